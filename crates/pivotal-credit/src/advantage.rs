//! From token rewards to the advantages that a policy update multiplies with (METHOD, section 8).

mod explained;
mod gae;
mod group;
mod running;
mod whiten;

pub(crate) use whiten::moments;

pub use explained::explained_variance;
pub use gae::{AfterTruncation, Gae, GaeTerms, discounted_returns};
pub use group::{GroupAdvantage, GroupAdvantages, ScoreBaseline, group_advantages, sequence_signs};
pub use running::RunningBaseline;
pub use whiten::{MaskedValues, Variance, WHITEN_EPSILON, WhitenMean, Whitened, whiten};
