//! An error on its way to the person: a message, and whose fault it is.

use std::fmt;

use pivotal_core::{ErrorKind, HasKind};

/// What ends the program without success.
#[derive(Debug)]
pub(crate) struct Failure {
    pub(crate) kind: ErrorKind,
    message: String,
}

impl Failure {
    pub(crate) fn input(message: impl Into<String>) -> Self {
        Self {
            kind: ErrorKind::Input,
            message: message.into(),
        }
    }

    pub(crate) fn system(error: &impl fmt::Display) -> Self {
        Self {
            kind: ErrorKind::System,
            message: error.to_string(),
        }
    }
}

impl<E: HasKind> From<E> for Failure {
    fn from(error: E) -> Self {
        Self {
            kind: error.kind(),
            message: error.to_string(),
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.message)
    }
}
