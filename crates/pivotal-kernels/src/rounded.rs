//! Rows kept as bf16, two in a word.

use std::arch::x86_64::{
    __m256bh, __m256i, _mm256_mask_storeu_epi16, _mm256_maskz_loadu_epi16, _mm512_castsi512_ps,
    _mm512_cvtepu16_epi32, _mm512_cvtneps_pbh, _mm512_mask_storeu_ps, _mm512_maskz_loadu_ps,
    _mm512_slli_epi32,
};

use crate::bf16::available;
use crate::panels::first_lanes;

/// Rounds a row of an even number of floats to bf16, into half as many words.
pub(crate) fn round_row(row: &[f32], words: &mut [f32]) {
    assert!(available() && row.len() == 2 * words.len());
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    fn with_avx512(row: &[f32], words: &mut [f32]) {
        let to = words.as_mut_ptr().cast::<i16>();
        for at in (0..row.len()).step_by(16) {
            let mask = first_lanes(row.len() - at);
            // SAFETY: the masks stop at the ends of both.
            unsafe {
                let narrow = _mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(mask, row.as_ptr().add(at)));
                let narrow = std::mem::transmute::<__m256bh, __m256i>(narrow);
                _mm256_mask_storeu_epi16(to.add(at), mask, narrow);
            }
        }
    }
    // SAFETY: the features are part of that path.
    unsafe { with_avx512(row, words) }
}

/// The halves of a row that [`round_row`] rounded.
pub(crate) fn widen_row(words: &[f32], first: &mut [f32], second: &mut [f32]) {
    assert!(available() && first.len() == words.len() && second.len() == words.len());
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    fn with_avx512(from: *const i16, half: &mut [f32]) {
        for at in (0..half.len()).step_by(16) {
            let mask = first_lanes(half.len() - at);
            // SAFETY: the masks stop at the ends of both; a bf16 is the upper half of an f32.
            unsafe {
                let narrow = _mm256_maskz_loadu_epi16(mask, from.add(at));
                let wide = _mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(narrow));
                _mm512_mask_storeu_ps(half.as_mut_ptr().add(at), mask, _mm512_castsi512_ps(wide));
            }
        }
    }
    let from = words.as_ptr().cast::<i16>();
    // SAFETY: the features are part of that path; `words` holds both halves, one behind the other.
    unsafe {
        with_avx512(from, first);
        with_avx512(from.add(first.len()), second);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::random;

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
            let rounded = |x: &f32| {
                let bits = x.to_bits();
                f32::from_bits((bits + 0x7fff + (bits >> 16 & 1)) & 0xffff_0000)
            };
            let expected: Vec<f32> = row.iter().map(rounded).collect();
            assert_eq!(halves.concat(), expected);
        }
    }
}
