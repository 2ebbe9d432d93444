//! Identity Preference Optimization with token credit.
//!
//! Azar et al. 2023, arXiv:2310.12036, Eq. 17 (τ there is β here), with h the log-ratio of chosen minus that of rejected:
//!
//! ```text
//! L = ( h - 1/(2β) )²
//! ```
//!
//! Reference: TRL 1.16, `CPOTrainer` on summed log-ratios and `DPOTrainer` on mean ones, each with `loss_type="ipo"`; value and
//! gradient agree to 1e-12 in f64 (golden vectors `dpo_variants`).
//!
//! Differs: the paper and OpenRLHF sum the log-ratio over tokens, TRL's DPO trainer averages it. Which one this is, the caller
//! says by the [`Normalisation`](crate::Normalisation) of its log-probabilities: `Sum` or `KeptMean`.

use crate::dpo::implicit_rewards;
use crate::{DpoTerms, LossError, PairLogps};

/// The IPO loss of each pair. `beta` sets the margin aimed at, `1/(2·beta)` nats.
///
/// # Shapes
/// All four inputs and each field of the result `[pairs]`.
///
/// # Errors
/// [`LossError::Domain`] if `beta` is not finite and positive; [`LossError::Length`] for unequal lengths.
pub fn ipo(policy: PairLogps, reference: PairLogps, beta: f64) -> Result<DpoTerms, LossError> {
    let rewards = implicit_rewards(policy, reference, beta)?;
    let log_ratio = rewards.margin().mul_scalar(beta.recip());
    let loss = log_ratio.sub_scalar((2.0 * beta).recip()).square();
    Ok(rewards.into_terms(loss))
}
