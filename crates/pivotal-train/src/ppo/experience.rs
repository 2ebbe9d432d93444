//! From rollouts to advantages, returns and masks: slices, no tensor.
//!
//! The order matters, and is METHOD's (section 8):
//!
//! ```text
//! score ▶ clamp, missing EOS ▶ running scale ▶ spread over tokens ▶ less the price of the KL ▶ (whiten)
//!       ▶ GAE over all response tokens ▶ whiten ▶ keep mask
//! ```
//!
//! A dropped token is an action that was taken: the mask enters nothing above it. All of it works on numbers that models have
//! given, detached from any tape.

use pivotal_core::{Sign, TokenMask};
use pivotal_credit::{
    Credit, CreditRule, CreditState, Diagnostics, DiagnosticsReport, Drift, Ending, KlController,
    KlPenalty, KlSum, MaskedValues, Response, ResponseCredit, RunningScale, Selection, Signal,
    SpreadParts, Thresholds, TokenColumns, Variance, WhitenMean, critic, explained_variance,
    increment, sequence_signs, spread_reward, whiten,
};
use serde::{Deserialize, Serialize};

use super::settings::{PpoSettings, RewardSpread, above_zero};
use crate::error::{Error, Result};
use crate::score::ResponseValues;

/// Steps at either end of a run whose opposing fractions are compared.
const DRIFT_STEPS: usize = 20;

/// Tokens of at most this probability under the policy count as decisive in diagnostics.
const DECISIVE_PROBABILITY: f64 = 0.9;

/// A response with what the models say of it.
#[derive(Clone, Debug)]
pub struct Measured {
    /// Its prompt: the row of the data set.
    pub id: u64,
    /// Which of that prompt's samples it is.
    pub sample: u32,
    /// The score of the whole response.
    pub score: f32,
    /// How it ended.
    pub ending: Ending,
    /// Log-probability of each token under the policy that sampled it, in nats, `[tokens]`.
    pub old_logps: Vec<f32>,
    /// The same under the reference.
    pub reference_logps: Vec<f32>,
    /// The value model's values.
    pub values: ResponseValues,
    /// The reward model's, where there is one.
    pub levels: Option<ResponseValues>,
    /// The text of each token, where the credit rule reads it.
    pub texts: Option<Vec<String>>,
}

/// What the update takes of one response, each `[tokens]`.
#[derive(Clone, Debug, PartialEq)]
pub struct Experience {
    /// Log-probabilities under the policy that sampled it, in nats.
    pub old_logps: Vec<f32>,
    /// Value of the state before each token when it was sampled.
    pub old_values: Vec<f32>,
    /// The advantages that the policy loss multiplies.
    pub advantages: Vec<f32>,
    /// What the value model learns.
    pub returns: Vec<f32>,
    /// Which tokens the policy loss uses.
    pub keep: TokenMask,
}

/// One batch's numbers before any update.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct ExperienceMetrics {
    /// Mean score as it was given.
    pub score: f64,
    /// Mean score after clamp, missing EOS and scale: what is paid.
    pub shaped_score: f64,
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
    pub explained_variance: Option<f64>,
    /// Share of response tokens that the policy loss uses.
    pub kept_fraction: f64,
    /// Share of responses of which it uses none.
    pub empty_mask_fraction: f64,
    /// Change of the fraction of segments against their response's sign since the run began, once it can be told.
    pub opposing_drift: Option<f64>,
    /// Segments, masks and signs, where a signal was segmented.
    pub credit: Option<DiagnosticsReport>,
}

/// What is remembered from batch to batch; part of a checkpoint.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExperienceState {
    controller: KlController,
    scale: RunningScale,
    spread: Option<CreditState>,
    credit: Option<CreditState>,
    /// Bits of each batch's opposing fraction: JSON may lose the last one.
    opposing: Vec<u64>,
}

/// Turns batches of measured responses into experience.
pub struct Shaper {
    settings: PpoSettings,
    rule: CreditRule,
    controller: KlController,
    scale: RunningScale,
    /// Segments that rewards are paid to, whatever the mask.
    spread: Option<Credit>,
    /// The mask; absent where every token is kept.
    credit: Option<Credit>,
    opposing: Vec<u64>,
}

