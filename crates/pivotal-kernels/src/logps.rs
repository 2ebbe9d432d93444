//! Log-probabilities of given tokens under a vocabulary projection, in tiles: `[rows, vocab]` never exists.
//!
//! ```text
//! z = hidden · headᵀ,  lse = ln Σ_v e^z_v,  logp = z_target - lse
//! dz_v = dlogp·([v = target] - e^(z_v - lse)),  dhidden = dz · head,  dhead = dzᵀ · hidden
//! ```
//!
//! The forward pass keeps a running maximum and sum a row; the backward pass computes each tile of logits again.

use crate::lanes::{exp, maximum};
use crate::matmul::{Precision, ProductShape, Store, matmul_nn, matmul_nt, matmul_tn};
use crate::parallel::{SharedOut, check_len, check_matrix, for_each_block, with_scratch};
use crate::rows::exp_sum;

/// Columns of a tile: with 1024 rows it takes 4 MiB and stays in the third-level cache.
const TILE: usize = 1024;
/// Rows of a tile, for the same reason.
const TILE_ROWS: usize = 2048;
/// Rows of a tile that one task reduces.
pub(crate) const TASK_ROWS: usize = 16;
/// A logit costs about this many multiply-adds: an exponential.
pub(crate) const COST: usize = 8;

/// The sizes of a vocabulary projection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HeadShape {
    /// Length of a hidden state.
    pub hidden: usize,
    /// Tokens of the vocabulary.
    pub vocab: usize,
}

/// What [`token_logps_forward`] returns. Both are `[rows]`, in nats.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenLogps {
    /// Log-probability of each row's target.
    pub logps: Vec<f32>,
    /// `ln Σ e^logit` of each row: what the backward pass needs again.
    pub lse: Vec<f32>,
}

/// The log-probability of `targets[row]` under `softmax(hidden[row] · headᵀ)`.
///
/// # Shapes
/// `hidden` is `[rows, hidden]`, `head` is `[vocab, hidden]`, `targets` is `[rows]`.
///
/// # Panics
/// If lengths do not fit or a target is not below `vocab`.
///
/// # Examples
/// ```
/// use pivotal_kernels::{HeadShape, Precision, token_logps_forward};
/// // Two tokens with equal logits.
/// let shape = HeadShape { hidden: 1, vocab: 2 };
/// let result = token_logps_forward(&[3.0], &[1.0, 1.0], &[1], shape, Precision::F32);
/// assert_eq!(result.logps, [-2f32.ln()]);
/// ```
#[must_use]
pub fn token_logps_forward(
    hidden: &[f32],
    head: &[f32],
    targets: &[u32],
    shape: HeadShape,
    precision: Precision,
) -> TokenLogps {
    check(hidden, head, targets, shape);
    let rows = targets.len();
    let mut best = vec![f32::NEG_INFINITY; rows];
    let mut total = vec![0.0; rows];
    let mut target_logits = vec![0.0; rows];
    for_each_tile(rows, shape, |tile| {
        let hidden = tile.hidden(hidden);
        tile.with_logits(hidden, head, precision, |logits| {
            let (best, total) = (SharedOut::new(&mut best), SharedOut::new(&mut total));
            let target_logits = SharedOut::new(&mut target_logits);
            for_each_block(tile.rows, TASK_ROWS, COST * logits.len(), |block| {
                for row in block {
                    let logits = &logits[row * tile.columns..][..tile.columns];
                    let row = tile.first_row + row;
                    // SAFETY: the blocks are disjoint, and so are their rows.
                    let (best, total) = unsafe { (&mut *best.at(row), &mut *total.at(row)) };
                    let larger = best.max(maximum(logits));
                    // A row of -inf only has no finite maximum to subtract.
                    let shift = if larger == f32::NEG_INFINITY {
                        0.0
                    } else {
                        larger
                    };
                    *total = *total * exp(*best - shift) + exp_sum(logits, shift);
                    *best = larger;
                    if let Some(column) = tile.column(targets[row]) {
                        // SAFETY: as above.
                        unsafe { *target_logits.at(row) = logits[column] };
                    }
                }
            });
        });
    });
    let lse: Vec<f32> = best
        .iter()
        .zip(&total)
        .map(|(best, total)| best + total.ln())
        .collect();
    let logps = target_logits
        .iter()
        .zip(&lse)
        .map(|(logit, lse)| logit - lse)
        .collect();
    TokenLogps { logps, lse }
}

