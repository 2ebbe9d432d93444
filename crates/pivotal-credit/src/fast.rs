//! Straight from the signal to the `agree` mask, with nothing allocated: for a baseline that is one number, the segment score
//! where it matters and no `min_len`. The result is [`Credit`](crate::Credit)'s, bit for bit.

use std::ops::Range;

use pivotal_core::Sign;

use self::dense::{DENSE, Decision, WINDOW, WORD, Word, bits, kept_of_word, write_bits};
use crate::{Between, Neutral, SchmittTrigger, Score, agree};

mod dense;

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
    let kept = [Sign::Positive, Sign::Negative, Sign::Neutral]
        .map(|sign| agree(sign, sequence_sign, neutral));
    let decision = Decision {
        above: baseline + offset,
        below: baseline - offset,
        kept,
    };
    // The segment that has no end yet; none where the word before knew its end already, and its last flags are in `spill`.
    let (mut open, mut spill) = (Some(0), 0);
    let mut starts = jumps(signal, 0, threshold);
    for first in (0..signal.len()).step_by(WORD) {
        let mut next = jumps(signal, first + WORD, threshold);
        let dense = starts.count_ones() >= DENSE && matches!(score, Score::Mean | Score::Sum);
        match dense {
            true => {
                let rest = &signal[first..];
                // The signal's last word is filled up: no segment ends beyond the signal.
                let mut padded = [0.0; WINDOW];
                let window = rest.first_chunk().unwrap_or_else(|| {
                    padded[..rest.len()].copy_from_slice(rest);
                    &padded
                });
                // The signal's end is where its last segment ends, as if another began there.
                match rest.len() {
                    ..WORD => starts |= 1 << rest.len(),
                    WORD => next = 1,
                    _ => {}
                }
                let before = starts.trailing_zeros();
                let end = first + before as usize;
                let kept_before =
                    open.is_some_and(|start| close(signal, start..end, score, decision, keep));
                let word = Word {
                    signal: window,
                    starts,
                    next,
                };
                let kept = kept_of_word(word, score, decision);
                let all_before = if kept_before { (1 << before) - 1 } else { 0 };
                let tokens = kept.tokens as u64 | spill | all_before;
                match keep[first..].first_chunk_mut() {
                    Some(flags) => write_bits(tokens, flags),
                    None => {
                        let mut flags = [false; WORD];
                        write_bits(tokens, &mut flags);
                        keep[first..].copy_from_slice(&flags[..rest.len()]);
                    }
                }
                spill = (kept.tokens >> WORD) as u64;
                let last = first + WORD - 1 - starts.leading_zeros() as usize;
                open = kept.open.then_some(last);
            }
            false => {
                while starts != 0 {
                    let end = first + starts.trailing_zeros() as usize;
                    match open {
                        Some(start) => {
                            close(signal, start..end, score, decision, keep);
                        }
                        None => {
                            for (bit, flag) in keep[first..end].iter_mut().enumerate() {
                                *flag = spill >> bit & 1 != 0;
                            }
                        }
                    }
                    (open, spill) = (Some(end), 0);
                    starts &= starts - 1;
                }
            }
        }
        starts = next;
    }
    if let Some(start) = open
        && start < signal.len()
    {
        close(signal, start..signal.len(), score, decision, keep);
    }
}

/// Decides on one segment and sets its flags; those of up to seven tokens after it may be set too, so segments are closed in
/// ascending order.
#[inline]
fn close(
    signal: &[f32],
    segment: Range<usize>,
    score: Score,
    decision: Decision,
    keep: &mut [bool],
) -> bool {
    let kept = decision.of(score.of_part(signal, segment.clone()));
    match keep[segment.start..].first_chunk_mut::<8>() {
        Some(flags) if segment.len() <= flags.len() => *flags = [kept; 8],
        _ => keep[segment].fill(kept),
    }
    kept
}

/// A bit for each of the tokens from `first` on that begins a segment: found without branches, which where cuts are many
/// would be mispredicted at every one.
#[inline]
fn jumps(signal: &[f32], first: usize, threshold: f32) -> u64 {
    const HALF: usize = WORD / 2;
    if first >= signal.len() {
        return 0;
    }
    let rest = &signal[first..];
    // A whole word in pieces of a length that is known: no token is then left to a loop of its own.
    if first > 0
        && let (Some(before), Some(at)) = (signal[first - 1..].first_chunk(), rest.first_chunk())
    {
        return bits(&moves::<WORD>(before, at, threshold));
    }
    // Nothing comes before the first token, which begins no segment but the first.
    if first == 0
        && let Some(word) = rest.first_chunk::<WORD>()
        && let (Some(low), Some(low_next)) = (word.first_chunk(), word[1..].first_chunk())
        && let (Some(high), Some(high_next)) = (word[HALF - 1..].first_chunk(), word.last_chunk())
    {
        let low = bits(&moves::<HALF>(low, low_next, threshold));
        return low << 1 | bits(&moves::<HALF>(high, high_next, threshold)) << HALF;
    }
    let (mut flags, from) = ([false; WORD], first.max(1));
    let pairs = signal[from - 1..].iter().zip(&signal[from..]);
    for (flag, (before, at)) in flags[from - first..].iter_mut().zip(pairs) {
        *flag = (at - before).abs() > threshold;
    }
    bits(&flags)
}

/// Whether each of `at` is further than `threshold` from what comes before it.
#[inline]
fn moves<const N: usize>(before: &[f32; N], at: &[f32; N], threshold: f32) -> [bool; N] {
    let mut flags = [false; N];
    for ((flag, before), at) in flags.iter_mut().zip(before).zip(at) {
        *flag = (at - before).abs() > threshold;
    }
    flags
}
