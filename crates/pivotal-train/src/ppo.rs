//! Proximal policy optimization with segment credit (METHOD, section 8).
//!
//! Schulman et al. 2017, arXiv:1707.06347, as Ziegler et al. 2019, arXiv:1909.08593, apply it to language. A step samples
//! responses, scores them, pays the score less the price of the KL divergence token by token, estimates advantages with a value
//! model, and then takes several optimizer steps on the clipped surrogate and on the value model's error. The keep mask is made
//! after the advantages are whitened, and has a part in the policy loss alone.

mod experience;
mod models;
mod recipe;
mod settings;
mod update;

pub use experience::{Experience, ExperienceNumbers, Measured, Shaper, ShaperState};
pub use models::Models;
pub use recipe::{PpoConfig, PpoMetrics, PpoRunFlags, Summary, train};
pub use settings::{
    PpoFlags, PpoSettings, RewardKl, RewardSpread, Scaling, SignBaseline, TokenReduction,
    Truncated, WhitenVariance,
};
pub use update::{
    UpdateInputs, UpdateNumbers, UpdateRule, UpdateSums, policy_gradients, rollout_values,
    value_gradients,
};
