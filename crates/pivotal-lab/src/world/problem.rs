//! Problems: a start value and a chain of operations.

use pivotal_core::RandomStream;
use serde::{Deserialize, Serialize};

use super::WorldError;
use super::draw::{below, between};
use super::error::in_range;
use super::vocabulary::{BEGIN, CLAIM, EQUALS, MINUS, MOST_STEPS, PLUS, STEP_END, letter, number};

/// Addition or subtraction.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Operator {
    /// `+`.
    Plus,
    /// `-`.
    Minus,
}

impl Operator {
    /// Its token.
    pub const fn token(self) -> u32 {
        match self {
            Self::Plus => PLUS,
            Self::Minus => MINUS,
        }
    }
}

/// How likely a step is to go wrong; mistakes have a rate for each.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Difficulty {
    /// Neither carries nor borrows.
    Easy,
    /// A carry, or a borrow with a small operand digit.
    Hard,
    /// A borrow whose operand ends in 7, 8 or 9.
    Severe,
}

/// One operation of a chain: an operator and an operand of 0 to 99.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
pub struct Operation {
    operator: Operator,
    operand: u8,
}

impl Operation {
    /// `operator` with `operand`.
    ///
    /// # Errors
    /// [`WorldError::Range`] if the operand has more than two digits.
    pub fn new(operator: Operator, operand: u8) -> Result<Self, WorldError> {
        in_range("operand", u64::from(operand), 0, 99)?;
        Ok(Self { operator, operand })
    }

    /// Addition or subtraction.
    pub const fn operator(self) -> Operator {
        self.operator
    }

    /// The number added or taken away.
    pub const fn operand(self) -> u8 {
        self.operand
    }

    /// The two result digits as a number: right, modulo 100, whatever `left` (below 100) is.
    pub const fn apply(self, left: u8) -> u8 {
        match self.operator {
            Operator::Plus => (left + self.operand) % 100,
            Operator::Minus => (left + 100 - self.operand) % 100,
        }
    }

    /// The result with the carry or borrow forgotten: equal to [`Operation::apply`] where there is none.
    pub const fn apply_without_carry(self, left: u8) -> u8 {
        let (left_tens, left_units) = (left / 10, left % 10);
        let (tens, units) = (self.operand / 10, self.operand % 10);
        match self.operator {
            Operator::Plus => (left_tens + tens) % 10 * 10 + (left_units + units) % 10,
            Operator::Minus => (left_tens + 10 - tens) % 10 * 10 + (left_units + 10 - units) % 10,
        }
    }

    /// How likely this operation is to go wrong on `left`.
    pub const fn difficulty(self, left: u8) -> Difficulty {
        let (left_units, units) = (left % 10, self.operand % 10);
        match self.operator {
            Operator::Plus if left_units + units >= 10 => Difficulty::Hard,
            Operator::Minus if left_units < units && units >= 7 => Difficulty::Severe,
            Operator::Minus if left_units < units => Difficulty::Hard,
            _ => Difficulty::Easy,
        }
    }

    /// The result over all integers, to see whether it leaves two digits.
    fn exact(self, left: u8) -> i32 {
        match self.operator {
            Operator::Plus => i32::from(left) + i32::from(self.operand),
            Operator::Minus => i32::from(left) - i32::from(self.operand),
        }
    }
}

/// A start value and a chain of operations whose right results stay in 0 to 99.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize)]
pub struct Problem {
    start: u8,
    operations: Vec<Operation>,
    claim: Option<u8>,
}

impl Problem {
    /// A problem; `claim` is a wrong result of the first step that the prompt plants, and that the right response ignores.
    ///
    /// # Errors
    /// [`WorldError::Range`] for a start or a claim above 99, no operation, or more than 8;
    /// [`WorldError::Overflow`] if a right result leaves 0 to 99; [`WorldError::RightClaim`] if the claim is right.
    pub fn new(
        start: u8,
        operations: Vec<Operation>,
        claim: Option<u8>,
    ) -> Result<Self, WorldError> {
        in_range("start", u64::from(start), 0, 99)?;
        in_range("steps", operations.len() as u64, 1, MOST_STEPS as u64)?;
        let mut left = start;
        for (step, operation) in operations.iter().enumerate() {
            let found = operation.exact(left);
            if !(0..=99).contains(&found) {
                return Err(WorldError::Overflow { step, found });
            }
            left = operation.apply(left);
        }
        if let Some(found) = claim {
            in_range("claim", u64::from(found), 0, 99)?;
            if found == operations[0].apply(start) {
                return Err(WorldError::RightClaim { found });
            }
        }
        Ok(Self {
            start,
            operations,
            claim,
        })
    }

    /// The value that the first operation acts on.
    pub const fn start(&self) -> u8 {
        self.start
    }

    /// The operations, first to last.
    pub fn operations(&self) -> &[Operation] {
        &self.operations
    }

    /// The wrong result of the first step that the prompt plants.
    pub const fn claim(&self) -> Option<u8> {
        self.claim
    }

