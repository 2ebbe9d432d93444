//! [`FrozenMlp`] with bf16 operands, a block of rows at a time on one thread: from the norm to the residual sum nothing of a block
//! leaves its second-level cache but the output, and what the backward pass will need.
//!
//! The gates and ups are made, gated and packed for the last product in chunks of [`CHUNK`] columns. Kept for the backward pass
//! they are bf16, in units of 16 rows, chunk by chunk; in a chunk a row's gates stand before its ups.
//!
//! A row's numbers do not depend on the block that it is in, and gradients of the updates are summed over all rows at once.

use std::ops::Range;

use super::bf16::{rows_of, update_sources, with_rights};
use super::mlp::{Joined, MlpOutputs, MlpSaved};
use super::{FrozenGroup, FrozenLinear, FrozenMlp, Group, scale};
use crate::group::{Multiplier, Segment, row_unit};
use crate::norm::{row_rstd, scale_row};
use crate::panels::{BlockRows, left_words, padded_pairs};
use crate::parallel::{EvenBlocks, SharedOut, with_scratch_parts, written};
use crate::processor::{Processor, processor};
use crate::rounded::round_row;
use crate::swiglu::gate_row_in_place;

mod backward;

pub(super) use backward::backward;

/// Columns of gates, and of ups, that are made together: whole panels and whole tiles.
const CHUNK: usize = 192;
/// Rows that are kept together.
const UNIT: usize = 16;
/// Rows of a block, at most: what it needs then takes 1.5 MiB of a model as wide as SmolLM2-135M.
const FORWARD_ROWS: usize = 256;

/// Blocks for the threads at hand.
fn row_blocks(path: Processor, rows: usize, most: usize) -> EvenBlocks {
    EvenBlocks::new(rows, row_unit(path), most, rayon::current_num_threads())
}

/// Columns of the chunks of `inner` columns.
fn chunks(inner: usize) -> impl Iterator<Item = Range<usize>> {
    (0..inner)
        .step_by(CHUNK)
        .map(move |first| first..(first + CHUNK).min(inner))
}

/// Where the kept gates and ups of a row's chunk are, in words of two.
fn kept_at(row: usize, inner: usize, chunk: &Range<usize>) -> usize {
    row / UNIT * UNIT * inner + chunk.start * UNIT + row % UNIT * chunk.len()
}

/// Hands the normalised rows of `x` to `take`, a unit at a time, with the first one's number: few enough for the first-level
/// cache.
fn for_normed(
    weight: &[f32],
    x: &[f32],
    rstd: &[f32],
    normed: &mut [f32],
    mut take: impl FnMut(usize, BlockRows<'_>),
) {
    let hidden = weight.len();
    for (unit, rstd) in rstd.chunks(UNIT).enumerate() {
        let x = &x[unit * UNIT * hidden..][..rstd.len() * hidden];
        for (row, &rstd) in rstd.iter().enumerate() {
            let at = row * hidden..(row + 1) * hidden;
            scale_row(&x[at.clone()], weight, rstd, &mut normed[at]);
        }
        let block = BlockRows {
            values: normed,
            stride: hidden,
            rows: rstd.len(),
            columns: hidden,
        };
        take(unit * UNIT, block);
    }
}

/// Adds a layer's biases to some of its columns.
fn add_bias(bias: Option<&[f32]>, columns: Range<usize>, block: &mut [f32], stride: usize) {
    let Some(bias) = bias else { return };
    for row in block.chunks_mut(stride) {
        row.iter_mut()
            .zip(&bias[columns.clone()])
            .for_each(|(value, bias)| *value += bias);
    }
}

/// A group's right operands, all packed before the rows are cut into blocks: packing waits for other threads, and a block must not.
struct Operands<'a> {
    layers: &'a [FrozenLinear<'a>],
    inputs: usize,
    /// Each layer's weight, for `x Wᵀ`.
    weights: Vec<&'a [f32]>,
    /// The update's `A`.
    a: &'a [f32],
    /// Each adapted layer's `B`.
    b: &'a [&'a [f32]],
    rank: usize,
    scale: f32,
}

