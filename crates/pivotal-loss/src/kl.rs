//! The KL divergence from sampled tokens: three estimates, and the losses that have its gradient or do not.
//!
//! Schulman 2020, "Approximating KL divergence". For a token drawn from p, with Δ = log p - log q:
//!
//! ```text
//! k1 = Δ        k2 = Δ²/2        k3 = e^(-Δ) - 1 + Δ
//! ```
//!
//! In expectation k1 and k3 are KL(p‖q), k2 nearly so where the two are close. As losses with p the policy they are three
//! other things, for the tokens stay as they were drawn. In expectation over the policy:
//!
//! ```text
//! ∇k1 = Δ's own gradient  ->  0                         (no loss at all, so not offered)
//! ∇k2 = Δ·∇log π          ->  ∇KL(π‖π_ref)              the gradient wanted
//! ∇k3 = (1 - e^(-Δ))·∇log π -> ∇KL(π_ref‖π)             that of the other direction
//! ```
//!
//! [`kl_straight_through`] has the value of k3 and the gradient of k2 (verl's `k3+`).
//!
//! Reference: the formulas in torch for all three; k3 as a loss also TRL 1.16, `GRPOTrainer` with `beta`. Value and gradient
//! agree to 1e-12 in f64 (golden vectors `kl` and `ppo`).
//!
//! Differs: TRL's GRPO takes k3 for its loss; OpenRLHF and verl choose by flag. Here each is a function of its own.

use burn::tensor::Tensor;
use pivotal_core::TokenMask;

use crate::error::{expect_len, expect_tensor_len};
use crate::kept_sums::zero_where_dropped;
use crate::{LossError, exp_remainder};

/// Estimates of KL(p‖q) at tokens that p drew. Each `[tokens]`, in nats, 0 where dropped; none has a gradient.
#[derive(Clone, Debug)]
pub struct KlEstimates {
    /// `Δ`: unbiased, can be negative.
    pub k1: Tensor<1>,
    /// `Δ²/2`: biased, at least 0.
    pub k2: Tensor<1>,
    /// `e^(-Δ) - 1 + Δ`: unbiased, at least 0.
    pub k3: Tensor<1>,
}

/// What the KL losses compute for each token. Each `[tokens]`; nothing is reduced here.
#[derive(Clone, Debug)]
pub struct KlTerms {
    /// Loss in nats, 0 where dropped: the only field that carries a gradient.
    pub loss: Tensor<1>,
    /// All three estimates of KL(π‖π_ref), to be logged.
    pub estimates: KlEstimates,
}

/// The estimates of KL(p‖q) at each token, `token_logps` under p, which drew the tokens, `other_token_logps` under q.
///
/// # Shapes
/// Both log-probabilities `[tokens]` in nats, `keep` one flag a token; each field of the result `[tokens]`.
///
/// # Errors
/// [`LossError::Length`] if the three are not of one length.
///
/// # Examples
/// ```
/// use burn::tensor::{Device, Tensor};
/// use pivotal_core::TokenMask;
/// let logps = |value: f32| Tensor::<1>::from_floats([value], &Device::flex());
/// let kl = pivotal_loss::kl_estimates(logps(-1.0), logps(-3.0), &TokenMask::all(1)).unwrap();
/// assert_eq!(kl.k1.into_scalar::<f32>(), 2.0);
/// assert_eq!(kl.k2.into_scalar::<f32>(), 2.0);
/// assert!((kl.k3.into_scalar::<f32>() - (1.0 + (-2f32).exp())).abs() < 1e-6);
/// ```
pub fn kl_estimates(
    token_logps: Tensor<1>,
    other_token_logps: Tensor<1>,
    keep: &TokenMask,
) -> Result<KlEstimates, LossError> {
    let delta = kept_log_ratio(token_logps, other_token_logps, keep)?;
    Ok(estimates_of(delta.detach()))
}

/// k2 as a loss: its expected gradient is that of KL(π‖π_ref).
///
/// # Shapes
/// Both log-probabilities `[tokens]` in nats, `keep` one flag a token; each field of the result `[tokens]`.
///
/// # Errors
/// [`LossError::Length`] if the three are not of one length.
pub fn kl_k2(
    token_logps: Tensor<1>,
    reference_token_logps: Tensor<1>,
    keep: &TokenMask,
) -> Result<KlTerms, LossError> {
    let delta = kept_log_ratio(token_logps, reference_token_logps, keep)?;
    Ok(KlTerms {
        loss: k2(delta.clone()),
        estimates: estimates_of(delta.detach()),
    })
}

/// k3 as a loss, as in the GRPO paper (Shao et al. 2024, arXiv:2402.03300, Eq. 4): its expected gradient is that of
/// KL(π_ref‖π), the other direction.
///
/// # Shapes
/// Both log-probabilities `[tokens]` in nats, `keep` one flag a token; each field of the result `[tokens]`.
///
/// # Errors
/// [`LossError::Length`] if the three are not of one length.
pub fn kl_k3(
    token_logps: Tensor<1>,
    reference_token_logps: Tensor<1>,
    keep: &TokenMask,
) -> Result<KlTerms, LossError> {
    let delta = kept_log_ratio(token_logps, reference_token_logps, keep)?;
    Ok(KlTerms {
        loss: exp_remainder(delta.clone().neg()),
        estimates: estimates_of(delta.detach()),
    })
}

/// The value of k3 with the gradient of k2: an unbiased value and the gradient of KL(π‖π_ref).
///
/// # Shapes
/// Both log-probabilities `[tokens]` in nats, `keep` one flag a token; each field of the result `[tokens]`.
///
/// # Errors
/// [`LossError::Length`] if the three are not of one length.
pub fn kl_straight_through(
    token_logps: Tensor<1>,
    reference_token_logps: Tensor<1>,
    keep: &TokenMask,
) -> Result<KlTerms, LossError> {
    let delta = kept_log_ratio(token_logps, reference_token_logps, keep)?;
    let estimates = estimates_of(delta.clone().detach());
    let slope = k2(delta);
    // `slope - slope` is exactly 0, so the value is untouched.
    Ok(KlTerms {
        loss: estimates.k3.clone() + (slope.clone() - slope.detach()),
        estimates,
    })
}

/// `log p - log q`, 0 and without gradient where dropped; q never has a gradient.
pub(crate) fn kept_log_ratio(
    token_logps: Tensor<1>,
    other_token_logps: Tensor<1>,
    keep: &TokenMask,
) -> Result<Tensor<1>, LossError> {
    let tokens = token_logps.dims()[0];
    expect_tensor_len("other_token_logps", &other_token_logps, tokens)?;
    expect_len("keep", keep.len(), tokens)?;
    let delta = token_logps - other_token_logps.detach();
    Ok(zero_where_dropped(delta, keep))
}

/// The three estimates of a detached Δ.
pub(crate) fn estimates_of(delta: Tensor<1>) -> KlEstimates {
    KlEstimates {
        k2: k2(delta.clone()),
        k3: exp_remainder(delta.clone().neg()),
        k1: delta,
    }
}

fn k2(delta: Tensor<1>) -> Tensor<1> {
    delta.square().mul_scalar(0.5)
}
