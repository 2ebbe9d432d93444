//! What the arms are measured on.

use pivotal_core::{TokenizedResponse, random_stream};
use serde::{Deserialize, Serialize};

use super::WorldError;
use super::mistakes::right_response;
use super::problem::{Partition, Problem, ProblemShape};
use super::retention;

/// A set of prompts, each with its one right response.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Split {
    /// The shape of the pairs, problems never trained on.
    HeldOut,
    /// The same shape, other problems: where each arm's settings are chosen, never reported.
    Tuning,
    /// Longer chains and larger numbers: in the corpus, never in the pairs.
    Shifted,
    /// A wrong result of the first step planted in the prompt: in the corpus, never in the pairs.
    Adversarial,
    /// Sorting: a skill that the pairs do not touch.
    Retention,
}

impl Split {
    /// Every split, the reported ones first.
    pub const ALL: [Self; 5] = [
        Self::HeldOut,
        Self::Shifted,
        Self::Adversarial,
        Self::Retention,
        Self::Tuning,
    ];

    /// What its problems look like; none for sorting.
    pub const fn shape(self) -> Option<ProblemShape> {
        match self {
            Self::HeldOut | Self::Tuning => Some(ProblemShape::USUAL),
            Self::Shifted => Some(ProblemShape::SHIFTED),
            Self::Adversarial => Some(ProblemShape::ADVERSARIAL),
            Self::Retention => None,
        }
    }

    /// Which part of the problem space it lies in.
    pub const fn partition(self) -> Partition {
        match self {
            Self::Tuning => Partition::Tuning,
            _ => Partition::Evaluation,
        }
    }

    /// Its name in records and random streams.
    pub const fn name(self) -> &'static str {
        match self {
            Self::HeldOut => "held_out",
            Self::Tuning => "tuning",
            Self::Shifted => "shifted",
            Self::Adversarial => "adversarial",
            Self::Retention => "retention",
        }
    }
}

/// One prompt of a split with its right response.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct EvaluationSample {
    /// Prompt and right response in token ids; the id counts from 0.
    pub sample: TokenizedResponse,
    /// The problem, to judge other responses by; none for sorting.
    pub problem: Option<Problem>,
}

/// `count` prompts of a split: a longer draw begins with the shorter one.
///
/// # Errors
/// None for the shapes of this module; [`WorldError::Range`] would name a shape that cannot be drawn.
pub fn evaluation_samples(
    split: Split,
    seed: u64,
    count: usize,
) -> Result<Vec<EvaluationSample>, WorldError> {
    let mut stream = random_stream(seed, &format!("world/split/{}", split.name()));
    (0..count as u64)
        .map(|id| match split.shape() {
            None => Ok(EvaluationSample {
                sample: retention::draw(&mut stream, split.partition(), id),
                problem: None,
            }),
            Some(shape) => {
                let problem = shape.draw(&mut stream, split.partition())?;
                let response = right_response(&problem);
                Ok(EvaluationSample {
                    sample: TokenizedResponse {
                        id,
                        prompt: problem.prompt(),
                        response_mask: vec![true; response.len()],
                        response,
                    },
                    problem: Some(problem),
                })
            }
        })
        .collect()
}
