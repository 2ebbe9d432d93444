//! Floats kept as bf16: rows two in a word, and whole buffers that a backward pass reads again.

#[cfg(target_arch = "x86_64")]
use crate::bf16::available;
use crate::parallel::{SharedOut, for_each_block, with_scratch};
#[cfg(target_arch = "x86_64")]
use crate::parallel::{rows_per_block, written};

/// Floats rounded to bf16, in half the room.
#[derive(Clone, Debug)]
pub struct RoundedFloats {
    /// Two in a word.
    words: Vec<f32>,
    len: usize,
}

/// Floats that a thread rounds or widens at a time.
const BLOCK: usize = 1 << 14;

impl RoundedFloats {
    /// `values`, rounded with all threads; `None` where [`bf16_available`](crate::bf16_available) is false, since products there
    /// do not round what they read.
    ///
    /// # Examples
    /// ```
    /// use pivotal_kernels::{RoundedFloats, bf16_available};
    /// let rounded = RoundedFloats::new(&[1.0, 1.001, -3.0]);
    /// assert_eq!(rounded.is_some(), bf16_available());
    /// if let Some(rounded) = rounded {
    ///     rounded.with(|values| assert_eq!(values, [1.0, 1.0, -3.0]));
    /// }
    /// ```
    #[must_use]
    pub fn new(values: &[f32]) -> Option<Self> {
        #[cfg(target_arch = "x86_64")]
        if available() {
            let len = values.len();
            let round = |words: SharedOut| {
                for_each_block(len, BLOCK, len, |block| {
                    // SAFETY: the features are there; a block begins at an even float and its words are its own, the last one
                    // half a word where `len` is odd.
                    unsafe { narrow(&values[block.clone()], words.at(block.start / 2).cast()) };
                });
                if len % 2 == 1 {
                    // SAFETY: the other half of the last word, which is nobody's.
                    unsafe { words.at(len / 2).cast::<u16>().add(1).write(0) };
                }
            };
            // SAFETY: `round` writes both halves of every word.
            let words = unsafe { written(len.div_ceil(2), round) };
            return Some(Self { words, len });
        }
        let _ = values;
        None
    }

    /// As [`RoundedFloats::new`], of rows of an even `width` that `fill` writes one by one.
    pub(crate) fn of_rows(
        rows: usize,
        width: usize,
        fill: impl Fn(usize, &mut [f32]) + Sync + Send,
    ) -> Option<Self> {
        assert!(width.is_multiple_of(2), "a row of {width} is not even");
        #[cfg(target_arch = "x86_64")]
        if available() {
            let len = rows * width;
            let round = |words: SharedOut| {
                for_each_block(rows, rows_per_block(width), len, |block| {
                    with_scratch(width, |row| {
                        for index in block {
                            fill(index, row);
                            // SAFETY: the features are there; the words of a row are its own.
                            unsafe { narrow(row, words.at(index * width / 2).cast()) };
                        }
                    });
                });
            };
            // SAFETY: `round` writes the words of every row.
            let words = unsafe { written(len / 2, round) };
            return Some(Self { words, len });
        }
        let _ = (rows, fill);
        None
    }

    /// Widens those from `first` on, an even number, into `values`, on this thread.
    pub(crate) fn read(&self, first: usize, values: &mut [f32]) {
        assert!(first.is_multiple_of(2) && first + values.len() <= self.len);
        let words = &self.words[first / 2..];
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the features were there when this was made, and so are the floats.
        unsafe {
            widen(words.as_ptr().cast(), values)
        };
        #[cfg(not(target_arch = "x86_64"))]
        for (index, value) in values.iter_mut().enumerate() {
            // The lower half of a word comes first, and a bf16 is the upper half of an f32.
            let bits = words[index / 2].to_bits();
            *value = f32::from_bits(if index % 2 == 0 {
                bits << 16
            } else {
                bits & 0xffff_0000
            });
        }
    }

    /// Lends `body` the floats, widened with all threads into a buffer that this thread keeps between calls.
    pub fn with<T>(&self, body: impl FnOnce(&[f32]) -> T) -> T {
        with_scratch(self.len, |values| {
            let target = SharedOut::new(values);
            for_each_block(self.len, BLOCK, self.len, |block| {
                // SAFETY: a block's floats are its own.
                self.read(block.start, unsafe {
                    target.slice(block.start, block.len())
                });
            });
            body(values)
        })
    }
}

