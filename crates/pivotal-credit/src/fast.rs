//! Straight from the signal to the `agree` mask, with nothing allocated: for a baseline that is one number, the segment score
//! where it matters and no `min_len`. The result is [`Credit`](crate::Credit)'s, bit for bit.

use pivotal_core::Sign;

use crate::score::sum_of_first;
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
    // As `agree` of `Sign::of`, looked up: the sign of a segment is a coin toss to the processor's branch prediction.
    let kept = [
        Sign::Neutral,
        Sign::Negative,
        Sign::Positive,
        Sign::Positive,
    ]
    .map(|sign| agree(sign, sequence_sign, neutral));
    let (above, below) = (baseline + offset, baseline - offset);
    let decide = |score: f32| kept[2 * usize::from(score > above) + usize::from(score < below)];
    let mut start = 0;
    // Ascending, so that what is written beyond a segment's end is overwritten by those after it.
    let mut close = |end: usize| {
        let len = end - start;
        match (score, signal[start..].first_chunk::<8>()) {
            (Score::Mean | Score::Sum | Score::Last, Some(window)) if (1..=8).contains(&len) => {
                let value = match score {
                    Score::Mean => (sum_of_first(len, window) / len as f64) as f32,
                    Score::Sum => sum_of_first(len, window) as f32,
                    _ => window[len - 1],
                };
                keep[start..start + 8].copy_from_slice(&[decide(value); 8]);
            }
            _ => keep[start..end].fill(decide(score.of(&signal[start..end]))),
        }
        start = end;
    };
    for first in (0..signal.len()).step_by(WORD) {
        let mut jumps = jumps(signal, first, threshold);
        while jumps != 0 {
            close(first + jumps.trailing_zeros() as usize);
            jumps &= jumps - 1;
        }
    }
    close(signal.len());
}

/// Tokens whose cuts make one machine word.
const WORD: usize = 64;

/// A bit for each of the tokens from `first` on that begins a segment: found without branches, which where cuts are many
/// would be mispredicted at every one.
#[inline]
fn jumps(signal: &[f32], first: usize, threshold: f32) -> u64 {
    let mut flags = [false; WORD];
    let flag = |flags: &mut [bool], before: &[f32], at: &[f32]| {
        for ((flag, before), at) in flags.iter_mut().zip(before).zip(at) {
            *flag = (at - before).abs() > threshold;
        }
    };
    // Nothing comes before the first token, so it is compared with itself and begins no segment but the first.
    let last = (first + WORD).min(signal.len());
    let from = first.max(1);
    flag(
        &mut flags[from - first..],
        &signal[from - 1..last.max(from) - 1],
        &signal[from..last.max(from)],
    );
    let (bytes, _) = flags.as_chunks::<8>();
    bytes.iter().enumerate().fold(0, |word, (index, byte)| {
        let byte = u64::from_le_bytes(byte.map(u8::from));
        // Brings the lowest bit of byte i to bit 56 + i.
        let bits = byte.wrapping_mul(0x0102_0408_1020_4080) >> 56;
        word | bits << (8 * index)
    })
}