/// Lends `body` a group's operands.
fn with_operands<T>(frozen: &FrozenGroup<'_>, body: impl FnOnce(&Operands<'_>) -> T) -> T {
    let inputs = frozen.inputs;
    let group = Group::new(frozen.layers, 0, inputs, frozen.update);
    let weights = frozen.layers.iter();
    let operands = Operands {
        layers: frozen.layers,
        inputs,
        weights: weights
            .map(|layer| layer.panels.forward(layer, inputs))
            .collect(),
        a: &[],
        b: &[],
        rank: 0,
        scale: 1.0,
    };
    let Some(update) = frozen.update.filter(|_| group.ranks > 0) else {
        return body(&operands);
    };
    with_rights(&[rows_of(update.a, group.ranks, inputs, 0, inputs)], |a| {
        with_rights(&update_sources(&group, update), |b| {
            body(&Operands {
                a: a[0],
                b,
                rank: update.rank,
                scale: update.scale,
                ..operands
            })
        })
    })
}

impl Operands<'_> {
    fn ranks(&self) -> usize {
        self.b.len() * self.rank
    }

    /// Words of a block's packed `h`, for all adapted layers.
    fn h_words(&self, rows: usize) -> usize {
        self.b.len() * left_words(rows, self.rank)
    }

    /// `h = s·input Aᵀ` of a block, and its packs.
    fn update(
        &self,
        multiplier: &Multiplier,
        left: &[f32],
        rows: usize,
        h: &mut [f32],
        packs: &mut [f32],
    ) {
        if self.ranks() == 0 {
            return;
        }
        let whole = Segment::whole(left, self.a, self.inputs);
        multiplier.multiply(&[whole], rows, 0..self.ranks(), h, self.ranks());
        scale(h, self.scale);
        let packs = packs.chunks_exact_mut(left_words(rows, self.rank));
        for (slot, pack) in packs.enumerate() {
            let block = BlockRows {
                values: &h[slot * self.rank..],
                stride: self.ranks(),
                rows,
                columns: self.rank,
            };
            block.pack_left(multiplier.path(), pack, self.rank, 0);
        }
    }

    /// Each layer's segments: its weight's, and its update's if it has one.
    fn segments<'s>(
        &'s self,
        left: &'s [f32],
        packs: &'s [f32],
        rows: usize,
    ) -> Vec<Vec<Segment<'s>>> {
        let mut updates = self
            .b
            .iter()
            .zip(packs.chunks_exact(left_words(rows, self.rank).max(1)));
        let both = self.layers.iter().zip(&self.weights);
        both.map(|(layer, weight)| {
            let whole = Segment::whole(left, weight, self.inputs);
            let update = if layer.adapted { updates.next() } else { None };
            let update = update.map(|(b, h)| Segment::whole(h, b, self.rank));
            std::iter::once(whole).chain(update).collect()
        })
        .collect()
    }
}

/// Where the forward pass puts what it makes.
#[derive(Clone, Copy)]
struct Outputs {
    y: SharedOut,
    kept: Option<SharedOut>,
    rstd: SharedOut,
    gate_up_h: SharedOut,
    down_h: SharedOut,
}

struct Forward<'a> {
    mlp: &'a FrozenMlp<'a>,
    path: Processor,
    x: &'a [f32],
    gate_up: &'a Operands<'a>,
    down: &'a Operands<'a>,
    out: Outputs,
}

pub(super) fn forward(mlp: &FrozenMlp<'_>, x: &[f32], rows: usize, keep: bool) -> MlpOutputs {
    let path = processor();
    let (hidden, inner) = (mlp.hidden(), mlp.inner());
    let (mut y, mut kept, mut rstd) = (Vec::new(), Vec::new(), vec![0.0; rows]);
    let (mut gate_up_h, mut down_h) = (Vec::new(), Vec::new());
    with_operands(&mlp.gate_up, |gate_up| {
        with_operands(&mlp.down, |down| {
            gate_up_h = vec![0.0; rows * gate_up.ranks()];
            down_h = vec![0.0; rows * down.ranks()];
            let mut run = |y: SharedOut, kept: Option<SharedOut>| {
                let out = Outputs {
                    y,
                    kept,
                    rstd: SharedOut::new(&mut rstd),
                    gate_up_h: SharedOut::new(&mut gate_up_h),
                    down_h: SharedOut::new(&mut down_h),
                };
                let pass = Forward {
                    mlp,
                    path,
                    x,
                    gate_up,
                    down,
                    out,
                };
                let blocks = row_blocks(path, rows, FORWARD_ROWS);
                blocks.for_each(3 * rows * hidden * inner, |rows| {
                    // SAFETY: the blocks are disjoint rows of outputs of the lengths above.
                    unsafe { pass.block(rows) };
                });
            };
            // SAFETY: the blocks write each row of both, and the rows that a unit lacks are written here.
            unsafe {
                y = written(rows * hidden, |y| {
                    if !keep {
                        return run(y, None);
                    }
                    let units = rows.next_multiple_of(UNIT);
                    kept = written(units * inner, |kept| {
                        let last = rows / UNIT * UNIT;
                        kept.slice(last * inner, (units - last) * inner).fill(0.0);
                        run(y, Some(kept));
                    });
                });
            }
        });
    });
    let saved = keep.then_some(MlpSaved {
        rstd,
        joined: Joined::Bf16(kept),
        gate_up_h,
        down_h,
    });
    MlpOutputs { y, saved }
}