/// What [`Shaper::shape`] makes of a batch.
pub struct Shaped {
    /// Of each response, in order.
    pub experience: Vec<Experience>,
    /// What credit made of each; empty where every token is kept unseen.
    pub credit: Vec<ResponseCredit>,
    /// The batch's numbers.
    pub metrics: ExperienceMetrics,
    /// Warnings about the masks, in words.
    pub warnings: Vec<String>,
}

impl Shaper {
    /// A shaper at the start of a run.
    ///
    /// # Errors
    /// [`Error::Setting`] for a signal or column that PPO does not have, naming the key.
    pub fn new(
        settings: &PpoSettings,
        rule: &CreditRule,
        has_reward_model: bool,
        seed: u64,
    ) -> Result<Self> {
        settings.check()?;
        check_rule(settings, rule, has_reward_model)?;
        let pays_segments = matches!(
            settings.spread,
            RewardSpread::SegmentEven | RewardSpread::SegmentLast
        );
        let segments = || {
            let mut all = rule.clone();
            all.selection = Selection::All;
            all.sequence_sign = pivotal_credit::SequenceSign::Response;
            Credit::new(all, seed)
        };
        Ok(Self {
            settings: settings.clone(),
            rule: rule.clone(),
            controller: settings.controller()?,
            scale: RunningScale::default(),
            spread: pays_segments.then(segments),
            credit: (rule.selection != Selection::All).then(|| Credit::new(rule.clone(), seed)),
            opposing: Vec::new(),
        })
    }

    /// What a checkpoint keeps.
    pub fn state(&self) -> ExperienceState {
        let state = |credit: &Option<Credit>| credit.as_ref().map(|credit| credit.state().clone());
        ExperienceState {
            controller: self.controller,
            scale: self.scale,
            spread: state(&self.spread),
            credit: state(&self.credit),
            opposing: self.opposing.clone(),
        }
    }

    /// Takes back what [`Shaper::state`] gave.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] if the state is of another configuration.
    pub fn restore(&mut self, state: ExperienceState, seed: u64) -> Result<()> {
        let again = |credit: &Option<Credit>, state: Option<CreditState>, what: &str| {
            match (credit, state) {
                (None, None) => Ok(None),
                (Some(credit), Some(state)) => {
                    Ok(Some(Credit::resume(credit.rule().clone(), seed, state)?))
                }
                _ => Err(Error::Checkpoint {
                    what: format!("the state of its own {what}"),
                }),
            }
        };
        self.spread = again(&self.spread, state.spread, "spread")?;
        self.credit = again(&self.credit, state.credit, "credit")?;
        (self.controller, self.scale) = (state.controller, state.scale);
        self.opposing = state.opposing;
        Ok(())
    }

    /// The coefficient that the next batch pays.
    pub fn kl_coef(&self) -> f64 {
        self.controller.kl_coef()
    }

