//! Losses of preference and reward learning, one method a file: pure functions over Burn tensors.
//!
//! Each returns named terms for each item, unreduced; only `loss` carries a gradient. Who calls it reduces, and says how.
//! Token log-probabilities come flat, one after the other for all responses of a batch; a [`ResponseIndex`] says whose each
//! is, and [`kept_sums`] makes from them the one number a response that the pairwise losses take.
//!
//! Masks are token masks: a token that is not kept has no part in any value or gradient, whatever its log-probability.

mod bradley_terry;
mod cdpo;
mod checked;
mod dpo;
mod error;
mod hinge;
mod ipo;
mod kept_sums;
mod kl;
mod kto;
mod ppo;
mod reduce;
mod response_index;
mod sequence_score;
mod sft;
mod simpo;
mod tdpo;
mod token_supervised;
mod value;

pub use bradley_terry::{
    BradleyTerryTerms, ScorePair, bradley_terry, center_penalty, token_l2_penalty,
};
pub use cdpo::{cdpo, robust_dpo};
pub use checked::{exp_remainder, log_sigmoid, log_sum_exp};
pub use dpo::{DpoTerms, PairLogps, dpo};
pub use error::LossError;
pub use hinge::hinge;
pub use ipo::ipo;
pub use kept_sums::{Normalisation, kept_sums};
pub use kl::{KlEstimates, KlTerms, kl_estimates, kl_k2, kl_k3, kl_straight_through};
pub use kto::{Judgement, KtoTerms, KtoWeights, kto, kto_baseline};
pub use ppo::{Clip, DualClipTerms, PpoTerms, dual_clip_ppo, ppo};
pub use reduce::{constant_length_mean, response_mean, responses_kept, token_mean};
pub use response_index::ResponseIndex;
pub use sequence_score::{ScoreAggregation, sequence_scores};
pub use sft::{SftTerms, sft};
pub use simpo::simpo;
pub use tdpo::{PairKl, TdpoTerms, tdpo1, tdpo2, token_forward_kl};
pub use token_supervised::{TokenSupervisedTerms, token_supervised};
pub use value::{ClippedValueTerms, ValueTerms, clipped_value_loss, value_loss};
