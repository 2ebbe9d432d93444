//! The KL divergence of a reference's next-token distribution from the policy's, over the whole vocabulary and in tiles:
//! neither `[rows, vocab]` ever exists.
//!
//! ```text
//! z = hidden · headᵀ,  lse = ln Σ_v e^z_v,  p_v = e^(z_v - lse);  z', lse' and q_v of the reference
//! KL(q‖p) = Σ_v q_v·(z'_v - z_v) - (lse' - lse)
//! dz_v = dkl·(p_v - q_v),  dhidden = dz · head,  dhead = dzᵀ · hidden
//! ```
//!
//! The forward pass keeps a running maximum and running sums a row, f32 within a tile and f64 across them: the divergence
//! is a difference of nearly equal numbers. The backward pass computes both tiles of logits again.

use crate::lanes::{exp, maximum, sum};
use crate::logps::{COST, HeadShape, TASK_ROWS, Tile, for_each_tile};
use crate::matmul::{Precision, ProductShape, Store, matmul_nn, matmul_tn};
use crate::parallel::{SharedOut, check_len, check_matrix, for_each_block, with_scratch};

/// A model's side of [`vocabulary_kl_forward`].
#[derive(Clone, Copy, Debug)]
pub struct HeadInput<'a> {
    /// Hidden states, `[rows, hidden]`.
    pub hidden: &'a [f32],
    /// The vocabulary projection, `[vocab, hidden]`.
    pub head: &'a [f32],
}

/// What [`vocabulary_kl_forward`] returns. Each `[rows]`, in nats.
#[derive(Clone, Debug, PartialEq)]
pub struct VocabularyKl {
    /// KL(reference‖policy) of each row.
    pub kl: Vec<f32>,
    /// `ln Σ e^logit` of the policy: what the backward pass needs again.
    pub lse: Vec<f32>,
    /// The same of the reference.
    pub reference_lse: Vec<f32>,
}

/// Σ over the vocabulary so far, all shifted by a running maximum.
#[derive(Clone, Copy)]
struct Running {
    best: f32,
    total: f64,
    reference_best: f32,
    reference_total: f64,
    /// Σ e^(z' - reference_best)·(z' - z).
    cross: f64,
}

/// What one tile says of a row, in this order: maximum and Σ e^(z - maximum), the same of the reference, and `cross`.
const STATISTICS: usize = 5;

/// KL(softmax(reference)‖softmax(policy)) of each row, over the vocabulary. Exactly 0 where the two sides are the same.
///
/// # Shapes
/// `hidden` of both sides is `[rows, hidden]`, `head` is `[vocab, hidden]`.
///
/// # Panics
/// If lengths do not fit.
///
/// # Examples
/// ```
/// use pivotal_kernels::{HeadInput, HeadShape, Precision, vocabulary_kl_forward};
/// // The policy says (¾, ¼), the reference (½, ½).
/// let shape = HeadShape { hidden: 1, vocab: 2 };
/// let head = [3f32.ln(), 0.0];
/// let policy = HeadInput { hidden: &[1.0], head: &head };
/// let reference = HeadInput { hidden: &[0.0], head: &head };
/// let kl = vocabulary_kl_forward(policy, reference, shape, Precision::F32).kl;
/// assert!((kl[0] - 0.5 * (4f32 / 3.0).ln()).abs() < 1e-6);
/// ```
#[must_use]
pub fn vocabulary_kl_forward(
    policy: HeadInput<'_>,
    reference: HeadInput<'_>,
    shape: HeadShape,
    precision: Precision,
) -> VocabularyKl {
    let rows = check(policy, reference, shape);
    let mut running = vec![Running::NOTHING; rows];
    for_each_tile(rows, shape, |tile| {
        with_both_logits(&tile, policy, reference, precision, |logits, other| {
            with_scratch(tile.rows * STATISTICS, |statistics| {
                let shared = SharedOut::new(statistics);
                for_each_block(tile.rows, TASK_ROWS, 2 * COST * logits.len(), |block| {
                    for row in block {
                        let range = row * tile.columns..(row + 1) * tile.columns;
                        let of_row = tile_statistics(&logits[range.clone()], &other[range]);
                        // SAFETY: the blocks are disjoint, and so are their rows.
                        unsafe { shared.slice(row * STATISTICS, STATISTICS) }
                            .copy_from_slice(&of_row);
                    }
                });
                let (statistics, _) = statistics.as_chunks::<STATISTICS>();
                for (row, of_row) in running[tile.first_row..].iter_mut().zip(statistics) {
                    row.add(*of_row);
                }
            });
        });
    });
    let lse = |best: f32, total: f64| f64::from(best) + total.ln();
    let policy = running.iter().map(|row| lse(row.best, row.total));
    let policy: Vec<f64> = policy.collect();
    let reference = running.iter();
    let reference = reference.map(|row| lse(row.reference_best, row.reference_total));
    let reference: Vec<f64> = reference.collect();
    let kl = running.iter().zip(policy.iter().zip(&reference));
    let kl = kl.map(|(row, (lse, other))| row.cross / row.reference_total - (other - lse));
    let narrow = |values: &[f64]| values.iter().map(|&value| value as f32).collect();
    VocabularyKl {
        kl: kl.map(|kl| kl as f32).collect(),
        lse: narrow(&policy),
        reference_lse: narrow(&reference),
    }
}

