//! Whether a response is right, and how far.

use serde::{Deserialize, Serialize};

use super::mistakes::right_response;
use super::problem::Problem;
use super::truth::{STEP_TOKENS, TokenTruth, label};
use super::vocabulary::{END, STEP_END, digit_value};

/// What a judge says of a response.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verdict {
    /// It is the one right response, token for token.
    pub exact: bool,
    /// Two digits stand between `=` and the last `;$`.
    pub answer: Option<u8>,
    /// That answer is the problem's, however it was reached.
    pub answer_right: bool,
    /// Whole steps of which no token is wrong, given what stands before it.
    pub right_steps: usize,
    /// Steps that the problem asks for.
    pub steps: usize,
    /// Tokens that are wrong, given what stands before them.
    pub wrong_tokens: usize,
}

/// Judges a response, EOS included, to `problem`.
///
/// # Examples
/// ```
/// use pivotal_lab::world::{judge::judge, problem::{Operation, Operator, Problem}, vocabulary::encode};
/// let operations = vec![Operation::new(Operator::Minus, 6)?, Operation::new(Operator::Plus, 16)?];
/// let problem = Problem::new(52, operations, None)?;
/// let verdict = judge(&problem, &encode("25B-60=65;65A+61=27;$")?);
/// assert_eq!((verdict.exact, verdict.answer_right), (false, false));
/// assert_eq!((verdict.right_steps, verdict.steps, verdict.wrong_tokens), (1, 2, 1));
/// // A local mistake: the answer is right, the response is not.
/// let verdict = judge(&problem, &encode("25B-60=65;64A+61=26;$")?);
/// assert_eq!((verdict.exact, verdict.answer_right), (false, true));
/// # Ok::<(), pivotal_lab::world::WorldError>(())
/// ```
pub fn judge(problem: &Problem, response: &[u32]) -> Verdict {
    let labels = label(problem, response);
    let in_steps = &labels[..labels.len().min(STEP_TOKENS * problem.steps())];
    let answer = answer(response);
    Verdict {
        exact: response == right_response(problem),
        answer,
        answer_right: answer == Some(problem.answer()),
        right_steps: in_steps
            .chunks_exact(STEP_TOKENS)
            .filter(|step| step.iter().all(|token: &TokenTruth| token.right))
            .count(),
        steps: problem.steps(),
        wrong_tokens: labels.iter().filter(|token| !token.right).count(),
    }
}

/// The number that a response ends with: `…dd;$`.
fn answer(response: &[u32]) -> Option<u8> {
    match response {
        [.., units, tens, STEP_END, END] => Some(digit_value(*units)? + 10 * digit_value(*tens)?),
        _ => None,
    }
}
