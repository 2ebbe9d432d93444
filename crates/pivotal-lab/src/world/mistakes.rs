//! Responses, right or with mistakes at known rates.

use pivotal_core::RandomStream;
use serde::{Deserialize, Serialize};

use super::WorldError;
use super::draw::{below, chance};
use super::error::in_range;
use super::problem::{Difficulty, Operation, Problem};
use super::vocabulary::{END, EQUALS, STEP_END, number};

/// How often a step goes wrong, in thousandths.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MistakeRates {
    /// A carry or borrow forgotten at a [`Difficulty::Hard`] step.
    pub hard_permille: u32,
    /// A borrow forgotten at a [`Difficulty::Severe`] step.
    pub severe_permille: u32,
    /// A result digit one off, at any step that is not wrong already.
    pub slip_permille: u32,
    /// Of the slips, those that the next step does not build on.
    pub local_permille: u32,
    /// A claim that the prompt plants, followed.
    pub follow_permille: u32,
}

impl MistakeRates {
    /// The rates of the corpus that the starting policy is trained on.
    pub const CORPUS: Self = Self {
        hard_permille: 100,
        severe_permille: 500,
        slip_permille: 20,
        local_permille: 500,
        follow_permille: 400,
    };

    /// No mistake at all.
    pub const NONE: Self = Self {
        hard_permille: 0,
        severe_permille: 0,
        slip_permille: 0,
        local_permille: 0,
        follow_permille: 0,
    };

    /// These with forgotten carries and slips `factor` times as frequent, at most 95 in 100 each.
    ///
    /// # Examples
    /// ```
    /// use pivotal_lab::world::mistakes::MistakeRates;
    /// let boosted = MistakeRates::CORPUS.boosted(3);
    /// assert_eq!((boosted.hard_permille, boosted.severe_permille), (300, 950));
    /// ```
    #[must_use]
    pub const fn boosted(self, factor: u32) -> Self {
        const fn scale(permille: u32, factor: u32) -> u32 {
            let scaled = permille.saturating_mul(factor);
            if scaled < 950 { scaled } else { 950 }
        }
        Self {
            hard_permille: scale(self.hard_permille, factor),
            severe_permille: scale(self.severe_permille, factor),
            slip_permille: scale(self.slip_permille, factor),
            ..self
        }
    }

    /// Whether every rate is at most 1000.
    ///
    /// # Errors
    /// [`WorldError::Range`] naming the field.
    pub fn check(&self) -> Result<(), WorldError> {
        for (name, value) in [
            ("hard_permille", self.hard_permille),
            ("severe_permille", self.severe_permille),
            ("slip_permille", self.slip_permille),
            ("local_permille", self.local_permille),
            ("follow_permille", self.follow_permille),
        ] {
            in_range(name, u64::from(value), 0, 1000)?;
        }
        Ok(())
    }

    fn forgotten_permille(&self, difficulty: Difficulty) -> u32 {
        match difficulty {
            Difficulty::Easy => 0,
            Difficulty::Hard => self.hard_permille,
            Difficulty::Severe => self.severe_permille,
        }
    }
}

/// What went wrong in a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Mistake {
    /// The carry or borrow was forgotten: the tens digit is one off.
    ForgottenCarry,
    /// The units digit is one off.
    UnitsSlip,
    /// The tens digit is one off, without any carry to blame.
    TensSlip,
    /// The prompt's wrong claim was copied.
    FollowedClaim,
}

/// How far a mistake reaches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Reach {
    /// The next step restates the wrong result and builds on it.
    Propagating,
    /// The next step restates the right result: only the written digits are wrong.
    Local,
}

/// One step as it was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
pub struct Step {
    /// The left operand restated.
    pub left: u8,
    /// The result written.
    pub result: u8,
    /// The right result of this step, given its own operands.
    pub right_result: u8,
    /// How likely the step was to go wrong.
    pub difficulty: Difficulty,
    /// What went wrong, and how far it reaches.
    pub mistake: Option<(Mistake, Reach)>,
}