/// The gradient of [`vocabulary_kl_forward`] by the policy's side: `dkl` `[rows]` is the upstream gradient, `saved` what the
/// forward pass returned.
///
/// `dhidden` `[rows, hidden]` is overwritten; `dhead` `[vocab, hidden]` is added to, and costs nothing when `None`.
///
/// # Panics
/// If lengths do not fit.
#[expect(
    clippy::too_many_arguments,
    reason = "two sides, one from the forward pass, the gradient above, two settings, two gradients"
)]
pub fn vocabulary_kl_backward(
    policy: HeadInput<'_>,
    reference: HeadInput<'_>,
    saved: &VocabularyKl,
    dkl: &[f32],
    shape: HeadShape,
    precision: Precision,
    dhidden: &mut [f32],
    mut dhead: Option<&mut [f32]>,
) {
    let rows = check(policy, reference, shape);
    check_len("lse", &saved.lse, rows);
    check_len("reference_lse", &saved.reference_lse, rows);
    check_len("dkl", dkl, rows);
    check_len("dhidden", dhidden, policy.hidden.len());
    if let Some(dhead) = &dhead {
        check_len("dhead", dhead, policy.head.len());
    }
    dhidden.fill(0.0);
    for_each_tile(rows, shape, |tile| {
        with_both_logits(&tile, policy, reference, precision, |logits, other| {
            let len = logits.len();
            let shared = SharedOut::new(logits);
            for_each_block(tile.rows, TASK_ROWS, 2 * COST * len, |block| {
                for row in block {
                    let first = row * tile.columns;
                    // SAFETY: the blocks are disjoint, and so are their rows.
                    let slopes = unsafe { shared.slice(first, tile.columns) };
                    let other = &other[first..][..tile.columns];
                    let row = tile.first_row + row;
                    let (lse, other_lse) = (saved.lse[row], saved.reference_lse[row]);
                    for (slope, &other) in slopes.iter_mut().zip(other) {
                        *slope = dkl[row] * (exp(*slope - lse) - exp(other - other_lse));
                    }
                }
            });
            let width = shape.hidden;
            let gradient = &mut dhidden[tile.first_row * width..][..tile.rows * width];
            let product = ProductShape {
                m: tile.rows,
                n: width,
                k: tile.columns,
            };
            let weights = tile.head(policy.head);
            matmul_nn(logits, weights, gradient, product, Store::Add, precision);
            if let Some(dhead) = &mut dhead {
                let product = ProductShape {
                    m: tile.columns,
                    n: width,
                    k: tile.rows,
                };
                let gradient = &mut dhead[tile.head_range()];
                let hidden = tile.hidden(policy.hidden);
                matmul_tn(logits, hidden, gradient, product, Store::Add, precision);
            }
        });
    });
}

