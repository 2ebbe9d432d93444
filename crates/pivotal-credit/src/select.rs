//! Keep masks: which tokens the loss uses (METHOD, section 7).

use std::ops::Range;

use pivotal_core::{RandomStream, Sign};
use rand::Rng;

use crate::named::named_enum;

named_enum! {
    /// The selection rule. A token is kept if and only if …
    pub enum Selection {
        /// … its segment's sign is the sequence's.
        Agree = "agree",
        /// … always: the unmasked trainer.
        All = "all",
        /// … `agree` drops it: a control.
        Disagree = "disagree",
        /// … it is drawn, as many in each response as `agree` keeps there: a control.
        Random = "random",
        /// … it is drawn, as many of each sequence sign and tenth of the response as `agree` keeps there: a control.
        RandomPosition = "random_position",
        /// … its ground-truth label agrees with the sequence's sign: an upper bound.
        Truth = "truth",
        /// … its signal is in the top percent of a positive response, or the bottom percent of a negative one: SePO
        /// (Yang et al. 2024, arXiv:2408.13518).
        Quota = "quota",
        /// … the reference's log-probability of it less the policy's is in the batch's top percent: Rho-1 (Lin et al. 2024,
        /// arXiv:2404.07965).
        ExcessLoss = "excess_loss",
        /// … the policy's entropy there is in the batch's top percent (Wang et al. 2025, arXiv:2506.01939).
        EntropyTop = "entropy_top",
    }
}

named_enum! {
    /// The sign that a token's segment is compared with.
    pub enum SequenceSign {
        /// The whole response's: its label, or the sign of its score.
        Response = "response",
        /// Each token's own: the sign of its advantage around 0, as the co-authors' code has it. An advantage of 0 agrees
        /// with nothing.
        Advantage = "advantage",
    }
}

named_enum! {
    /// What `agree` does with a neutral segment.
    pub enum Neutral {
        /// Drops it.
        Drop = "drop",
        /// Keeps it.
        Keep = "keep",
    }
}

named_enum! {
    /// How a kept token counts.
    pub enum Weighting {
        /// Fully.
        Hard = "hard",
        /// By how far its segment's score is to the sequence's side of the baseline, linear within the offset.
        Soft = "soft",
    }
}

/// Whether a segment of sign `segment` is kept in a response of sign `sequence`.
///
/// A response of neutral sign agrees with nothing.
#[inline]
pub fn agree(segment: Sign, sequence: Sign, neutral: Neutral) -> bool {
    match segment {
        Sign::Neutral => neutral == Neutral::Keep,
        _ => segment == sequence,
    }
}

/// The soft weight clamp((sign · (score − b) + δ) / 2δ, 0, 1) of a segment's tokens; at δ = 0 it is the hard mask, and it
/// is 0 where the sequence has no sign.
///
/// # Examples
/// ```
/// use pivotal_core::Sign;
/// use pivotal_credit::soft_weight;
/// assert_eq!(soft_weight(0.0, 0.0, 1.0, Sign::Positive), 0.5);
/// assert_eq!(soft_weight(0.5, 0.0, 1.0, Sign::Positive), 0.75);
/// assert_eq!(soft_weight(0.5, 0.0, 1.0, Sign::Negative), 0.25);
/// ```
pub fn soft_weight(score: f32, baseline: f32, offset: f32, sequence: Sign) -> f32 {
    let toward = f32::from(sequence.as_i8()) * (score - baseline);
    if sequence == Sign::Neutral {
        0.0
    } else if offset > 0.0 {
        ((toward + offset) / (2.0 * offset)).clamp(0.0, 1.0)
    } else {
        f32::from(u8::from(toward > 0.0))
    }
}

/// Which of `bins` equal parts of a response of `tokens` tokens holds token `index`.
///
/// # Examples
/// ```
/// use pivotal_credit::relative_bin;
/// assert_eq!((0..4).map(|index| relative_bin(index, 4, 10)).collect::<Vec<_>>(), [0, 2, 5, 7]);
/// ```
pub fn relative_bin(index: usize, tokens: usize, bins: usize) -> usize {
    // Through u128: index · bins may pass the end of usize for no honest input, but it must not wrap.
    (index as u128 * bins as u128 / tokens.max(1) as u128) as usize
}

