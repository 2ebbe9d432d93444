//! What can be wrong with a study.

use pivotal_core::{ErrorKind, HasKind, RecordError, Side};

/// A study that cannot be read, contradicts itself, or cannot be shown.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Not the JSON of a study.
    #[error("not a study: {source}")]
    Json {
        /// What the parser said, with line and column.
        #[from]
        source: serde_json::Error,
    },
    /// A list that needs an entry has none.
    #[error("`{list}` is empty, expected at least one entry")]
    Empty {
        /// Name of the list.
        list: &'static str,
    },
    /// Two entries of a list have one key.
    #[error("`{list}` has `{key}` twice, expected each key once")]
    Duplicate {
        /// Name of the list.
        list: &'static str,
        /// The key met twice.
        key: String,
    },
    /// A reference to an entry that is not there.
    #[error("{place} names `{key}`, expected one of `{list}`: {known}")]
    Unknown {
        /// Where the reference stands.
        place: String,
        /// The list that should hold it.
        list: &'static str,
        /// The key met.
        key: String,
        /// The keys the list holds.
        known: String,
    },
    /// A comparison of an arm with itself.
    #[error("a comparison on `{metric}` sets `{arm}` against itself, expected two arms")]
    SelfComparison {
        /// The arm.
        arm: String,
        /// The metric.
        metric: String,
    },
    /// A value that is not a finite number.
    #[error("`{metric}` of `{row}` is {value} at seed {seed}, expected a finite number")]
    NotFinite {
        /// The arm or the signal.
        row: String,
        /// The metric.
        metric: String,
        /// The seed.
        seed: u64,
        /// What stands there.
        value: f64,
    },
    /// An example's record contradicts itself.
    #[error("example {pair}, signal `{signal}`, {side:?} response: {source}")]
    Record {
        /// Which example, counted from 1.
        pair: usize,
        /// Label of the signal.
        signal: String,
        /// Which response.
        side: Side,
        /// What the record's own check said.
        source: RecordError,
    },
    /// An example's record says it is the other side.
    #[error(
        "example {pair}, signal `{signal}`: the record given as {expected:?} says it is {found:?}"
    )]
    SwappedSide {
        /// Which example, counted from 1.
        pair: usize,
        /// Label of the signal.
        signal: String,
        /// The side it was given as.
        expected: Side,
        /// The side it says.
        found: Side,
    },
    /// The page's template failed: our own fault.
    #[error("the report's template failed: {source:#}")]
    Template {
        /// What the template engine said.
        #[from]
        source: minijinja::Error,
    },
}

impl HasKind for Error {
    fn kind(&self) -> ErrorKind {
        match self {
            Self::NotFinite { .. }
            | Self::Record {
                source: RecordError::NotFinite { .. },
                ..
            } => ErrorKind::NotFinite,
            Self::Template { .. } => ErrorKind::System,
            _ => ErrorKind::Input,
        }
    }
}