impl Running {
    const NOTHING: Self = Self {
        best: f32::NEG_INFINITY,
        total: 0.0,
        reference_best: f32::NEG_INFINITY,
        reference_total: 0.0,
        cross: 0.0,
    };

    fn add(&mut self, [best, total, reference_best, reference_total, cross]: [f32; STATISTICS]) {
        let ([old, new], largest) = rescale(self.best, best);
        self.best = largest;
        self.total = old * self.total + new * f64::from(total);
        let ([old, new], largest) = rescale(self.reference_best, reference_best);
        self.reference_best = largest;
        self.reference_total = old * self.reference_total + new * f64::from(reference_total);
        self.cross = old * self.cross + new * f64::from(cross);
    }
}

/// What sums shifted by `old` and by `new` are multiplied by to be shifted by the larger, and the larger.
fn rescale(old: f32, new: f32) -> ([f64; 2], f32) {
    let largest = old.max(new);
    let factor = |shift: f32| match shift == largest {
        true => 1.0,
        false => (f64::from(shift) - f64::from(largest)).exp(),
    };
    ([factor(old), factor(new)], largest)
}

/// See [`STATISTICS`]; sums in an order that the length fixes.
fn tile_statistics(logits: &[f32], other: &[f32]) -> [f32; STATISTICS] {
    const LANES: usize = 16;
    let (best, reference_best) = (maximum(logits), maximum(other));
    let (mut total, mut reference_total, mut cross) =
        ([0.0f32; LANES], [0.0f32; LANES], [0.0f32; LANES]);
    let (blocks, rest) = logits.as_chunks::<LANES>();
    let (other_blocks, other_rest) = other.as_chunks::<LANES>();
    for (block, other) in blocks.iter().zip(other_blocks) {
        for lane in 0..LANES {
            let weight = exp(other[lane] - reference_best);
            total[lane] += exp(block[lane] - best);
            reference_total[lane] += weight;
            cross[lane] += weight * (other[lane] - block[lane]);
        }
    }
    let mut sums = [sum(&total), sum(&reference_total), sum(&cross)];
    for (&logit, &other) in rest.iter().zip(other_rest) {
        let weight = exp(other - reference_best);
        sums[0] += exp(logit - best);
        sums[1] += weight;
        sums[2] += weight * (other - logit);
    }
    [best, sums[0], reference_best, sums[1], sums[2]]
}

fn with_both_logits(
    tile: &Tile,
    policy: HeadInput<'_>,
    reference: HeadInput<'_>,
    precision: Precision,
    body: impl FnOnce(&mut [f32], &[f32]),
) {
    let hidden = tile.hidden(reference.hidden);
    tile.with_logits(hidden, reference.head, precision, |other| {
        tile.with_logits(
            tile.hidden(policy.hidden),
            policy.head,
            precision,
            |logits| body(logits, other),
        );
    });
}

