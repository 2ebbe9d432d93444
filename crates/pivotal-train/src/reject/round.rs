//! One round's responses: which are accepted, what they come to, and how they are written down.

use std::collections::BTreeMap;
use std::path::Path;

use pivotal_core::{SegmentRecord, TokenMask};
use pivotal_credit::ResponseCredit;
use pivotal_data::{Content, DataSet, ReadOptions, Sample};
use pivotal_model::Finish;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::choose::{AcceptRule, Candidate, Verdict, choose_accepted};
use crate::error::Result;
use crate::onpolicy::{
    CreditNumbers, ResponseScore, Rollout, RolloutRecord, StepLog, UsedNumbers, finish_name,
    groups_of,
};

/// One round's numbers; a line of `rounds.jsonl`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct RoundNumbers {
    /// The round, from 1.
    pub round: u64,
    /// Prompts that were answered.
    pub prompts: usize,
    /// Responses that were sampled.
    pub sampled: usize,
    /// Those that were accepted.
    pub accepted: usize,
    /// Their share.
    pub accepted_fraction: f64,
    /// Responses without text.
    pub empty: usize,
    /// Responses that repeat one of the same prompt which ranks before them.
    pub duplicates: usize,
    /// Responses below the minimum score.
    pub below_minimum: usize,
    /// Prompts of which no response was accepted.
    pub prompts_without_accepted: usize,
    /// Mean score of the sampled responses.
    pub score: f64,
    /// Their standard deviation.
    pub score_std: f64,
    /// Mean over the prompts of their best response's score: best of n.
    pub best_score: f64,
    /// Mean score of the accepted responses; absent if there are none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub accepted_score: Option<f64>,
    /// Mean of what checks came to; absent without checks.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub checks: Option<f64>,
    /// Mean score of the reward model; absent without one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reward: Option<f64>,
    /// Tokens of a sampled response.
    pub response_tokens: f64,
    /// Tokens of an accepted response; absent if there are none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub accepted_tokens: Option<f64>,
    /// Share of the sampled responses that ended by themselves.
    pub ended_fraction: f64,
    /// Optimizer steps that the round makes of them.
    pub steps: u64,
    /// What credit did to the accepted responses.
    #[serde(flatten)]
    pub credit: CreditNumbers,
}

/// The verdict on each of `rollouts`.
pub(super) fn verdicts(
    rollouts: &[Rollout],
    scores: &[ResponseScore],
    rule: AcceptRule,
) -> Vec<Verdict> {
    let candidates: Vec<Candidate<'_>> = rollouts
        .iter()
        .zip(scores)
        .map(|(rollout, score)| Candidate {
            prompt: rollout.id,
            score: score.total,
            token_ids: &rollout.token_ids,
            text: &rollout.text,
        })
        .collect();
    choose_accepted(&candidates, rule)
}

/// Indices of the accepted of `rollouts`, prompt by prompt, the best of each first.
pub(super) fn accepted_order(rollouts: &[Rollout], verdicts: &[Verdict]) -> Vec<usize> {
    let mut order: Vec<(usize, usize, usize)> = Vec::new();
    for (index, (rollout, verdict)) in rollouts.iter().zip(verdicts).enumerate() {
        if let Verdict::Accepted { rank } = *verdict {
            order.push((rollout.prompt, rank, index));
        }
    }
    order.sort_unstable();
    order.into_iter().map(|(_, _, index)| index).collect()
}

