//! Segment credit on sampled responses.

use pivotal_core::{Sign, TokenMask};
use pivotal_credit::{
    Credit, CreditConfig, CreditRule, CreditState, Cut, Diagnostics, Response, ResponseCredit,
    Selection, Signal, TokenColumn, Weighting, increment, log_ratio,
};
use pivotal_data::Tokenizer;
use pivotal_kernels::account::{Part, time};
use pivotal_model::Decoder;
use serde::{Deserialize, Serialize};

use super::layout::Layout;
use super::sample::Rollout;
use super::score::ResponseScore;
use super::settings::{ScoreSettings, SignalSettings};
use super::state::{from_state_text, state_text};
use crate::diagnosis::{CreditNumbers, WarningSettings, Watch, WatchState};
use crate::error::{Error, Result};

/// Credit over the batches of a run, with its diagnostics.
#[derive(Debug)]
pub struct RolloutCredit {
    credit: Credit,
    watch: Watch,
    seed: u64,
}

/// What a checkpoint keeps.
#[derive(Serialize, Deserialize)]
struct State {
    credit: CreditState,
    watch: WatchState,
}

/// What the signals and rules are made of, each `[rollouts][tokens]`. Empty lists are not known.
#[derive(Clone, Copy, Debug)]
pub struct SignalInputs<'a> {
    /// Log-probabilities of the policy that sampled, in nats.
    pub old_logps: &'a [Vec<f32>],
    /// The same under the reference.
    pub reference_logps: &'a [Vec<f32>],
    /// The log-ratio's two sides.
    pub oracle: &'a OracleLogps,
    /// The factor of the log-ratio.
    pub signal_beta: f32,
    /// The update's advantages.
    pub advantages: &'a [Vec<f32>],
    /// The value model's value of the state before each token.
    pub critic: &'a [Vec<f32>],
    /// Whether each token is right, where the world knows: for the selection `truth`.
    pub truth: &'a [Vec<bool>],
}

/// Log-probabilities at temperature 1, `[rollouts][tokens]` in nats; empty without an oracle.
///
/// What an oracle learnt is the ratio of the models themselves, whatever the temperature that responses are sampled at.
#[derive(Clone, Debug, Default)]
pub struct OracleLogps {
    /// Under the oracle.
    pub oracle: Vec<Vec<f32>>,
    /// Under the reference.
    pub reference: Vec<Vec<f32>>,
}

impl OracleLogps {
    /// Those of the rollouts of `layout`; nothing without an oracle.
    ///
    /// # Errors
    /// If a sequence does not fit a model.
    pub fn of(
        oracle: Option<&Decoder>,
        reference: &Decoder,
        layout: &Layout,
        rollouts: &[Rollout],
    ) -> Result<Self> {
        let Some(oracle) = oracle else {
            return Ok(Self::default());
        };
        Ok(Self {
            oracle: layout.token_logps(oracle, rollouts, 1.0)?,
            reference: layout.token_logps(reference, rollouts, 1.0)?,
        })
    }
}

impl RolloutCredit {
    /// Credit under `config`; `more` is what [`RolloutCredit::state`] gave, empty at the start of a run.
    ///
    /// # Errors
    /// [`Error::Credit`] for a rule that does not hold up; [`Error::Setting`] for soft weights and for what rollouts lack.
    pub fn new(config: &CreditConfig, seed: u64, more: &str) -> Result<Self> {
        let rule = config.resolve()?;
        if rule.weighting == Weighting::Soft {
            return Err(Error::Setting {
                key: "credit-weighting",
                found: "soft".into(),
                expected: "hard: the losses of these recipes take masks, not weights",
            });
        }
        let needs_external = rule.needs_signal() && rule.signal == Signal::External;
        if needs_external {
            return Err(Error::Setting {
                key: "credit-signal",
                found: "external".into(),
                expected: "log_ratio, level, increment, critic or advantage: sampled responses have no columns",
            });
        }
        let state: Option<State> = from_state_text(more)?;
        Ok(match state {
            None => Self {
                credit: Credit::new(rule, seed),
                watch: Watch::new(&WarningSettings::default(), None),
                seed,
            },
            Some(State { credit, watch }) => Self {
                credit: Credit::resume(rule, seed, credit)?,
                watch: Watch::new(&WarningSettings::default(), Some(watch)),
                seed,
            },
        })
    }

