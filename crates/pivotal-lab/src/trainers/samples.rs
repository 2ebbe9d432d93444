//! What an on-policy step samples, how the world's judge scores it, and what is true of it.

use pivotal_core::random_stream;
use pivotal_train::onpolicy::{Prompt, ResponseScore, Rollout};

use crate::error::Result;
use crate::world::draw::chance;
use crate::world::judge::judge;
use crate::world::problem::{Partition, Problem, ProblemShape};
use crate::world::truth::label;

/// Verdicts that are flipped, in thousandths: as many as the pairs' labels.
pub(crate) const FLIP_PERMILLE: u32 = 250;

/// The prompts of one step, the same for every arm of a seed.
pub(crate) struct StepPrompts {
    pub(crate) problems: Vec<Problem>,
    pub(crate) prompts: Vec<Prompt>,
}

/// A step's responses with their scores.
pub(crate) struct Samples {
    pub(crate) step_prompts: StepPrompts,
    pub(crate) rollouts: Vec<Rollout>,
    /// 1 for a response that the judge calls right, else 0.
    pub(crate) scores: Vec<ResponseScore>,
    /// Whether each token is right: for the truth mask, and to measure the others.
    pub(crate) truth: Vec<Vec<bool>>,
}

impl StepPrompts {
    /// New problems of the pairs' shape; no problem of the training partition is ever evaluated on.
    pub(crate) fn draw(seed: u64, step: u64, count: usize) -> Result<Self> {
        let mut stream = random_stream(seed, &format!("trainers/prompts/{step}"));
        let problems = (0..count)
            .map(|_| ProblemShape::USUAL.draw(&mut stream, Partition::Training))
            .collect::<Result<Vec<_>, _>>()?;
        let prompts = problems.iter().enumerate().map(|(index, problem)| Prompt {
            // Of its own over the whole run: it names the random numbers of its samples and masks.
            id: step * count as u64 + index as u64,
            token_ids: problem.prompt(),
            checks: Vec::new(),
            reference: Default::default(),
        });
        Ok(Self {
            prompts: prompts.collect(),
            problems,
        })
    }

    pub(crate) fn refs(&self) -> Vec<&Prompt> {
        self.prompts.iter().collect()
    }
}

impl Samples {
    /// Judges `rollouts`: is it the one right response? A quarter of the verdicts is flipped, each drawn by prompt and sample.
    pub(crate) fn judged(step_prompts: StepPrompts, rollouts: Vec<Rollout>, seed: u64) -> Self {
        let problem = |rollout: &Rollout| &step_prompts.problems[rollout.prompt];
        let score = |rollout: &Rollout| {
            let right = judge(problem(rollout), &rollout.token_ids).exact;
            let name = format!("trainers/judge/{}/{}", rollout.id, rollout.sample);
            let flipped = chance(&mut random_stream(seed, &name), FLIP_PERMILLE);
            let total = f32::from(u8::from(right != flipped));
            ResponseScore {
                total,
                parts: total,
                penalty: 0.0,
                checks: Some(total),
                values: None,
                reward: None,
            }
        };
        let truth = |rollout: &Rollout| {
            let labels = label(problem(rollout), &rollout.token_ids);
            labels.iter().map(|token| token.right).collect()
        };
        Self {
            scores: rollouts.iter().map(score).collect(),
            truth: rollouts.iter().map(truth).collect(),
            step_prompts,
            rollouts,
        }
    }

    /// The prompt's id of each response.
    pub(crate) fn ids(&self) -> Vec<u64> {
        self.rollouts.iter().map(|rollout| rollout.id).collect()
    }

    /// The score of each response.
    pub(crate) fn totals(&self) -> Vec<f32> {
        self.scores.iter().map(|score| score.total).collect()
    }

    /// Those of the responses that `wanted` says, in their order.
    pub(crate) fn only(self, wanted: &[bool]) -> Self {
        fn kept<T>(all: Vec<T>, wanted: &[bool]) -> Vec<T> {
            let both = all.into_iter().zip(wanted);
            both.filter_map(|(one, &wanted)| wanted.then_some(one))
                .collect()
        }
        Self {
            rollouts: kept(self.rollouts, wanted),
            scores: kept(self.scores, wanted),
            truth: kept(self.truth, wanted),
            ..self
        }
    }
}