impl RoundNumbers {
    /// What is known before credit is given: the rest is empty.
    pub(super) fn of(
        round: u64,
        rollouts: &[Rollout],
        scores: &[ResponseScore],
        verdicts: &[Verdict],
    ) -> Self {
        let groups = groups_of(rollouts);
        let count = |of: &dyn Fn(&Verdict) -> bool| verdicts.iter().filter(|one| of(one)).count();
        let accepted: Vec<usize> = (0..rollouts.len())
            .filter(|&index| verdicts[index].is_accepted())
            .collect();
        let total = |index: usize| f64::from(scores[index].total);
        let tokens = |index: usize| rollouts[index].token_ids.len() as f64;
        let all = || 0..rollouts.len();
        let score = mean(all().map(total)).unwrap_or(0.0);
        let variance = mean(all().map(|index| (total(index) - score).powi(2)));
        let best = groups.iter().map(|group| {
            let scores = group.clone().map(total);
            scores.fold(f64::NEG_INFINITY, f64::max)
        });
        let without = groups.iter().filter(|group| {
            let mut of_group = (*group).clone();
            !of_group.any(|index| verdicts[index].is_accepted())
        });
        let ended = |index: usize| f64::from(u8::from(rollouts[index].finish != Finish::Length));
        let known = |of: &dyn Fn(&ResponseScore) -> Option<f32>| {
            mean(scores.iter().filter_map(of).map(f64::from))
        };
        Self {
            round,
            prompts: groups.len(),
            sampled: rollouts.len(),
            accepted: accepted.len(),
            accepted_fraction: accepted.len() as f64 / rollouts.len().max(1) as f64,
            empty: count(&|one| *one == Verdict::Empty),
            duplicates: count(&|one| matches!(one, Verdict::Duplicate { .. })),
            below_minimum: count(&|one| *one == Verdict::BelowMinimum),
            prompts_without_accepted: without.count(),
            score,
            score_std: variance.unwrap_or(0.0).sqrt(),
            best_score: mean(best).unwrap_or(0.0),
            accepted_score: mean(accepted.iter().copied().map(total)),
            checks: known(&|score| score.checks),
            reward: known(&|score| score.reward),
            response_tokens: mean(all().map(tokens)).unwrap_or(0.0),
            accepted_tokens: mean(accepted.iter().copied().map(tokens)),
            ended_fraction: mean(all().map(ended)).unwrap_or(0.0),
            steps: 0,
            credit: CreditNumbers::default(),
        }
    }
}

/// `None` of nothing.
fn mean(values: impl Iterator<Item = f64>) -> Option<f64> {
    let (mut sum, mut count) = (0.0, 0_u64);
    for value in values {
        sum += value;
        count += 1;
    }
    (count > 0).then(|| sum / count as f64)
}

/// What a round found.
#[derive(Clone, Copy)]
pub(super) struct Found<'a> {
    /// The responses sampled.
    pub rollouts: &'a [Rollout],
    /// Their scores.
    pub scores: &'a [ResponseScore],
    /// What became of them.
    pub verdicts: &'a [Verdict],
    /// Indices of those accepted, in order.
    pub order: &'a [usize],
    /// What credit made of those, in that order; `None` where every token is kept.
    pub given: Option<&'a [ResponseCredit]>,
    /// Their masks.
    pub keep: &'a [TokenMask],
}

/// One line of `accepted.jsonl`: `prompt` and `completion` are columns that `pivotal sft` and TRL train on.
#[derive(Serialize)]
struct AcceptedRecord<'a> {
    round: u64,
    id: u64,
    sample: usize,
    rank: usize,
    prompt: &'a Value,
    completion: Value,
    finish: &'static str,
    score: f32,
    #[serde(skip_serializing_if = "Option::is_none")]
    checks: Option<f32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    reward: Option<f32>,
    token_ids: &'a [u32],
    #[serde(skip_serializing_if = "<[f32]>::is_empty")]
    signal: &'a [f32],
    #[serde(flatten)]
    used: Option<UsedNumbers<'a>>,
    #[serde(skip_serializing_if = "<[SegmentRecord]>::is_empty")]
    segments: &'a [SegmentRecord],
    keep: &'a [bool],
}

/// The `prompt` column of each row, as it stands in the data: a text, or messages.
pub(super) struct PromptColumn(BTreeMap<u64, Value>);

