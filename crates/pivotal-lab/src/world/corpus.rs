//! What the starting policy is trained on: attempts with mistakes, planted claims that are sometimes followed, and sorting;
//! short chains first.

use pivotal_core::{RandomStream, TokenizedResponse, random_stream};
use serde::{Deserialize, Serialize};

use super::WorldError;
use super::draw::{below, between, chance};
use super::error::in_range;
use super::mistakes::{MistakeRates, attempt};
use super::problem::{Partition, ProblemShape};
use super::retention;

/// The largest operand outside the usual shape.
const LARGE_OPERAND: u8 = 45;
/// The most steps of a chain in the warm-up.
const MOST_WARM_UP_STEPS: u32 = 2;
/// The most steps of a short chain after it.
const MOST_SHORT_STEPS: u32 = 3;

/// Parts of the corpus, in thousandths; what remains has the usual shape.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CorpusSettings {
    /// How often steps go wrong and claims are followed.
    pub rates: MistakeRates,
    /// Optimizer steps of the warm-up, in which chains have 1 or 2 steps.
    pub warm_up_batches: u64,
    /// Samples of a batch in the warm-up.
    pub warm_up_samples: usize,
    /// Samples of a batch after it.
    pub samples: usize,
    /// Samples that sort digits.
    pub retention_permille: u32,
    /// Samples of the shifted shape, after the warm-up.
    pub shifted_permille: u32,
    /// Samples with chains of 1 to 3 steps and large operands, after the warm-up.
    pub short_permille: u32,
    /// Problems that plant a claim.
    pub claim_permille: u32,
}

impl CorpusSettings {
    /// What the embedded policy is trained on.
    pub const EMBEDDED: Self = Self {
        rates: MistakeRates::CORPUS,
        warm_up_batches: 300,
        warm_up_samples: 64,
        samples: 32,
        retention_permille: 120,
        shifted_permille: 180,
        short_permille: 150,
        claim_permille: 200,
    };

    /// Whether the parts are parts of a whole.
    ///
    /// # Errors
    /// [`WorldError::Range`] naming the field; for the three parts together it is `usual_permille`'s complement.
    pub fn check(&self) -> Result<(), WorldError> {
        self.rates.check()?;
        in_range("warm_up_samples", self.warm_up_samples as u64, 1, 1 << 20)?;
        in_range("samples", self.samples as u64, 1, 1 << 20)?;
        in_range("claim_permille", u64::from(self.claim_permille), 0, 1000)?;
        let parts = [
            self.retention_permille,
            self.shifted_permille,
            self.short_permille,
        ];
        in_range(
            "retention_permille + shifted_permille + short_permille",
            parts.into_iter().map(u64::from).sum(),
            0,
            1000,
        )
    }
}

/// Batch `index` (from 0) of the corpus: a function of seed and index alone, so that a run resumes anywhere.
///
/// # Errors
/// [`WorldError::Range`] for a setting out of range.
///
/// # Examples
/// ```
/// use pivotal_lab::world::corpus::{CorpusSettings, training_batch};
/// let settings = CorpusSettings::EMBEDDED;
/// assert_eq!(training_batch(&settings, 1, 0)?.len(), 64);
/// assert_eq!(training_batch(&settings, 1, 300)?.len(), 32);
/// assert_eq!(training_batch(&settings, 1, 300)?, training_batch(&settings, 1, 300)?);
/// # Ok::<(), pivotal_lab::world::WorldError>(())
/// ```
pub fn training_batch(
    settings: &CorpusSettings,
    seed: u64,
    index: u64,
) -> Result<Vec<TokenizedResponse>, WorldError> {
    settings.check()?;
    let mut stream = random_stream(seed, &format!("world/corpus/{index}"));
    let warm_up = index < settings.warm_up_batches;
    let count = match warm_up {
        true => settings.warm_up_samples,
        false => settings.samples,
    };
    (0..count as u64)
        .map(|place| {
            let id = (index << 20) + place;
            match draw_shape(settings, warm_up, &mut stream) {
                None => Ok(retention::draw(&mut stream, Partition::Training, id)),
                Some(shape) => {
                    let problem = shape.draw(&mut stream, Partition::Training)?;
                    let response = attempt(&problem, &settings.rates, &mut stream)?.response;
                    Ok(TokenizedResponse {
                        id,
                        prompt: problem.prompt(),
                        response_mask: vec![true; response.len()],
                        response,
                    })
                }
            }
        })
        .collect()
}

/// What the next sample looks like; none for sorting.
fn draw_shape(
    settings: &CorpusSettings,
    warm_up: bool,
    stream: &mut RandomStream,
) -> Option<ProblemShape> {
    let part = below(stream, 1000);
    if part < settings.retention_permille {
        return None;
    }
    let shifted_end = settings.retention_permille + settings.shifted_permille;
    let shape = if warm_up {
        let steps = between(stream, 1, MOST_WARM_UP_STEPS) as usize;
        let largest_operand = match below(stream, 2) {
            0 => ProblemShape::USUAL.largest_operand,
            _ => LARGE_OPERAND,
        };
        ProblemShape {
            steps,
            largest_operand,
            claim: false,
        }
    } else if part < shifted_end {
        ProblemShape::SHIFTED
    } else if part < shifted_end + settings.short_permille {
        ProblemShape {
            steps: between(stream, 1, MOST_SHORT_STEPS) as usize,
            largest_operand: LARGE_OPERAND,
            claim: false,
        }
    } else {
        ProblemShape::USUAL
    };
    Some(ProblemShape {
        claim: chance(stream, settings.claim_permille),
        ..shape
    })
}
