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
mod response_index;
mod sequence_score;
mod sft;
mod simpo;
mod token_supervised;

pub use bradley_terry::{
    BradleyTerryTerms, ScorePair, bradley_terry, center_penalty, token_l2_penalty,
};
pub use cdpo::{cdpo, robust_dpo};
pub use checked::{log_sigmoid, log_sum_exp};
pub use dpo::{DpoTerms, PairLogps, dpo};
pub use error::LossError;
pub use hinge::hinge;
pub use ipo::ipo;
pub use kept_sums::{Normalisation, kept_sums};
pub use response_index::ResponseIndex;
pub use sequence_score::{ScoreAggregation, sequence_scores};
pub use sft::{SftTerms, sft};
pub use simpo::simpo;
pub use token_supervised::{TokenSupervisedTerms, token_supervised};