impl PromptColumn {
    /// Reads it from a file of prompts.
    pub(super) fn read(path: &Path) -> Result<Self> {
        let data = DataSet::read(path, ReadOptions::default())?;
        let column = data.rows().iter().filter_map(|row| match &row.sample {
            Sample::Prompt { prompt }
            | Sample::Completion { prompt, .. }
            | Sample::Preference { prompt, .. } => Some((row.row, column_value(prompt))),
            _ => None,
        });
        Ok(Self(column.collect()))
    }

    fn of(&self, id: u64) -> &Value {
        self.0.get(&id).unwrap_or(&Value::Null)
    }
}

fn column_value(content: &Content) -> Value {
    match content {
        Content::Text(text) => Value::from(text.as_str()),
        Content::Chat(messages) => messages
            .iter()
            .map(|message| json!({ "role": message.role, "content": message.content }))
            .collect(),
    }
}

/// A response in the shape of its prompt: a text, or one message of the assistant.
fn completion(prompt: &Value, text: &str) -> Value {
    match prompt {
        Value::Array(_) => json!([{ "role": "assistant", "content": text }]),
        _ => Value::from(text),
    }
}

/// The files of a run that have their lines by round.
pub(super) struct RoundFiles {
    rollouts: StepLog,
    accepted: StepLog,
    rounds: StepLog,
}

impl RoundFiles {
    /// Opens them and forgets what came after `round`.
    pub(super) fn open(run: &Path, round: u64) -> Result<Self> {
        Ok(Self {
            rollouts: StepLog::open(run, "rollouts.jsonl", round)?,
            accepted: StepLog::open_rounds(run, "accepted.jsonl", round)?,
            rounds: StepLog::open_rounds(run, "rounds.jsonl", round)?,
        })
    }

    /// Adds a round.
    pub(super) fn write(
        &mut self,
        numbers: &RoundNumbers,
        found: Found<'_>,
        prompts: &PromptColumn,
    ) -> Result<()> {
        let mut place = vec![None; found.rollouts.len()];
        for (at, &index) in found.order.iter().enumerate() {
            place[index] = Some(at);
        }
        let records = found.rollouts.iter().enumerate().map(|(index, rollout)| {
            let credit = place[index].and_then(|at| Some(&found.given?[at]));
            let record = RolloutRecord::new(numbers.round, rollout, &found.scores[index]);
            RolloutRecord {
                accepted: Some(found.verdicts[index].is_accepted()),
                verdict: Some(found.verdicts[index].name()),
                ..record.with_credit(credit)
            }
        });
        self.rollouts.write(records)?;
        let records = found.order.iter().enumerate().map(|(at, &index)| {
            let (rollout, score) = (&found.rollouts[index], &found.scores[index]);
            let credit = found.given.map(|given| &given[at]);
            let prompt = prompts.of(rollout.id);
            AcceptedRecord {
                round: numbers.round,
                id: rollout.id,
                sample: rollout.sample,
                rank: match found.verdicts[index] {
                    Verdict::Accepted { rank } => rank,
                    _ => 0,
                },
                prompt,
                completion: completion(prompt, &rollout.text),
                finish: finish_name(rollout.finish),
                score: score.total,
                checks: score.checks,
                reward: score.reward,
                token_ids: &rollout.token_ids,
                signal: credit.map_or(&[], |credit| &credit.signal),
                used: credit.map(UsedNumbers::of),
                segments: credit.map_or(&[], |credit| &credit.segments),
                keep: found.keep[at].as_slice(),
            }
        });
        self.accepted.write(records)?;
        self.rounds.write([numbers])
    }

    /// The numbers of the last round that was written, if any.
    pub(super) fn last(&self) -> Result<Option<RoundNumbers>> {
        let line = self.rounds.last_line()?;
        Ok(line.and_then(|line| serde_json::from_str(&line).ok()))
    }

