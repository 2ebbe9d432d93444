//! From scores to advantages and returns: slices, no tensor.
//!
//! The order matters, and is METHOD's (section 8):
//!
//! ```text
//! score ▶ clamp ▶ running scale ▶ spread over tokens ▶ less the price of the KL ▶ (whiten)
//!       ▶ GAE over all response tokens ▶ whiten ▶ keep mask
//! ```
//!
//! A dropped token is an action that was taken: the mask, which [`RolloutCredit`](crate::onpolicy::RolloutCredit) makes of
//! what comes out of here, enters nothing above it. All of it are numbers that models have given, detached from any tape.

use pivotal_core::{ErrorKind, HasKind, SegmentRecord, Sign};
use pivotal_credit::{
    AfterTruncation, Credit, CreditRule, CreditState, Ending, KlController, KlPenalty, KlSum,
    MaskedValues, MissingEos, Response, RunningScale, ScoreRule, Selection, SequenceSign, Signal,
    SpreadParts, Variance, WhitenMean, critic, explained_variance, increment, sequence_signs,
    spread_reward, whiten,
};
use serde::{Deserialize, Serialize};

use super::settings::{PpoSettings, RewardSpread, above_zero};
use crate::error::{Error, Result};
use crate::score::ResponseValues;

/// A response with what the models say of it.
#[derive(Clone, Debug)]
pub struct Measured {
    /// Its prompt: the row of the data set.
    pub id: u64,
    /// Which of that prompt's samples it is.
    pub sample: u32,
    /// The score of the whole response, before the penalty.
    pub score: f32,
    /// What is subtracted from it because the response did not end by itself, after the clamp; else 0.
    pub penalty: f32,
    /// How it ended.
    pub ending: Ending,
    /// Log-probability of each token under the policy that sampled it, in nats, `[tokens]`.
    pub old_logps: Vec<f32>,
    /// The same under the reference.
    pub reference_logps: Vec<f32>,
    /// The value model's values, each of the state *at* its token.
    pub values: ResponseValues,
    /// The reward model's, where there is one.
    pub levels: Option<ResponseValues>,
    /// The text of each token, where the rule that cuts segments reads it.
    pub texts: Vec<String>,
}

/// What a batch of responses teaches, each list `[responses][tokens]`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Experience {
    /// Value of the state before each token when it was sampled.
    pub old_values: Vec<Vec<f32>>,
    /// The reward of each token, the price of the KL paid.
    pub rewards: Vec<Vec<f32>>,
    /// The advantages that the policy loss multiplies.
    pub advantages: Vec<Vec<f32>>,
    /// What the value model learns.
    pub returns: Vec<Vec<f32>>,
    /// The sign of each response, of its score less the baseline, `[responses]`.
    pub signs: Vec<Sign>,
}

/// One batch's numbers before any update.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct ExperienceNumbers {
    /// Mean score as it was given.
    pub score: f64,
    /// Standard deviation of the scores.
    pub score_std: f64,
    /// Mean score after clamp and scale: what is paid at the end with the spread `last`.
    pub paid_score: f64,
    /// Share of responses that did not end by themselves.
    pub truncated_fraction: f64,
    /// Mean length of a response.
    pub response_tokens: f64,
    /// Mean over responses of the summed k1, in nats: what the controller sees.
    pub kl: f64,
    /// Mean k1 a token, in nats.
    pub kl_k1: f64,
    /// Mean k2 a token, in nats.
    pub kl_k2: f64,
    /// Mean k3 a token, in nats.
    pub kl_k3: f64,
    /// Largest distance of a token's log-probability from the reference's, in nats.
    pub max_abs_log_ratio: f64,
    /// The coefficient that this batch paid.
    pub kl_coef: f64,
    /// Scores that their clamp changed.
    pub clamped_scores: usize,
    /// Log-ratios that their clamp changed.
    pub clamped_log_ratios: usize,
    /// KL estimates that their clamp changed.
    pub clamped_kls: usize,
    /// Mean advantage before whitening.
    pub advantage_mean: f64,
    /// Standard deviation of the advantages before whitening.
    pub advantage_std: f64,
    /// How much of the returns' variance the value model explained; absent where they do not vary.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub explained_variance: Option<f64>,
}

/// What is remembered from batch to batch; part of a checkpoint.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ShaperState {
    controller: KlController,
    scale: RunningScale,
    spread: Option<CreditState>,
}

