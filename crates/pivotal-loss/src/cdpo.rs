//! DPO for noisy labels: conservative and robust, with token credit.
//!
//! With m = β·[ Σ_w M·ℓ - Σ_l M·ℓ ] and ε the chance that a label is flipped:
//!
//! ```text
//! conservative  L = -(1 - ε)·log σ(m) - ε·log σ(-m)
//! robust        L = [ -(1 - ε)·log σ(m) + ε·log σ(-m) ] / (1 - 2ε)
//! ```
//!
//! Conservative: Mitchell 2023, "A note on DPO with noisy preferences". Robust: Chowdhury et al. 2024, arXiv:2403.00409, the
//! unbiased estimate of the clean loss.
//!
//! Reference: TRL 1.16, `CPOTrainer` with `label_smoothing` on log-ratios, and `DPOTrainer` with `loss_type="robust"`; value
//! and gradient agree to 1e-12 in f64 (golden vectors `dpo_variants`).

use crate::dpo::implicit_rewards;
use crate::{DpoTerms, LossError, PairLogps, log_sigmoid};

/// The conservative DPO loss of each pair; with `label_smoothing` 0 it is [`dpo`](crate::dpo).
///
/// `label_smoothing` is ε: at least 0, below ½.
///
/// # Shapes
/// All four inputs and each field of the result `[pairs]`.
///
/// # Errors
/// [`LossError::Domain`] for `beta` or `label_smoothing` outside its range; [`LossError::Length`] for unequal lengths.
pub fn cdpo(
    policy: PairLogps,
    reference: PairLogps,
    beta: f64,
    label_smoothing: f64,
) -> Result<DpoTerms, LossError> {
    expect_smoothing(label_smoothing)?;
    let rewards = implicit_rewards(policy, reference, beta)?;
    let right = log_sigmoid(rewards.margin()).mul_scalar(1.0 - label_smoothing);
    let flipped = log_sigmoid(rewards.margin().neg()).mul_scalar(label_smoothing);
    Ok(rewards.into_terms((right + flipped).neg()))
}

/// The robust DPO loss of each pair; with `label_smoothing` 0 it is [`dpo`](crate::dpo). It can be negative.
///
/// # Shapes
/// All four inputs and each field of the result `[pairs]`.
///
/// # Errors
/// [`LossError::Domain`] for `beta` or `label_smoothing` outside its range; [`LossError::Length`] for unequal lengths.
pub fn robust_dpo(
    policy: PairLogps,
    reference: PairLogps,
    beta: f64,
    label_smoothing: f64,
) -> Result<DpoTerms, LossError> {
    expect_smoothing(label_smoothing)?;
    let rewards = implicit_rewards(policy, reference, beta)?;
    let unbiased = (1.0 - 2.0 * label_smoothing).recip();
    let right = log_sigmoid(rewards.margin()).mul_scalar((1.0 - label_smoothing) * unbiased);
    let flipped = log_sigmoid(rewards.margin().neg()).mul_scalar(label_smoothing * unbiased);
    Ok(rewards.into_terms(flipped - right))
}

fn expect_smoothing(label_smoothing: f64) -> Result<(), LossError> {
    match (0.0..0.5).contains(&label_smoothing) {
        true => Ok(()),
        false => Err(LossError::Domain {
            name: "label_smoothing",
            expected: "at least 0 and below 0.5",
            found: label_smoothing,
        }),
    }
}
