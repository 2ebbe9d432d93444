//! The products of [`key_values`](crate::key_values) on AVX-512: eight queries at a time, whose sums stay in registers.
//!
//! A sum of f32 runs in the order of the portable path with the same fused operation, so both give the same bits. Pairs of bf16 are
//! multiplied as [`attention_avx512`](crate::attention_avx512) does it.

use std::arch::x86_64::{
    __m512, __m512bh, _mm512_add_ps, _mm512_castsi512_ps, _mm512_cvtne2ps_pbh, _mm512_dpbf16_ps,
    _mm512_fmadd_ps, _mm512_fmsub_ps, _mm512_loadu_ps, _mm512_max_ps, _mm512_mul_ps,
    _mm512_reduce_add_ps, _mm512_reduce_max_ps, _mm512_set1_ps, _mm512_setzero_ps,
    _mm512_storeu_ps,
};
use std::f32::consts::LOG2_E;

use crate::attention_avx512::{bits, exp2, load, round_row, store};
use crate::bf16::available;
use crate::key_values::{BLOCK, Pair, Word};

/// Queries multiplied together.
const QUERIES: usize = 8;
/// Words of a vector.
const VECTOR: usize = 16;

/// Words that are multiplied.
pub(crate) trait Factor: Word {
    /// `sum + a · b`, lane by lane; a word's elements are summed.
    ///
    /// # Safety
    /// The processor has AVX-512 BF16.
    unsafe fn multiply_add(a: __m512, b: __m512, sum: __m512) -> __m512;
}

impl Factor for f32 {
    #[inline(always)]
    unsafe fn multiply_add(a: __m512, b: __m512, sum: __m512) -> __m512 {
        // SAFETY: the caller's promise.
        unsafe { _mm512_fmadd_ps(a, b, sum) }
    }
}

impl Factor for Pair {
    #[inline(always)]
    unsafe fn multiply_add(a: __m512, b: __m512, sum: __m512) -> __m512 {
        // SAFETY: the caller's promise; both are 512 bits, and every pattern is valid.
        unsafe {
            let [a, b] = [a, b].map(|words| std::mem::transmute::<__m512, __m512bh>(words));
            _mm512_dpbf16_ps(sum, a, b)
        }
    }
}

/// `scale · query` rounded to bf16, two elements a word.
///
/// # Panics
/// If `words` has another length, or the instructions are missing.
pub(crate) fn query_pairs(query: &[f32], scale: f32, words: &mut [f32]) {
    assert!(available() && words.len() == query.len().div_ceil(2));
    // SAFETY: the features are there.
    unsafe { round_row(query, scale, words) }
}

/// The softmax of `scores`, zeros if all are negative infinity, rounded to bf16: two a word, into the first half.
///
/// # Panics
/// If they are not whole vectors, or the instructions are missing.
pub(crate) fn soften_to_pairs(scores: &mut [f32]) {
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    fn soften(scores: &mut [f32]) {
        let hidden = _mm512_set1_ps(f32::NEG_INFINITY);
        let mut largest = hidden;
        for at in (0..scores.len()).step_by(VECTOR) {
            // The second operand is returned where one is NaN.
            largest = _mm512_max_ps(load(&scores[at..]), largest);
        }
        let log2_e = _mm512_set1_ps(LOG2_E);
        let largest = _mm512_reduce_max_ps(largest);
        let shift = match largest == f32::NEG_INFINITY {
            true => _mm512_setzero_ps(),
            false => _mm512_set1_ps(largest * LOG2_E),
        };
        let mut total = _mm512_setzero_ps();
        for at in (0..scores.len()).step_by(VECTOR) {
            let weight = exp2(_mm512_fmsub_ps(load(&scores[at..]), log2_e, shift));
            total = _mm512_add_ps(total, weight);
            store(weight, &mut scores[at..]);
        }
        let total = _mm512_reduce_add_ps(total);
        let part = _mm512_set1_ps(if total == 0.0 { 0.0 } else { 1.0 / total });
        for at in (0..scores.len()).step_by(2 * VECTOR) {
            let low = load(&scores[at..]);
            let high = match scores.len() - at {
                VECTOR => _mm512_setzero_ps(),
                _ => load(&scores[at + VECTOR..]),
            };
            let [low, high] = [low, high].map(|weights| _mm512_mul_ps(weights, part));
            let pairs = bits(_mm512_cvtne2ps_pbh(high, low));
            store(_mm512_castsi512_ps(pairs), &mut scores[at / 2..]);
        }
    }
    assert!(available() && scores.len().is_multiple_of(VECTOR));
    // SAFETY: the features are there.
    unsafe { soften(scores) }
}

