//! A reward model trained on token labels, for data with ground truth.
//!
//! Binary cross-entropy with logits, `z` 1 for a right token and 0 for a wrong one:
//!
//! ```text
//! L_t = -[ z·log σ(v_t) + (1 - z)·log σ(-v_t) ]
//! ```
//!
//! Reference: `torch.nn.functional.binary_cross_entropy_with_logits`, the same formula in the form log(1 + e^v) - z·v.

use burn::tensor::{Bool, Tensor, TensorData};
use pivotal_core::TokenMask;

use crate::error::expect_len;
use crate::kept_sums::zero_where_dropped;
use crate::{LossError, log_sigmoid};

/// What [`token_supervised`] computes for each token. `[tokens]`; nothing is reduced here.
#[derive(Clone, Debug)]
pub struct TokenSupervisedTerms {
    /// Loss in nats, 0 for a token without a label. Carries the gradient.
    pub loss: Tensor<1>,
}

/// The loss of each labelled token.
///
/// `right` is the label: true, the token is right and its value should be positive. `labelled` says which tokens have one;
/// the others have neither loss nor gradient.
///
/// # Shapes
/// `token_values` `[tokens]` (logits), `right` and `labelled` one flag a token; the result `[tokens]`.
///
/// # Errors
/// [`LossError::Length`] if the three are not of one length.
///
/// # Examples
/// ```
/// use burn::tensor::{Device, Tensor};
/// use pivotal_core::TokenMask;
/// let values = Tensor::<1>::from_floats([0.0, -200.0], &Device::flex());
/// let right = TokenMask::from(vec![true, false]);
/// let terms = pivotal_loss::token_supervised(values, &right, &TokenMask::all(2)).unwrap();
/// assert_eq!(terms.loss.try_into_vec_as::<f32>().unwrap(), [2f32.ln(), 0.0]);
/// ```
pub fn token_supervised(
    token_values: Tensor<1>,
    right: &TokenMask,
    labelled: &TokenMask,
) -> Result<TokenSupervisedTerms, LossError> {
    let tokens = token_values.dims()[0];
    expect_len("right", right.len(), tokens)?;
    expect_len("labelled", labelled.len(), tokens)?;
    let wrong = TensorData::new(right.inverted().as_slice().to_vec(), [tokens]);
    let wrong = Tensor::<1, Bool>::from_data(wrong, &token_values.device());
    let towards_label = token_values.clone().mask_where(wrong, token_values.neg());
    let loss = log_sigmoid(towards_label).neg();
    Ok(TokenSupervisedTerms {
        loss: zero_where_dropped(loss, labelled),
    })
}