    /// The same with warnings under `settings`.
    #[must_use]
    pub fn with_warnings(mut self, settings: &WarningSettings) -> Self {
        self.watch = self.watch.under(settings);
        self
    }

    /// Checks before a run is made that the recipe can give what `config` asks for; `with_critic` says whether it has a value model.
    ///
    /// # Errors
    /// [`Error::Setting`] naming what lacks; [`Error::Credit`] for a rule that does not hold up.
    pub fn check(
        config: &CreditConfig,
        score: &ScoreSettings,
        signal: &SignalSettings,
        with_critic: bool,
    ) -> Result<()> {
        let credit = Self::new(config, 0, "")?;
        let rule = credit.rule();
        let lacking = |key, found: String, expected| {
            Err(Error::Setting {
                key,
                found,
                expected,
            })
        };
        if rule.needs_truth() || matches!(rule.cut, Cut::External) {
            let expected = "a rule for sampled responses, of which no truth and no cuts are known";
            return lacking(
                "credit",
                "a selection or cut from the data".into(),
                expected,
            );
        }
        let entropies = [
            TokenColumn::ReferenceEntropies,
            TokenColumn::PolicyEntropies,
        ];
        let mut needed = rule.needed_columns().into_iter();
        if let Some((_, by)) = needed.find(|(column, _)| entropies.contains(column)) {
            let expected = "a rule that reads no entropies: this recipe does not compute them";
            return lacking("credit", by.to_owned(), expected);
        }
        if !rule.needs_signal() {
            return Ok(());
        }
        let found = rule.signal.to_string();
        match rule.signal {
            Signal::LogRatio => signal.require_oracle().map(|_| ()),
            Signal::Level | Signal::Increment if score.reward_model.as_os_str().is_empty() => {
                lacking(
                    "credit-signal",
                    found,
                    "another signal, or `--reward-model`",
                )
            }
            Signal::Critic if !with_critic => {
                lacking("credit-signal", found, "a recipe with a value model: `ppo`")
            }
            _ => Ok(()),
        }
    }

    /// The rule.
    pub fn rule(&self) -> &CreditRule {
        self.credit.rule()
    }

    /// The run's seed.
    pub fn seed(&self) -> u64 {
        self.seed
    }

    /// What a checkpoint must keep.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] if it cannot be written.
    pub fn state(&self) -> Result<String> {
        state_text(&State {
            credit: self.credit.state().clone(),
            watch: self.watch.state().clone(),
        })
    }

    /// The credit of each rollout, `None` where every token is kept without a signal, and the step's numbers.
    ///
    /// The masks are made of numbers: no gradient goes through them.
    ///
    /// # Errors
    /// [`Error::Setting`] if the recipe cannot give the signal; [`Error::Credit`] naming the response whose signal or column does
    /// not hold up.
    pub fn assign(
        &mut self,
        rollouts: &[Rollout],
        scores: &[ResponseScore],
        signs: &[Sign],
        inputs: SignalInputs<'_>,
        tokenizer: &Tokenizer,
    ) -> Result<(Option<Vec<ResponseCredit>>, CreditNumbers)> {
        let rule = self.credit.rule().clone();
        if rule.selection == Selection::All {
            return Ok((None, CreditNumbers::keep_all()));
        }
        let signal = signals(&rule, rollouts, scores, inputs)?;
        let texts = match rule.needs_texts() {
            false => None,
            true => {
                let texts = rollouts
                    .iter()
                    .map(|rollout| tokenizer.token_texts(&rollout.token_ids));
                Some(texts.collect::<Result<Vec<_>, _>>()?)
            }
        };
        let texts: Option<Vec<Vec<&str>>> = texts.as_ref().map(|all| {
            all.iter()
                .map(|texts| texts.iter().map(String::as_str).collect())
                .collect()
        });
        let batch: Vec<Response<'_>> = (0..rollouts.len())
            .map(|index| {
                let rollout = &rollouts[index];
                let sample = rollout.sample as u32;
                let mut response = Response::new(rollout.id, sample, &signal[index], signs[index]);
                response.texts = texts.as_ref().map(|texts| &texts[index][..]);
                response.truth = inputs.truth.get(index).map(Vec::as_slice);
                let columns = &mut response.columns;
                columns.old_token_logps = column(inputs.old_logps, index);
                // Masks are made before the first update: the policy is the one that sampled.
                columns.token_logps = column(inputs.old_logps, index);
                columns.reference_token_logps = column(inputs.reference_logps, index);
                columns.advantages = column(inputs.advantages, index);
                response
            })
            .collect();
        let given = time(Part::Credit, || self.credit.assign(&batch))?;
        let numbers = self.numbers(&rule, &given, inputs.old_logps)?;
        Ok((Some(given), numbers))
    }

