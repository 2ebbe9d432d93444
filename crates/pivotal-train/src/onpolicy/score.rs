//! The score of each response: checks, a reward model, or both weighted.

use std::path::Path;

use pivotal_loss::ScoreAggregation;
use pivotal_model::{Finish, RewardModel};

use super::check::{Check, Pattern};
use super::command::CommandCheck;
use super::prompts::Prompt;
use super::sample::{Rollout, groups_of};
use super::settings::{CheckScore, ScoreSettings};
use crate::error::{Error, Result};
use crate::score::{Group, ResponseValues, token_values};
use crate::settings::Precision;
use crate::workspace::Workspace;

/// What a response was found to be worth.
#[derive(Clone, Debug, PartialEq)]
pub struct ResponseScore {
    /// The weighted sum of the parts, less the penalty.
    pub total: f32,
    /// The weighted sum of the parts.
    pub parts: f32,
    /// The penalty, where it was cut off at its longest length; else 0.
    pub penalty: f32,
    /// What its checks come to, 0 to 1; `None` without checks.
    pub checks: Option<f32>,
    /// The reward model's values of its tokens; `None` without one.
    pub values: Option<ResponseValues>,
    /// The reward model's score of the whole; `None` without one.
    pub reward: Option<f32>,
}

/// Whatever scores responses.
#[derive(Debug)]
pub struct Scorer {
    settings: ScoreSettings,
    everywhere: Vec<Check>,
    command: Option<CommandCheck>,
    reward_model: Option<RewardModel>,
    micro_batch_tokens: usize,
}

impl Scorer {
    /// The scorer that `settings` name.
    ///
    /// # Errors
    /// [`Error::Setting`] for a regular expression that is none or a model without a value head.
    pub fn new(
        settings: &ScoreSettings,
        workspace: &Workspace,
        precision: Precision,
        micro_batch_tokens: usize,
    ) -> Result<Self> {
        let everywhere = match settings.regex.is_empty() {
            true => vec![],
            false => {
                let pattern = Pattern::new(&settings.regex);
                let pattern = pattern.map_err(|why| Error::Setting {
                    key: "regex",
                    found: format!("`{}` ({why})", settings.regex),
                    expected: "a regular expression",
                })?;
                vec![Check::Regex { pattern }]
            }
        };
        let path = &settings.reward_model;
        let reward_model = match path.as_os_str().is_empty() {
            true => None,
            false => Some(workspace.reward_model("reward-model", path, precision)?),
        };
        Ok(Self {
            settings: settings.clone(),
            everywhere,
            command: CommandCheck::new(&settings.command, settings.command_seconds),
            reward_model,
            micro_batch_tokens,
        })
    }

    /// Checks that each of `prompts`, of the file that the setting `key` names, has something to be scored by.
    ///
    /// # Errors
    /// [`Error::Record`], naming the row that has neither a check nor anything else.
    pub fn check_prompts(&self, key: &str, path: &Path, prompts: &[Prompt]) -> Result<()> {
        let general =
            self.reward_model.is_some() || self.command.is_some() || !self.everywhere.is_empty();
        match prompts.iter().find(|prompt| prompt.checks.is_empty()) {
            Some(prompt) if !general => Err(Error::Record {
                path: path.into(),
                line: prompt.id as usize,
                what: format!(
                    "there is no `answer` and no `checks`, expected something that scores every row of `--{key}`: \
                     checks, `--regex`, `--command` or `--reward-model`"
                ),
            }),
            _ => Ok(()),
        }
    }

    /// The reward model, where there is one.
    pub fn reward_model(&self) -> Option<&RewardModel> {
        self.reward_model.as_ref()
    }

    /// The score of each of `rollouts`, whose prompts `prompts` holds.
    ///
    /// # Errors
    /// [`Error::Command`] if the command cannot be run; [`Error::Model`] if a response does not fit the reward model.
    pub fn score(&self, prompts: &[&Prompt], rollouts: &[Rollout]) -> Result<Vec<ResponseScore>> {
        let values = self.values(prompts, rollouts)?;
        let score = |(rollout, values): (&Rollout, Option<ResponseValues>)| {
            let checks = self.checks(prompts[rollout.prompt], rollout)?;
            let reward = values.as_ref().map(|values| self.aggregate(&values.levels));
            let settings = &self.settings;
            let penalty = match rollout.finish {
                Finish::Length => settings.missing_eos_penalty,
                Finish::Eos | Finish::Stop => 0.0,
            };
            let parts = settings.check_weight * f64::from(checks.unwrap_or(0.0))
                + settings.reward_weight * f64::from(reward.unwrap_or(0.0));
            Ok(ResponseScore {
                total: (parts - penalty) as f32,
                parts: parts as f32,
                penalty: penalty as f32,
                checks,
                values,
                reward,
            })
        };
        rollouts.iter().zip(values).map(score).collect()
    }

    fn checks(&self, prompt: &Prompt, rollout: &Rollout) -> Result<Option<f32>> {
        let text = &rollout.text;
        let own = prompt.checks.iter().chain(&self.everywhere);
        let mut held: Vec<bool> = own.map(|check| check.holds(text)).collect();
        if let Some(command) = &self.command {
            held.push(command.holds(prompt.id, text, &prompt.reference)?);
        }
        let passed = held.iter().filter(|&&held| held).count();
        Ok((!held.is_empty()).then(|| match self.settings.check_score {
            CheckScore::Fraction => passed as f32 / held.len() as f32,
            CheckScore::All => f32::from(u8::from(passed == held.len())),
        }))
    }

    fn aggregate(&self, levels: &[f32]) -> f32 {
        let sum = || levels.iter().map(|&level| f64::from(level)).sum::<f64>();
        let score = match self.settings.reward_aggregation.into() {
            ScoreAggregation::Mean => sum() / levels.len().max(1) as f64,
            ScoreAggregation::Sum => sum(),
            ScoreAggregation::Last => levels.last().copied().map_or(0.0, f64::from),
        };
        score as f32
    }

    fn values(
        &self,
        prompts: &[&Prompt],
        rollouts: &[Rollout],
    ) -> Result<Vec<Option<ResponseValues>>> {
        let Some(model) = &self.reward_model else {
            return Ok(vec![None; rollouts.len()]);
        };
        let order = groups_of(rollouts);
        let groups: Vec<Group<'_>> = order
            .iter()
            .map(|range| Group {
                prompt: &prompts[rollouts[range.start].prompt].token_ids,
                responses: rollouts[range.clone()]
                    .iter()
                    .map(|rollout| &rollout.token_ids[..])
                    .collect(),
            })
            .collect();
        let values = token_values(model, &groups, self.micro_batch_tokens)?;
        Ok(values.into_iter().flatten().map(Some).collect())
    }
}