/// Turns batches of measured responses into experience.
#[derive(Debug)]
pub struct Shaper {
    settings: PpoSettings,
    controller: KlController,
    scale: RunningScale,
    /// The signal that is paid, and the segments that it is paid to; `None` where the score is paid at the end.
    spread: Option<(Signal, Credit)>,
}

impl Shaper {
    /// A shaper: at the start of a run, or as `state` left it.
    ///
    /// # Errors
    /// [`Error::Setting`] for a spread whose signal no reward model gives; [`Error::Checkpoint`] for the state of another
    /// configuration.
    pub fn new(
        settings: &PpoSettings,
        rule: &CreditRule,
        has_reward_model: bool,
        seed: u64,
        state: Option<ShaperState>,
    ) -> Result<Self> {
        settings.check()?;
        let spread = match settings.spread {
            RewardSpread::Last => None,
            _ => {
                let level = matches!(rule.signal, Signal::Level | Signal::Increment);
                if !level || !has_reward_model {
                    return Err(Error::Setting {
                        key: "spread",
                        found: format!("{:?} with credit-signal {}", settings.spread, rule.signal),
                        expected: "last, or `--reward-model` and `--credit-signal` level or increment, which is what is paid",
                    });
                }
                // Segments as the mask cuts them, whatever it keeps; no column is known before the rewards are.
                let mut segments = rule.clone();
                segments.selection = Selection::All;
                segments.sequence_sign = SequenceSign::Response;
                if let Some((_, by)) = segments.needed_columns().first() {
                    return Err(Error::Setting {
                        key: "spread",
                        found: format!("{:?} with {by}", settings.spread),
                        expected: "last, or a rule that cuts by the signal alone",
                    });
                }
                Some((rule.signal, Credit::new(segments, seed)))
            }
        };
        let mut shaper = Self {
            controller: settings.controller()?,
            scale: RunningScale::default(),
            settings: settings.clone(),
            spread,
        };
        if let Some(state) = state {
            shaper.spread = match (shaper.spread, state.spread) {
                (None, None) => None,
                (Some((signal, credit)), Some(state)) => {
                    let rule = credit.rule().clone();
                    Some((signal, Credit::resume(rule, seed, state)?))
                }
                _ => {
                    return Err(Error::Checkpoint {
                        what: "the state of this spread".into(),
                    });
                }
            };
            (shaper.controller, shaper.scale) = (state.controller, state.scale);
        }
        Ok(shaper)
    }

    /// What a checkpoint keeps.
    pub fn state(&self) -> ShaperState {
        ShaperState {
            controller: self.controller,
            scale: self.scale,
            spread: self
                .spread
                .as_ref()
                .map(|(_, credit)| credit.state().clone()),
        }
    }

    /// Whether the rule that cuts segments for rewards reads token texts.
    pub fn needs_texts(&self) -> bool {
        let spread = self.spread.as_ref();
        spread.is_some_and(|(_, credit)| credit.rule().needs_texts())
    }

    /// The coefficient that the next batch pays.
    pub fn kl_coef(&self) -> f64 {
        self.controller.kl_coef()
    }

    /// Experience of a batch in step `step` (from 1).
    ///
    /// # Errors
    /// [`Error::NotFinite`] naming the number and the rows that have it; [`Error::Credit`] for a rule that does not hold up.
    pub fn shape(
        &mut self,
        batch: &[Measured],
        step: u64,
    ) -> Result<(Experience, ExperienceNumbers)> {
        check_finite(batch, step)?;
        let settings = self.settings.clone();
        let mut numbers = ExperienceNumbers {
            kl_coef: self.controller.kl_coef(),
            ..ExperienceNumbers::default()
        };
        let scores = self.scores(batch, &mut numbers)?;
        let prompts: Vec<u64> = batch.iter().map(|one| one.id).collect();
        let signs = sequence_signs(&prompts, &scores, settings.sign_baseline.into())?;
        let task = self.task_rewards(batch, &scores, &signs)?;
        // Every token of a sampled response is the policy's own.
        let masks: Vec<Vec<bool>> = batch
            .iter()
            .map(|one| vec![true; one.old_logps.len()])
            .collect();
        let mut rewards = self.rewards(batch, &task, &masks, &mut numbers, step)?;
        let variance = settings.whiten_variance.into();
        if settings.whiten_rewards {
            whitened(&mut rewards, &masks, WhitenMean::Kept, variance)?;
        }
        let gae = settings.gae()?;
        let (mut advantages, mut returns, mut old_values) = (vec![], vec![], vec![]);
        for ((one, rewards), mask) in batch.iter().zip(&rewards).zip(&masks) {
            let (before, after) = critic(one.values.prompt_value, &one.values.levels);
            let rule = AfterTruncation::from(settings.after_truncation);
            let after = rule.final_value(one.ending, after);
            let found = gae.advantages(rewards, &before, mask, after)?;
            advantages.push(found.advantages);
            returns.push(found.returns);
            old_values.push(before);
        }
        numbers.explained_variance =
            explained_variance(&old_values.concat(), &returns.concat(), &masks.concat())?;
        (numbers.advantage_mean, numbers.advantage_std) = mean_and_std(&advantages.concat());
        if settings.whiten_advantages {
            whitened(&mut advantages, &masks, WhitenMean::Removed, variance)?;
        }
        let experience = Experience {
            old_values,
            rewards,
            advantages,
            returns,
            signs,
        };
        Ok((experience, numbers))
    }