    /// Experience of a batch of step `step` (from 1).
    ///
    /// # Errors
    /// [`Error::NotFinite`] naming the number and the rows that have it; [`Error::Credit`] for a rule that does not hold up.
    pub fn shape(&mut self, batch: &[Measured], step: u64) -> Result<Shaped> {
        check_finite(batch, step)?;
        let settings = self.settings.clone();
        let mut metrics = ExperienceMetrics {
            kl_coef: self.controller.kl_coef(),
            ..ExperienceMetrics::default()
        };
        let scores = self.scores(batch, &mut metrics)?;
        let prompts: Vec<u64> = batch.iter().map(|one| one.id).collect();
        let signs = sequence_signs(&prompts, &scores, settings.sign_baseline.into())?;
        let task = self.task_rewards(batch, &scores, &signs)?;

        let masks: Vec<Vec<bool>> = batch
            .iter()
            .map(|one| vec![true; one.old_logps.len()])
            .collect();
        let mut rewards = self.rewards(batch, &task, &masks, &mut metrics)?;
        let variance = settings.whiten_variance.into();
        if settings.whiten_rewards {
            whitened(&mut rewards, &masks, WhitenMean::Kept, variance)?;
        }
        let gae = settings.gae()?;
        let (mut advantages, mut returns, mut values) = (vec![], vec![], vec![]);
        for ((one, rewards), mask) in batch.iter().zip(&rewards).zip(&masks) {
            let (before, after) = critic(one.values.prompt_value, &one.values.levels);
            let last = pivotal_credit::AfterTruncation::from(settings.after_truncation)
                .final_value(one.ending, after);
            let found = gae.advantages(rewards, &before, mask, last)?;
            advantages.push(found.advantages);
            returns.push(found.returns);
            values.push(before);
        }
        let flat = |lists: &[Vec<f32>]| lists.concat();
        metrics.explained_variance =
            explained_variance(&flat(&values), &flat(&returns), &flat_flags(&masks))?;
        (metrics.advantage_mean, metrics.advantage_std) = mean_and_std(&flat(&advantages));
        if settings.whiten_advantages {
            whitened(&mut advantages, &masks, WhitenMean::Removed, variance)?;
        }

        let (keep, credit, warnings) =
            self.masks(batch, &values, &advantages, &signs, &mut metrics)?;
        let lists = batch.iter().zip(values).zip(advantages).zip(returns).zip(keep);
        let experience = lists
            .map(|((((one, old_values), advantages), returns), keep)| Experience {
                old_logps: one.old_logps.clone(),
                old_values,
                advantages,
                returns,
                keep,
            })
            .collect();
        Ok(Shaped {
            experience,
            credit,
            metrics,
            warnings,
        })
    }

    /// Scores as they are paid.
    fn scores(&mut self, batch: &[Measured], metrics: &mut ExperienceMetrics) -> Result<Vec<f32>> {
        let rule = self.settings.score_rule();
        let mut scores = Vec::with_capacity(batch.len());
        let share = 1.0 / batch.len().max(1) as f64;
        for one in batch {
            let shaped = rule.shape(one.score, one.ending)?;
            metrics.score += share * f64::from(one.score);
            metrics.clamped_scores += usize::from(shaped.clamped);
            metrics.truncated_fraction += share * f64::from(u8::from(shaped.missing_eos));
            metrics.response_tokens += share * one.old_logps.len() as f64;
            scores.push(shaped.score);
        }
        let scores = self.scale.scale(&scores, self.settings.score_scaling.into())?;
        metrics.shaped_score = scores.iter().map(|&score| share * f64::from(score)).sum();
        Ok(scores)
    }

    /// The task's reward of each token.
    fn task_rewards(
        &mut self,
        batch: &[Measured],
        scores: &[f32],
        signs: &[Sign],
    ) -> Result<Vec<Vec<f32>>> {
        let signals: Vec<Vec<f32>> = match self.settings.spread {
            RewardSpread::Last => vec![Vec::new(); batch.len()],
            _ => batch
                .iter()
                .map(|one| reward_signal(self.rule.signal, one))
                .collect(),
        };
        let segments = match &mut self.spread {
            Some(credit) => {
                let texts = texts(batch);
                let responses = responses(batch, &signals, signs, &texts);
                credit.assign(&responses)?
            }
            None => Vec::new(),
        };
        let spread = self.settings.spread.into();
        let paid = batch.iter().zip(scores).enumerate().map(|(index, (one, &score))| {
            let parts = SpreadParts {
                score,
                segments: segments.get(index).map_or(&[], |given| &given.segments[..]),
                signal: &signals[index],
            };
            Ok(spread_reward(spread, parts, &vec![true; one.old_logps.len()])?)
        });
        paid.collect()
    }

