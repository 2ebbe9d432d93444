//! Token signals: which number each token gets (METHOD, section 2).

use crate::named::named_enum;
use crate::{Error, Result};

named_enum! {
    /// The token signal r.
    pub enum Signal {
        /// The reward model's value at each token, that token included.
        Level = "level",
        /// The level's change at each token.
        Increment = "increment",
        /// β(log π_oracle − log π_ref) of each token: the implicit reward of a DPO-trained oracle.
        LogRatio = "log_ratio",
        /// The value model's value of the state before each token, that token excluded.
        Critic = "critic",
        /// The advantage of each token in the policy update.
        Advantage = "advantage",
        /// A column of the data.
        External = "external",
    }
}

/// The increments r_t = level_t − level_{t−1}, where level_0 is `prompt_level`, the value at the last prompt token.
///
/// They telescope: their sum is the last level minus `prompt_level`.
///
/// # Shapes
/// `levels` and the result `[tokens]`, in the reward model's unit.
///
/// # Examples
/// ```
/// assert_eq!(pivotal_credit::increment(1.0, &[3.0, 2.5, 2.5]), [2.0, -0.5, 0.0]);
/// ```
pub fn increment(prompt_level: f32, levels: &[f32]) -> Vec<f32> {
    let mut previous = prompt_level;
    levels
        .iter()
        .map(|&level| level - std::mem::replace(&mut previous, level))
        .collect()
}

/// The signal `critic` from a value head's outputs, and the value of the state after the last token.
///
/// A value head reads the hidden state *at* a token, so that its output there includes that token: that is the signal `level`.
/// The state before token t is the one at token t − 1, or at the last prompt token.
///
/// # Shapes
/// `levels` and the result `[tokens]`, in the value model's unit.
///
/// # Examples
/// ```
/// let (critic, after) = pivotal_credit::critic(1.0, &[3.0, 2.5, 2.0]);
/// assert_eq!((critic.as_slice(), after), (&[1.0, 3.0, 2.5][..], 2.0));
/// ```
pub fn critic(prompt_level: f32, levels: &[f32]) -> (Vec<f32>, f32) {
    let mut before = prompt_level;
    let values = levels
        .iter()
        .map(|&level| std::mem::replace(&mut before, level));
    (values.collect(), before)
}

/// The implicit token rewards β(log π_oracle(y_t) − log π_ref(y_t)) (Rafailov et al., arXiv:2404.12358).
///
/// # Shapes
/// Both log-probabilities and the result `[tokens]`, in nats.
///
/// # Errors
/// [`Error::Length`] if the two differ in length (as response 0: the caller knows which it is).
///
/// # Examples
/// ```
/// let reward = pivotal_credit::log_ratio(0.5, &[-1.0, -3.0], &[-2.0, -1.0])?;
/// assert_eq!(reward, [0.5, -1.0]);
/// # Ok::<(), pivotal_credit::Error>(())
/// ```
pub fn log_ratio(
    beta: f32,
    oracle_token_logps: &[f32],
    reference_token_logps: &[f32],
) -> Result<Vec<f32>> {
    if oracle_token_logps.len() != reference_token_logps.len() {
        return Err(Error::Length {
            column: "reference_token_logps",
            id: 0,
            expected: oracle_token_logps.len(),
            found: reference_token_logps.len(),
        });
    }
    Ok(oracle_token_logps
        .iter()
        .zip(reference_token_logps)
        .map(|(&oracle, &reference)| beta * (oracle - reference))
        .collect())
}

/// Moves a signal that reacts `delay` tokens late back onto the tokens it reacts to: r_t becomes r_{t+delay}.
///
/// The last `delay` tokens have no successor that far away and keep the response's last value.
///
/// # Examples
/// ```
/// let mut signal = [0.0, 1.0, -4.0, 2.0];
/// pivotal_credit::advance(&mut signal, 1);
/// assert_eq!(signal, [1.0, -4.0, 2.0, 2.0]);
/// ```
pub fn advance(signal: &mut [f32], delay: usize) {
    let Some(&last) = signal.last() else { return };
    let delay = delay.min(signal.len());
    signal.copy_within(delay.., 0);
    let kept = signal.len() - delay;
    signal[kept..].fill(last);
}

/// Refuses a signal that is not finite; `id` names the response in the error.
///
/// # Errors
/// [`Error::NotFinite`] with the first such token.
pub fn check_finite(signal: Signal, id: u64, values: &[f32]) -> Result<()> {
    match values.iter().position(|value| !value.is_finite()) {
        Some(index) => Err(Error::NotFinite {
            signal,
            id,
            index,
            value: values[index],
        }),
        None => Ok(()),
    }
}