/// The number of rows.
#[track_caller]
fn check(policy: HeadInput<'_>, reference: HeadInput<'_>, shape: HeadShape) -> usize {
    check_matrix("head", policy.head, shape.vocab, shape.hidden);
    check_len("reference_head", reference.head, policy.head.len());
    check_len("reference_hidden", reference.hidden, policy.hidden.len());
    let rows = policy.hidden.len() / shape.hidden.max(1);
    check_matrix("hidden", policy.hidden, rows, shape.hidden);
    rows
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{HEADS, assert_close, assert_near, masked, on_each, on_threads, random};

    // f32 logits of size about 5, summed over up to 3000 tokens.
    const F32_TOLERANCE: f64 = 5e-6;
    // Logits are sums of bf16 products: each term off by 2^-8 of itself.
    const BF16_TOLERANCE: f64 = 2e-2;
    // The whole gradient, as one vector: a difference of two probabilities, each off by its own logits' rounding.
    const F32_DISTANCE: f64 = 5e-6;
    const BF16_DISTANCE: f64 = 2e-2;

    struct Sides {
        hidden: Vec<f32>,
        head: Vec<f32>,
        reference_hidden: Vec<f32>,
        reference_head: Vec<f32>,
        dkl: Vec<f32>,
    }

    impl Sides {
        fn new(rows: usize, shape: HeadShape) -> Self {
            let head = |seed| {
                let weights = random(shape.vocab * shape.hidden, seed);
                weights.iter().map(|w| w * 2.0).collect::<Vec<_>>()
            };
            Self {
                hidden: random(rows * shape.hidden, 1),
                head: head(2),
                reference_hidden: random(rows * shape.hidden, 3),
                reference_head: head(4),
                dkl: masked(rows, 5),
            }
        }

        fn policy(&self) -> HeadInput<'_> {
            HeadInput {
                hidden: &self.hidden,
                head: &self.head,
            }
        }

        fn reference(&self) -> HeadInput<'_> {
            HeadInput {
                hidden: &self.reference_hidden,
                head: &self.reference_head,
            }
        }

        fn run(
            &self,
            shape: HeadShape,
            precision: Precision,
        ) -> (VocabularyKl, Vec<f32>, Vec<f32>) {
            let (policy, reference) = (self.policy(), self.reference());
            let saved = vocabulary_kl_forward(policy, reference, shape, precision);
            let mut dhidden = vec![f32::NAN; self.hidden.len()];
            let mut dhead = vec![1.0; self.head.len()];
            let gradients = Some(&mut dhead[..]);
            vocabulary_kl_backward(
                policy,
                reference,
                &saved,
                &self.dkl,
                shape,
                precision,
                &mut dhidden,
                gradients,
            );
            (saved, dhidden, dhead)
        }
    }

    fn logits(side: HeadInput<'_>, row: usize, width: usize) -> Vec<f64> {
        let x = &side.hidden[row * width..][..width];
        let product = |w: &[f32]| {
            let terms = x.iter().zip(w);
            terms.map(|(x, w)| f64::from(*x) * f64::from(*w)).sum()
        };
        side.head.chunks(width).map(product).collect()
    }

    fn log_softmax(logits: &[f64]) -> Vec<f64> {
        let lse = logits.iter().map(|z| z.exp()).sum::<f64>().ln();
        logits.iter().map(|z| z - lse).collect()
    }

    /// KL, `dhidden` and `dhead`, from the definition.
    fn naive(sides: &Sides, width: usize) -> [Vec<f64>; 3] {
        let mut kl = Vec::new();
        let mut dhidden = vec![0.0; sides.hidden.len()];
        let mut dhead = vec![1.0; sides.head.len()];
        for (row, &upstream) in sides.dkl.iter().enumerate() {
            let log_p = log_softmax(&logits(sides.policy(), row, width));
            let log_q = log_softmax(&logits(sides.reference(), row, width));
            let terms = log_p.iter().zip(&log_q);
            kl.push(terms.map(|(p, q)| q.exp() * (q - p)).sum());
            for (token, (log_p, log_q)) in log_p.iter().zip(&log_q).enumerate() {
                let slope = f64::from(upstream) * (log_p.exp() - log_q.exp());
                for i in 0..width {
                    dhidden[row * width + i] += slope * f64::from(sides.head[token * width + i]);
                    dhead[token * width + i] += slope * f64::from(sides.hidden[row * width + i]);
                }
            }
        }
        [kl, dhidden, dhead]
    }

    #[test]
    fn values_and_gradients_agree_with_f64() {
        on_each(|| {
            for (rows, hidden, vocab) in HEADS.into_iter().chain([(2051, 2, 5)]) {
                agrees_with_f64(rows, HeadShape { hidden, vocab });
            }
        });
    }

    fn agrees_with_f64(rows: usize, shape: HeadShape) {
        let sides = Sides::new(rows, shape);
        let [kl, dhidden, dhead] = naive(&sides, shape.hidden);
        let without_start: Vec<f64> = dhead.iter().map(|d| d - 1.0).collect();
        for (precision, tolerance, distance) in [
            (Precision::F32, F32_TOLERANCE, F32_DISTANCE),
            (Precision::Bf16, BF16_TOLERANCE, BF16_DISTANCE),
        ] {
            let (saved, got_hidden, got_head) = sides.run(shape, precision);
            assert_close("kl", &saved.kl, &kl, tolerance);
            assert_close("dhidden", &got_hidden, &dhidden, tolerance);
            assert_near("dhidden", &got_hidden, &dhidden, distance);
            assert_close("dhead", &got_head, &dhead, tolerance);
            let backward = |dhead: Option<&mut [f32]>| {
                let mut dhidden = vec![f32::NAN; sides.hidden.len()];
                let (policy, reference) = (sides.policy(), sides.reference());
                vocabulary_kl_backward(
                    policy,
                    reference,
                    &saved,
                    &sides.dkl,
                    shape,
                    precision,
                    &mut dhidden,
                    dhead,
                );
                dhidden
            };
            let mut alone = vec![0.0; sides.head.len()];
            assert_eq!(backward(Some(&mut alone)), got_hidden);
            assert_near("dhead", &alone, &without_start, distance);
            assert_eq!(backward(None), got_hidden);
        }
    }

    #[test]
    fn equal_sides_have_exactly_no_divergence_and_no_gradient() {
        let shape = HeadShape {
            hidden: 24,
            vocab: 2100,
        };
        let mut sides = Sides::new(9, shape);
        sides.reference_hidden = sides.hidden.clone();
        sides.reference_head = sides.head.clone();
        for precision in [Precision::F32, Precision::Bf16] {
            let (saved, dhidden, _) = sides.run(shape, precision);
            assert!(saved.kl.iter().chain(&dhidden).all(|&value| value == 0.0));
        }
    }

    #[test]
    fn a_small_divergence_is_not_lost_in_large_logits() {
        // Log-sums near 37, between whose f32 neighbours lie 4e-6; the divergence is smaller.
        let shape = HeadShape {
            hidden: 2,
            vocab: 1500,
        };
        let mut sides = Sides::new(1, shape);
        for weights in sides.head.chunks_mut(2) {
            weights[0] = 30.0;
        }
        sides.reference_head = sides.head.clone();
        (sides.hidden, sides.reference_hidden) = (vec![1.0, 1.0], vec![1.0, 1.0025]);
        let kl = vocabulary_kl_forward(sides.policy(), sides.reference(), shape, Precision::F32).kl;
        let expected = naive(&sides, 2)[0][0];
        assert!(expected > 2e-6, "{expected}");
        let error = (f64::from(kl[0]) - expected).abs();
        assert!(error < 3e-7, "{} off by {error:e}", kl[0]);
    }

    #[test]
    fn large_logits_stay_finite() {
        let shape = HeadShape {
            hidden: 1,
            vocab: 3,
        };
        let head = [-1000.0, 1000.0, 0.0];
        let (policy, reference) = (
            HeadInput {
                hidden: &[1.0],
                head: &head,
            },
            HeadInput {
                hidden: &[-1.0],
                head: &head,
            },
        );
        let saved = vocabulary_kl_forward(policy, reference, shape, Precision::F32);
        assert_eq!((saved.kl[0], saved.lse[0]), (2000.0, 1000.0));
    }

    #[test]
    fn threads_change_no_bit() {
        let shape = HeadShape {
            hidden: 48,
            vocab: 2500,
        };
        let sides = Sides::new(100, shape);
        for precision in [Precision::F32, Precision::Bf16] {
            let run = || sides.run(shape, precision);
            assert_eq!(on_threads(1, run), on_threads(2, run));
        }
    }

    #[test]
    #[should_panic(expected = "`reference_hidden` has 2 elements, expected 1")]
    fn sides_of_different_rows_panic() {
        let side = |hidden| HeadInput {
            hidden,
            head: &[1.0, 2.0],
        };
        let shape = HeadShape {
            hidden: 1,
            vocab: 2,
        };
        let _ = vocabulary_kl_forward(side(&[0.0]), side(&[0.0; 2]), shape, Precision::F32);
    }
}