/// Puts the products of all queries with a block's keys, `[words of head_dim, 16]`, into `scores` `[queries, stride]` from `at` on.
///
/// # Panics
/// If a slice is too short or the instructions are missing.
pub(crate) fn score<W: Factor>(
    queries: &[&[f32]],
    keys: &[W],
    scores: &mut [f32],
    stride: usize,
    at: usize,
) {
    assert!(available());
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
                1 => score_block::<1, W>(queries, keys, scores, stride),
                2 => score_block::<2, W>(queries, keys, scores, stride),
                3 => score_block::<3, W>(queries, keys, scores, stride),
                4 => score_block::<4, W>(queries, keys, scores, stride),
                5 => score_block::<5, W>(queries, keys, scores, stride),
                6 => score_block::<6, W>(queries, keys, scores, stride),
                7 => score_block::<7, W>(queries, keys, scores, stride),
                _ => score_block::<8, W>(queries, keys, scores, stride),
            }
        }
    }
}

/// # Safety
/// `Q` queries of `keys.len() / 16` elements; `scores` has 16 floats at each of `Q` multiples of `stride`.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
unsafe fn score_block<const Q: usize, W: Factor>(
    queries: &[&[f32]],
    keys: &[W],
    scores: &mut [f32],
    stride: usize,
) {
    let mut sums = [_mm512_setzero_ps(); Q];
    let queries: [*const f32; Q] = std::array::from_fn(|q| queries[q].as_ptr());
    for (dim, keys) in keys.chunks_exact(BLOCK).enumerate() {
        // SAFETY: a row of keys is 16 floats, and every query has an element `dim`.
        unsafe {
            let keys = _mm512_loadu_ps(keys.as_ptr().cast());
            for q in 0..Q {
                sums[q] = W::multiply_add(_mm512_set1_ps(*queries[q].add(dim)), keys, sums[q]);
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
pub(crate) fn add<W: Factor>(
    values: &[W],
    weights: &[f32],
    stride: usize,
    sums: &mut [f32],
    padded: usize,
) {
    assert!(available() && padded.is_multiple_of(VECTOR));
    let (tokens, queries) = (values.len() / padded, sums.len() / padded);
    if let Some(last) = queries.checked_sub(1) {
        assert!(weights.len() >= last * stride + tokens);
    }
    for row in (0..queries).step_by(QUERIES) {
        let sums = &mut sums[row * padded..];
        let weights = &weights[row * stride..];
        for dim in (0..padded).step_by(2 * VECTOR) {
            let (queries, at) = (queries - row, (padded, dim));
            // SAFETY: the features are there; the queries left have `tokens` weights and `padded` sums each, and as many
            // columns from `dim` on, by the assertions above.
            unsafe {
                match padded - dim {
                    VECTOR => add_rows::<1, W>(queries, values, weights, stride, sums, at),
                    _ => add_rows::<2, W>(queries, values, weights, stride, sums, at),
                }
            }
        }
    }
}

/// # Safety
/// As for [`add_columns`], of the first eight of so many `queries`.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
unsafe fn add_rows<const V: usize, W: Factor>(
    queries: usize,
    values: &[W],
    weights: &[f32],
    stride: usize,
    sums: &mut [f32],
    at: (usize, usize),
) {
    // SAFETY: the caller's promise.
    unsafe {
        match queries {
            1 => add_columns::<1, V, W>(values, weights, stride, sums, at),
            2 => add_columns::<2, V, W>(values, weights, stride, sums, at),
            3 => add_columns::<3, V, W>(values, weights, stride, sums, at),
            4 => add_columns::<4, V, W>(values, weights, stride, sums, at),
            5 => add_columns::<5, V, W>(values, weights, stride, sums, at),
            6 => add_columns::<6, V, W>(values, weights, stride, sums, at),
            7 => add_columns::<7, V, W>(values, weights, stride, sums, at),
            _ => add_columns::<8, V, W>(values, weights, stride, sums, at),
        }
    }
}

/// # Safety
/// `Q` rows of `padded` sums, with `V` vectors of columns from `dim` on; a weight a row of `values` at each of `Q` multiples of
/// `stride`.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
unsafe fn add_columns<const Q: usize, const V: usize, W: Factor>(
    values: &[W],
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
                let value = _mm512_loadu_ps(value.as_ptr().add(dim + v * VECTOR).cast());
                for (q, held) in held.iter_mut().enumerate() {
                    let weight = _mm512_set1_ps(*weights.as_ptr().add(q * stride + token));
                    held[v] = W::multiply_add(weight, value, held[v]);
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