impl Forward<'_> {
    /// # Safety
    /// The outputs have room for `rows`, which are the caller's alone.
    unsafe fn block(&self, rows: Range<usize>) {
        let (hidden, inner) = (self.mlp.hidden(), self.mlp.inner());
        let (first, count) = (rows.start, rows.len());
        let Outputs {
            y,
            kept,
            rstd,
            gate_up_h,
            down_h,
        } = self.out;
        let ranks = [self.gate_up.ranks(), self.down.ranks()];
        // SAFETY: the caller's promise.
        let (rstd, gate_up_h, down_h, y) = unsafe {
            (
                rstd.slice(first, count),
                gate_up_h.slice(first * ranks[0], count * ranks[0]),
                down_h.slice(first * ranks[1], count * ranks[1]),
                y.slice(first * hidden, count * hidden),
            )
        };
        let x = &self.x[first * hidden..][..count * hidden];
        let (weight, eps) = self.mlp.norm();
        let multiplier = Multiplier::on(self.path);
        let words = [
            left_words(count, hidden),
            left_words(count, inner),
            self.gate_up.h_words(count),
            self.down.h_words(count),
            UNIT * hidden,
            // The last product's sums take the place of what was made before.
            (count * 2 * CHUNK).max(count * hidden),
        ];
        with_scratch_parts(words, |parts| {
            let [left, gated, h_packs, down_packs, normed, work] = parts;
            for (rstd, x) in rstd.iter_mut().zip(x.chunks_exact(hidden)) {
                *rstd = row_rstd(x, eps);
            }
            let panel = padded_pairs(hidden);
            for_normed(weight, x, rstd, normed, |row, block| {
                block.pack_left(multiplier.path(), &mut left[row * panel..], hidden, 0);
            });
            let left = &*left;
            self.gate_up
                .update(&multiplier, left, count, gate_up_h, h_packs);
            let segments = self.gate_up.segments(left, h_packs, count);
            for columns in chunks(inner) {
                let width = columns.len();
                let chunk = &mut work[..count * 2 * width];
                let halves = self.gate_up.layers.iter().zip(&segments);
                for (half, (layer, segments)) in halves.enumerate() {
                    let half = &mut chunk[half * width..];
                    multiplier.multiply(segments, count, columns.clone(), half, 2 * width);
                    add_bias(layer.bias, columns.clone(), half, 2 * width);
                }
                for (row, values) in chunk.chunks_exact_mut(2 * width).enumerate() {
                    if let Some(kept) = kept {
                        // SAFETY: the row is the caller's.
                        let to =
                            unsafe { kept.slice(kept_at(first + row, inner, &columns), width) };
                        round_row(values, to);
                    }
                    gate_row_in_place(values);
                }
                let block = BlockRows {
                    values: chunk,
                    stride: 2 * width,
                    rows: count,
                    columns: width,
                };
                block.pack_left(multiplier.path(), gated, inner, columns.start);
            }
            let gated = &*gated;
            self.down
                .update(&multiplier, gated, count, down_h, down_packs);
            let segments = self.down.segments(gated, down_packs, count);
            let sums = &mut work[..count * hidden];
            multiplier.multiply(&segments[0], count, 0..hidden, sums, hidden);
            add_bias(self.down.layers[0].bias, 0..hidden, sums, hidden);
            for ((y, x), sum) in y.iter_mut().zip(x).zip(sums) {
                *y = *sum + x;
            }
        });
    }
}
