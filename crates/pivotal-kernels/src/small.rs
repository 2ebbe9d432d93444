//! f32 products with few rows against a large weight, without packing it.
//!
//! The `gemm` crate repacks the weight at every call, which costs more than the product below 64 rows.

use crate::lanes::{LANES, Lanes, fused};
use crate::matmul::{ProductShape, Store};
use crate::parallel::{SharedOut, for_each_block};

/// Rows and columns of the register tile: 12 sums, 3 weight rows and an operand fill the 16 AVX registers.
const TILE_ROWS: usize = 4;
const TILE_COLUMNS: usize = 3;

/// `out[m, n] (+)= a[m, k] · b[n, k]ᵀ`. The sums of a row do not depend on how many rows there are.
pub(crate) fn few_rows_nt(
    a: &[f32],
    b: &[f32],
    out: &mut [f32],
    shape: ProductShape,
    store: Store,
) {
    let ProductShape { m, n, k } = shape;
    let target = SharedOut::new(out);
    let block = (16_384 / k.max(1)).next_multiple_of(TILE_COLUMNS);
    for_each_block(n, block, m * n * k, |columns| {
        for column in columns.clone().step_by(TILE_COLUMNS) {
            let width = TILE_COLUMNS.min(columns.end - column);
            let weights = &b[column * k..(column + width) * k];
            for row in (0..m).step_by(TILE_ROWS) {
                let height = TILE_ROWS.min(m - row);
                let sums = tile(&a[row * k..(row + height) * k], height, weights, width, k);
                for (r, sums) in sums.iter().enumerate().take(height) {
                    for (c, &sum) in sums.iter().enumerate().take(width) {
                        // SAFETY: row < m and column < n, and no other block has this column.
                        unsafe {
                            let at = target.at((row + r) * n + column + c);
                            *at = if store == Store::Add { *at + sum } else { sum };
                        }
                    }
                }
            }
        }
    });
}

fn tile(
    a: &[f32],
    height: usize,
    b: &[f32],
    width: usize,
    k: usize,
) -> [[f32; TILE_COLUMNS]; TILE_ROWS] {
    match (height, width) {
        (4, 3) => dots::<4, 3>(a, b, k),
        (3, 3) => dots::<3, 3>(a, b, k),
        (2, 3) => dots::<2, 3>(a, b, k),
        (1, 3) => dots::<1, 3>(a, b, k),
        (4, 2) => dots::<4, 2>(a, b, k),
        (3, 2) => dots::<3, 2>(a, b, k),
        (2, 2) => dots::<2, 2>(a, b, k),
        (1, 2) => dots::<1, 2>(a, b, k),
        (4, 1) => dots::<4, 1>(a, b, k),
        (3, 1) => dots::<3, 1>(a, b, k),
        (2, 1) => dots::<2, 1>(a, b, k),
        _ => dots::<1, 1>(a, b, k),
    }
}

fn dots<const R: usize, const C: usize>(
    a: &[f32],
    b: &[f32],
    k: usize,
) -> [[f32; TILE_COLUMNS]; TILE_ROWS] {
    let rows: [&[f32]; R] = std::array::from_fn(|r| &a[r * k..][..k]);
    let columns: [&[f32]; C] = std::array::from_fn(|c| &b[c * k..][..k]);
    let whole = k / LANES * LANES;
    let mut sums = [[Lanes::splat(0.0); C]; R];
    for at in (0..whole).step_by(LANES) {
        let weights: [Lanes; C] = std::array::from_fn(|c| Lanes::load(&columns[c][at..at + LANES]));
        for (sums, row) in sums.iter_mut().zip(rows) {
            let value = Lanes::load(&row[at..at + LANES]);
            for (sum, weight) in sums.iter_mut().zip(weights) {
                *sum = value.mul_add(weight, *sum);
            }
        }
    }
    let mut result = [[0.0; TILE_COLUMNS]; TILE_ROWS];
    for r in 0..R {
        for c in 0..C {
            let rest = rows[r][whole..].iter().zip(&columns[c][whole..]);
            result[r][c] = rest.fold(sums[r][c].sum(), |sum, (&a, &b)| fused(a, b, sum));
        }
    }
    result
}

