//! SimPO with token credit: no reference, rewards per kept token.
//!
//! Meng et al. 2024, arXiv:2405.14734, Eq. 6, with means over kept tokens only:
//!
//! ```text
//! L = -log σ( β·Σ_w M·log π / Σ_w M - β·Σ_l M·log π / Σ_l M - γ )
//! ```
//!
//! Reference: TRL 1.16, `CPOTrainer` with `loss_type="simpo"`; value and gradient agree to 1e-12 in f64 (golden vectors
//! `dpo_variants`).
//!
//! Differs: the paper's released code passes the ratio γ/β; here, as in TRL, `target_margin` is γ itself.

use crate::error::{expect_positive, expect_tensor_len, expect_weight};
use crate::{DpoTerms, LossError, PairLogps, log_sigmoid};

/// The SimPO loss of each pair. `policy` holds means over kept tokens ([`Normalisation::KeptMean`](crate::Normalisation)).
///
/// `beta` scales the rewards, above 0, usually 2; `target_margin` is γ, at least 0.
///
/// # Shapes
/// Both inputs and each field of the result `[pairs]`.
///
/// # Errors
/// [`LossError::Domain`] for `beta` or `target_margin` outside its range; [`LossError::Length`] for unequal lengths.
pub fn simpo(policy: PairLogps, beta: f64, target_margin: f64) -> Result<DpoTerms, LossError> {
    expect_positive("beta", beta)?;
    expect_weight("target_margin", target_margin)?;
    let pairs = policy.chosen.dims()[0];
    expect_tensor_len("policy.rejected", &policy.rejected, pairs)?;
    let chosen_reward = policy.chosen.mul_scalar(beta);
    let rejected_reward = policy.rejected.mul_scalar(beta);
    let margin = chosen_reward.clone() - rejected_reward.clone();
    Ok(DpoTerms {
        loss: log_sigmoid(margin.sub_scalar(target_margin)).neg(),
        chosen_reward: chosen_reward.detach(),
        rejected_reward: rejected_reward.detach(),
    })
}
