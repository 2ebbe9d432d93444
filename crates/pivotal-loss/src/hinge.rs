//! The hinge loss on implicit rewards, with token credit.
//!
//! Zhao et al. 2023, arXiv:2305.10425 (SLiC), on DPO's rewards as Liu et al. 2023, arXiv:2309.06657 (RSO), do:
//!
//! ```text
//! L = max(0, 1 - β·[ Σ_w M·ℓ - Σ_l M·ℓ ])
//! ```
//!
//! Reference: TRL 1.16, `DPOTrainer` with `loss_type="hinge"`; value and gradient agree to 1e-12 in f64 (golden vectors
//! `dpo_variants`).

use crate::dpo::implicit_rewards;
use crate::{DpoTerms, LossError, PairLogps};

/// The hinge loss of each pair: 0, and without gradient, where the margin is 1 or more.
///
/// # Shapes
/// All four inputs and each field of the result `[pairs]`.
///
/// # Errors
/// [`LossError::Domain`] if `beta` is not finite and positive; [`LossError::Length`] for unequal lengths.
pub fn hinge(policy: PairLogps, reference: PairLogps, beta: f64) -> Result<DpoTerms, LossError> {
    let rewards = implicit_rewards(policy, reference, beta)?;
    let loss = rewards.margin().neg().add_scalar(1.0).clamp_min(0.0);
    Ok(rewards.into_terms(loss))
}
