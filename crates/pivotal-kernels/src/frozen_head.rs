//! Log-probabilities under a vocabulary projection that is not trained, with their gradient taken on the way.
//!
//! ```text
//! z = hidden · headᵀ,  p_v = e^(z_v - lse),  ∂logp/∂hidden = head_target - Σ_v p_v head_v
//! ```
//!
//! Unlike [`token_logps_backward`](crate::token_logps_backward) this needs no second product for the logits: the sum over the
//! vocabulary is kept relative to each row's running maximum and scaled down when that rises, as in attention with an
//! online softmax (Milakov and Gimelshein 2018, arXiv:1805.02867). The upstream gradient is a factor a row, for later.

use crate::frozen::FrozenPanels;
use crate::lanes::{add_scaled, exp, maximum};
use crate::logps::{HeadShape, TokenLogps, check};
use crate::matmul::{Precision, ProductShape, Store, matmul_nn, matmul_nt};
use crate::parallel::{SharedOut, check_len, for_each_block, with_scratch};
use crate::rows::{exp_sum, exp_sum_in_place};

/// Columns of a tile: with 1024 rows it takes 4 MiB and stays in the third-level cache. A multiple of the width of a panel, and
/// of 32, so that a tile's sums begin where sixteen pairs begin.
const TILE: usize = 960;
/// Rows of a tile, for the same reason.
const TILE_ROWS: usize = 2048;
/// Rows of a tile that one task reduces.
const TASK_ROWS: usize = 16;
/// A logit costs about this many multiply-adds: an exponential.
const COST: usize = 8;

/// As [`token_logps_forward`](crate::token_logps_forward), from a frozen head whose bf16 panels are kept in `panels`.
///
/// With `slopes`, `[rows, hidden]`, also the gradient of each row's log-probability with respect to its hidden state.
/// The log-probabilities are the same bit for bit with and without.
///
/// # Shapes
/// `hidden` is `[rows, hidden]`, `head` is `[vocab, hidden]`, `targets` is `[rows]`.
///
/// # Panics
/// If lengths do not fit or a target is not below `vocab`.
#[must_use]
pub fn frozen_token_logps(
    hidden: &[f32],
    head: &[f32],
    panels: &FrozenPanels,
    targets: &[u32],
    shape: HeadShape,
    precision: Precision,
    mut slopes: Option<&mut [f32]>,
) -> TokenLogps {
    check(hidden, head, targets, shape);
    if let Some(slopes) = &mut slopes {
        check_len("slopes", slopes, hidden.len());
        slopes.fill(0.0);
    }
    let width = shape.hidden;
    let mut result = TokenLogps {
        logps: Vec::with_capacity(targets.len()),
        lse: Vec::with_capacity(targets.len()),
    };
    for first in (0..targets.len()).step_by(TILE_ROWS) {
        let rows = TILE_ROWS.min(targets.len() - first);
        let part = first * width..(first + rows) * width;
        let targets = &targets[first..first + rows];
        let mut sums = RowSums {
            targets,
            best: vec![f32::NEG_INFINITY; rows],
            total: vec![0.0; rows],
            target_logits: vec![0.0; rows],
            slopes: slopes
                .as_deref_mut()
                .map(|slopes| &mut slopes[part.clone()]),
            width,
        };
        accumulate(&hidden[part], head, panels, shape, precision, &mut sums);
        sums.finish(head, &mut result);
    }
    result
}

/// What is known of each row of a tile after some columns of the vocabulary.
struct RowSums<'a> {
    targets: &'a [u32],
    /// The largest logit.
    best: Vec<f32>,
    /// `Σ e^(z - best)`.
    total: Vec<f32>,
    target_logits: Vec<f32>,
    /// `Σ e^(z_v - best) head_v`, `[rows, width]`, if wanted.
    slopes: Option<&'a mut [f32]>,
    width: usize,
}

