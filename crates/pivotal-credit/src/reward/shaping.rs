//! The reward of each token: the task's reward less the price of leaving the reference.
//!
//! Ziegler et al. 2019, arXiv:1909.08593, Eq. 2, token by token, y drawn from π:
//!
//! ```text
//! reward_t = task_t − kl_coef · k(log π(y_t) − log π_ref(y_t)),     task = the score at the last response token
//! ```
//!
//! The last response token is the last of the model's own, EOS where there is one, never a pad.
//!
//! Differs: a response without EOS keeps its score, loses a penalty from it (TRL's `missing_eos_penalty`), or is given a
//! fixed score in its place (OpenAI: −1): [`MissingEos`]. OpenRLHF clamps the score to ±10, log-ratios to ±20 and the KL to
//! ±10; here every clamp is off by default and counted.

use serde::{Deserialize, Serialize};

use super::{KlEstimator, KlSum};
use crate::Result;
use crate::check::{domain, finite, finite_number, length};
use crate::named::named_enum;

named_enum! {
    /// How a response ended.
    pub enum Ending {
        /// By itself: its last token is EOS, or a stop string.
        Eos = "eos",
        /// At its length limit.
        Truncated = "truncated",
    }
}

/// What a response that did not end by itself does to its score.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum MissingEos {
    /// Nothing.
    #[default]
    Ignore,
    /// This is subtracted from it: TRL.
    Penalty(f32),
    /// This takes its place: OpenAI, −1.
    Score(f32),
}

/// How a score is corrected before it becomes a reward.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ScoreRule {
    /// Scores are clamped to ± this; `None`: not.
    pub clamp: Option<f32>,
    /// What becomes of the score of a response without EOS, after the clamp.
    pub missing_eos: MissingEos,
}

/// A corrected score.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ShapedScore {
    /// The score.
    pub score: f32,
    /// Whether the clamp changed it.
    pub clamped: bool,
    /// Whether the response lacked its EOS.
    pub missing_eos: bool,
}

impl ScoreRule {
    /// Corrects one score.
    ///
    /// # Errors
    /// [`Error::NotFiniteColumn`](crate::Error::NotFiniteColumn) for the score, [`Error::Value`](crate::Error::Value) for a
    /// clamp that is not above 0 or a penalty that is not finite.
    ///
    /// # Examples
    /// ```
    /// use pivotal_credit::{Ending, MissingEos, ScoreRule};
    /// let rule = |missing_eos| ScoreRule { clamp: Some(10.0), missing_eos };
    /// let score = |missing_eos, ending| rule(missing_eos).shape(12.0, ending).map(|shaped| shaped.score);
    /// assert_eq!(score(MissingEos::Penalty(1.0), Ending::Eos)?, 10.0);
    /// assert_eq!(score(MissingEos::Penalty(1.0), Ending::Truncated)?, 9.0);
    /// assert_eq!(score(MissingEos::Score(-1.0), Ending::Truncated)?, -1.0);
    /// # Ok::<(), pivotal_credit::Error>(())
    /// ```
    pub fn shape(&self, score: f32, ending: Ending) -> Result<ShapedScore> {
        finite_number("score", f64::from(score))?;
        let (inside, clamped) = clamp("score_clamp", f64::from(score), self.clamp)?;
        let inside = inside as f32;
        if let MissingEos::Penalty(value) | MissingEos::Score(value) = self.missing_eos {
            domain("missing_eos", value.is_finite(), "a finite number", value)?;
        }
        let missing_eos = ending == Ending::Truncated;
        let score = match (missing_eos, self.missing_eos) {
            (true, MissingEos::Penalty(penalty)) => inside - penalty,
            (true, MissingEos::Score(fixed)) => fixed,
            _ => inside,
        };
        Ok(ShapedScore {
            score,
            clamped,
            missing_eos,
        })
    }
}