    fn numbers(
        &mut self,
        rule: &CreditRule,
        given: &[ResponseCredit],
        old_logps: &[Vec<f32>],
    ) -> Result<CreditNumbers> {
        let mut diagnostics = Diagnostics::default();
        for (index, credit) in given.iter().enumerate() {
            diagnostics.observe(credit, None, column(old_logps, index))?;
        }
        Ok(self.watch.credit(&diagnostics, rule))
    }
}

/// The masks of `given`; every token where there is none.
pub fn masks(rollouts: &[Rollout], given: Option<&[ResponseCredit]>) -> Vec<TokenMask> {
    match given {
        Some(given) => given.iter().map(|credit| credit.keep.clone()).collect(),
        None => rollouts
            .iter()
            .map(|rollout| TokenMask::all(rollout.token_ids.len()))
            .collect(),
    }
}

fn column(of: &[Vec<f32>], index: usize) -> Option<&[f32]> {
    of.get(index).map(Vec::as_slice)
}

/// The signal of each rollout; zeros where the rule reads none.
fn signals(
    rule: &CreditRule,
    rollouts: &[Rollout],
    scores: &[ResponseScore],
    inputs: SignalInputs<'_>,
) -> Result<Vec<Vec<f32>>> {
    let lacking = |what: &'static str| Error::Setting {
        key: "credit-signal",
        found: rule.signal.to_string(),
        expected: what,
    };
    let given = |of: &[Vec<f32>], what| match of.len() == rollouts.len() {
        true => Ok(of.to_vec()),
        false => Err(lacking(what)),
    };
    if !rule.needs_signal() {
        let zeros = rollouts
            .iter()
            .map(|rollout| vec![0.0; rollout.token_ids.len()]);
        return Ok(zeros.collect());
    }
    match rule.signal {
        Signal::LogRatio => {
            let what = "a signal that does not need `--oracle`";
            let OracleLogps { oracle, reference } = inputs.oracle;
            let (oracle, reference) = (given(oracle, what)?, given(reference, what)?);
            let pairs = oracle.iter().zip(&reference);
            let ratio = |(oracle, reference): (&Vec<f32>, &Vec<f32>)| {
                Ok(log_ratio(inputs.signal_beta, oracle, reference)?)
            };
            pairs.map(ratio).collect()
        }
        Signal::Level | Signal::Increment => scores
            .iter()
            .map(|score| {
                let values = score.values.as_ref();
                let values =
                    values.ok_or_else(|| lacking("a signal that needs no `--reward-model`"))?;
                Ok(match rule.signal {
                    Signal::Increment => increment(values.prompt_value, &values.levels),
                    _ => values.levels.clone(),
                })
            })
            .collect(),
        Signal::Advantage => given(inputs.advantages, "a recipe with advantages"),
        Signal::Critic => given(inputs.critic, "a recipe with a value model: `ppo`"),
        Signal::External => Err(lacking("a signal that sampled responses have")),
    }
}
