//! Held-out prompts along the run.

use std::path::Path;

use pivotal_data::Tokenizer;
use pivotal_model::{Decoder, Finish};
use serde::{Deserialize, Serialize};

use super::prompts::{Prompt, read_prompts};
use super::record::{RolloutRecord, StepLog};
use super::sample::Sampler;
use super::score::Scorer;
use super::settings::{EvalSettings, PromptSettings, ScoreSettings};
use crate::error::Result;
use crate::settings::Precision;
use crate::workspace::Workspace;

/// A line of `evaluations.jsonl`: means over the held-out prompts, answered greedily.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Evaluation {
    /// Steps taken before.
    pub step: u64,
    /// The score.
    pub score: f64,
    /// The part of it that checks gave; absent without checks.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub checks: Option<f64>,
    /// Share of the responses of which every check holds.
    pub all_checks: f64,
    /// Tokens of a response.
    pub response_tokens: f64,
    /// Share of the responses that ended by themselves.
    pub ended_fraction: f64,
}

/// Held-out prompts, and the files that tell how the policy does on them: `evaluations.jsonl`, and its responses in
/// `evaluation_rollouts.jsonl`.
#[derive(Debug)]
pub struct Evaluator {
    prompts: Vec<Prompt>,
    scorer: Scorer,
    every: u64,
    first: Option<Evaluation>,
    last: Option<Evaluation>,
    log: Option<(StepLog, StepLog)>,
}

impl Evaluator {
    /// Reads the held-out prompts; `None` where the settings name none.
    ///
    /// # Errors
    /// As [`read_prompts`], [`Scorer::new`] and [`Scorer::check_prompts`].
    pub fn new(
        settings: &EvalSettings,
        data: &PromptSettings,
        score: &ScoreSettings,
        workspace: &Workspace,
        precision: Precision,
        micro_batch_tokens: usize,
    ) -> Result<Option<Self>> {
        if settings.path.as_os_str().is_empty() {
            return Ok(None);
        }
        let data = PromptSettings {
            path: settings.path.clone(),
            ..data.clone()
        };
        let prompts = read_prompts(&data, workspace)?;
        let scorer = Scorer::new(score, workspace, precision, micro_batch_tokens)?;
        scorer.check_prompts("eval-data", &data.path, &prompts)?;
        Ok(Some(Self {
            prompts,
            scorer,
            every: settings.every,
            first: None,
            last: None,
            log: None,
        }))
    }

    /// Opens the files of a run that stands at `step`.
    ///
    /// # Errors
    /// [`crate::Error::File`].
    pub fn open(&mut self, run: &Path, step: u64) -> Result<()> {
        let log = StepLog::open(run, "evaluations.jsonl", step)?;
        let text = std::fs::read_to_string(run.join("evaluations.jsonl")).unwrap_or_default();
        let known = |line: &str| serde_json::from_str::<Evaluation>(line).ok();
        let known: Vec<Evaluation> = text.lines().filter_map(known).collect();
        // Responses are written before the line that sums them up: those of an evaluation that was cut short go.
        let whole = |step| known.iter().any(|evaluation| evaluation.step == step);
        let rollouts = StepLog::open_where(run, "evaluation_rollouts.jsonl", whole)?;
        self.first = known.first().copied();
        self.last = known.last().copied();
        self.log = Some((log, rollouts));
        Ok(())
    }

    /// Evaluates `policy` after `step` of `steps` steps, where it is time to and it was not done.
    ///
    /// # Errors
    /// Whatever sampling, scoring or writing meets.
    pub fn after(
        &mut self,
        step: u64,
        steps: u64,
        policy: &mut Decoder,
        sampler: &mut Sampler,
        tokenizer: &Tokenizer,
    ) -> Result<()> {
        let due = step == 0 || step == steps || (self.every > 0 && step.is_multiple_of(self.every));
        if !due || self.last.is_some_and(|last| last.step == step) {
            return Ok(());
        }
        let prompts: Vec<&Prompt> = self.prompts.iter().collect();
        let rollouts = sampler.greedy(policy, &prompts, tokenizer, step)?;
        let scores = self.scorer.score(&prompts, &rollouts)?;
        let mean = |values: &mut dyn Iterator<Item = f64>| {
            values.sum::<f64>() / rollouts.len().max(1) as f64
        };
        let checked = scores.iter().any(|score| score.checks.is_some());
        let checks = |score: &super::ResponseScore| f64::from(score.checks.unwrap_or(0.0));
        let share = |flag: bool| f64::from(u8::from(flag));
        let evaluation = Evaluation {
            step,
            score: mean(&mut scores.iter().map(|score| f64::from(score.total))),
            checks: checked.then(|| mean(&mut scores.iter().map(checks))),
            all_checks: mean(&mut scores.iter().map(|score| share(score.checks == Some(1.0)))),
            response_tokens: mean(&mut rollouts.iter().map(|r| r.token_ids.len() as f64)),
            ended_fraction: mean(
                &mut rollouts
                    .iter()
                    .map(|rollout| share(rollout.finish != Finish::Length)),
            ),
        };
        if let Some((log, rollout_log)) = &mut self.log {
            let records = rollouts.iter().zip(&scores);
            rollout_log
                .write(records.map(|(rollout, score)| RolloutRecord::new(step, rollout, score)))?;
            log.write([evaluation])?;
            rollout_log.sync()?;
            log.sync()?;
        }
        self.first.get_or_insert(evaluation);
        self.last = Some(evaluation);
        Ok(())
    }

    /// The first and the last evaluation of the run.
    pub fn ends(&self) -> Option<[Evaluation; 2]> {
        Some([self.first?, self.last?])
    }
}