/// The price of leaving the reference.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct KlPenalty {
    /// Reward a nat; [`KlController::kl_coef`](crate::KlController::kl_coef).
    pub kl_coef: f64,
    /// Which estimate of the KL; k1 is the one whose expected policy gradient is the KL's.
    pub estimator: KlEstimator,
    /// Log-ratios are clamped to ± this many nats; `None`: not.
    pub log_ratio_clamp: Option<f32>,
    /// Estimates are clamped to ± this many nats; `None`: not.
    pub kl_clamp: Option<f32>,
}

/// One response's token rewards.
#[derive(Clone, Debug, PartialEq)]
pub struct KlShaped {
    /// The rewards, `[tokens]`; 0 where the token is not the model's own.
    pub rewards: Vec<f32>,
    /// The KL of the response before any clamp, by every estimator.
    pub kl: KlSum,
    /// Log-ratios that the clamp changed.
    pub clamped_log_ratios: usize,
    /// Estimates that the clamp changed.
    pub clamped_kls: usize,
}

impl KlPenalty {
    /// Puts the penalty on each of the model's own tokens, over `task_rewards`: what
    /// [`spread_reward`](crate::spread_reward) made of the score.
    ///
    /// # Shapes
    /// All four `[tokens]`; log-probabilities in nats, the policy's as it sampled them.
    ///
    /// # Errors
    /// [`Error::Unequal`](crate::Error::Unequal), [`Error::NotFiniteColumn`](crate::Error::NotFiniteColumn), or
    /// [`Error::Value`](crate::Error::Value) for a coefficient below 0 or a clamp that is not above 0.
    ///
    /// # Examples
    /// ```
    /// use pivotal_credit::{KlEstimator, KlPenalty};
    /// let penalty = KlPenalty { kl_coef: 0.1, estimator: KlEstimator::K1, log_ratio_clamp: None, kl_clamp: None };
    /// let shaped = penalty.rewards(&[-1.0, -2.0], &[-3.0, -1.0], &[0.0, 1.0], &[true, true])?;
    /// assert_eq!(shaped.rewards, [-0.2, 1.1]);
    /// # Ok::<(), pivotal_credit::Error>(())
    /// ```
    pub fn rewards(
        &self,
        token_logps: &[f32],
        reference_token_logps: &[f32],
        task_rewards: &[f32],
        response_mask: &[bool],
    ) -> Result<KlShaped> {
        let inside = self.kl_coef.is_finite() && self.kl_coef >= 0.0;
        domain(
            "kl_coef",
            inside,
            "a finite number of at least 0",
            self.kl_coef,
        )?;
        let kl = KlSum::of(token_logps, reference_token_logps, response_mask)?;
        length("task_rewards", token_logps.len(), task_rewards.len())?;
        finite("task_rewards", task_rewards, response_mask)?;
        let mut shaped = KlShaped {
            rewards: vec![0.0; token_logps.len()],
            kl,
            clamped_log_ratios: 0,
            clamped_kls: 0,
        };
        for index in (0..token_logps.len()).filter(|&index| response_mask[index]) {
            let log_ratio = f64::from(token_logps[index]) - f64::from(reference_token_logps[index]);
            let (log_ratio, outside) = clamp("log_ratio_clamp", log_ratio, self.log_ratio_clamp)?;
            shaped.clamped_log_ratios += usize::from(outside);
            let estimate = self.estimator.of(log_ratio);
            let (estimate, outside) = clamp("kl_clamp", estimate, self.kl_clamp)?;
            shaped.clamped_kls += usize::from(outside);
            let reward = f64::from(task_rewards[index]) - self.kl_coef * estimate;
            shaped.rewards[index] = reward as f32;
        }
        // k3 grows as e^|Δ|: without a clamp a far-off token can leave f32.
        finite("rewards", &shaped.rewards, response_mask)?;
        Ok(shaped)
    }
}

/// `value` within ± `limit`, and whether that changed it.
fn clamp(key: &'static str, value: f64, limit: Option<f32>) -> Result<(f64, bool)> {
    let Some(limit) = limit else {
        return Ok((value, false));
    };
    let inside = limit.is_finite() && limit > 0.0;
    domain(key, inside, "a finite number above 0", limit)?;
    let limit = f64::from(limit);
    Ok((value.clamp(-limit, limit), value.abs() > limit))
}