    /// The task's rewards less the price of the KL; the controller then takes what it was.
    fn rewards(
        &mut self,
        batch: &[Measured],
        task: &[Vec<f32>],
        masks: &[Vec<bool>],
        metrics: &mut ExperienceMetrics,
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
            let shaped = penalty.rewards(&one.old_logps, &one.reference_logps, task, mask)?;
            sum.merge(&shaped.kl);
            metrics.clamped_log_ratios += shaped.clamped_log_ratios;
            metrics.clamped_kls += shaped.clamped_kls;
            rewards.push(shaped.rewards);
        }
        let tokens = sum.tokens.max(1) as f64;
        metrics.kl = sum.k1 / batch.len().max(1) as f64;
        metrics.kl_k1 = sum.k1 / tokens;
        metrics.kl_k2 = sum.k2 / tokens;
        metrics.kl_k3 = sum.k3 / tokens;
        metrics.max_abs_log_ratio = sum.max_abs_log_ratio;
        self.controller.update(metrics.kl, batch.len() as u64)?;
        Ok(rewards)
    }

    /// Which tokens the policy loss uses, of numbers alone.
    #[expect(clippy::type_complexity, reason = "taken apart where it is called")]
    fn masks(
        &mut self,
        batch: &[Measured],
        values: &[Vec<f32>],
        advantages: &[Vec<f32>],
        signs: &[Sign],
        metrics: &mut ExperienceMetrics,
    ) -> Result<(Vec<TokenMask>, Vec<ResponseCredit>, Vec<String>)> {
        let Some(credit) = &mut self.credit else {
            metrics.kept_fraction = 1.0;
            let all = |one: &Measured| TokenMask::all(one.old_logps.len());
            return Ok((batch.iter().map(all).collect(), Vec::new(), Vec::new()));
        };
        let signals: Vec<Vec<f32>> = match credit.rule().signal {
            Signal::Critic => values.to_vec(),
            Signal::Advantage => advantages.to_vec(),
            signal if !credit.rule().needs_signal() && !reads_reward_model(signal) => {
                advantages.iter().map(|one| vec![0.0; one.len()]).collect()
            }
            signal => batch.iter().map(|one| reward_signal(signal, one)).collect(),
        };
        let texts = texts(batch);
        let mut responses = responses(batch, &signals, signs, &texts);
        for ((response, one), advantages) in responses.iter_mut().zip(batch).zip(advantages) {
            response.columns = TokenColumns {
                advantages: Some(advantages),
                old_token_logps: Some(&one.old_logps),
                token_logps: Some(&one.old_logps),
                reference_token_logps: Some(&one.reference_logps),
                ..TokenColumns::default()
            };
        }
        let given = credit.assign(&responses)?;
        let mut diagnostics = Diagnostics::new(DECISIVE_PROBABILITY);
        for (one, given) in batch.iter().zip(&given) {
            diagnostics.observe(given, None, Some(&one.old_logps))?;
        }
        let report = diagnostics.report();
        self.opposing.push(report.opposing_fraction.to_bits());
        let mut drift = Drift::new(DRIFT_STEPS);
        self.opposing
            .iter()
            .for_each(|&bits| drift.push(f64::from_bits(bits)));
        let thresholds = Thresholds::default();
        let warnings = thresholds.warnings(&report, credit.rule()).into_iter();
        let warnings = warnings.chain(thresholds.drift_warning(&drift));
        let warnings = warnings.map(|warning| warning.to_string()).collect();
        metrics.kept_fraction = report.kept_fraction;
        metrics.empty_mask_fraction = report.empty_mask_fraction;
        metrics.opposing_drift = drift.change();
        metrics.credit = Some(report);
        let keep = given.iter().map(|given| given.keep.clone()).collect();
        Ok((keep, given, warnings))
    }
}