impl RowSums<'_> {
    /// Takes in the logits of columns `first..first + columns`; where slopes are wanted, leaves `e^(z - best)` in their place.
    fn take(&mut self, logits: &mut [f32], first: usize, columns: usize) {
        let rows = self.targets.len();
        let (targets, width) = (self.targets, self.width);
        let best = SharedOut::new(&mut self.best);
        let total = SharedOut::new(&mut self.total);
        let target_logits = SharedOut::new(&mut self.target_logits);
        let slopes = self.slopes.as_deref_mut().map(SharedOut::new);
        let work = COST * logits.len();
        let logits = SharedOut::new(logits);
        for_each_block(rows, TASK_ROWS, work, |block| {
            for row in block {
                // SAFETY: the blocks are disjoint, and so are their rows of all five slices.
                let (logits, best, total) = unsafe {
                    (
                        logits.slice(row * columns, columns),
                        &mut *best.at(row),
                        &mut *total.at(row),
                    )
                };
                let column = (targets[row] as usize).checked_sub(first);
                if let Some(column) = column.filter(|&column| column < columns) {
                    // SAFETY: as above.
                    unsafe { *target_logits.at(row) = logits[column] };
                }
                let larger = best.max(maximum(logits));
                // A row of -inf only has no finite maximum to subtract.
                let shift = if larger == f32::NEG_INFINITY {
                    0.0
                } else {
                    larger
                };
                let shrink = exp(*best - shift);
                match slopes {
                    None => *total = *total * shrink + exp_sum(logits, shift),
                    Some(slopes) => {
                        *total = *total * shrink + exp_sum_in_place(logits, shift);
                        if larger > *best {
                            // SAFETY: as above.
                            let slopes = unsafe { slopes.slice(row * width, width) };
                            slopes.iter_mut().for_each(|slope| *slope *= shrink);
                        }
                    }
                }
                *best = larger;
            }
        });
    }

    fn finish(self, head: &[f32], result: &mut TokenLogps) {
        let lse = self
            .best
            .iter()
            .zip(&self.total)
            .map(|(best, total)| best + total.ln());
        let before = result.lse.len();
        result.lse.extend(lse);
        let lse = &result.lse[before..];
        let logps = self
            .target_logits
            .iter()
            .zip(lse)
            .map(|(logit, lse)| logit - lse);
        result.logps.extend(logps);
        let Some(slopes) = self.slopes else { return };
        let rows = slopes.chunks_exact_mut(self.width.max(1));
        for ((slopes, &target), &total) in rows.zip(self.targets).zip(&self.total) {
            let share = -1.0 / total;
            slopes.iter_mut().for_each(|slope| *slope *= share);
            add_scaled(
                slopes,
                1.0,
                &head[target as usize * self.width..][..self.width],
            );
        }
    }
}

