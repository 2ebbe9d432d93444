//! Masks of short segments, 64 tokens at a time: which of them are kept is found for a segment of each length at every token, in
//! vectors, and where segments begin then only picks among the answers. Nothing branches on a segment.

use crate::{Score, score::sum_of_part};

/// Tokens whose flags make one machine word.
pub(super) const WORD: usize = 64;
/// The longest segment that is scored at every token. Where segments begin at random at every second token, one in sixteen is longer.
const LENGTHS: usize = 4;
/// Tokens read with a word.
pub(super) const WINDOW: usize = WORD + LENGTHS - 1;
/// Segments that must begin in a word before scoring every length at every token is cheaper than a segment at a time.
pub(super) const DENSE: u32 = 12;

/// Whether a segment is kept, by its score.
#[derive(Clone, Copy)]
pub(super) struct Decision {
    pub(super) above: f32,
    pub(super) below: f32,
    /// What is kept: positive, negative, neutral.
    pub(super) kept: [bool; 3],
}

impl Decision {
    #[inline]
    pub(super) fn of(self, score: f32) -> bool {
        let [positive, negative, neutral] = self.kept;
        let (above, below) = (score > self.above, score < self.below);
        (above & positive) | (!above & ((below & negative) | (!below & neutral)))
    }
}

/// A word of tokens.
#[derive(Clone, Copy)]
pub(super) struct Word<'a> {
    /// Their signal, and that of the tokens after them.
    pub(super) signal: &'a [f32; WINDOW],
    /// Which of them begin segments.
    pub(super) starts: u64,
    /// Which of the next word's do.
    pub(super) next: u64,
}

/// What is known of a word's segments.
#[derive(Clone, Copy)]
pub(super) struct Kept {
    /// Tokens that are kept, those of the next word's first that belong to the last segment included. Tokens before the first
    /// start are not set.
    pub(super) tokens: u128,
    /// Whether the last start's segment ends too late to be known; its tokens are not set.
    pub(super) open: bool,
}

/// The mask of the segments that begin in `word`, by their means or else their sums.
#[inline]
pub(super) fn kept_of_word(word: Word<'_>, score: Score, decision: Decision) -> Kept {
    match score {
        Score::Mean => kept_by(word, decision, |sum, len| match len {
            3 => third(sum) as f32,
            // A half and a quarter are exact.
            1 | 2 | 4 => (sum * (1.0 / len as f64)) as f32,
            _ => (sum / len as f64) as f32,
        }),
        _ => kept_by(word, decision, |sum, _| sum as f32),
    }
}

/// [`kept_of_word`] where `score` makes a segment's score of its sum and its length.
#[inline]
fn kept_by(word: Word<'_>, decision: Decision, score: impl Fn(f64, usize) -> f32) -> Kept {
    let decided = decide(word, decision, &score);
    let mut open = word.starts;
    let mut tokens = 0_u128;
    for len in 1..=LENGTHS {
        let ending = open & ends(word, len);
        open &= !ending;
        let mut kept = u128::from(ending & decided);
        for _ in 1..len {
            kept |= kept << 1;
        }
        tokens |= kept;
    }
    let last = word.starts & !(u64::MAX >> 1 >> word.starts.leading_zeros());
    let known = open & !last;
    Kept {
        tokens: tokens | u128::from(long_segments(word, known, decision, score)),
        open: open & last != 0,
    }
}

/// Whether a segment begins `len` tokens later.
#[inline]
fn ends(word: Word<'_>, len: usize) -> u64 {
    word.starts >> len | word.next << (WORD - len)
}

/// Those kept of the segments that are longer than [`LENGTHS`], at the starts `open`, none of which is the last.
#[inline]
fn long_segments(
    word: Word<'_>,
    mut open: u64,
    decision: Decision,
    score: impl Fn(f64, usize) -> f32,
) -> u64 {
    let [positive, negative, neutral] = decision.kept;
    // By whether the score is above, and whether it is below: a table, for which of them it is nobody can predict.
    let kept_where = [neutral, positive, negative, positive];
    let mut kept = 0;
    while open != 0 {
        let start = open.trailing_zeros();
        open &= open - 1;
        let len = (word.starts >> start >> 1).trailing_zeros() + 1;
        let sum = sum_of_part(word.signal, start as usize..(start + len) as usize);
        let value = score(sum, len as usize);
        let place = usize::from(value > decision.above) | usize::from(value < decision.below) << 1;
        let all = (1_u64 << len) - 1;
        kept |= (all << start) * u64::from(kept_where[place]);
    }
    kept
}