#[cfg(target_arch = "x86_64")]
use rows::{narrow, widen};
#[cfg(target_arch = "x86_64")]
pub(crate) use rows::{round_row, widen_row};

#[cfg(target_arch = "x86_64")]
mod rows {
    use std::arch::x86_64::{
        __m256bh, __m256i, _mm256_mask_storeu_epi16, _mm256_maskz_loadu_epi16, _mm512_castsi512_ps,
        _mm512_cvtepu16_epi32, _mm512_cvtneps_pbh, _mm512_mask_storeu_ps, _mm512_maskz_loadu_ps,
        _mm512_slli_epi32,
    };

    use crate::bf16::available;
    use crate::panels::first_lanes;

    /// Rounds `values` to as many bf16 from `to` on.
    ///
    /// # Safety
    /// The features are there, and so is the room.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    pub(super) unsafe fn narrow(values: &[f32], to: *mut i16) {
        for at in (0..values.len()).step_by(16) {
            let mask = first_lanes(values.len() - at);
            // SAFETY: the masks stop at the ends of both.
            unsafe {
                let wide = _mm512_maskz_loadu_ps(mask, values.as_ptr().add(at));
                let narrow = std::mem::transmute::<__m256bh, __m256i>(_mm512_cvtneps_pbh(wide));
                _mm256_mask_storeu_epi16(to.add(at), mask, narrow);
            }
        }
    }

    /// The floats of as many bf16 from `from` on.
    ///
    /// # Safety
    /// The features are there, and so are the bf16.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    pub(super) unsafe fn widen(from: *const i16, values: &mut [f32]) {
        for at in (0..values.len()).step_by(16) {
            let mask = first_lanes(values.len() - at);
            // SAFETY: the masks stop at the ends of both; a bf16 is the upper half of an f32.
            unsafe {
                let narrow = _mm256_maskz_loadu_epi16(mask, from.add(at));
                let wide = _mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(narrow));
                _mm512_mask_storeu_ps(values.as_mut_ptr().add(at), mask, _mm512_castsi512_ps(wide));
            }
        }
    }

    /// Rounds a row of an even number of floats to bf16, into half as many words.
    pub(crate) fn round_row(row: &[f32], words: &mut [f32]) {
        assert!(available() && row.len() == 2 * words.len());
        // SAFETY: the features are part of that path, and the room was checked.
        unsafe { narrow(row, words.as_mut_ptr().cast()) }
    }

    /// The halves of a row that [`round_row`] rounded.
    pub(crate) fn widen_row(words: &[f32], first: &mut [f32], second: &mut [f32]) {
        assert!(available() && first.len() == words.len() && second.len() == words.len());
        let from = words.as_ptr().cast::<i16>();
        // SAFETY: the features are part of that path; `words` holds both halves, one behind the other.
        unsafe {
            widen(from, first);
            widen(from.add(first.len()), second);
        }
    }
}

#[cfg(all(test, target_arch = "x86_64"))]
mod tests {
    use super::*;
    use crate::testing::{on_each, on_threads, random};

    fn rounded(x: &f32) -> f32 {
        let bits = x.to_bits();
        f32::from_bits((bits + 0x7fff + (bits >> 16 & 1)) & 0xffff_0000)
    }

    #[test]
    fn a_row_comes_back_rounded() {
        if !available() {
            return;
        }
        for len in [0, 1, 15, 16, 17, 192] {
            let row = random(2 * len, 1);
            let (mut words, mut halves) = (vec![0.0; len], [vec![0.0; len], vec![0.0; len]]);
            round_row(&row, &mut words);
            let [first, second] = &mut halves;
            widen_row(&words, first, second);
            let expected: Vec<f32> = row.iter().map(rounded).collect();
            assert_eq!(halves.concat(), expected);
        }
    }

    #[test]
    fn a_buffer_comes_back_rounded_whatever_the_threads() {
        on_each(|| {
            for len in [0, 1, 2, 31, BLOCK, BLOCK + 1, 5 * BLOCK + 17] {
                let values = random(len, 1);
                let expected: Vec<f32> = values.iter().map(rounded).collect();
                for threads in [1, 3] {
                    let kept = on_threads(threads, || RoundedFloats::new(&values));
                    assert_eq!(kept.is_some(), available());
                    if let Some(kept) = kept {
                        let back = on_threads(threads, || kept.with(<[f32]>::to_vec));
                        assert_eq!(back, expected);
                    }
                }
            }
        });
    }
}