/// A response with what is known of how it came about.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Attempt {
    /// Token ids, EOS included.
    pub response: Vec<u32>,
    /// The steps, first to last.
    pub steps: Vec<Step>,
}

impl Attempt {
    /// Steps that went wrong.
    pub fn mistakes(&self) -> usize {
        self.steps
            .iter()
            .filter(|step| step.mistake.is_some())
            .count()
    }
}

/// The one right response to a problem, EOS included.
pub fn right_response(problem: &Problem) -> Vec<u32> {
    let mut left = problem.start();
    let steps: Vec<Step> = problem
        .operations()
        .iter()
        .map(|operation| {
            let step = written(*operation, left, operation.apply(left), None);
            left = step.result;
            step
        })
        .collect();
    render(problem, &steps)
}

/// A response with mistakes drawn at `rates`.
///
/// # Errors
/// [`WorldError::Range`] for a rate above 1000.
pub fn attempt(
    problem: &Problem,
    rates: &MistakeRates,
    stream: &mut RandomStream,
) -> Result<Attempt, WorldError> {
    rates.check()?;
    let mut left = problem.start();
    let mut steps = Vec::with_capacity(problem.steps());
    for (index, &operation) in problem.operations().iter().enumerate() {
        let claim = problem.claim().filter(|_| index == 0);
        let step = draw_step(operation, left, claim, rates, stream);
        left = match step.mistake {
            Some((_, Reach::Local)) => step.right_result,
            _ => step.result,
        };
        steps.push(step);
    }
    Ok(Attempt {
        response: render(problem, &steps),
        steps,
    })
}

fn draw_step(
    operation: Operation,
    left: u8,
    claim: Option<u8>,
    rates: &MistakeRates,
    stream: &mut RandomStream,
) -> Step {
    let right = operation.apply(left);
    let forgotten = rates.forgotten_permille(operation.difficulty(left));
    let (result, mistake) = match claim {
        Some(claim) if chance(stream, rates.follow_permille) => (claim, Mistake::FollowedClaim),
        _ if chance(stream, forgotten) => {
            (operation.apply_without_carry(left), Mistake::ForgottenCarry)
        }
        _ if chance(stream, rates.slip_permille) => slip(right, stream),
        _ => return written(operation, left, right, None),
    };
    // A forgotten carry and a followed claim are believed; only a slip can be one of the pen.
    let reach = match mistake {
        Mistake::UnitsSlip | Mistake::TensSlip if chance(stream, rates.local_permille) => {
            Reach::Local
        }
        _ => Reach::Propagating,
    };
    written(operation, left, result, Some((mistake, reach)))
}

/// One of the two digits one up or one down, modulo 10.
fn slip(right: u8, stream: &mut RandomStream) -> (u8, Mistake) {
    let (tens, units) = (right / 10, right % 10);
    let by = [1, 9][below(stream, 2) as usize];
    match below(stream, 2) {
        0 => (tens * 10 + (units + by) % 10, Mistake::UnitsSlip),
        _ => ((tens + by) % 10 * 10 + units, Mistake::TensSlip),
    }
}

fn written(operation: Operation, left: u8, result: u8, mistake: Option<(Mistake, Reach)>) -> Step {
    Step {
        left,
        result,
        right_result: operation.apply(left),
        difficulty: operation.difficulty(left),
        mistake,
    }
}

fn render(problem: &Problem, steps: &[Step]) -> Vec<u32> {
    let mut tokens = Vec::with_capacity(steps.len() * super::truth::STEP_TOKENS + 1);
    for (index, (step, operation)) in steps.iter().zip(problem.operations()).enumerate() {
        tokens.extend(number(step.left));
        tokens.extend([problem.letter(index), operation.operator().token()]);
        tokens.extend(number(operation.operand()));
        tokens.push(EQUALS);
        tokens.extend(number(step.result));
        tokens.push(STEP_END);
    }
    tokens.push(END);
    tokens
}