/// A uniformly random set of `fraction` of `tokens` tokens, as flags. Where that is no whole number, it is rounded up with
/// the probability of its fractional part, so that the expected number is exact.
///
/// # Examples
/// ```
/// use pivotal_core::random_stream;
/// let keep = pivotal_credit::random_subset(10, 0.3, &mut random_stream(1, "control"));
/// assert_eq!(keep.iter().filter(|&&keep| keep).count(), 3);
/// ```
pub fn random_subset(tokens: usize, fraction: f64, random: &mut RandomStream) -> Vec<bool> {
    let expected = fraction.clamp(0.0, 1.0) * tokens as f64;
    // 53 bits make a uniform number in [0, 1). The tolerance is for 0.3 · 10 = 3.0000000000000004-like products.
    let uniform = (random.next_u64() >> 11) as f64 / (1_u64 << 53) as f64;
    let whole = (expected + 1e-9).floor();
    let up = expected - whole > uniform;
    let kept = (whole as usize + usize::from(up)).min(tokens);
    let mut keep = vec![false; tokens];
    keep[..kept].fill(true);
    shuffle(&mut keep, random);
    keep
}

/// Fisher–Yates. Written out because its draws are part of the record: a library may change how it samples a range.
pub(crate) fn shuffle<T>(items: &mut [T], random: &mut RandomStream) {
    for last in (1..items.len()).rev() {
        items.swap(below(last + 1, random), last);
    }
}

fn below(bound: usize, random: &mut RandomStream) -> usize {
    ((u128::from(random.next_u64()) * bound as u128) >> 64) as usize
}

/// Permutes `keep` among the tokens of each stratum: (sequence sign, tenth of the response).
pub(crate) fn shuffle_within_positions(
    keep: &mut [Vec<bool>],
    sequence_signs: &[Sign],
    random: &mut RandomStream,
) {
    for sign in [Sign::Negative, Sign::Neutral, Sign::Positive] {
        for bin in 0..POSITION_BINS {
            let places: Vec<(usize, usize)> = (0..keep.len())
                .filter(|&response| sequence_signs[response] == sign)
                .flat_map(|response| {
                    bin_tokens(bin, keep[response].len()).map(move |t| (response, t))
                })
                .collect();
            let mut flags: Vec<bool> = places
                .iter()
                .map(|&(response, t)| keep[response][t])
                .collect();
            shuffle(&mut flags, random);
            for (&(response, t), flag) in places.iter().zip(flags) {
                keep[response][t] = flag;
            }
        }
    }
}

/// Relative positions that `random_position` and the diagnostics tell apart.
pub(crate) const POSITION_BINS: usize = 10;

fn bin_tokens(bin: usize, tokens: usize) -> Range<usize> {
    let first = |bin: usize| (bin * tokens).div_ceil(POSITION_BINS);
    first(bin)..first(bin + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bins_and_their_tokens_agree() {
        for tokens in 0..40 {
            for bin in 0..POSITION_BINS {
                for index in bin_tokens(bin, tokens) {
                    assert_eq!(relative_bin(index, tokens, POSITION_BINS), bin);
                }
            }
            let covered: usize = (0..POSITION_BINS)
                .map(|bin| bin_tokens(bin, tokens).len())
                .sum();
            assert_eq!(covered, tokens);
        }
    }

    #[test]
    fn soft_is_hard_without_an_offset() {
        for (score, sign, want) in [
            (0.3, Sign::Positive, 1.0),
            (-0.3, Sign::Positive, 0.0),
            (0.0, Sign::Positive, 0.0),
            (-0.3, Sign::Negative, 1.0),
            (0.3, Sign::Neutral, 0.0),
        ] {
            assert_eq!(soft_weight(score, 0.0, 0.0, sign), want);
        }
    }

    #[test]
    fn random_rounding_is_unbiased() {
        let mut random = pivotal_core::random_stream(3, "rounding");
        let draws = 20_000;
        let mut kept = 0;
        for _ in 0..draws {
            let subset = random_subset(7, 0.35, &mut random);
            let count = subset.iter().filter(|&&keep| keep).count();
            assert!(count == 2 || count == 3);
            kept += count;
        }
        // 2.45 expected; the standard error is √(0.45 · 0.55 / 20000) = 0.0035.
        let average = kept as f64 / f64::from(draws);
        assert!((average - 2.45).abs() < 0.015, "{average}");
    }

    #[test]
    fn every_place_is_drawn_alike() {
        let mut random = pivotal_core::random_stream(4, "places");
        let mut hits = [0_u32; 5];
        for _ in 0..20_000 {
            for (hit, kept) in hits.iter_mut().zip(random_subset(5, 0.4, &mut random)) {
                *hit += u32::from(kept);
            }
        }
        // 8000 expected, standard deviation √(20000 · 0.4 · 0.6) = 69.
        assert!(
            hits.iter().all(|&hit| hit.abs_diff(8_000) < 350),
            "{hits:?}"
        );
    }
}