/// The gradient of [`token_logps_forward`]: `dlogps` `[rows]` is the upstream gradient, `lse` what the forward pass returned.
///
/// `dhidden` `[rows, hidden]` is overwritten; `dhead` `[vocab, hidden]` is added to, and costs nothing when `None`.
///
/// # Panics
/// If lengths do not fit or a target is not below `vocab`.
#[expect(
    clippy::too_many_arguments,
    reason = "three inputs, two from the forward pass, two gradients, two settings"
)]
pub fn token_logps_backward(
    hidden: &[f32],
    head: &[f32],
    targets: &[u32],
    lse: &[f32],
    dlogps: &[f32],
    shape: HeadShape,
    precision: Precision,
    dhidden: &mut [f32],
    mut dhead: Option<&mut [f32]>,
) {
    check(hidden, head, targets, shape);
    check_len("lse", lse, targets.len());
    check_len("dlogps", dlogps, targets.len());
    check_len("dhidden", dhidden, hidden.len());
    if let Some(dhead) = &dhead {
        check_len("dhead", dhead, head.len());
    }
    dhidden.fill(0.0);
    for_each_tile(targets.len(), shape, |tile| {
        let rows = tile.hidden(hidden);
        tile.with_logits(rows, head, precision, |logits| {
            let len = logits.len();
            let shared = SharedOut::new(logits);
            for_each_block(tile.rows, TASK_ROWS, COST * len, |block| {
                for row in block {
                    // SAFETY: the blocks are disjoint, and so are their rows.
                    let slopes = unsafe { shared.slice(row * tile.columns, tile.columns) };
                    let row = tile.first_row + row;
                    let (lse, upstream) = (lse[row], dlogps[row]);
                    for slope in slopes.iter_mut() {
                        *slope = -upstream * exp(*slope - lse);
                    }
                    if let Some(column) = tile.column(targets[row]) {
                        slopes[column] += upstream;
                    }
                }
            });
            let weights = tile.head(head);
            let product = ProductShape {
                m: tile.rows,
                n: shape.hidden,
                k: tile.columns,
            };
            let gradient =
                &mut dhidden[tile.first_row * shape.hidden..][..tile.rows * shape.hidden];
            matmul_nn(logits, weights, gradient, product, Store::Add, precision);
            if let Some(dhead) = &mut dhead {
                let product = ProductShape {
                    m: tile.columns,
                    n: shape.hidden,
                    k: tile.rows,
                };
                matmul_tn(
                    logits,
                    rows,
                    &mut dhead[tile.head_range()],
                    product,
                    Store::Add,
                    precision,
                );
            }
        });
    });
}

#[track_caller]
pub(crate) fn check(hidden: &[f32], head: &[f32], targets: &[u32], shape: HeadShape) {
    check_matrix("hidden", hidden, targets.len(), shape.hidden);
    check_matrix("head", head, shape.vocab, shape.hidden);
    for (row, &target) in targets.iter().enumerate() {
        assert!(
            (target as usize) < shape.vocab,
            "`targets[{row}]` is {target}, expected below the vocabulary of {}",
            shape.vocab
        );
    }
}

/// A part of the logits.
#[derive(Clone, Copy)]
pub(crate) struct Tile {
    shape: HeadShape,
    pub(crate) first_row: usize,
    pub(crate) rows: usize,
    first_column: usize,
    pub(crate) columns: usize,
}

pub(crate) fn for_each_tile(rows: usize, shape: HeadShape, mut body: impl FnMut(Tile)) {
    for first_row in (0..rows).step_by(TILE_ROWS) {
        for first_column in (0..shape.vocab).step_by(TILE) {
            body(Tile {
                shape,
                first_row,
                rows: TILE_ROWS.min(rows - first_row),
                first_column,
                columns: TILE.min(shape.vocab - first_column),
            });
        }
    }
}

