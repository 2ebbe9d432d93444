//! Preference pairs: two attempts at one problem, the one with fewer mistakes preferred, and a part of the labels flipped.

use pivotal_core::{RandomStream, Side, TokenMask, TokenizedPair, random_stream};
use serde::{Deserialize, Serialize};

use super::WorldError;
use super::draw::chance;
use super::error::in_range;
use super::mistakes::{Attempt, MistakeRates, attempt};
use super::problem::{Partition, Problem, ProblemShape};
use super::truth::{TokenTruth, label};

/// What pairs to draw.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PairSettings {
    /// What the problems look like.
    pub shape: ProblemShape,
    /// How often steps go wrong, on both sides.
    pub rates: MistakeRates,
    /// Whether the better attempt must hold a mistake too: errors in the chosen response, as real ones have.
    pub both_wrong: bool,
    /// Labels that are flipped, in thousandths.
    pub flip_permille: u32,
}

impl PairSettings {
    /// Mistakes three times as frequent as in the corpus, on both sides, and a quarter of the labels flipped: where
    /// learning from the difference of two responses is hard.
    pub const CONFLICT: Self = Self {
        shape: ProblemShape::USUAL,
        rates: MistakeRates::CORPUS.boosted(3),
        both_wrong: true,
        flip_permille: 250,
    };

    /// The corpus's own mistakes, clean labels, and a chosen response that may be right: the easy world, in which a mask has
    /// nothing to gain.
    pub const CLEAN: Self = Self {
        shape: ProblemShape::USUAL,
        rates: MistakeRates::CORPUS,
        both_wrong: false,
        flip_permille: 0,
    };

    /// Whether such pairs exist.
    ///
    /// # Errors
    /// [`WorldError::Range`] naming the field.
    pub fn check(&self) -> Result<(), WorldError> {
        self.shape.check()?;
        self.rates.check()?;
        in_range("flip_permille", u64::from(self.flip_permille), 0, 1000)
    }
}

/// A preference pair with all that is known of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct WorldPair {
    /// The problem that both attempts are at.
    pub problem: Problem,
    /// The preferred attempt: the one with fewer mistakes, unless the label was flipped.
    pub chosen: Attempt,
    /// The other attempt.
    pub rejected: Attempt,
    /// Whether the label was flipped, so that the chosen attempt has more mistakes.
    pub flipped: bool,
}

impl WorldPair {
    /// The attempt of one side.
    pub const fn attempt(&self, side: Side) -> &Attempt {
        match side {
            Side::Chosen => &self.chosen,
            Side::Rejected => &self.rejected,
        }
    }

    /// The token ids, as the recipes take them.
    pub fn tokenized(&self, id: u64) -> TokenizedPair {
        TokenizedPair {
            id,
            prompt: self.problem.prompt(),
            chosen: self.chosen.response.clone(),
            rejected: self.rejected.response.clone(),
        }
    }

    /// The truth of each token of one side, `[response tokens]`.
    pub fn labels(&self, side: Side) -> Vec<TokenTruth> {
        label(&self.problem, &self.attempt(side).response)
    }

    /// The tokens whose truth agrees with the side: right ones of the chosen response, wrong ones of the rejected.
    /// The keep mask of the `truth` rule.
    pub fn truth_keep(&self, side: Side) -> TokenMask {
        let agrees = |token: TokenTruth| token.right == (side == Side::Chosen);
        TokenMask::from(
            self.labels(side)
                .into_iter()
                .map(agrees)
                .collect::<Vec<bool>>(),
        )
    }
}

/// `count` pairs of the training partition: a longer draw begins with the shorter one.
///
/// # Errors
/// [`WorldError::Range`] for a setting out of range; [`WorldError::NoPair`] if the settings hardly ever give a pair.
pub fn preference_pairs(
    settings: &PairSettings,
    seed: u64,
    count: usize,
) -> Result<Vec<WorldPair>, WorldError> {
    settings.check()?;
    let mut stream = random_stream(seed, "world/pairs");
    (0..count).map(|_| draw(settings, &mut stream)).collect()
}

fn draw(settings: &PairSettings, stream: &mut RandomStream) -> Result<WorldPair, WorldError> {
    const MOST_DRAWS: u64 = 100_000;
    for _ in 0..MOST_DRAWS {
        let problem = settings.shape.draw(stream, Partition::Training)?;
        let first = attempt(&problem, &settings.rates, stream)?;
        let second = attempt(&problem, &settings.rates, stream)?;
        let (better, worse) = match first.mistakes().cmp(&second.mistakes()) {
            std::cmp::Ordering::Less => (first, second),
            std::cmp::Ordering::Greater => (second, first),
            std::cmp::Ordering::Equal => continue,
        };
        if settings.both_wrong && better.mistakes() == 0 {
            continue;
        }
        let flipped = chance(stream, settings.flip_permille);
        let (chosen, rejected) = match flipped {
            true => (worse, better),
            false => (better, worse),
        };
        return Ok(WorldPair {
            problem,
            chosen,
            rejected,
            flipped,
        });
    }
    Err(WorldError::NoPair { found: MOST_DRAWS })
}