/// A bit for every token whose segment, where it begins one of at most [`LENGTHS`] tokens, is kept. Sums are those of
/// [`Score::of`], bit for bit.
#[inline]
fn decide(word: Word<'_>, decision: Decision, score: impl Fn(f64, usize) -> f32) -> u64 {
    let signal = word.signal;
    let token = |at: usize| f64::from(signal[at]);
    let (two, three, four) = (
        lanes(ends(word, 1)),
        lanes(ends(word, 2)),
        lanes(ends(word, 3)),
    );
    let mut scores = [0.0; WORD];
    // Loops, not `from_fn`: they become vectors.
    for (at, slot) in scores.iter_mut().enumerate() {
        let of_two = score(token(at) + token(at + 1), 2);
        let of_three = score((token(at) + token(at + 2)) + token(at + 1), 3);
        let of_four = score(
            (token(at) + token(at + 2)) + (token(at + 1) + token(at + 3)),
            4,
        );
        let longer = if four[at] != 0 { of_three } else { of_four };
        let longer = if three[at] != 0 { of_two } else { longer };
        *slot = if two[at] != 0 { signal[at] } else { longer };
    }
    let mut flags = [false; WORD];
    for (flag, &score) in flags.iter_mut().zip(&scores) {
        *flag = decision.of(score);
    }
    bits(&flags)
}

/// 0 or not, for each bit: as wide as a score, so that one vector instruction picks eight.
#[inline]
fn lanes(word: u64) -> [u32; WORD] {
    let halves = [word as u32, (word >> 32) as u32];
    let mut lanes = [0; WORD];
    for (lanes, half) in lanes.chunks_exact_mut(32).zip(halves) {
        for (bit, lane) in lanes.iter_mut().enumerate() {
            *lane = half & (1 << bit);
        }
    }
    lanes
}

/// `sum / 3`, rounded correctly: the quotient that the rounded reciprocal gives is off by a unit in the last place at most, and
/// its remainder, which a fused multiply-add finds exactly, mends it (Markstein 1990). A division takes four times as long.
#[inline]
fn third(sum: f64) -> f64 {
    const RECIPROCAL: f64 = 1.0 / 3.0;
    let quotient = sum * RECIPROCAL;
    let remainder = (-3.0_f64).mul_add(quotient, sum);
    remainder.mul_add(RECIPROCAL, quotient)
}

/// One bit a flag, the first lowest; of 8 flags or a multiple.
#[inline]
pub(super) fn bits<const N: usize>(flags: &[bool; N]) -> u64 {
    let (bytes, _) = flags.as_chunks::<8>();
    bytes.iter().enumerate().fold(0, |word, (index, byte)| {
        let byte = u64::from_le_bytes(byte.map(u8::from));
        // Brings the lowest bit of byte i to bit 56 + i.
        let bits = byte.wrapping_mul(0x0102_0408_1020_4080) >> 56;
        word | bits << (8 * index)
    })
}

/// [`bits`] backwards.
#[inline]
pub(super) fn write_bits(word: u64, flags: &mut [bool; WORD]) {
    let (bytes, _) = flags.as_chunks_mut::<8>();
    for (byte, bits) in bytes.iter_mut().zip(word.to_le_bytes()) {
        // Byte i of the copies keeps bit i alone, and carries it to its top.
        let copies = u64::from(bits).wrapping_mul(0x0101_0101_0101_0101);
        let tops = (copies & 0x8040_2010_0804_0201) + 0x7f7f_7f7f_7f7f_7f7f;
        *byte = (tops >> 7 & 0x0101_0101_0101_0101)
            .to_le_bytes()
            .map(|flag| flag != 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pivotal_core::random_stream;
    use rand::Rng;

    #[test]
    fn a_third_is_the_quotient() {
        let mut random = random_stream(1, "thirds");
        for _ in 0..1_000_000 {
            // Every sum of three f32 within their exponents, and halves of a unit in the last place of an f64.
            let [a, b, c] = [(); 3].map(|()| {
                let bits = random.next_u32();
                let value = f32::from_bits(bits);
                f64::from(if value.is_finite() { value } else { 1.0 })
            });
            let sum = (a + c) + b;
            assert_eq!(third(sum), sum / 3.0, "{sum:e}");
        }
        for sum in [0.0, 3.0, -3.0, 1e-45, 3.0 * f64::from(f32::MAX), 5.0, 7.0] {
            assert_eq!(third(sum), sum / 3.0, "{sum:e}");
        }
    }

    #[test]
    fn bits_are_written_as_they_are_read() {
        let mut random = random_stream(1, "bits");
        for _ in 0..1_000 {
            let word = random.next_u64();
            let mut flags = [false; WORD];
            write_bits(word, &mut flags);
            assert!((0..WORD).all(|bit| flags[bit] == (word >> bit & 1 != 0)));
            assert_eq!(bits(&flags), word);
        }
    }
}