    /// Writes what was added to the disk: before a checkpoint that counts on it.
    pub(super) fn sync(&self) -> Result<()> {
        self.rollouts.sync()?;
        self.accepted.sync()?;
        self.rounds.sync()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reject::Dedupe;

    fn rollout(prompt: usize, sample: usize, token_ids: &[u32], finish: Finish) -> Rollout {
        Rollout {
            prompt,
            id: prompt as u64 + 10,
            sample,
            token_ids: token_ids.to_vec(),
            sampled_logps: vec![-1.0; token_ids.len()],
            finish,
            text: "x".to_owned(),
        }
    }

    fn score(total: f32) -> ResponseScore {
        ResponseScore {
            total,
            parts: total,
            penalty: 0.0,
            checks: Some(total),
            values: None,
            reward: None,
        }
    }

    #[test]
    fn a_rounds_numbers_can_be_counted_by_hand() {
        let rollouts = [
            rollout(0, 0, &[1], Finish::Eos),
            rollout(0, 1, &[1, 2, 3], Finish::Length),
            rollout(0, 2, &[1, 2, 3], Finish::Length),
            rollout(1, 0, &[4, 5], Finish::Eos),
            rollout(1, 1, &[4, 6], Finish::Stop),
        ];
        let scores = [0.5, 1.0, 1.0, 0.0, 0.25].map(score);
        let rule = AcceptRule {
            best: 2,
            min_score: Some(0.5),
            dedupe: Dedupe::Tokens,
        };
        let verdicts = verdicts(&rollouts, &scores, rule);
        assert_eq!(accepted_order(&rollouts, &verdicts), [1, 0]);
        let numbers = RoundNumbers::of(3, &rollouts, &scores, &verdicts);
        let expected = RoundNumbers {
            round: 3,
            prompts: 2,
            sampled: 5,
            accepted: 2,
            accepted_fraction: 0.4,
            duplicates: 1,
            below_minimum: 2,
            prompts_without_accepted: 1,
            score: 0.55,
            score_std: numbers.score_std,
            best_score: 0.625,
            accepted_score: Some(0.75),
            checks: Some(0.55),
            response_tokens: 2.2,
            accepted_tokens: Some(2.0),
            ended_fraction: 0.6,
            ..RoundNumbers::default()
        };
        assert_eq!(numbers, expected);
        assert!((numbers.score_std - 0.16_f64.sqrt()).abs() < 1e-12);
        let text = crate::onpolicy::state_text(&numbers).unwrap();
        assert_eq!(
            crate::onpolicy::from_state_text(&text).unwrap(),
            Some(numbers)
        );
    }

    #[test]
    fn a_round_without_responses_or_without_an_accepted_one_has_numbers() {
        let none = RoundNumbers::of(1, &[], &[], &[]);
        assert_eq!(
            (none.score, none.best_score, none.accepted_score),
            (0.0, 0.0, None)
        );
        let rollouts = [rollout(0, 0, &[1], Finish::Eos)];
        let numbers = RoundNumbers::of(1, &rollouts, &[score(0.0)], &[Verdict::BelowMinimum]);
        assert_eq!((numbers.accepted, numbers.prompts_without_accepted), (0, 1));
        assert_eq!(numbers.accepted_tokens, None);
        let line = serde_json::to_string(&numbers).unwrap();
        assert!(!line.contains("null"), "{line}");
    }

    #[test]
    fn a_completion_has_the_shape_of_its_prompt() {
        let chat = column_value(&Content::Chat(vec![pivotal_data::Message {
            role: "user".into(),
            content: "hi".into(),
        }]));
        assert_eq!(chat, json!([{ "role": "user", "content": "hi" }]));
        assert_eq!(
            completion(&chat, "yes"),
            json!([{ "role": "assistant", "content": "yes" }])
        );
        assert_eq!(completion(&Value::from("hi"), "yes"), Value::from("yes"));
    }
}
