//! What can be wrong with what the world is asked for.

use pivotal_core::{ErrorKind, HasKind};

/// A setting or a text that this world does not have.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum WorldError {
    /// A character that is no token.
    #[error(
        "`{found}` at character {position} is no token of the world, expected one of `{}`",
        super::vocabulary::CHARACTERS
    )]
    Character {
        /// The character met.
        found: char,
        /// Where, counted from 0.
        position: usize,
    },
    /// A token id above the vocabulary.
    #[error(
        "token id {found} at position {position} is out of the vocabulary, expected less than {expected}"
    )]
    TokenId {
        /// The id met.
        found: u32,
        /// Where, counted from 0.
        position: usize,
        /// The size of the vocabulary.
        expected: usize,
    },
    /// A setting out of its range.
    #[error("`{name}` is {found}, expected {least} to {most}")]
    Range {
        /// The setting.
        name: &'static str,
        /// The value met.
        found: u64,
        /// The least value allowed.
        least: u64,
        /// The greatest value allowed.
        most: u64,
    },
    /// A problem whose right values leave 0 to 99.
    #[error("step {step} of the problem gives {found}, expected 0 to 99")]
    Overflow {
        /// The step, counted from 0.
        step: usize,
        /// Its right result.
        found: i32,
    },
    /// A claim that is right: it would not be one that the right response ignores.
    #[error("the claim {found} is the right result of the first step, expected a wrong one")]
    RightClaim {
        /// The claimed result.
        found: u8,
    },
    /// Pairs that the settings make impossible or too rare to find.
    #[error(
        "{found} draws in a row gave no pair: with these `rates` the two responses hardly ever differ in mistakes, expected higher rates or `both_wrong` off"
    )]
    NoPair {
        /// Draws tried.
        found: u64,
    },
}

impl HasKind for WorldError {
    fn kind(&self) -> ErrorKind {
        ErrorKind::Input
    }
}

/// `value` if it lies in `least..=most`.
pub(crate) fn in_range(
    name: &'static str,
    value: u64,
    least: u64,
    most: u64,
) -> Result<(), WorldError> {
    if (least..=most).contains(&value) {
        Ok(())
    } else {
        Err(WorldError::Range {
            name,
            found: value,
            least,
            most,
        })
    }
}
