//! The baseline b that parts good signal from bad (METHOD, section 3).

use std::collections::{HashMap, VecDeque};

use pivotal_core::statistics::quantile;
use serde::{Deserialize, Serialize};

use crate::named::named_enum;
use crate::select::relative_bin;
use crate::{Error, Result, calibrate};

/// A baseline rule with its parameters. Statistics are over tokens, the current batch included.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Baseline {
    /// This number.
    Fixed(f32),
    /// The batch's mean.
    BatchMean,
    /// The mean over the batch's responses to the same prompt.
    PromptMean,
    /// The mean over all batches so far, a batch's tokens counting `decay` times less with every batch after it.
    RunningMean {
        /// 0: this batch only; 1: all alike.
        decay: f64,
    },
    /// A quantile over the last `window` tokens.
    Quantile {
        /// Between 0 and 1.
        q: f64,
        /// Tokens remembered.
        window: usize,
    },
    /// The mean at the same position over all batches so far, forgetting as in `RunningMean`.
    PositionMean {
        /// What "the same position" is.
        positions: Positions,
        /// Number of relative positions; unused by absolute ones.
        bins: usize,
        /// 0: this batch only; 1: all alike.
        decay: f64,
    },
    /// The threshold that best separates the tokens of positive responses from those of negative ones, on a part of the
    /// first batch's prompts; it then stays.
    Calibrated {
        /// The part of the prompts, above 0 and up to 1.
        fraction: f64,
    },
}

named_enum! {
    /// Which tokens of two responses are at the same position.
    pub enum Positions {
        /// Those with the same index.
        Absolute = "absolute",
        /// Those in the same of `bins` equal parts of their response.
        Relative = "relative",
    }
}

impl Baseline {
    /// The rule's name in configuration files.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Fixed(_) => "fixed",
            Self::BatchMean => "batch_mean",
            Self::PromptMean => "prompt_mean",
            Self::RunningMean { .. } => "running_mean",
            Self::Quantile { .. } => "quantile",
            Self::PositionMean { .. } => "position_mean",
            Self::Calibrated { .. } => "calibrated",
        }
    }
}

/// One response's baseline as numbers.
#[derive(Clone, Debug, PartialEq)]
pub enum ResolvedBaseline {
    /// The same for every token.
    Constant(f32),
    /// One a token.
    PerToken(Vec<f32>),
}

/// A sum whose old terms fade.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct FadingMean {
    #[serde(with = "crate::exact")]
    sum: f64,
    #[serde(with = "crate::exact")]
    weight: f64,
}

impl FadingMean {
    fn fade(&mut self, decay: f64) {
        self.sum *= decay;
        self.weight *= decay;
    }

    fn push(&mut self, value: f32) {
        self.sum += f64::from(value);
        self.weight += 1.0;
    }

    fn mean(&self) -> f32 {
        if self.weight > 0.0 {
            (self.sum / self.weight) as f32
        } else {
            0.0
        }
    }
}

/// What a baseline remembers between batches. Serialise it with a checkpoint and a resumed run continues bit for bit.
///
/// # Examples
/// ```
/// use pivotal_credit::{Baseline, BaselineState, ResolvedBaseline};
/// let mut state = BaselineState::new(Baseline::RunningMean { decay: 0.5 });
/// assert_eq!(state.resolve(&[(7, &[1.0, 3.0])]), [ResolvedBaseline::Constant(2.0)]);
/// // Now the first batch counts half: (0.5 · 4 + 9) / (0.5 · 2 + 2).
/// assert_eq!(state.resolve(&[(8, &[4.0, 5.0])]), [ResolvedBaseline::Constant(11.0 / 3.0)]);
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BaselineState {
    rule: Baseline,
    running: FadingMean,
    window: VecDeque<f32>,
    positions: Vec<FadingMean>,
    /// The threshold found, by `Calibrated`.
    #[serde(default)]
    threshold: Option<f32>,
}

impl BaselineState {
    /// A state that has seen nothing.
    pub fn new(rule: Baseline) -> Self {
        Self {
            rule,
            running: FadingMean::default(),
            window: VecDeque::new(),
            positions: Vec::new(),
            threshold: None,
        }
    }

