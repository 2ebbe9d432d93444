//! The `[grpo]` table.

use clap::ValueEnum;
use pivotal_credit::{GroupAdvantage, ScoreBaseline};
use pivotal_loss::Clip;
use serde::{Deserialize, Serialize};

use crate::error::Result;
use crate::settings::{domain, overlay};
use crate::table::table;

/// How the scores of a group become advantages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub enum Estimator {
    /// Less the group's mean, over the group's standard deviation.
    #[default]
    Grpo,
    /// Less the group's mean, over the batch's standard deviation.
    BatchNormalised,
    /// Less the group's mean: Dr. GRPO.
    MeanOnly,
    /// Less the mean of the group's others.
    Rloo,
}

impl From<Estimator> for GroupAdvantage {
    fn from(estimator: Estimator) -> Self {
        match estimator {
            Estimator::Grpo => Self::GroupNormalised,
            Estimator::BatchNormalised => Self::BatchNormalised,
            Estimator::MeanOnly => Self::MeanOnly,
            Estimator::Rloo => Self::LeaveOneOut,
        }
    }
}

/// What the tokens' losses of an optimizer step come to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub enum Reduction {
    /// Every kept token weighs the same.
    #[default]
    TokenMean,
    /// Every response of which something is kept weighs the same.
    ResponseMean,
    /// The sum over kept tokens, divided by responses and `max-new-tokens`.
    ConstantLength,
}

/// The KL loss towards the reference.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub enum KlLoss {
    /// Δ²/2: the gradient of KL(π‖π_ref).
    #[default]
    K2,
    /// e^(−Δ) − 1 + Δ, as in the GRPO paper: the gradient of the other direction.
    K3,
    /// The value of k3 with the gradient of k2.
    StraightThrough,
}

/// The baseline of a score's sign.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub enum SignBaseline {
    /// The mean over the responses to the same prompt.
    #[default]
    Group,
    /// The mean over the step.
    Batch,
}

impl From<SignBaseline> for ScoreBaseline {
    fn from(baseline: SignBaseline) -> Self {
        match baseline {
            SignBaseline::Group => Self::Group,
            SignBaseline::Batch => Self::Batch,
        }
    }
}

table! {
    /// Group-relative policy optimization.
    pub struct GrpoSettings, GrpoFlags {
        /// Advantages from a group's scores: grpo, batch_normalised, mean_only or rloo.
        "estimator" estimator: Estimator = Estimator::Grpo,
        /// Added to the standard deviation that divides.
        "std-epsilon" std_epsilon: f64 = 1e-4,
        /// What the tokens' losses come to: token_mean, response_mean or constant_length.
        "reduction" reduction: Reduction = Reduction::TokenMean,
        /// The ratio of a token with a negative advantage is pushed down to 1 less this, no further.
        "clip-low" clip_low: f64 = 0.2,
        /// The ratio of a token with a positive advantage is pushed up to 1 and this, no further.
        "clip-high" clip_high: f64 = 0.2,
        /// The loss of a token with a negative advantage stops growing at this ratio; 0 does not stop it.
        "dual-clip" dual_clip: f64 = 0.0,
        /// Weight of the KL loss towards the reference, over every response token; 0 has none.
        "kl-coef" kl_coef: f64 = 0.0,
        /// The KL loss: k2, k3 or straight_through.
        "kl-loss" kl_loss: KlLoss = KlLoss::K2,
        /// Steps between measurements of the KL divergence from the reference where nothing but the metrics needs it: each costs a
        /// pass of the reference. 0 never measures.
        "kl-every" kl_every: u64 = 1,
        /// Optimizer steps that a pass over the sampled responses is cut into, by prompt.
        "minibatches" minibatches: usize = 1,
        /// Passes over the sampled responses.
        "update-epochs" update_epochs: usize = 1,
        /// The baseline that a score is above or below, for the sign that credit compares segments with: group or batch.
        "sign-baseline" sign_baseline: SignBaseline = SignBaseline::Group,
    }
}

overlay! {
    GrpoFlags => GrpoSettings,
}

impl GrpoSettings {
    /// Checks every number's domain.
    ///
    /// # Errors
    /// [`crate::Error::Setting`], naming the flag.
    pub fn check(&self) -> Result<()> {
        let not_negative = "a number of at least 0";
        let numbers = [
            ("std-epsilon", self.std_epsilon),
            ("clip-high", self.clip_high),
            ("kl-coef", self.kl_coef),
        ];
        for (key, value) in numbers {
            domain(key, value, not_negative, value >= 0.0)?;
        }
        let low = self.clip_low;
        domain("clip-low", low, "from 0 to 1", (0.0..=1.0).contains(&low))?;
        let dual = self.dual_clip;
        domain(
            "dual-clip",
            dual,
            "0, or a number above 1 + clip-high",
            dual == 0.0 || dual > 1.0 + self.clip_high,
        )?;
        for (key, count) in [
            ("minibatches", self.minibatches),
            ("update-epochs", self.update_epochs),
        ] {
            domain(key, count as f64, "at least 1", count > 0)?;
        }
        Ok(())
    }

    /// The bounds of the ratio.
    pub fn clip(&self) -> Clip {
        Clip {
            low: self.clip_low,
            high: self.clip_high,
        }
    }
}