fn check_rule(settings: &PpoSettings, rule: &CreditRule, has_reward_model: bool) -> Result<()> {
    let setting = |key, found: String, expected| {
        Err(Error::Setting {
            key,
            found,
            expected,
        })
    };
    if rule.weighting == pivotal_credit::Weighting::Soft {
        let expected = "hard: the losses of these recipes take masks, not weights";
        return setting("credit-weighting", "soft".into(), expected);
    }
    let pays_signal = settings.spread != RewardSpread::Last;
    let masks = rule.selection != Selection::All;
    if pays_signal && !reads_reward_model(rule.signal) {
        let expected = "level or increment: the spread pays the reward model's signal";
        return setting("credit-signal", rule.signal.to_string(), expected);
    }
    let reads = pays_signal || (masks && rule.needs_signal());
    if reads && reads_reward_model(rule.signal) && !has_reward_model {
        let expected = "critic or advantage, or a reward model for level and increment";
        return setting("credit-signal", rule.signal.to_string(), expected);
    }
    let known = reads_reward_model(rule.signal)
        || matches!(rule.signal, Signal::Critic | Signal::Advantage);
    if reads && !known {
        let expected = "critic, advantage, or with a reward model level or increment; `--credit-selection all` needs none";
        return setting("credit-signal", rule.signal.to_string(), expected);
    }
    if rule.needs_truth() {
        let expected = "a selection that needs no labels: samples have none";
        return setting("credit-selection", "truth".into(), expected);
    }
    let missing = rule.needed_columns().into_iter().find(|(column, _)| {
        matches!(
            column,
            pivotal_credit::TokenColumn::PolicyEntropies
                | pivotal_credit::TokenColumn::ReferenceEntropies
        )
    });
    match missing {
        Some((_, by)) if masks || pays_signal => {
            let expected = "a rule without entropies: this recipe does not take them";
            setting("credit", by.to_owned(), expected)
        }
        _ => Ok(()),
    }
}

fn reads_reward_model(signal: Signal) -> bool {
    matches!(signal, Signal::Level | Signal::Increment)
}

/// `level` or `increment`; nothing without a reward model, which [`check_rule`] refuses where it is read.
fn reward_signal(signal: Signal, one: &Measured) -> Vec<f32> {
    match (&one.levels, signal) {
        (Some(levels), Signal::Increment) => increment(levels.prompt_value, &levels.levels),
        (Some(levels), _) => levels.levels.clone(),
        (None, _) => vec![0.0; one.old_logps.len()],
    }
}

fn texts(batch: &[Measured]) -> Vec<Option<Vec<&str>>> {
    batch
        .iter()
        .map(|one| {
            one.texts
                .as_ref()
                .map(|texts| texts.iter().map(String::as_str).collect())
        })
        .collect()
}

fn responses<'a>(
    batch: &[Measured],
    signals: &'a [Vec<f32>],
    signs: &[Sign],
    texts: &'a [Option<Vec<&'a str>>],
) -> Vec<Response<'a>> {
    let parts = batch.iter().zip(signals).zip(signs).zip(texts);
    parts
        .map(|(((one, signal), &sign), texts)| {
            let mut response = Response::new(one.id, one.sample, signal, sign);
            response.texts = texts.as_deref();
            response
        })
        .collect()
}

fn check_finite(batch: &[Measured], step: u64) -> Result<()> {
    type Numbers = fn(&Measured) -> Vec<f32>;
    let columns: [(&'static str, Numbers); 5] = [
        ("score", |one| vec![one.score]),
        ("old_logps", |one| one.old_logps.clone()),
        ("reference_logps", |one| one.reference_logps.clone()),
        ("values", |one| with_prompt(&one.values)),
        ("reward_model_values", |one| {
            one.levels.as_ref().map_or(Vec::new(), with_prompt)
        }),
    ];
    for (metric, numbers) in columns {
        let bad = batch
            .iter()
            .filter(|one| numbers(one).iter().any(|number| !number.is_finite()));
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

fn with_prompt(values: &ResponseValues) -> Vec<f32> {
    let mut all = values.levels.clone();
    all.push(values.prompt_value);
    all
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

fn flat_flags(masks: &[Vec<bool>]) -> Vec<bool> {
    masks.concat()
}

fn mean_and_std(values: &[f32]) -> (f64, f64) {
    let count = values.len().max(1) as f64;
    let mean = values.iter().map(|&value| f64::from(value)).sum::<f64>() / count;
    let squares = values.iter().map(|&value| (f64::from(value) - mean).powi(2));
    (mean, (squares.sum::<f64>() / count).sqrt())
}