fn accumulate(
    hidden: &[f32],
    head: &[f32],
    panels: &FrozenPanels,
    shape: HeadShape,
    precision: Precision,
    sums: &mut RowSums<'_>,
) {
    #[cfg(target_arch = "x86_64")]
    if precision == Precision::Bf16 && crate::bf16::available() {
        return bf16::accumulate(hidden, head, panels, shape, sums);
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = panels;
    let (rows, width) = (sums.targets.len(), shape.hidden);
    for first in (0..shape.vocab).step_by(TILE) {
        let columns = TILE.min(shape.vocab - first);
        let head = &head[first * width..][..columns * width];
        with_scratch(rows * columns, |logits| {
            let product = ProductShape {
                m: rows,
                n: columns,
                k: width,
            };
            matmul_nt(hidden, head, logits, product, Store::Replace, precision);
            sums.take(logits, first, columns);
            if let Some(slopes) = &mut sums.slopes {
                let product = ProductShape {
                    m: rows,
                    n: width,
                    k: columns,
                };
                matmul_nn(logits, head, slopes, product, Store::Add, precision);
            }
        });
    }
}

#[cfg(target_arch = "x86_64")]
mod bf16 {
    use super::{RowSums, TILE};
    use crate::frozen::{FrozenLinear, FrozenPanels};
    use crate::group::{Job, Segment, multiply_jobs};
    use crate::logps::HeadShape;
    use crate::matmul::Store;
    use crate::panels::{Source, left_words, pack_left, padded_pairs};
    use crate::parallel::with_scratch;

    fn dense(values: &[f32], lines: usize, k: usize) -> Source<'_> {
        Source {
            values,
            line_stride: k,
            k_stride: 1,
            lines,
            k,
        }
    }

    pub(super) fn accumulate(
        hidden: &[f32],
        head: &[f32],
        panels: &FrozenPanels,
        shape: HeadShape,
        sums: &mut RowSums<'_>,
    ) {
        let (rows, width) = (sums.targets.len(), shape.hidden);
        let layer = FrozenLinear {
            weight: Some(head),
            bias: None,
            panels,
            outputs: shape.vocab,
            adapted: false,
        };
        let forward = panels.forward(&layer, width);
        let tile = TILE.min(shape.vocab);
        with_scratch(left_words(rows, width), |left| {
            pack_left(dense(hidden, rows, width), left);
            with_scratch(rows * tile, |logits| {
                for first in (0..shape.vocab).step_by(TILE) {
                    let columns = TILE.min(shape.vocab - first);
                    let logits = &mut logits[..rows * columns];
                    let right = &forward[first * padded_pairs(width)..];
                    let segment = [Segment::whole(left, right, width)];
                    let job = Job {
                        segments: &segment,
                        columns,
                        out_column: 0,
                    };
                    multiply_jobs(&[job], rows, logits, columns, Store::Replace);
                    sums.take(logits, first, columns);
                    if let Some(slopes) = &mut sums.slopes {
                        let right = panels.backward(&layer, width);
                        with_scratch(left_words(rows, columns), |left| {
                            pack_left(dense(logits, rows, columns), left);
                            let segment = [Segment {
                                left,
                                right,
                                right_pairs: (padded_pairs(shape.vocab), first / 2),
                                pairs: columns.div_ceil(2),
                            }];
                            let job = Job {
                                segments: &segment,
                                columns: width,
                                out_column: 0,
                            };
                            multiply_jobs(&[job], rows, slopes, width, Store::Add);
                        });
                    }
                }
            });
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::logps::{token_logps_backward, token_logps_forward};
    use crate::testing::{assert_close, assert_near, on_each, on_threads, random, widen};

    // Two orders of the same f32 sums; logits of size about 5.
    const F32_TOLERANCE: f64 = 1e-5;
    // The probabilities are rounded before the upstream factor here and after it there.
    const BF16_TOLERANCE: f64 = 2e-2;
    // The whole gradient, as one vector.
    const F32_DISTANCE: f64 = 5e-6;
    const BF16_DISTANCE: f64 = 1e-2;

    fn targets(rows: usize, vocab: usize) -> Vec<u32> {
        (0..rows)
            .map(|row| (row * 7919 + vocab - 1) as u32 % vocab as u32)
            .collect()
    }

    fn compute(
        x: &[f32],
        head: &[f32],
        targets: &[u32],
        shape: HeadShape,
        precision: Precision,
    ) -> (TokenLogps, Vec<f32>) {
        let panels = FrozenPanels::default();
        let mut slopes = vec![f32::NAN; x.len()];
        let with = frozen_token_logps(
            x,
            head,
            &panels,
            targets,
            shape,
            precision,
            Some(&mut slopes),
        );
        let without = frozen_token_logps(x, head, &panels, targets, shape, precision, None);
        assert_eq!(with, without, "the gradient changes no log-probability");
        (with, slopes)
    }

    /// The log-probabilities and the gradient of their sum, in f32, by the kernels that make the logits twice.
    fn two_passes(
        x: &[f32],
        head: &[f32],
        targets: &[u32],
        shape: HeadShape,
    ) -> (TokenLogps, Vec<f32>) {
        let exact = token_logps_forward(x, head, targets, shape, Precision::F32);
        let (mut dx, ones) = (vec![f32::NAN; x.len()], vec![1.0; targets.len()]);
        token_logps_backward(
            x,
            head,
            targets,
            &exact.lse,
            &ones,
            shape,
            Precision::F32,
            &mut dx,
            None,
        );
        (exact, dx)
    }

    #[test]
    fn agrees_with_the_two_pass_kernels() {
        on_each(|| {
            for (rows, hidden, vocab) in [
                (0, 4, 9),
                (1, 1, 1),
                (5, 16, 959),
                (3, 33, 960),
                (63, 5, 959),
                (65, 8, 961),
                (64, 17, 3001),
                (1, 64, 2017),
            ] {
                let shape = HeadShape { hidden, vocab };
                let x = random(rows * hidden, 1);
                let head: Vec<f32> = random(vocab * hidden, 2).iter().map(|w| w * 2.0).collect();
                let targets = targets(rows, vocab);
                for (precision, tolerance, distance) in [
                    (Precision::F32, F32_TOLERANCE, F32_DISTANCE),
                    (Precision::Bf16, BF16_TOLERANCE, BF16_DISTANCE),
                ] {
                    let (got, slopes) = compute(&x, &head, &targets, shape, precision);
                    let (exact, dx) = two_passes(&x, &head, &targets, shape);
                    assert_close("logps", &got.logps, &widen(&exact.logps), tolerance);
                    assert_close("slopes", &slopes, &widen(&dx), tolerance);
                    assert_near("slopes", &slopes, &widen(&dx), distance);
                }
            }
        });
    }

    #[test]
    fn a_maximum_that_rises_late_scales_the_sum_down() {
        // Logits climb with the token id, from -500 to 500, so every tile brings a new maximum.
        let shape = HeadShape {
            hidden: 1,
            vocab: 5000,
        };
        let head: Vec<f32> = (0..5000)
            .map(|token| (token as f32 - 2500.0) / 5.0)
            .collect();
        let (got, slopes) = compute(&[1.0], &head, &[4990], shape, Precision::F32);
        let logits = head.iter().map(|&z| f64::from(z) - 499.8);
        let total: f64 = logits.clone().map(f64::exp).sum();
        let mean: f64 = logits.map(|z| z.exp() / total * (z + 499.8)).sum();
        let target = f64::from(head[4990]);
        assert_close("logp", &got.logps, &[target - 499.8 - total.ln()], 1e-5);
        assert_close("slope", &slopes, &[target - mean], 1e-3);
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
        let targets = targets(rows, 5);
        let (exact, dx) = two_passes(&x, &head, &targets, shape);
        on_each(|| {
            for (precision, tolerance, distance) in [
                (Precision::F32, F32_TOLERANCE, F32_DISTANCE),
                (Precision::Bf16, BF16_TOLERANCE, BF16_DISTANCE),
            ] {
                let (got, slopes) = compute(&x, &head, &targets, shape, precision);
                assert_close("logps", &got.logps, &widen(&exact.logps), tolerance);
                assert_close("lse", &got.lse, &widen(&exact.lse), tolerance);
                assert_near("slopes", &slopes, &widen(&dx), distance);
            }
        });
    }

    #[test]
    fn threads_change_no_bit() {
        on_each(|| {
            let (rows, shape) = (
                100,
                HeadShape {
                    hidden: 48,
                    vocab: 2500,
                },
            );
            let (x, head) = (random(rows * 48, 1), random(2500 * 48, 2));
            let targets = targets(rows, 2500);
            for precision in [Precision::F32, Precision::Bf16] {
                let run = || compute(&x, &head, &targets, shape, precision);
                let one = on_threads(1, run);
                assert_eq!(one, on_threads(2, run));
                assert_eq!(one, on_threads(3, run));
            }
        });
    }
}
