//! Direct Preference Optimization with token credit.
//!
//! Rafailov et al. 2023, arXiv:2305.18290, Eq. 7, with the sums over kept tokens only (METHOD, section 8):
//!
//! ```text
//! L = -log σ( β·[ Σ_w M·(log π - log π_ref) - Σ_l M·(log π - log π_ref) ] )
//! ```
//!
//! Reference: TRL 1.16, `DPOTrainer` with `loss_type="sigmoid"`, keep given as its completion mask; value and gradient
//! agree to 1e-12 in f64 (golden vectors `dpo` and `masked_dpo`).
//!
//! Differs: TRL subtracts chosen from rejected first and the reference after; here each side's own reward is formed first,
//! which is the same number but for the last bit. TRL reports rewards of whole responses, here of the kept tokens.

use burn::tensor::Tensor;

use crate::error::{expect_positive, expect_tensor_len};
use crate::{LossError, log_sigmoid};

/// Log-probabilities of both responses of each pair, in nats; see [`kept_sums`](crate::kept_sums). Each `[pairs]`.
#[derive(Clone, Debug)]
pub struct PairLogps {
    /// Of the chosen responses.
    pub chosen: Tensor<1>,
    /// Of the rejected responses.
    pub rejected: Tensor<1>,
}

/// What [`dpo`] computes for each pair. Each `[pairs]`; nothing is reduced here.
#[derive(Clone, Debug)]
pub struct DpoTerms {
    /// Loss in nats: the only field that carries a gradient.
    pub loss: Tensor<1>,
    /// `β·log(π/π_ref)` of the chosen response's kept tokens: its implicit reward, in nats.
    pub chosen_reward: Tensor<1>,
    /// The same of the rejected response.
    pub rejected_reward: Tensor<1>,
}

/// The DPO loss of each pair (Eq. 7).
///
/// The same tokens must have been kept for policy and reference. `beta` is the strength of the KL anchor: dimensionless,
/// above 0, usually 0.1. The reference gets no gradient.
///
/// # Shapes
/// All four inputs and each field of the result `[pairs]`.
///
/// # Errors
/// [`LossError::Domain`] if `beta` is not finite and positive; [`LossError::Length`] if the four lengths are not one.
///
/// # Examples
/// ```
/// use burn::tensor::{Device, Tensor};
/// use pivotal_loss::{PairLogps, dpo};
/// let side = |value: f32| Tensor::<1>::from_floats([value], &Device::flex());
/// let policy = PairLogps { chosen: side(-3.0), rejected: side(-5.0) };
/// let terms = dpo(policy.clone(), policy, 0.1).unwrap();
/// assert_eq!(terms.loss.into_scalar::<f32>(), 2f32.ln());
/// ```
pub fn dpo(policy: PairLogps, reference: PairLogps, beta: f64) -> Result<DpoTerms, LossError> {
    let rewards = implicit_rewards(policy, reference, beta)?;
    let loss = log_sigmoid(rewards.margin()).neg();
    Ok(rewards.into_terms(loss))
}

/// The implicit rewards of both sides, with their gradient: what every loss of this family is a function of.
pub(crate) struct ImplicitRewards {
    chosen: Tensor<1>,
    rejected: Tensor<1>,
}

impl ImplicitRewards {
    pub(crate) fn margin(&self) -> Tensor<1> {
        self.chosen.clone() - self.rejected.clone()
    }

    pub(crate) fn into_terms(self, loss: Tensor<1>) -> DpoTerms {
        DpoTerms {
            loss,
            chosen_reward: self.chosen.detach(),
            rejected_reward: self.rejected.detach(),
        }
    }
}

pub(crate) fn implicit_rewards(
    policy: PairLogps,
    reference: PairLogps,
    beta: f64,
) -> Result<ImplicitRewards, LossError> {
    expect_positive("beta", beta)?;
    let pairs = policy.chosen.dims()[0];
    expect_tensor_len("policy.rejected", &policy.rejected, pairs)?;
    expect_tensor_len("reference.chosen", &reference.chosen, pairs)?;
    expect_tensor_len("reference.rejected", &reference.rejected, pairs)?;
    Ok(ImplicitRewards {
        chosen: (policy.chosen - reference.chosen.detach()).mul_scalar(beta),
        rejected: (policy.rejected - reference.rejected.detach()).mul_scalar(beta),
    })
}