/// Columns one task of [`few_rows_nn`] keeps: 64 rows of them stay in the second-level cache.
const STRIP: usize = 512;

/// `out[m, n] (+)= a[m, k] · b[k, n]`. The sums of a row do not depend on how many rows there are.
pub(crate) fn few_rows_nn(
    a: &[f32],
    b: &[f32],
    out: &mut [f32],
    shape: ProductShape,
    store: Store,
) {
    let ProductShape { m, n, k } = shape;
    if store == Store::Replace {
        out.fill(0.0);
    }
    let target = SharedOut::new(out);
    for_each_block(n, STRIP, m * n * k, |columns| {
        let width = columns.len();
        let weights = |p: usize| &b[p * n + columns.start..][..width];
        for p in (0..k / 4 * 4).step_by(4) {
            let four = [weights(p), weights(p + 1), weights(p + 2), weights(p + 3)];
            for row in 0..m {
                let factors: [f32; 4] = std::array::from_fn(|i| a[row * k + p + i]);
                // SAFETY: the strip lies in row `row` of `out`, and no other block has these columns.
                let sums = unsafe { target.slice(row * n + columns.start, width) };
                add_four(sums, factors, four);
            }
        }
        for p in k / 4 * 4..k {
            for row in 0..m {
                // SAFETY: as above.
                let sums = unsafe { target.slice(row * n + columns.start, width) };
                crate::lanes::add_scaled(sums, a[row * k + p], weights(p));
            }
        }
    });
}

#[inline]
fn add_four(sums: &mut [f32], factors: [f32; 4], rows: [&[f32]; 4]) {
    let len = sums.len();
    let rows: [&[f32]; 4] = rows.map(|row| &row[..len]);
    for at in 0..len {
        let mut sum = sums[at];
        for (factor, row) in factors.iter().zip(rows) {
            sum = fused(*factor, row[at], sum);
        }
        sums[at] = sum;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{assert_close, naive_product, on_threads, random};

    // f32 sums of up to 300 terms of size about 1.
    const TOLERANCE: f64 = 2e-5;

    #[test]
    fn every_tile_shape_agrees_with_f64() {
        for m in [1, 2, 3, 4, 5, 9] {
            for n in [1, 2, 3, 4, 65, 600] {
                for k in [0, 1, 7, 8, 63, 300] {
                    let shape = ProductShape { m, n, k };
                    let (a, start) = (random(m * k, 1), random(m * n, 3));
                    let (nt, nn) = (random(n * k, 2), random(k * n, 4));
                    for store in [Store::Replace, Store::Add] {
                        let mut out = start.clone();
                        few_rows_nt(&a, &nt, &mut out, shape, store);
                        let expected = naive_product(&a, (k, 1), &nt, (1, k), &start, shape, store);
                        assert_close("nt", &out, &expected, TOLERANCE);
                        let mut out = start.clone();
                        few_rows_nn(&a, &nn, &mut out, shape, store);
                        let expected = naive_product(&a, (k, 1), &nn, (n, 1), &start, shape, store);
                        assert_close("nn", &out, &expected, TOLERANCE);
                    }
                }
            }
        }
    }

    #[test]
    fn a_row_does_not_depend_on_its_neighbours_or_the_threads() {
        let (m, n, k) = (7, 1030, 131);
        let (a, b) = (random(m * k, 1), random(n * k, 2));
        for product in [few_rows_nt, few_rows_nn] {
            let run = |rows: usize, first: usize| {
                let mut out = vec![0.0; rows * n];
                let shape = ProductShape { m: rows, n, k };
                product(
                    &a[first * k..(first + rows) * k],
                    &b,
                    &mut out,
                    shape,
                    Store::Replace,
                );
                out
            };
            let all = on_threads(1, || run(m, 0));
            assert_eq!(all, on_threads(2, || run(m, 0)));
            for row in 0..m {
                assert_eq!(run(1, row), all[row * n..(row + 1) * n]);
            }
        }
    }
}
