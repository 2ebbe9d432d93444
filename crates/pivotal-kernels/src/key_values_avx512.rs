//! The products of [`key_values`](crate::key_values) on AVX-512: eight queries at a time, whose sums stay in registers.
//!
//! Every sum runs in the order of the portable path with the same fused operation, so both give the same bits.

use std::arch::x86_64::{
    __m512, _mm256_loadu_si256, _mm512_castsi512_ps, _mm512_cvtepu16_epi32, _mm512_fmadd_ps,
    _mm512_loadu_ps, _mm512_set1_ps, _mm512_setzero_ps, _mm512_slli_epi32, _mm512_storeu_ps,
};

use crate::key_values::{BLOCK, Bf16};

/// Queries multiplied together.
const QUERIES: usize = 8;
/// Floats of a vector.
const VECTOR: usize = 16;

/// What 16 floats are loaded from.
pub(crate) trait Loaded: Copy {
    /// # Safety
    /// 16 elements can be read, and AVX-512 is there.
    unsafe fn load(from: *const Self) -> __m512;
}

impl Loaded for f32 {
    #[inline(always)]
    unsafe fn load(from: *const Self) -> __m512 {
        // SAFETY: the caller's promise.
        unsafe { _mm512_loadu_ps(from) }
    }
}

impl Loaded for Bf16 {
    #[inline(always)]
    unsafe fn load(from: *const Self) -> __m512 {
        // SAFETY: the caller's promise; a bf16 is the upper half of an f32.
        unsafe {
            let halves = _mm256_loadu_si256(from.cast());
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(halves)))
        }
    }
}

/// Puts the products of all queries with a block's keys, `[head_dim, 16]`, into `scores` `[queries, stride]` from `at` on.
///
/// # Panics
/// If a slice is too short or the instructions are missing.
pub(crate) fn score<T: Loaded>(
    queries: &[&[f32]],
    keys: &[T],
    scores: &mut [f32],
    stride: usize,
    at: usize,
) {
    assert!(is_x86_feature_detected!("avx512f"));
    let dim = keys.len() / BLOCK;
    assert!(queries.iter().all(|query| query.len() == dim));
    if let Some(last) = queries.len().checked_sub(1) {
        assert!(scores.len() >= last * stride + at + BLOCK);
    }
    for (index, queries) in queries.chunks(QUERIES).enumerate() {
        let scores = &mut scores[index * QUERIES * stride + at..];
        // SAFETY: the features are there; a query has an element for each row of 16 keys, and each query's 16 scores lie
        // inside the slice, by the assertions above.
        unsafe {
            match queries.len() {
                1 => score_block::<1, T>(queries, keys, scores, stride),
                2 => score_block::<2, T>(queries, keys, scores, stride),
                3 => score_block::<3, T>(queries, keys, scores, stride),
                4 => score_block::<4, T>(queries, keys, scores, stride),
                5 => score_block::<5, T>(queries, keys, scores, stride),
                6 => score_block::<6, T>(queries, keys, scores, stride),
                7 => score_block::<7, T>(queries, keys, scores, stride),
                _ => score_block::<8, T>(queries, keys, scores, stride),
            }
        }
    }
}

/// # Safety
/// `Q` queries of `keys.len() / 16` elements; `scores` has 16 floats at each of `Q` multiples of `stride`.
#[target_feature(enable = "avx512f")]
unsafe fn score_block<const Q: usize, T: Loaded>(
    queries: &[&[f32]],
    keys: &[T],
    scores: &mut [f32],
    stride: usize,
) {
    let mut sums = [_mm512_setzero_ps(); Q];
    let queries: [*const f32; Q] = std::array::from_fn(|q| queries[q].as_ptr());
    for (dim, keys) in keys.chunks_exact(BLOCK).enumerate() {
        // SAFETY: a row of keys is 16 floats, and every query has an element `dim`.
        unsafe {
            let keys = T::load(keys.as_ptr());
            for q in 0..Q {
                sums[q] = _mm512_fmadd_ps(_mm512_set1_ps(*queries[q].add(dim)), keys, sums[q]);
            }
        }
    }
    for (q, sum) in sums.into_iter().enumerate() {
        // SAFETY: the caller's promise.
        unsafe { _mm512_storeu_ps(scores.as_mut_ptr().add(q * stride), sum) };
    }
}

