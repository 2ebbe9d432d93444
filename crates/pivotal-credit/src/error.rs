//! What can be wrong with a credit configuration or a batch.

use pivotal_core::{ErrorKind, HasKind};

use crate::Signal;

/// The result of this crate's functions.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// A credit rule, or a batch, that has no meaning.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A signal that is infinite or not a number.
    #[error(
        "signal `{signal}` of response {id} is {value} at token {index}, expected a finite number"
    )]
    NotFinite {
        /// Which signal.
        signal: Signal,
        /// The response's id.
        id: u64,
        /// Which token of the response.
        index: usize,
        /// The value met.
        value: f32,
    },
    /// A column that is not one value a token.
    #[error("`{column}` of response {id} has {found} values, expected {expected}, one a token")]
    Length {
        /// Name of the column.
        column: &'static str,
        /// The response's id.
        id: u64,
        /// Tokens of the response.
        expected: usize,
        /// Values found.
        found: usize,
    },
    /// A column that the rule needs and the response lacks.
    #[error("response {id} has no `{column}`, which `{needed_by}` needs")]
    Missing {
        /// Name of the column.
        column: &'static str,
        /// The response's id.
        id: u64,
        /// The choice that needs it.
        needed_by: &'static str,
    },
    /// External cut offsets out of order or out of the response.
    #[error(
        "`cuts` of response {id}: offset {found} at index {index}, expected ascending offsets below {tokens} tokens"
    )]
    Offset {
        /// The response's id.
        id: u64,
        /// Which offset.
        index: usize,
        /// The offset met.
        found: usize,
        /// Tokens of the response.
        tokens: usize,
    },
    /// A configuration value outside its domain.
    #[error("`{key}` is {found}, expected {expected}")]
    Value {
        /// The configuration key.
        key: &'static str,
        /// The domain.
        expected: String,
        /// The value met.
        found: String,
    },
    /// Two keys that say the same thing in two ways.
    #[error("`{first}` and `{second}` are both set; set one of them")]
    Conflict {
        /// The first key.
        first: &'static str,
        /// The second key.
        second: &'static str,
    },
    /// A key that the chosen rule ignores.
    #[error("`{key}` has no effect with `{with}`; remove it or choose another rule")]
    Unused {
        /// The key.
        key: &'static str,
        /// The choice, as `key = name`.
        with: String,
    },
    /// A key that the chosen rule needs.
    #[error("`{with}` needs {needs}")]
    Needs {
        /// The choice, as `key = name`.
        with: &'static str,
        /// What it needs.
        needs: &'static str,
    },
    /// A key that does not exist.
    #[error("unknown key `{key}`, expected one of {expected}")]
    Key {
        /// The key met.
        key: String,
        /// The keys there are.
        expected: String,
    },
    /// Two lists that must be of one length.
    #[error("`{column}` has {found} values, expected {expected}")]
    Unequal {
        /// Name of the column.
        column: &'static str,
        /// The length asked for.
        expected: usize,
        /// The length met.
        found: usize,
    },
    /// A number that came out of a model and is not finite.
    #[error("`{column}` is {value} at index {index}, expected a finite number")]
    NotFiniteColumn {
        /// Name of the column.
        column: &'static str,
        /// Which value.
        index: usize,
        /// The value met.
        value: f64,
    },
    /// A column of a response that is infinite or not a number.
    #[error("`{column}` of response {id} is {value} at token {index}, expected a finite number")]
    NotFiniteToken {
        /// Name of the column.
        column: &'static str,
        /// The response's id.
        id: u64,
        /// Which token of the response.
        index: usize,
        /// The value met.
        value: f32,
    },
    /// A number that finite signals come to and that f32 does not hold.
    #[error(
        "`{column}` comes to {value} with signal `{signal}` of response {id}, expected a finite number: the signal is too large"
    )]
    Overflow {
        /// Name of the number.
        column: &'static str,
        /// Which signal.
        signal: Signal,
        /// The response's id.
        id: u64,
        /// The value met.
        value: f32,
    },
    /// A calibration split without tokens of both sides.
    #[error(
        "`baseline = calibrated` has {positive} tokens of positive and {negative} of negative responses in its calibration split, expected some of both; raise `baseline_calibration`"
    )]
    Calibration {
        /// Tokens of positive responses.
        positive: usize,
        /// Tokens of negative ones.
        negative: usize,
    },
    /// A segment's reward that no token can be paid.
    #[error("segment {segment} has a reward and no token of the model's own")]
    NoPlace {
        /// Which segment.
        segment: usize,
    },
    /// A saved state that belongs to another baseline.
    #[error(
        "the saved baseline state is of `{found}`, expected `{expected}`; resume with the same credit rule"
    )]
    State {
        /// The baseline configured.
        expected: String,
        /// The baseline saved.
        found: String,
    },
}

impl HasKind for Error {
    fn kind(&self) -> ErrorKind {
        match self {
            // A column of the data is the input's fault; a computed signal means a model diverged.
            Self::NotFinite { signal, .. } | Self::Overflow { signal, .. }
                if *signal != Signal::External =>
            {
                ErrorKind::NotFinite
            }
            Self::NotFiniteColumn { .. } | Self::NotFiniteToken { .. } => ErrorKind::NotFinite,
            _ => ErrorKind::Input,
        }
    }
}
