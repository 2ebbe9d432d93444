//! The products in f32, eight floats at a time; wider where the processor is.

use super::BLOCK;
#[cfg(target_arch = "x86_64")]
use crate::key_values_avx512;
use crate::lanes::{LANES, Lanes};

/// Vectors of a block's positions.
const VECTORS: usize = BLOCK / LANES;
/// Queries multiplied together: their sums are half of the 16 AVX registers.
const QUERIES: usize = 4;

/// Puts the products of all queries with a block's keys, `[head_dim, 16]`, into `scores` `[queries, stride]` from `at` on.
pub(super) fn score(
    queries: &[&[f32]],
    keys: &[f32],
    scores: &mut [f32],
    stride: usize,
    at: usize,
    #[cfg_attr(not(target_arch = "x86_64"), expect(unused_variables))] wide: bool,
) {
    #[cfg(target_arch = "x86_64")]
    if wide {
        return key_values_avx512::score(queries, keys, scores, stride, at);
    }
    for (index, queries) in queries.chunks(QUERIES).enumerate() {
        let scores = &mut scores[index * QUERIES * stride..];
        match *queries {
            [a, b, c, d] => score_block([a, b, c, d], keys, scores, stride, at),
            [a, b, c] => score_block([a, b, c], keys, scores, stride, at),
            [a, b] => score_block([a, b], keys, scores, stride, at),
            _ => score_block([queries[0]], keys, scores, stride, at),
        }
    }
}

fn score_block<const Q: usize>(
    queries: [&[f32]; Q],
    keys: &[f32],
    scores: &mut [f32],
    stride: usize,
    at: usize,
) {
    let mut sums = [[Lanes::splat(0.0); VECTORS]; Q];
    let queries = queries.map(|query| &query[..keys.len() / BLOCK]);
    for (dim, keys) in keys.chunks_exact(BLOCK).enumerate() {
        let keys: [Lanes; VECTORS] = std::array::from_fn(|v| Lanes::load(&keys[v * LANES..]));
        for (sums, query) in sums.iter_mut().zip(queries) {
            let query = Lanes::splat(query[dim]);
            for (sum, key) in sums.iter_mut().zip(keys) {
                *sum = query.mul_add(key, *sum);
            }
        }
    }
    for (row, sums) in sums.iter().enumerate() {
        for (vector, sum) in sums.iter().enumerate() {
            sum.store(&mut scores[row * stride + at + vector * LANES..][..LANES]);
        }
    }
}

/// Adds the rows of `values`, `padded` long, weighted by `weights` `[queries, stride]`, to `sums` `[queries, padded]`.
pub(super) fn add(
    values: &[f32],
    weights: &[f32],
    stride: usize,
    sums: &mut [f32],
    padded: usize,
    #[cfg_attr(not(target_arch = "x86_64"), expect(unused_variables))] wide: bool,
) {
    #[cfg(target_arch = "x86_64")]
    if wide {
        return key_values_avx512::add(values, weights, stride, sums, padded);
    }
    let queries = sums.len() / padded;
    for row in (0..queries).step_by(QUERIES) {
        let sums = &mut sums[row * padded..];
        let weights = &weights[row * stride..];
        match queries - row {
            1 => add_block::<1>(values, weights, stride, sums, padded),
            2 => add_block::<2>(values, weights, stride, sums, padded),
            3 => add_block::<3>(values, weights, stride, sums, padded),
            _ => add_block::<4>(values, weights, stride, sums, padded),
        }
    }
}

fn add_block<const Q: usize>(
    values: &[f32],
    weights: &[f32],
    stride: usize,
    sums: &mut [f32],
    padded: usize,
) {
    let mut dim = 0;
    while dim + 2 * LANES <= padded {
        add_columns::<Q, 2>(values, weights, stride, sums, (padded, dim));
        dim += 2 * LANES;
    }
    if dim < padded {
        add_columns::<Q, 1>(values, weights, stride, sums, (padded, dim));
    }
}

fn add_columns<const Q: usize, const V: usize>(
    values: &[f32],
    weights: &[f32],
    stride: usize,
    sums: &mut [f32],
    (padded, dim): (usize, usize),
) {
    let tokens = values.len() / padded;
    let weights: [&[f32]; Q] = std::array::from_fn(|q| &weights[q * stride..][..tokens]);
    let at = |q: usize, v: usize| q * padded + dim + v * LANES;
    let mut held: [[Lanes; V]; Q] =
        std::array::from_fn(|q| std::array::from_fn(|v| Lanes::load(&sums[at(q, v)..])));
    for (token, value) in values.chunks_exact(padded).enumerate() {
        let value: [Lanes; V] = std::array::from_fn(|v| Lanes::load(&value[dim + v * LANES..]));
        for (held, weights) in held.iter_mut().zip(weights) {
            let weight = Lanes::splat(weights[token]);
            for (held, value) in held.iter_mut().zip(value) {
                *held = weight.mul_add(value, *held);
            }
        }
    }
    for (q, held) in held.iter().enumerate() {
        for (v, held) in held.iter().enumerate() {
            held.store(&mut sums[at(q, v)..][..LANES]);
        }
    }
}