    /// Refuses a saved state that belongs to another rule.
    ///
    /// # Errors
    /// [`Error::State`].
    pub fn expect(self, rule: Baseline) -> Result<Self> {
        if self.rule == rule {
            Ok(self)
        } else {
            Err(Error::State {
                expected: format!("{rule:?}"),
                found: format!("{:?}", self.rule),
            })
        }
    }

    /// Whether the rule is `Calibrated` and its threshold is still to be found.
    pub(crate) fn calibration_fraction(&self) -> Option<f64> {
        match (self.rule, self.threshold) {
            (Baseline::Calibrated { fraction }, None) => Some(fraction),
            _ => None,
        }
    }

    /// Finds the threshold of `Calibrated` between the tokens of positive and of negative responses.
    ///
    /// # Errors
    /// [`Error::Calibration`] if one side has no token; nothing was learnt then.
    pub fn calibrate(&mut self, positive: &[f32], negative: &[f32]) -> Result<()> {
        let found = calibrate(positive, negative).ok_or(Error::Calibration {
            positive: positive.len(),
            negative: negative.len(),
        })?;
        self.threshold = Some(found.threshold);
        Ok(())
    }

    /// Takes one batch in, `(prompt id, signal)` of each response, and returns each response's baseline. Before any token
    /// was seen, a mean or quantile is 0, and so is a threshold before [`calibrate`](Self::calibrate).
    pub fn resolve(&mut self, batch: &[(u64, &[f32])]) -> Vec<ResolvedBaseline> {
        let tokens = || batch.iter().flat_map(|(_, signal)| signal.iter().copied());
        let constant = |value| vec![ResolvedBaseline::Constant(value); batch.len()];
        match self.rule {
            Baseline::Fixed(value) => constant(value),
            Baseline::Calibrated { .. } => constant(self.threshold.unwrap_or(0.0)),
            Baseline::BatchMean => constant(mean_of(tokens())),
            Baseline::PromptMean => {
                let mut prompts: HashMap<u64, FadingMean> = HashMap::new();
                for (prompt, signal) in batch {
                    let mean = prompts.entry(*prompt).or_default();
                    signal.iter().for_each(|&reward| mean.push(reward));
                }
                batch
                    .iter()
                    .map(|(prompt, _)| prompts[prompt].mean())
                    .map(ResolvedBaseline::Constant)
                    .collect()
            }
            Baseline::RunningMean { decay } => {
                self.running.fade(decay);
                tokens().for_each(|reward| self.running.push(reward));
                constant(self.running.mean())
            }
            Baseline::Quantile { q, window } => {
                self.window.extend(tokens());
                let excess = self.window.len().saturating_sub(window);
                self.window.drain(..excess);
                constant(quantile(self.window.make_contiguous(), q).unwrap_or(0.0) as f32)
            }
            Baseline::PositionMean {
                positions,
                bins,
                decay,
            } => {
                self.positions
                    .iter_mut()
                    .for_each(|position| position.fade(decay));
                let slot = |index, tokens| match positions {
                    Positions::Absolute => index,
                    Positions::Relative => relative_bin(index, tokens, bins),
                };
                for (_, signal) in batch {
                    for (index, &reward) in signal.iter().enumerate() {
                        let slot = slot(index, signal.len());
                        if slot >= self.positions.len() {
                            self.positions.resize(slot + 1, FadingMean::default());
                        }
                        self.positions[slot].push(reward);
                    }
                }
                let per_token = |signal: &[f32]| {
                    let mean = |index| self.positions[slot(index, signal.len())].mean();
                    ResolvedBaseline::PerToken((0..signal.len()).map(mean).collect())
                };
                batch.iter().map(|(_, signal)| per_token(signal)).collect()
            }
        }
    }
}

fn mean_of(tokens: impl Iterator<Item = f32>) -> f32 {
    let mut all = FadingMean::default();
    tokens.for_each(|reward| all.push(reward));
    all.mean()
}
