//! The `[ppo]` table.

use std::path::PathBuf;

use clap::ValueEnum;
use pivotal_credit::{
    AfterTruncation, Gae, KlController, KlEstimator, ScoreBaseline, ScoreScaling, Spread, Variance,
};
use pivotal_loss::Clip;
use serde::{Deserialize, Serialize};

use crate::error::Result;
use crate::settings::{HeadInit, domain, overlay};
use crate::table::table;

/// Choices of `pivotal-credit`, as flags and files name them.
macro_rules! choices {
    ($(
        $(#[doc = $about:literal])+
        pub enum $name:ident of $target:ty, default $default:ident {
            $( $(#[doc = $doc:literal])+ $variant:ident ),+ $(,)?
        }
    )+) => {$(
        $(#[doc = $about])+
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
        #[serde(rename_all = "snake_case")]
        #[value(rename_all = "snake_case")]
        pub enum $name {
            $( $(#[doc = $doc])+ $variant, )+
        }

        impl Default for $name {
            fn default() -> Self {
                Self::$default
            }
        }

        impl From<$name> for $target {
            fn from(choice: $name) -> Self {
                match choice {
                    $( $name::$variant => Self::$variant, )+
                }
            }
        }
    )+};
}

choices! {
    /// Where in a response its reward is paid.
    pub enum RewardSpread of Spread, default Last {
        /// The score at the last token.
        Last,
        /// Each segment's score in equal parts on its tokens.
        SegmentEven,
        /// Each segment's score at its last token.
        SegmentLast,
        /// Each token's signal at that token.
        Token,
    }
    /// The estimate of the KL divergence that the reward pays for.
    pub enum RewardKl of KlEstimator, default K1 {
        /// The log-ratio.
        K1,
        /// Half its square.
        K2,
        /// Schulman's third.
        K3,
    }
    /// What becomes of scores before they are rewards.
    pub enum Scaling of ScoreScaling, default None {
        /// Nothing.
        None,
        /// Divided by the running standard deviation.
        Std,
        /// Less the running mean, and divided.
        Normal,
    }
    /// The variance that whitening divides by.
    pub enum WhitenVariance of Variance, default Bessel {
        /// Over n.
        Biased,
        /// Over n − 1.
        Bessel,
    }
    /// The value after the last token of a response that was cut at its length limit.
    pub enum Truncated of AfterTruncation, default Zero {
        /// 0.
        Zero,
        /// The value model's.
        Value,
    }
    /// What a score is compared with for its response's sign.
    pub enum SignBaseline of ScoreBaseline, default Batch {
        /// The mean over the responses to its prompt.
        Group,
        /// The mean over the batch of rollouts.
        Batch,
    }
}

/// How the losses of an optimizer step's tokens become one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub enum TokenReduction {
    /// The mean over its kept tokens.
    #[default]
    TokenMean,
    /// The mean over its responses of their means over kept tokens.
    ResponseMean,
}

table! {
    /// Proximal policy optimization.
    pub struct PpoSettings, PpoFlags {
        /// Passes over each batch of rollouts.
        "update-epochs" update_epochs: usize = 2,
        /// Optimizer steps that a pass over the sampled responses is cut into, by prompt.
        "minibatches" minibatches: usize = 2,
        /// How far a token's probability may move before it is pushed no further: down to 1 − this.
        "clip-low" clip_low: f64 = 0.2,
        /// The same upwards: up to 1 + this.
        "clip-high" clip_high: f64 = 0.2,
        /// How far a value may move from the old one before it is pushed no further; 0 does not clip.
        "value-clip" value_clip: f64 = 0.2,
        /// Peak learning rate of the value model.
        "value-lr" value_lr: f64 = 1e-4,
        /// A reward model (an adapter or model directory of `reward`) that the value model starts as.
        /// A fresh adapter and head on the policy's base if empty.
        "value-model" value_model: PathBuf = PathBuf::new(),
        /// How a fresh value head begins: zero or normal.
        "head-init" head_init: HeadInit = HeadInit::Zero,
        /// The value loss takes the tokens that credit keeps, instead of all.
        "mask-value-loss" mask_value_loss: bool = false,
        /// How an optimizer step's token losses become one: token_mean or response_mean.
        "reduction" reduction: TokenReduction = TokenReduction::TokenMean,
        /// Reward that a nat of KL divergence from the reference costs.
        "kl-coef" kl_coef: f64 = 0.05,
        /// The divergence in nats a response that the coefficient is moved to hold; 0 leaves it fixed.
        "kl-target" kl_target: f64 = 0.0,
        /// Responses over which an error of a fifth or more moves the coefficient by a fifth.
        "kl-horizon" kl_horizon: u64 = 10_000,
        /// The estimate of the divergence: k1, k2 or k3.
        "kl-estimator" kl_estimator: RewardKl = RewardKl::K1,
        /// Log-ratios in the reward are clamped to ± this many nats; 0 does not clamp.
        "log-ratio-clamp" log_ratio_clamp: f32 = 0.0,
        /// Estimates in the reward are clamped to ± this many nats; 0 does not clamp.
        "kl-clamp" kl_clamp: f32 = 0.0,
        /// Scores are clamped to ± this; 0 does not clamp.
        "score-clamp" score_clamp: f32 = 0.0,
        /// What becomes of scores over the run: none, std or normal.
        "score-scaling" score_scaling: Scaling = Scaling::None,
        /// Where a reward is paid: last, segment_even, segment_last or token.
        /// All but last pay the reward model's signal, level or increment, that `credit-signal` names.
        "spread" spread: RewardSpread = RewardSpread::Last,
        /// Discount γ of later rewards.
        "gamma" gamma: f64 = 1.0,
        /// λ of generalised advantage estimation.
        "gae-lambda" gae_lambda: f64 = 0.95,
        /// The value after the last token of a response cut at its length limit: zero or value.
        "after-truncation" after_truncation: Truncated = Truncated::Zero,
        /// Rewards are given unit variance over the batch; their mean stays.
        "whiten-rewards" whiten_rewards: bool = false,
        /// Advantages are given mean 0 and unit variance over the batch.
        "whiten-advantages" whiten_advantages: bool = true,
        /// The variance that whitening divides by: biased or bessel.
        "whiten-variance" whiten_variance: WhitenVariance = WhitenVariance::Bessel,
        /// What a score is compared with for the sign of its response: batch or group.
        "sign-baseline" sign_baseline: SignBaseline = SignBaseline::Batch,
    }
}

overlay! { PpoFlags => PpoSettings }

impl PpoSettings {
    /// Checks every number's domain.
    ///
    /// # Errors
    /// [`crate::Error::Setting`] or [`crate::Error::Credit`], naming the key.
    pub fn check(&self) -> Result<()> {
        let not_negative = "a number of at least 0";
        let numbers = [
            ("clip-high", self.clip_high),
            ("value-clip", self.value_clip),
            ("value-lr", self.value_lr),
            ("log-ratio-clamp", f64::from(self.log_ratio_clamp)),
            ("kl-clamp", f64::from(self.kl_clamp)),
            ("score-clamp", f64::from(self.score_clamp)),
        ];
        for (key, value) in numbers {
            domain(key, value, not_negative, value >= 0.0)?;
        }
        let low = self.clip_low;
        domain("clip-low", low, "from 0 to 1", (0.0..=1.0).contains(&low))?;
        let counts = [
            ("update-epochs", self.update_epochs),
            ("minibatches", self.minibatches),
        ];
        for (key, count) in counts {
            domain(key, count as f64, "at least 1", count > 0)?;
        }
        self.gae()?;
        self.controller()?;
        Ok(())
    }

    /// The two discounts.
    pub(crate) fn gae(&self) -> Result<Gae> {
        Ok(Gae::new(self.gamma, self.gae_lambda)?)
    }

    /// The KL coefficient as it begins.
    pub(crate) fn controller(&self) -> Result<KlController> {
        Ok(match self.kl_target > 0.0 {
            true => KlController::adaptive(self.kl_coef, self.kl_target, self.kl_horizon)?,
            false => {
                let target = self.kl_target;
                domain("kl-target", target, "at least 0", target == 0.0)?;
                KlController::fixed(self.kl_coef)?
            }
        })
    }

    /// How far the ratio may go.
    pub(crate) fn clip(&self) -> Clip {
        Clip {
            low: self.clip_low,
            high: self.clip_high,
        }
    }
}

/// A limit, where there is one.
pub(crate) fn above_zero(limit: f32) -> Option<f32> {
    (limit > 0.0).then_some(limit)
}
