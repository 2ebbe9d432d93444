//! A segment's score (METHOD, section 5).

use std::ops::Range;

use crate::named::named_enum;

named_enum! {
    /// How a segment's token signals become one number.
    pub enum Score {
        /// Their mean.
        Mean = "mean",
        /// Their sum.
        Sum = "sum",
        /// The last of them.
        Last = "last",
        /// The one farthest from 0, with its sign; the first of those equally far.
        MaxAbs = "max_abs",
    }
}

impl Score {
    /// The score of one segment's signal; 0 of no token. Sums run in f64, in a fixed order.
    ///
    /// # Examples
    /// ```
    /// use pivotal_credit::Score;
    /// let signal = [1.0, -4.0, 1.5];
    /// assert_eq!(Score::Mean.of(&signal), -0.5);
    /// assert_eq!(Score::Sum.of(&signal), -1.5);
    /// assert_eq!(Score::Last.of(&signal), 1.5);
    /// assert_eq!(Score::MaxAbs.of(&signal), -4.0);
    /// ```
    #[inline]
    pub fn of(self, signal: &[f32]) -> f32 {
        match self {
            Self::Mean => (sum(signal) / signal.len().max(1) as f64) as f32,
            Self::Sum => sum(signal) as f32,
            Self::Last => signal.last().copied().unwrap_or(0.0),
            Self::MaxAbs => signal.get(farthest(signal)).copied().unwrap_or(0.0),
        }
    }

    /// The baseline of one segment's score where every token has its own: the tokens' mean, or that of the one token which is
    /// the score; 0 of no token.
    ///
    /// # Examples
    /// ```
    /// use pivotal_credit::Score;
    /// let (signal, baselines) = ([1.0, -4.0, 1.5], [0.0, 1.0, 2.0]);
    /// assert_eq!(Score::Sum.baseline_of(&signal, &baselines), 1.0);
    /// assert_eq!(Score::Last.baseline_of(&signal, &baselines), 2.0);
    /// assert_eq!(Score::MaxAbs.baseline_of(&signal, &baselines), 1.0);
    /// ```
    pub fn baseline_of(self, signal: &[f32], baselines: &[f32]) -> f32 {
        match self {
            Self::Mean | Self::Sum => Self::Mean.of(baselines),
            Self::Last => Self::Last.of(baselines),
            Self::MaxAbs => baselines.get(farthest(signal)).copied().unwrap_or(0.0),
        }
    }

    /// [`Score::of`] a part of a signal, bit for bit: faster, for what stands after the part can be read with it.
    #[inline]
    pub(crate) fn of_part(self, signal: &[f32], part: Range<usize>) -> f32 {
        match self {
            Self::Mean => (sum_of_part(signal, part.clone()) / part.len().max(1) as f64) as f32,
            Self::Sum => sum_of_part(signal, part) as f32,
            Self::Last | Self::MaxAbs => self.of(&signal[part]),
        }
    }
}

/// Where the first of those farthest from 0 stands.
#[inline]
fn farthest(signal: &[f32]) -> usize {
    let mut farthest = (0, 0.0_f32);
    for (index, reward) in signal.iter().enumerate() {
        if reward.abs() > farthest.1 {
            farthest = (index, reward.abs());
        }
    }
    farthest.0
}

/// The sum in f64, in an order fixed by the length.
///
/// Element i goes to lane i modulo eight, so that the compiler can keep the lanes in vector registers; the lanes are added in
/// pairs.
#[inline]
fn sum(signal: &[f32]) -> f64 {
    let (chunks, rest) = signal.as_chunks::<8>();
    let mut lanes = sum_chunks(chunks);
    // Zeros change no lane. To add only what is there, a loop over the lanes would store through masks, which some processors take
    // a hundred cycles for.
    let mut last = [0.0; 8];
    last[..rest.len()].copy_from_slice(rest);
    for (lane, reward) in lanes.iter_mut().zip(last) {
        *lane += f64::from(reward);
    }
    sum_lanes(lanes)
}

#[inline(always)]
fn sum_chunks(chunks: &[[f32; 8]]) -> [f64; 8] {
    let mut lanes = [0.0_f64; 8];
    for chunk in chunks {
        for (lane, &reward) in lanes.iter_mut().zip(chunk) {
            *lane += f64::from(reward);
        }
    }
    lanes
}

/// [`sum`] of a part of a signal.
#[inline]
pub(crate) fn sum_of_part(signal: &[f32], part: Range<usize>) -> f64 {
    let (chunks, rest) = signal[part.clone()].as_chunks::<8>();
    let Some(last) = signal[part.end - rest.len()..].first_chunk() else {
        return sum(&signal[part]);
    };
    if chunks.is_empty() {
        return sum_of_first(rest.len(), last);
    }
    let mut lanes = sum_chunks(chunks);
    // Masked, not copied into zeros as in `sum`: what was just stored piece by piece is slow to load as a whole.
    let mask = &FIRST[rest.len()];
    for (index, lane) in lanes.iter_mut().enumerate() {
        *lane += f64::from(f32::from_bits(last[index].to_bits() & mask[index]));
    }
    sum_lanes(lanes)
}

#[inline]
fn sum_lanes(lanes: [f64; 8]) -> f64 {
    let four: [f64; 4] = std::array::from_fn(|lane| lanes[lane] + lanes[lane + 4]);
    (four[0] + four[2]) + (four[1] + four[3])
}

/// [`sum`] of the first `len` of eight elements, `len` less than 8.
#[inline]
fn sum_of_first(len: usize, window: &[f32; 8]) -> f64 {
    let mask = &FIRST[len];
    let lane = |lane: usize| f64::from(f32::from_bits(window[lane].to_bits() & mask[lane]));
    if len <= 4 {
        // Most segments where there are many: the upper lanes would add zeros.
        return (lane(0) + lane(2)) + (lane(1) + lane(3));
    }
    sum_lanes(std::array::from_fn(lane))
}

/// All ones in the first `len` lanes, zeros in the others.
static FIRST: [[u32; 8]; 8] = {
    let mut masks = [[0; 8]; 8];
    let mut len = 1;
    while len < 8 {
        masks[len] = masks[len - 1];
        masks[len][len - 1] = u32::MAX;
        len += 1;
    }
    masks
};

#[cfg(test)]
mod tests {
    use super::*;
    use pivotal_core::random_stream;
    use rand::Rng;

    #[test]
    fn a_part_scores_as_if_nothing_stood_around_it() {
        let mut random = random_stream(1, "parts");
        let signal: Vec<f32> = (0..41)
            .map(|_| (random.next_u32() as i32) as f32 / 1e8)
            .collect();
        for score in [Score::Mean, Score::Sum, Score::Last, Score::MaxAbs] {
            for start in 0..=signal.len() {
                for end in start..=signal.len() {
                    let alone = score.of(&signal[start..end]);
                    let part = score.of_part(&signal, start..end);
                    assert_eq!(
                        part.to_bits(),
                        alone.to_bits(),
                        "{score:?} of {start}..{end}"
                    );
                }
            }
        }
    }
}