/// Adds the rows of `values`, `padded` long, weighted by `weights` `[queries, stride]`, to `sums` `[queries, padded]`.
///
/// # Panics
/// If a slice is too short, a row is not whole vectors, or the instructions are missing.
pub(crate) fn add<T: Loaded>(
    values: &[T],
    weights: &[f32],
    stride: usize,
    sums: &mut [f32],
    padded: usize,
) {
    assert!(is_x86_feature_detected!("avx512f") && padded.is_multiple_of(VECTOR));
    let (tokens, queries) = (values.len() / padded, sums.len() / padded);
    if let Some(last) = queries.checked_sub(1) {
        assert!(weights.len() >= last * stride + tokens);
    }
    for row in (0..queries).step_by(QUERIES) {
        let sums = &mut sums[row * padded..];
        let weights = &weights[row * stride..];
        for dim in (0..padded).step_by(2 * VECTOR) {
            let last = padded - dim == VECTOR;
            // SAFETY: the features are there; the queries left have `tokens` weights and `padded` sums each, and as many
            // columns from `dim` on, by the assertions above.
            unsafe {
                let at = (padded, dim);
                match (queries - row, last) {
                    (1, false) => add_columns::<1, 2, T>(values, weights, stride, sums, at),
                    (2, false) => add_columns::<2, 2, T>(values, weights, stride, sums, at),
                    (3, false) => add_columns::<3, 2, T>(values, weights, stride, sums, at),
                    (4, false) => add_columns::<4, 2, T>(values, weights, stride, sums, at),
                    (5, false) => add_columns::<5, 2, T>(values, weights, stride, sums, at),
                    (6, false) => add_columns::<6, 2, T>(values, weights, stride, sums, at),
                    (7, false) => add_columns::<7, 2, T>(values, weights, stride, sums, at),
                    (_, false) => add_columns::<8, 2, T>(values, weights, stride, sums, at),
                    (1, true) => add_columns::<1, 1, T>(values, weights, stride, sums, at),
                    (2, true) => add_columns::<2, 1, T>(values, weights, stride, sums, at),
                    (3, true) => add_columns::<3, 1, T>(values, weights, stride, sums, at),
                    (4, true) => add_columns::<4, 1, T>(values, weights, stride, sums, at),
                    (5, true) => add_columns::<5, 1, T>(values, weights, stride, sums, at),
                    (6, true) => add_columns::<6, 1, T>(values, weights, stride, sums, at),
                    (7, true) => add_columns::<7, 1, T>(values, weights, stride, sums, at),
                    (_, true) => add_columns::<8, 1, T>(values, weights, stride, sums, at),
                }
            }
        }
    }
}

/// # Safety
/// `Q` rows of `padded` sums, with `V` vectors of columns from `dim` on; a weight a row of `values` at each of `Q` multiples of
/// `stride`.
#[target_feature(enable = "avx512f")]
unsafe fn add_columns<const Q: usize, const V: usize, T: Loaded>(
    values: &[T],
    weights: &[f32],
    stride: usize,
    sums: &mut [f32],
    (padded, dim): (usize, usize),
) {
    let mut held: [[__m512; V]; Q] = [[_mm512_setzero_ps(); V]; Q];
    for (q, held) in held.iter_mut().enumerate() {
        for (v, held) in held.iter_mut().enumerate() {
            // SAFETY: the caller's promise.
            *held = unsafe { _mm512_loadu_ps(sums.as_ptr().add(q * padded + dim + v * VECTOR)) };
        }
    }
    for (token, value) in values.chunks_exact(padded).enumerate() {
        for v in 0..V {
            // SAFETY: a row of values is `padded` long, and every query has a weight for it.
            unsafe {
                let value = T::load(value.as_ptr().add(dim + v * VECTOR));
                for (q, held) in held.iter_mut().enumerate() {
                    let weight = _mm512_set1_ps(*weights.as_ptr().add(q * stride + token));
                    held[v] = _mm512_fmadd_ps(weight, value, held[v]);
                }
            }
        }
    }
    for (q, held) in held.into_iter().enumerate() {
        for (v, held) in held.into_iter().enumerate() {
            // SAFETY: the caller's promise.
            unsafe { _mm512_storeu_ps(sums.as_mut_ptr().add(q * padded + dim + v * VECTOR), held) };
        }
    }
}
