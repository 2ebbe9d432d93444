//! The losses of PPO's value model.
//!
//! With v the value of a token, v_old the value it had when the tokens were drawn and R its return:
//!
//! ```text
//! plain     L_t = ½·(v - R)²
//! clipped   L_t = ½·max( (v - R)², (clip(v, v_old - c, v_old + c) - R)² )
//! ```
//!
//! Clipped: OpenAI's baselines; for language models Ziegler et al. 2019, arXiv:1909.08593, code. The maximum never lowers the
//! loss: it takes the gradient from a value that has moved more than `c` towards its return.
//!
//! Reference: TRL's former `PPOTrainer.train` (`vf_losses1`, `vf_losses2`), transcribed in torch; value, gradient and clip
//! count agree to 1e-12 in f64 (golden vectors `value`).
//!
//! Differs: some trainers leave out the ½ and put it into the coefficient. Which tokens count is the caller's: METHOD keeps the
//! whole response mask here, whatever the policy's loss drops.

use burn::tensor::Tensor;
use pivotal_core::TokenMask;

use crate::LossError;
use crate::error::{expect_len, expect_positive, expect_tensor_len};
use crate::kept_sums::zero_where_dropped;
use crate::ppo::ones_where;

/// What [`value_loss`] computes for each token. Each `[tokens]`; nothing is reduced here.
#[derive(Clone, Debug)]
pub struct ValueTerms {
    /// Loss in squared reward, 0 where dropped: the only field that carries a gradient.
    pub loss: Tensor<1>,
    /// `v - R`, 0 where dropped.
    pub error: Tensor<1>,
}

/// What [`clipped_value_loss`] computes for each token. Each `[tokens]`; nothing is reduced here.
#[derive(Clone, Debug)]
pub struct ClippedValueTerms {
    /// Loss in squared reward, 0 where dropped: the only field that carries a gradient.
    pub loss: Tensor<1>,
    /// `v - R`, 0 where dropped.
    pub error: Tensor<1>,
    /// 1 where the clipped value's loss is the larger, so that the token has no gradient; else 0.
    pub clipped: Tensor<1>,
}

/// Half the squared error of each token's value.
///
/// # Shapes
/// `values` and `returns` `[tokens]`, `keep` one flag a token; each field of the result `[tokens]`.
///
/// # Errors
/// [`LossError::Length`] if the three are not of one length.
pub fn value_loss(
    values: Tensor<1>,
    returns: Tensor<1>,
    keep: &TokenMask,
) -> Result<ValueTerms, LossError> {
    let error = kept_error(values, returns, keep)?;
    Ok(ValueTerms {
        loss: half_square(error.clone()),
        error: error.detach(),
    })
}

/// Half the larger of two squared errors: of the value, and of the value held within `clip` of the old one.
///
/// # Shapes
/// `values`, `old_values` and `returns` `[tokens]`, `keep` one flag a token; each field of the result `[tokens]`.
///
/// # Errors
/// [`LossError::Length`] if the four are not of one length; [`LossError::Domain`] if `clip` is not finite and positive.
///
/// # Examples
/// ```
/// use burn::tensor::{Device, Tensor};
/// use pivotal_core::TokenMask;
/// let one = |value: f32| Tensor::<1>::from_floats([value], &Device::flex());
/// let keep = TokenMask::all(1);
/// let terms = pivotal_loss::clipped_value_loss(one(3.0), one(0.0), one(4.0), &keep, 1.0).unwrap();
/// assert_eq!(terms.loss.into_scalar::<f32>(), 4.5);
/// assert_eq!(terms.clipped.into_scalar::<f32>(), 1.0);
/// ```
pub fn clipped_value_loss(
    values: Tensor<1>,
    old_values: Tensor<1>,
    returns: Tensor<1>,
    keep: &TokenMask,
    clip: f64,
) -> Result<ClippedValueTerms, LossError> {
    expect_positive("clip", clip)?;
    expect_tensor_len("old_values", &old_values, values.dims()[0])?;
    let at = values.clone().detach();
    let error = kept_error(values, returns.clone(), keep)?;
    let moved = zero_where_dropped(at - old_values.clone().detach(), keep);
    let held = old_values.detach() + moved.clone().clamp(-clip, clip);
    let held_loss = half_square(zero_where_dropped(held - returns.detach(), keep));

    let loss = half_square(error.clone());
    let larger = held_loss.clone().greater(loss.clone().detach());
    let clipped = larger.bool_and(moved.abs().greater_elem(clip));
    Ok(ClippedValueTerms {
        loss: loss.mask_where(clipped.clone(), held_loss),
        clipped: ones_where(&error.clone().detach(), clipped),
        error: error.detach(),
    })
}

fn kept_error(
    values: Tensor<1>,
    returns: Tensor<1>,
    keep: &TokenMask,
) -> Result<Tensor<1>, LossError> {
    let tokens = values.dims()[0];
    expect_tensor_len("returns", &returns, tokens)?;
    expect_len("keep", keep.len(), tokens)?;
    Ok(zero_where_dropped(values - returns.detach(), keep))
}

fn half_square(error: Tensor<1>) -> Tensor<1> {
    error.square().mul_scalar(0.5)
}
