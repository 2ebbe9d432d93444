//! From one number a token to the loss of an optimizer step. Frameworks differ here more than in any formula.
//!
//! ```text
//! token_mean            Σ M·v / ΣM                      every kept token weighs the same
//! response_mean         Σ_i (Σ M·v / ΣM)_i / responses  every response weighs the same
//! constant_length_mean  Σ M·v / (responses · length)    every kept token the same, whatever the others' lengths
//! ```
//!
//! Token mean: DAPO (arXiv:2503.14476). Response mean: GRPO as published (arXiv:2402.03300). Constant length: Dr. GRPO
//! (Liu et al. 2025, arXiv:2503.20783), which takes the longest response allowed for the length.
//!
//! Denominators count the whole optimizer step. Each function returns this batch's share of the step's loss; the shares of all
//! micro-batches add up to it, however the step is cut into them, as long as no response is cut in two. A batch of which nothing
//! is kept has the share 0 and no gradient; a step of which nothing is kept, with the denominator 0, too.
//!
//! Reference: TRL 1.16, `GRPOTrainer` with `loss_type` `bnpo`, `grpo` and `dr_grpo` on one batch; value and gradient agree to
//! 1e-12 in f64 (golden vectors `ppo`).
//!
//! Differs: TRL's `bnpo` and `grpo` divide by the tokens of each micro-batch and average the quotients; its `grpo` counts a
//! response of which nothing is kept, OpenRLHF's mean does not: here the caller passes the count that it means.

use burn::tensor::Tensor;
use pivotal_core::TokenMask;

use crate::error::{expect_len, expect_positive, expect_tensor_len};
use crate::kept_sums::zero_where_dropped;
use crate::{LossError, Normalisation, ResponseIndex, kept_sums};

/// The sum over kept tokens, divided by `step_tokens`: the tokens kept in the whole optimizer step.
///
/// # Shapes
/// `values` `[tokens]`, `keep` one flag a token; returns `[1]`.
///
/// # Errors
/// [`LossError::Length`] if the two lengths differ; [`LossError::StepCount`] if `step_tokens` is less than what is kept here.
///
/// # Examples
/// ```
/// use burn::tensor::{Device, Tensor};
/// use pivotal_core::TokenMask;
/// let values = Tensor::<1>::from_floats([1.0, 5.0, 2.0], &Device::flex());
/// let keep = TokenMask::from(vec![true, false, true]);
/// let share = pivotal_loss::token_mean(values, &keep, 4).unwrap();
/// assert_eq!(share.into_scalar::<f32>(), 0.75);
/// ```
pub fn token_mean(
    values: Tensor<1>,
    keep: &TokenMask,
    step_tokens: usize,
) -> Result<Tensor<1>, LossError> {
    expect_len("keep", keep.len(), values.dims()[0])?;
    expect_step("step_tokens", step_tokens, keep.kept())?;
    Ok(kept_total(values, keep).mul_scalar(per(step_tokens as f64)))
}

/// The mean over kept tokens of each response, summed and divided by `step_responses`.
///
/// `step_responses` counts responses of the whole optimizer step: all of them, or only those of which something is kept
/// ([`responses_kept`]).
///
/// # Shapes
/// `values` `[tokens]`, `keep` one flag a token; returns `[1]`.
///
/// # Errors
/// [`LossError::Length`] if `values`, `index` and `keep` are not of one length; [`LossError::StepCount`] if `step_responses`
/// is less than the responses here of which something is kept.
///
/// # Examples
/// ```
/// use burn::tensor::{Device, Tensor};
/// use pivotal_core::TokenMask;
/// use pivotal_loss::{ResponseIndex, response_mean};
/// let values = Tensor::<1>::from_floats([1.0, 3.0, 6.0], &Device::flex());
/// let index = ResponseIndex::of_whole_responses(&[2, 1]);
/// let share = response_mean(values, &index, &TokenMask::all(3), 2).unwrap();
/// assert_eq!(share.into_scalar::<f32>(), 4.0);
/// ```
pub fn response_mean(
    values: Tensor<1>,
    index: &ResponseIndex,
    keep: &TokenMask,
    step_responses: usize,
) -> Result<Tensor<1>, LossError> {
    expect_tensor_len("values", &values, index.entries())?;
    let here = responses_kept(index, keep)?;
    expect_step("step_responses", step_responses, here)?;
    let means = kept_sums(values, index, keep, Normalisation::KeptMean)?;
    Ok(total(means).mul_scalar(per(step_responses as f64)))
}

/// The sum over kept tokens, divided by `step_responses` times a constant length.
///
/// `step_responses` counts the responses of the whole optimizer step, `length` is the same in every step: the most tokens that
/// a response may have.
///
/// # Shapes
/// `values` `[tokens]`, `keep` one flag a token; returns `[1]`.
///
/// # Errors
/// [`LossError::Length`] if `values`, `index` and `keep` are not of one length; [`LossError::StepCount`] if `step_responses`
/// is less than the responses here; [`LossError::Domain`] if `length` is 0.
pub fn constant_length_mean(
    values: Tensor<1>,
    index: &ResponseIndex,
    keep: &TokenMask,
    step_responses: usize,
    length: usize,
) -> Result<Tensor<1>, LossError> {
    expect_tensor_len("values", &values, index.entries())?;
    expect_len("keep", keep.len(), index.entries())?;
    expect_step("step_responses", step_responses, index.responses())?;
    expect_positive("length", length as f64)?;
    let denominator = step_responses as f64 * length as f64;
    Ok(kept_total(values, keep).mul_scalar(per(denominator)))
}

/// How many responses have a kept token among their entries.
///
/// # Errors
/// [`LossError::Length`] if `keep` has another length than `index`.
pub fn responses_kept(index: &ResponseIndex, keep: &TokenMask) -> Result<usize, LossError> {
    expect_len("keep", keep.len(), index.entries())?;
    let kept = index.count(keep.as_slice().iter().copied());
    Ok(kept.into_iter().filter(|&kept| kept > 0).count())
}

fn kept_total(values: Tensor<1>, keep: &TokenMask) -> Tensor<1> {
    total(zero_where_dropped(values, keep))
}

fn total(values: Tensor<1>) -> Tensor<1> {
    match values.dims()[0] {
        0 => Tensor::zeros([1], (&values.device(), values.dtype())),
        _ => values.sum(),
    }
}

/// The reciprocal; 0 of 0, for a step of which nothing is kept has no loss.
fn per(denominator: f64) -> f64 {
    match denominator > 0.0 {
        true => denominator.recip(),
        false => 0.0,
    }
}

fn expect_step(name: &'static str, found: usize, here: usize) -> Result<(), LossError> {
    match found >= here {
        true => Ok(()),
        false => Err(LossError::StepCount { name, here, found }),
    }
}
