//! Supervised fine-tuning on kept tokens; also the loss of rejection sampling (METHOD, section 8).
//!
//! ```text
//! L = -Σ M·log π / ΣM
//! ```
//!
//! Reference: `torch.nn.functional.cross_entropy` with `ignore_index`; value and gradient agree to 1e-12 in f64 (golden
//! vectors `sft`).
//!
//! Differs: many trainers divide by the tokens of each micro-batch and average the quotients, which weighs a token by the
//! length of its neighbours. Here the denominator is the caller's, and is meant to count a whole optimizer step.

use burn::tensor::Tensor;
use pivotal_core::TokenMask;

use crate::LossError;
use crate::error::{expect_len, expect_positive};
use crate::kept_sums::zero_where_dropped;

/// What [`sft`] computes for each token. Each `[tokens]`; nothing is reduced here.
#[derive(Clone, Debug)]
pub struct SftTerms {
    /// The token's share of the step's loss, `-M·log π / denominator`: sum it over the step. Carries the gradient.
    pub loss: Tensor<1>,
    /// `-M·log π` in nats, 0 for a token that is not kept.
    pub negative_logps: Tensor<1>,
}

/// The loss of each token, to be summed over the optimizer step.
///
/// `denominator` is ΣM over the whole step: kept tokens of all its micro-batches. A step in which nothing is kept has no
/// loss; the caller must skip it, for there is no denominator.
///
/// # Shapes
/// `token_logps` `[tokens]` in nats, `keep` one flag a token; each field of the result `[tokens]`.
///
/// # Errors
/// [`LossError::Length`] if `keep` has another length; [`LossError::Domain`] if `denominator` is not finite and positive.
///
/// # Examples
/// ```
/// use burn::tensor::{Device, Tensor};
/// use pivotal_core::TokenMask;
/// let token_logps = Tensor::<1>::from_floats([-1.0, -5.0, -2.0], &Device::flex());
/// let keep = TokenMask::from(vec![true, false, true]);
/// let terms = pivotal_loss::sft(token_logps, &keep, 2.0).unwrap();
/// assert_eq!(terms.loss.sum().into_scalar::<f32>(), 1.5);
/// ```
pub fn sft(
    token_logps: Tensor<1>,
    keep: &TokenMask,
    denominator: f64,
) -> Result<SftTerms, LossError> {
    expect_len("keep", keep.len(), token_logps.dims()[0])?;
    expect_positive("denominator", denominator)?;
    let negative_logps = zero_where_dropped(token_logps.neg(), keep);
    // Not `div_scalar`: Burn's gradient of that rounds the reciprocal to f32, also for an f64 tensor.
    Ok(SftTerms {
        loss: negative_logps.clone().mul_scalar(denominator.recip()),
        negative_logps: negative_logps.detach(),
    })
}
