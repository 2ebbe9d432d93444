//! Straight from the signal to the `agree` mask, with nothing allocated: for a baseline that is one number, the segment score
//! where it matters and no `min_len`. The result is [`Credit`](crate::Credit)'s, bit for bit.

use pivotal_core::Sign;

use crate::{Between, Neutral, SchmittTrigger, Score, agree};

/// The `agree` mask of Schmitt-trigger segments; `trigger` is fresh.
///
/// # Panics
/// If `keep` and `signal` differ in length.
///
/// # Examples
/// ```
/// use pivotal_core::Sign;
/// use pivotal_credit::{Between, Neutral, SchmittTrigger, schmitt_mask};
/// let trigger = SchmittTrigger::new(0.0, 0.5, Between::Hold);
/// let mut keep = [false; 4];
/// schmitt_mask(&[0.1, 0.9, 0.1, -0.8], trigger, Sign::Positive, Neutral::Drop, &mut keep);
/// assert_eq!(keep, [false, true, true, false]);
/// ```
pub fn schmitt_mask(
    signal: &[f32],
    trigger: SchmittTrigger,
    sequence_sign: Sign,
    neutral: Neutral,
    keep: &mut [bool],
) {
    assert_eq!(signal.len(), keep.len(), "one flag a token");
    let SchmittTrigger { high, low, .. } = trigger;
    let keep_neutral = agree(Sign::Neutral, sequence_sign, neutral);
    let outside = |reward: f32| (reward > high) | (reward < low);
    match (trigger.between, sequence_sign) {
        (Between::Neutral, _) => {
            let positive = agree(Sign::Positive, sequence_sign, neutral);
            let negative = agree(Sign::Negative, sequence_sign, neutral);
            for (keep, &reward) in keep.iter_mut().zip(signal) {
                *keep = ((reward > high) & positive)
                    | ((reward < low) & negative)
                    | (!outside(reward) & keep_neutral);
            }
        }
        (Between::Hold, sequence_sign) => {
            let lead = signal
                .iter()
                .position(|&reward| outside(reward))
                .unwrap_or(signal.len());
            let (leading, rest) = keep.split_at_mut(lead);
            leading.fill(keep_neutral);
            match sequence_sign {
                Sign::Positive => latch(&signal[lead..], rest, |r| r > high, |r| r < low),
                Sign::Negative => latch(&signal[lead..], rest, |r| r < low, |r| r > high),
                Sign::Neutral => rest.fill(false),
            }
        }
    }
}

/// A set-reset latch, in bit operations only: events are random to the branch predictor, and a mispredicted branch costs more
/// than ten tokens. The chain from one state to the next is two operations long.
#[inline]
fn latch(
    signal: &[f32],
    state: &mut [bool],
    set: impl Fn(f32) -> bool,
    reset: impl Fn(f32) -> bool,
) {
    let mut on = false;
    for (reward, state) in signal.iter().zip(state) {
        on = set(*reward) | (on & !reset(*reward));
        *state = on;
    }
}

/// The `agree` mask of segments cut where the signal moves by more than `threshold`, each signed by its score.
///
/// # Panics
/// If `keep` and `signal` differ in length.
///
/// # Examples
/// ```
/// use pivotal_core::Sign;
/// use pivotal_credit::{Neutral, Score, jump_mask};
/// let mut keep = [false; 4];
/// // Segments [1, 2] and [-1, 0], of means 1.5 and -0.5.
/// jump_mask(
///     &[1.0, 2.0, -1.0, 0.0], 1.0, (0.0, 0.0), Score::Mean, Sign::Negative, Neutral::Drop, &mut keep,
/// );
/// assert_eq!(keep, [false, false, true, true]);
/// ```
pub fn jump_mask(
    signal: &[f32],
    threshold: f32,
    (baseline, offset): (f32, f32),
    score: Score,
    sequence_sign: Sign,
    neutral: Neutral,
    keep: &mut [bool],
) {
    assert_eq!(signal.len(), keep.len(), "one flag a token");
    let mut start = 0;
    while start < signal.len() {
        let end = next_jump(signal, start, threshold);
        let sign = Sign::of(score.of(&signal[start..end]), baseline, offset);
        keep[start..end].fill(agree(sign, sequence_sign, neutral));
        start = end;
    }
}

/// The first token after `start` that begins a segment, or the end.
fn next_jump(signal: &[f32], start: usize, threshold: f32) -> usize {
    let jumps = |pair: &[f32]| (pair[1] - pair[0]).abs() > threshold;
    match signal[start..].windows(2).position(jumps) {
        Some(steps) => start + steps + 1,
        None => signal.len(),
    }
}
