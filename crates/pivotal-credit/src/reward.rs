//! From a response's score to token rewards (METHOD, section 8).

mod kl;
mod normalise;
mod scale;
mod shaping;
mod spread;

pub use kl::{KlEstimator, KlSum};
pub use normalise::ScoreNormalisation;
pub use scale::{RunningScale, ScoreScaling};
pub use shaping::{Ending, KlPenalty, KlShaped, MissingEos, ScoreRule, ShapedScore};
pub use spread::{Spread, SpreadParts, spread_reward};