impl Tile {
    pub(crate) fn hidden<'a>(&self, hidden: &'a [f32]) -> &'a [f32] {
        &hidden[self.first_row * self.shape.hidden..][..self.rows * self.shape.hidden]
    }

    pub(crate) fn head<'a>(&self, head: &'a [f32]) -> &'a [f32] {
        &head[self.head_range()]
    }

    /// Where the weights of its tokens lie in `[vocab, hidden]`.
    pub(crate) fn head_range(&self) -> std::ops::Range<usize> {
        let width = self.shape.hidden;
        self.first_column * width..(self.first_column + self.columns) * width
    }

    /// The column of a target, if it lies in this tile.
    fn column(&self, target: u32) -> Option<usize> {
        (target as usize)
            .checked_sub(self.first_column)
            .filter(|&column| column < self.columns)
    }

    pub(crate) fn with_logits(
        &self,
        hidden: &[f32],
        head: &[f32],
        precision: Precision,
        body: impl FnOnce(&mut [f32]),
    ) {
        with_scratch(self.rows * self.columns, |logits| {
            let product = ProductShape {
                m: self.rows,
                n: self.columns,
                k: self.shape.hidden,
            };
            matmul_nt(
                hidden,
                self.head(head),
                logits,
                product,
                Store::Replace,
                precision,
            );
            body(logits);
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{HEADS, assert_close, assert_near, masked, on_each, on_threads, random};

    // f32 logits of size about 5, summed over up to 3000 tokens.
    const F32_TOLERANCE: f64 = 5e-6;
    // Logits are sums of bf16 products: each term off by 2^-8 of itself.
    const BF16_TOLERANCE: f64 = 2e-2;
    // The whole gradient, as one vector: its terms' errors differ in sign.
    const F32_DISTANCE: f64 = 2e-6;
    const BF16_DISTANCE: f64 = 1e-2;

    struct Naive {
        logps: Vec<f64>,
        dhidden: Vec<f64>,
        dhead: Vec<f64>,
    }

    fn naive(hidden: &[f32], head: &[f32], targets: &[u32], dlogps: &[f32], width: usize) -> Naive {
        let mut result = Naive {
            logps: Vec::new(),
            dhidden: vec![0.0; hidden.len()],
            dhead: vec![0.0; head.len()],
        };
        for (row, &target) in targets.iter().enumerate() {
            let x = &hidden[row * width..][..width];
            let logits: Vec<f64> = head
                .chunks(width)
                .map(|w| {
                    x.iter()
                        .zip(w)
                        .map(|(x, w)| f64::from(*x) * f64::from(*w))
                        .sum()
                })
                .collect();
            let lse = logits.iter().map(|z| z.exp()).sum::<f64>().ln();
            result.logps.push(logits[target as usize] - lse);
            for (token, logit) in logits.iter().enumerate() {
                let hit = if token == target as usize { 1.0 } else { 0.0 };
                let slope = f64::from(dlogps[row]) * (hit - (logit - lse).exp());
                for i in 0..width {
                    result.dhidden[row * width + i] += slope * f64::from(head[token * width + i]);
                    result.dhead[token * width + i] += slope * f64::from(x[i]);
                }
            }
        }
        result
    }

    fn targets(rows: usize, vocab: usize) -> Vec<u32> {
        (0..rows)
            .map(|row| (row * 7919 + vocab - 1) as u32 % vocab as u32)
            .collect()
    }

    #[test]
    fn values_and_gradients_agree_with_f64() {
        on_each(|| {
            for (rows, hidden, vocab) in HEADS.into_iter().chain([(1, 64, 2049)]) {
                agrees_with_f64(rows, HeadShape { hidden, vocab });
            }
        });
    }

    fn agrees_with_f64(rows: usize, shape: HeadShape) {
        let HeadShape { hidden, vocab } = shape;
        let x = random(rows * hidden, 1);
        let head: Vec<f32> = random(vocab * hidden, 2).iter().map(|w| w * 2.0).collect();
        let (targets, dlogps) = (targets(rows, vocab), masked(rows, 3));
        let expected = naive(&x, &head, &targets, &dlogps, hidden);
        for (precision, tolerance, distance) in [
            (Precision::F32, F32_TOLERANCE, F32_DISTANCE),
            (Precision::Bf16, BF16_TOLERANCE, BF16_DISTANCE),
        ] {
            let got = token_logps_forward(&x, &head, &targets, shape, precision);
            assert_close("logps", &got.logps, &expected.logps, tolerance);
            let backward = |dhead: Option<&mut [f32]>| {
                let mut dx = vec![f32::NAN; x.len()];
                token_logps_backward(
                    &x, &head, &targets, &got.lse, &dlogps, shape, precision, &mut dx, dhead,
                );
                dx
            };
            let (mut dhead, mut added) = (vec![0.0; head.len()], vec![1.0; head.len()]);
            let dx = backward(Some(&mut dhead));
            assert_close("dhidden", &dx, &expected.dhidden, tolerance);
            assert_near("dhidden", &dx, &expected.dhidden, distance);
            assert_close("dhead", &dhead, &expected.dhead, tolerance);
            assert_near("dhead", &dhead, &expected.dhead, distance);
            assert_eq!(backward(Some(&mut added)), dx);
            let and_one: Vec<f64> = dhead.iter().map(|d| f64::from(d + 1.0)).collect();
            assert_close("dhead, added", &added, &and_one, F32_TOLERANCE);
            assert_eq!(backward(None), dx);
        }
    }

    #[test]
    fn rows_beyond_one_tile_are_reached() {
        let (rows, shape) = (
            TILE_ROWS + 3,
            HeadShape {
                hidden: 2,
                vocab: 5,
            },
        );
        let (x, head) = (random(rows * 2, 1), random(10, 2));
        let (targets, dlogps) = (targets(rows, 5), random(rows, 3));
        let expected = naive(&x, &head, &targets, &dlogps, 2);
        let got = token_logps_forward(&x, &head, &targets, shape, Precision::F32);
        assert_close("logps", &got.logps, &expected.logps, F32_TOLERANCE);
        let (mut dx, mut dhead) = (vec![0.0; x.len()], vec![0.0; 10]);
        token_logps_backward(
            &x,
            &head,
            &targets,
            &got.lse,
            &dlogps,
            shape,
            Precision::F32,
            &mut dx,
            Some(&mut dhead),
        );
        assert_close("dhidden", &dx, &expected.dhidden, F32_TOLERANCE);
        assert_close("dhead", &dhead, &expected.dhead, F32_TOLERANCE);
    }

    #[test]
    fn large_logits_stay_finite() {
        let shape = HeadShape {
            hidden: 1,
            vocab: 3,
        };
        let got = token_logps_forward(&[1.0], &[-1000.0, 1000.0, 0.0], &[0], shape, Precision::F32);
        assert_eq!(got.logps, [-2000.0]);
        assert_eq!(got.lse, [1000.0]);
    }

    #[test]
    fn threads_change_no_bit() {
        let (rows, shape) = (
            100,
            HeadShape {
                hidden: 48,
                vocab: 2500,
            },
        );
        let (x, head) = (random(rows * 48, 1), random(2500 * 48, 2));
        let (targets, dlogps) = (targets(rows, 2500), random(rows, 3));
        for precision in [Precision::F32, Precision::Bf16] {
            let run = || {
                let got = token_logps_forward(&x, &head, &targets, shape, precision);
                let (mut dx, mut dhead) = (vec![0.0; x.len()], vec![0.0; head.len()]);
                token_logps_backward(
                    &x,
                    &head,
                    &targets,
                    &got.lse,
                    &dlogps,
                    shape,
                    precision,
                    &mut dx,
                    Some(&mut dhead),
                );
                (got, dx, dhead)
            };
            assert_eq!(on_threads(1, run), on_threads(2, run));
        }
    }

    #[test]
    #[should_panic(expected = "`targets[1]` is 5, expected below the vocabulary of 5")]
    fn a_target_beyond_the_vocabulary_panics() {
        let shape = HeadShape {
            hidden: 1,
            vocab: 5,
        };
        let _ = token_logps_forward(&[0.0; 2], &[0.0; 5], &[0, 5], shape, Precision::F32);
    }
}
