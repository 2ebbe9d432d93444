//! Which tokens of a response are wrong.
//!
//! A token is wrong if it is not the correct continuation of what stands before it. What that is depends on its slot:
//!
//! | slot | right |
//! |---|---|
//! | left operand, first step | the prompt's start value |
//! | left operand, later | the result written in the step before, or that step's right result |
//! | letter, operator, operand, `=`, `;` | as the prompt has it |
//! | result digits | the step's right result, from its left operand and operand **as written** |
//! | `$` | after the last step, and nothing after it |
//!
//! Where two left operands are right, the tens digit must belong to one that the units digit fits. Two digits that are no
//! digits, or are not there, are read as the right ones, so that one broken token does not make all later ones wrong.

use serde::{Deserialize, Serialize};

use super::problem::{Difficulty, Operation, Operator, Problem};
use super::vocabulary::{END, EQUALS, MINUS, PLUS, STEP_END, digit, digit_value, number};

/// Tokens of a step.
pub const STEP_TOKENS: usize = 10;

/// What a token of a response is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Slot {
    /// A digit of the restated left operand.
    Left,
    /// The step's letter.
    Letter,
    /// The operator.
    Operator,
    /// A digit of the restated operand.
    Operand,
    /// `=`.
    Equals,
    /// The result's units digit.
    ResultUnits,
    /// The result's tens digit: where a forgotten carry shows.
    ResultTens,
    /// `;`.
    StepEnd,
    /// `$`.
    End,
    /// Behind where the response should have ended.
    Beyond,
}

const SLOTS: [Slot; STEP_TOKENS] = [
    Slot::Left,
    Slot::Left,
    Slot::Letter,
    Slot::Operator,
    Slot::Operand,
    Slot::Operand,
    Slot::Equals,
    Slot::ResultUnits,
    Slot::ResultTens,
    Slot::StepEnd,
];

/// The truth about one token.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenTruth {
    /// Whether it is a correct continuation of what stands before it.
    pub right: bool,
    /// What it is.
    pub slot: Slot,
    /// Its step, counted from 0; none for `$` and what stands beyond.
    pub step: Option<usize>,
    /// How likely its step was to go wrong, judged by the operands as written; easy outside steps.
    pub difficulty: Difficulty,
}

/// The truth of each token of a response to `problem`, `[response tokens]`; the response may be any tokens at all.
///
/// # Examples
/// ```
/// use pivotal_lab::world::{problem::{Operation, Operator, Problem}, truth::label, vocabulary::encode};
/// let operations = vec![Operation::new(Operator::Minus, 6)?, Operation::new(Operator::Plus, 16)?];
/// let problem = Problem::new(52, operations, None)?;
/// // 52 - 6 = 56 is wrong in its tens digit; 56 + 16 = 72 builds on it correctly.
/// let labels = label(&problem, &encode("25B-60=65;65A+61=27;$")?);
/// assert_eq!(labels.iter().filter(|token| !token.right).count(), 1);
/// // Going on from the right 46 instead is right as well.
/// let labels = label(&problem, &encode("25B-60=65;64A+61=26;$")?);
/// assert_eq!(labels.iter().filter(|token| !token.right).count(), 1);
/// # Ok::<(), pivotal_lab::world::WorldError>(())
/// ```
pub fn label(problem: &Problem, response: &[u32]) -> Vec<TokenTruth> {
    let mut labels = Vec::with_capacity(response.len());
    let mut expected_left = [problem.start(); 2];
    let mut chunks = response.chunks(STEP_TOKENS);
    for (step, &operation) in problem.operations().iter().enumerate() {
        let Some(tokens) = chunks.next() else {
            return labels;
        };
        let reading = Reading::new(tokens, operation, expected_left);
        for (position, &token) in tokens.iter().enumerate() {
            labels.push(TokenTruth {
                right: reading.expects(position, token, problem.letter(step), operation),
                slot: SLOTS[position],
                step: Some(step),
                difficulty: reading.operation.difficulty(reading.left),
            });
        }
        expected_left = [reading.result, reading.right_result()];
    }
    for (index, &token) in response.iter().skip(labels.len()).enumerate() {
        labels.push(TokenTruth {
            right: index == 0 && token == END,
            slot: if index == 0 { Slot::End } else { Slot::Beyond },
            step: None,
            difficulty: Difficulty::Easy,
        });
    }
    labels
}

/// The numbers of one step as they were written.
struct Reading {
    /// Left operands that would be right.
    expected_left: [u8; 2],
    left: u8,
    operation: Operation,
    result: u8,
}

impl Reading {
    fn new(tokens: &[u32], operation: Operation, expected_left: [u8; 2]) -> Self {
        // A response that is cut, or broken, is read as far as it can be.
        let read = |position: usize, otherwise: u8| {
            tokens
                .get(position)
                .and_then(|&token| digit_value(token))
                .unwrap_or(otherwise)
        };
        let number_at = |position: usize, otherwise: u8| {
            read(position, otherwise % 10) + 10 * read(position + 1, otherwise / 10)
        };
        let left = number_at(0, expected_left[0]);
        let operator = match tokens.get(3) {
            Some(&PLUS) => Operator::Plus,
            Some(&MINUS) => Operator::Minus,
            _ => operation.operator(),
        };
        let operand = number_at(4, operation.operand());
        let operation =
            Operation::new(operator, operand).expect("two digits make a number of at most 99");
        let result = number_at(7, operation.apply(left));
        Self {
            expected_left,
            left,
            operation,
            result,
        }
    }

    fn right_result(&self) -> u8 {
        self.operation.apply(self.left)
    }

    /// Whether `token` is right at `position` of the step.
    fn expects(&self, position: usize, token: u32, letter: u32, asked: Operation) -> bool {
        let [first, second] = self.expected_left;
        let units = self.left % 10;
        match position {
            0 => token == digit(first % 10) || token == digit(second % 10),
            1 => {
                // A units digit that fits neither is wrong itself; its tens digit may then belong to either.
                let stray = units != first % 10 && units != second % 10;
                [first, second]
                    .iter()
                    .any(|&left| token == digit(left / 10) && (stray || units == left % 10))
            }
            2 => token == letter,
            3 => token == asked.operator().token(),
            4 | 5 => token == number(asked.operand())[position - 4],
            6 => token == EQUALS,
            7 | 8 => token == number(self.right_result())[position - 7],
            _ => token == STEP_END,
        }
    }
}