    /// Steps of the chain.
    pub fn steps(&self) -> usize {
        self.operations.len()
    }

    /// The right final value.
    pub fn answer(&self) -> u8 {
        self.operations
            .iter()
            .fold(self.start, |left, operation| operation.apply(left))
    }

    /// The letter token of a step.
    pub(crate) fn letter(&self, step: usize) -> u32 {
        letter(step, self.steps())
    }

    /// The prompt's token ids.
    pub fn prompt(&self) -> Vec<u32> {
        let mut tokens = vec![BEGIN];
        for (step, operation) in self.operations.iter().enumerate() {
            tokens.extend([self.letter(step), operation.operator.token()]);
            tokens.extend(number(operation.operand));
            if let (0, Some(claim)) = (step, self.claim) {
                tokens.push(CLAIM);
                tokens.extend(number(claim));
            }
        }
        tokens.push(EQUALS);
        tokens.extend(number(self.start));
        tokens.push(STEP_END);
        tokens
    }

    /// The part of the problem space this one lies in, whatever it claims.
    pub fn partition(&self) -> Partition {
        let numbers = self
            .operations
            .iter()
            .flat_map(|operation| [operation.operator.token() as u8, operation.operand]);
        Partition::of(std::iter::once(self.start).chain(numbers))
    }
}

/// A part of the problem space: no problem lies in two, so that nothing trained on is ever evaluated on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Partition {
    /// 14 in 16: the corpus and the pairs.
    Training,
    /// 1 in 16: where settings are chosen.
    Tuning,
    /// 1 in 16: what is reported.
    Evaluation,
}

impl Partition {
    /// By a hash (FNV-1a) of what defines a problem.
    pub(crate) fn of(content: impl Iterator<Item = u8>) -> Self {
        let hash = content.fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
        });
        // The upper half: the low bits of FNV-1a depend on the low bits of the input alone.
        match (hash >> 32) % 16 {
            0 => Self::Evaluation,
            1 => Self::Tuning,
            _ => Self::Training,
        }
    }
}

/// What kind of problems to draw.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ProblemShape {
    /// Steps of the chain, 1 to 8.
    pub steps: usize,
    /// Operands are 1 to this, 1 to 99.
    pub largest_operand: u8,
    /// Whether the prompt plants a wrong result of the first step.
    pub claim: bool,
}

impl ProblemShape {
    /// The shape of the pairs and of the held-out split: 4 steps with operands to 19.
    pub const USUAL: Self = Self {
        steps: 4,
        largest_operand: 19,
        claim: false,
    };
    /// The shifted split: longer chains and larger numbers, 6 steps with operands to 45.
    pub const SHIFTED: Self = Self {
        steps: 6,
        largest_operand: 45,
        claim: false,
    };
    /// The adversarial split: the usual shape with a planted claim.
    pub const ADVERSARIAL: Self = Self {
        claim: true,
        ..Self::USUAL
    };

    /// Whether such problems exist.
    ///
    /// # Errors
    /// [`WorldError::Range`] naming the field.
    pub fn check(&self) -> Result<(), WorldError> {
        in_range("steps", self.steps as u64, 1, MOST_STEPS as u64)?;
        in_range("largest_operand", u64::from(self.largest_operand), 1, 99)
    }

    /// A problem of this shape that lies in `partition`.
    ///
    /// # Errors
    /// Those of [`ProblemShape::check`].
    pub fn draw(
        &self,
        stream: &mut RandomStream,
        partition: Partition,
    ) -> Result<Problem, WorldError> {
        self.check()?;
        loop {
            let problem = self.draw_anywhere(stream);
            if problem.partition() == partition {
                return Ok(problem);
            }
        }
    }

    fn draw_anywhere(&self, stream: &mut RandomStream) -> Problem {
        let start = below(stream, 100) as u8;
        let mut left = start;
        let mut operations = Vec::with_capacity(self.steps);
        while operations.len() < self.steps {
            let operator = match below(stream, 2) {
                0 => Operator::Plus,
                _ => Operator::Minus,
            };
            let operand = between(stream, 1, u32::from(self.largest_operand)) as u8;
            let operation = Operation { operator, operand };
            if (0..=99).contains(&operation.exact(left)) {
                left = operation.apply(left);
                operations.push(operation);
            }
        }
        let claim = self
            .claim
            .then(|| near_miss(stream, operations[0].apply(start)));
        Problem {
            start,
            operations,
            claim,
        }
    }
}

/// A number of two digits that differs from `right` by 1, 2 or 10: a believable wrong result.
fn near_miss(stream: &mut RandomStream, right: u8) -> u8 {
    const DISTANCES: [i32; 6] = [-10, -2, -1, 1, 2, 10];
    loop {
        let claim = i32::from(right) + DISTANCES[below(stream, 6) as usize];
        if (0..=99).contains(&claim) {
            return claim as u8;
        }
    }
}
