//! What a loss refuses.

use burn::tensor::Tensor;
use pivotal_core::{ErrorKind, HasKind};

/// An input that a loss is not defined for.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum LossError {
    /// Two inputs that must be of one length are not.
    #[error("`{name}` has {found} entries, expected {expected}")]
    Length {
        /// Which input.
        name: &'static str,
        /// The length asked for.
        expected: usize,
        /// The length met.
        found: usize,
    },
    /// A setting outside the range where the loss is defined.
    #[error("`{name}` is {found}, expected {expected}")]
    Domain {
        /// Which setting.
        name: &'static str,
        /// The range, in words.
        expected: &'static str,
        /// The value met.
        found: f64,
    },
    /// An input of which at least one entry is needed.
    #[error("`{name}` is empty, expected at least one entry")]
    Empty {
        /// Which input.
        name: &'static str,
    },
    /// A denominator of an optimizer step that is smaller than what one batch of the step holds.
    #[error(
        "`{name}` is {found}, expected at least the {here} of this batch: it counts the whole optimizer step"
    )]
    StepCount {
        /// Which denominator.
        name: &'static str,
        /// What this batch alone holds.
        here: usize,
        /// The denominator given.
        found: usize,
    },
    /// A token that belongs to no response of the batch.
    #[error("token {token} belongs to response {found}, expected one of {responses}")]
    NoSuchResponse {
        /// Which entry of the index.
        token: usize,
        /// The response it names.
        found: usize,
        /// Responses in the batch.
        responses: usize,
    },
    /// A response without a token where one is needed.
    #[error("response {response} has no token, so it has no score")]
    NoToken {
        /// Which response.
        response: usize,
    },
}

impl HasKind for LossError {
    fn kind(&self) -> ErrorKind {
        ErrorKind::Input
    }
}

pub(crate) fn expect_len(
    name: &'static str,
    found: usize,
    expected: usize,
) -> Result<(), LossError> {
    match found == expected {
        true => Ok(()),
        false => Err(LossError::Length {
            name,
            expected,
            found,
        }),
    }
}

pub(crate) fn expect_tensor_len(
    name: &'static str,
    tensor: &Tensor<1>,
    expected: usize,
) -> Result<(), LossError> {
    expect_len(name, tensor.dims()[0], expected)
}

pub(crate) fn expect_positive(name: &'static str, value: f64) -> Result<(), LossError> {
    match value.is_finite() && value > 0.0 {
        true => Ok(()),
        false => Err(LossError::Domain {
            name,
            expected: "a finite number above 0",
            found: value,
        }),
    }
}

pub(crate) fn expect_weight(name: &'static str, value: f64) -> Result<(), LossError> {
    match value.is_finite() && value >= 0.0 {
        true => Ok(()),
        false => Err(LossError::Domain {
            name,
            expected: "a finite number, at least 0",
            found: value,
        }),
    }
}