    /// Scores as they are paid.
    fn scores(&mut self, batch: &[Measured], numbers: &mut ExperienceNumbers) -> Result<Vec<f32>> {
        let mut scores = Vec::with_capacity(batch.len());
        let share = 1.0 / batch.len().max(1) as f64;
        for one in batch {
            // A penalty before the clamp would be lost where the score is beyond it.
            let rule = ScoreRule {
                clamp: above_zero(self.settings.score_clamp),
                missing_eos: MissingEos::Penalty(one.penalty),
            };
            let shaped = rule.shape(one.score, one.ending)?;
            numbers.clamped_scores += usize::from(shaped.clamped);
            numbers.truncated_fraction += share * f64::from(u8::from(shaped.missing_eos));
            numbers.response_tokens += share * one.old_logps.len() as f64;
            scores.push(shaped.score);
        }
        let given: Vec<f32> = batch.iter().map(|one| one.score - one.penalty).collect();
        (numbers.score, numbers.score_std) = mean_and_std(&given);
        let paid = self
            .scale
            .scale(&scores, self.settings.score_scaling.into())?;
        numbers.paid_score = mean_and_std(&paid).0;
        Ok(paid)
    }

    /// The task's reward of each token.
    fn task_rewards(
        &mut self,
        batch: &[Measured],
        scores: &[f32],
        signs: &[Sign],
    ) -> Result<Vec<Vec<f32>>> {
        let spread = self.settings.spread.into();
        let pay = |index: usize, segments: &[SegmentRecord], signal: &[f32]| {
            let score = scores[index];
            let parts = SpreadParts {
                score,
                segments,
                signal,
            };
            let own = vec![true; batch[index].old_logps.len()];
            Ok::<_, Error>(spread_reward(spread, parts, &own)?)
        };
        let Some((signal, credit)) = &mut self.spread else {
            return (0..batch.len()).map(|index| pay(index, &[], &[])).collect();
        };
        let signals: Vec<Vec<f32>> = batch
            .iter()
            .map(|one| paid_signal(*signal, one))
            .collect::<Result<_>>()?;
        let texts: Vec<Vec<&str>> = batch
            .iter()
            .map(|one| one.texts.iter().map(String::as_str).collect())
            .collect();
        let responses: Vec<Response<'_>> = batch
            .iter()
            .enumerate()
            .map(|(index, one)| {
                let mut response = Response::new(one.id, one.sample, &signals[index], signs[index]);
                let texts = &texts[index][..];
                response.texts = (!texts.is_empty()).then_some(texts);
                response
            })
            .collect();
        let given = credit.assign(&responses)?;
        let score = credit.rule().score;
        let given = given.into_iter().enumerate();
        given
            .map(|(index, mut given)| {
                // Segments lie where the signal says once `signal_delay` has moved it; what is paid is the signal itself, for a sum
                // of increments is the last level less the first only where each is paid once.
                for segment in &mut given.segments {
                    segment.score = score.of(&signals[index][segment.start..segment.end]);
                }
                let mut rewards: Vec<f32> = pay(index, &given.segments, &signals[index])?;
                // These rewards are the signal's, which knows no end: what a missing one costs is paid there.
                if let Some(last) = rewards.last_mut() {
                    *last -= batch[index].penalty;
                }
                Ok(rewards)
            })
            .collect()
    }

    /// The task's rewards less the price of the KL; the controller then takes what that was.
    fn rewards(
        &mut self,
        batch: &[Measured],
        task: &[Vec<f32>],
        masks: &[Vec<bool>],
        numbers: &mut ExperienceNumbers,
        step: u64,
    ) -> Result<Vec<Vec<f32>>> {
        let penalty = KlPenalty {
            kl_coef: self.controller.kl_coef(),
            estimator: self.settings.kl_estimator.into(),
            log_ratio_clamp: above_zero(self.settings.log_ratio_clamp),
            kl_clamp: above_zero(self.settings.kl_clamp),
        };
        let mut sum = KlSum::default();
        let mut rewards = Vec::with_capacity(batch.len());
        for ((one, task), mask) in batch.iter().zip(task).zip(masks) {
            let shaped = penalty.rewards(&one.old_logps, &one.reference_logps, task, mask);
            let shaped = shaped.map_err(|error| match error.kind() {
                // All that goes in is finite: k3 of a token that is far off is not.
                ErrorKind::NotFinite => Error::NotFinite {
                    step,
                    metric: "rewards",
                    samples: vec![one.id],
                },
                _ => error.into(),
            })?;
            sum.merge(&shaped.kl);
            numbers.clamped_log_ratios += shaped.clamped_log_ratios;
            numbers.clamped_kls += shaped.clamped_kls;
            rewards.push(shaped.rewards);
        }
        let tokens = sum.tokens.max(1) as f64;
        numbers.kl = sum.k1 / batch.len().max(1) as f64;
        numbers.kl_k1 = sum.k1 / tokens;
        numbers.kl_k2 = sum.k2 / tokens;
        numbers.kl_k3 = sum.k3 / tokens;
        numbers.max_abs_log_ratio = sum.max_abs_log_ratio;
        self.controller.update(numbers.kl, batch.len() as u64)?;
        Ok(rewards)
    }
}

/// `level` or `increment` of the reward model.
fn paid_signal(signal: Signal, one: &Measured) -> Result<Vec<f32>> {
    let levels = one.levels.as_ref().ok_or_else(|| Error::Setting {
        key: "spread",
        found: format!("without a reward model's values of row {}", one.id),
        expected: "last, or `--reward-model`",
    })?;
    Ok(match signal {
        Signal::Increment => increment(levels.prompt_value, &levels.levels),
        _ => levels.levels.clone(),
    })
}

/// A metric and whether a response's is finite.
type NamedCheck<'a> = (&'static str, &'a dyn Fn(&Measured) -> bool);

fn check_finite(batch: &[Measured], step: u64) -> Result<()> {
    let finite = |values: &[f32]| values.iter().all(|value| value.is_finite());
    let whole = |values: &ResponseValues| values.prompt_value.is_finite() && finite(&values.levels);
    let good: [NamedCheck<'_>; 5] = [
        ("score", &|one| one.score.is_finite()),
        ("old_logps", &|one| finite(&one.old_logps)),
        ("reference_logps", &|one| finite(&one.reference_logps)),
        ("values", &|one| whole(&one.values)),
        ("reward_model_values", &|one| {
            one.levels.as_ref().is_none_or(whole)
        }),
    ];
    for (metric, good) in good {
        let bad = batch.iter().filter(|one| !good(one));
        let samples: Vec<u64> = bad.map(|one| one.id).collect();
        if !samples.is_empty() {
            return Err(Error::NotFinite {
                step,
                metric,
                samples,
            });
        }
    }
    Ok(())
}

fn whitened(
    lists: &mut [Vec<f32>],
    masks: &[Vec<bool>],
    mean: WhitenMean,
    variance: Variance,
) -> Result<()> {
    let mut batch: Vec<MaskedValues<'_>> = lists
        .iter_mut()
        .zip(masks)
        .map(|(values, response_mask)| MaskedValues {
            values,
            response_mask,
        })
        .collect();
    whiten(&mut batch, mean, variance)?;
    Ok(())
}

fn mean_and_std(values: &[f32]) -> (f64, f64) {
    let count = values.len().max(1) as f64;
    let mean = values.iter().map(|&value| f64::from(value)).sum::<f64>() / count;
    let squares = values
        .iter()
        .map(|&value| (f64::from(value) - mean).powi(2));
    (mean, (squares.sum::<f64>() / count).sqrt())
}
