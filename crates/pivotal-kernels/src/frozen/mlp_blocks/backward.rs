//! The backward pass, in blocks as well.

use std::ops::Range;

use super::super::bf16::{down_product, hidden_sources, up_gradient, with_rights};
use super::super::mlp::{MlpGradients, MlpSaved, MlpWanted};
use super::super::{FrozenGroup, FrozenMlp, Group, scale};
use super::{CHUNK, UNIT, chunks, for_normed, kept_at, row_blocks};
use crate::group::{Multiplier, Segment};
use crate::norm::row_input_gradient;
use crate::panels::{BlockRows, COLUMNS, Source, left_words, packed_words};
use crate::parallel::{SharedOut, with_scratch_parts, written};
use crate::processor::{Processor, processor};
use crate::rounded::widen_row;
use crate::swiglu::gate_row_gradient_in_place;

/// Rows of a block, at most: it holds both halves' gradients, packed, where the forward pass holds one product.
const BACKWARD_ROWS: usize = 128;

/// A group's right operands as the backward pass reads them, packed as [`Operands`](super::Operands) are before the blocks.
struct Transposed<'a> {
    /// Each layer's weight, for `dy W`.
    weights: Vec<&'a [f32]>,
    /// The update's `A`, for `dh A`.
    a: &'a [f32],
    /// Each adapted layer's `B`, for `dy B`.
    b: &'a [&'a [f32]],
    rank: usize,
    scale: f32,
}

/// Lends `body` a group's operands.
fn with_transposed<T>(frozen: &FrozenGroup<'_>, body: impl FnOnce(&Transposed<'_>) -> T) -> T {
    let inputs = frozen.inputs;
    let group = Group::new(frozen.layers, 0, inputs, frozen.update);
    let weights = frozen.layers.iter();
    let operands = Transposed {
        weights: weights
            .map(|layer| layer.panels.backward(layer, inputs))
            .collect(),
        a: &[],
        b: &[],
        rank: 0,
        scale: 1.0,
    };
    let Some(update) = frozen.update.filter(|_| group.ranks > 0) else {
        return body(&operands);
    };
    let a = Source {
        values: update.a,
        line_stride: 1,
        k_stride: inputs,
        lines: inputs,
        k: group.ranks,
    };
    with_rights(&[a], |a| {
        with_rights(&hidden_sources(&group, update), |b| {
            body(&Transposed {
                a: a[0],
                b,
                rank: update.rank,
                scale: update.scale,
                ..operands
            })
        })
    })
}

impl Transposed<'_> {
    fn ranks(&self) -> usize {
        self.b.len() * self.rank
    }

    /// Words of a block's packed `dh`.
    fn dh_words(&self, rows: usize) -> usize {
        left_words(rows, self.ranks())
    }

    /// `dh_i = s·dy_i B_i` of the adapted layers' `dy`, each `outputs` wide, and its pack.
    fn hidden<'l>(
        &self,
        multiplier: &Multiplier,
        lefts: impl Iterator<Item = &'l [f32]>,
        outputs: usize,
        rows: usize,
        dh: &mut [f32],
        pack: &mut [f32],
    ) {
        if self.ranks() == 0 {
            return;
        }
        for (slot, (left, b)) in lefts.zip(self.b).enumerate() {
            let whole = Segment::whole(left, b, outputs);
            let dh = &mut dh[slot * self.rank..];
            multiplier.multiply(&[whole], rows, 0..self.rank, dh, self.ranks());
        }
        scale(dh, self.scale);
        let block = BlockRows {
            values: dh,
            stride: self.ranks(),
            rows,
            columns: self.ranks(),
        };
        block.pack_left(multiplier.path(), pack, self.ranks(), 0);
    }

    /// `dh A`, if there is an update.
    fn segment<'s>(&'s self, pack: &'s [f32]) -> Option<Segment<'s>> {
        (self.ranks() > 0).then(|| Segment::whole(pack, self.a, self.ranks()))
    }
}

/// Where the backward pass puts what it makes: the gradient of `x`, those of the updates' hidden rows, and right operands over all
/// rows for the gradients of the updates. `None` where not wanted.
#[derive(Clone, Copy)]
struct Slopes {
    x: Option<SharedOut>,
    gate_up_h: SharedOut,
    down_h: SharedOut,
    /// `dout`, for the last layer's `B`.
    dout: Option<SharedOut>,
    /// `silu(gate)·up`, for its `A`.
    gated: Option<SharedOut>,
    /// The gradients of the gates and of the ups, for their `B`.
    halves: [Option<SharedOut>; 2],
    /// The normalised rows, for their `A`.
    normed: Option<SharedOut>,
}

struct Backward<'a> {
    mlp: &'a FrozenMlp<'a>,
    path: Processor,
    x: &'a [f32],
    rstd: &'a [f32],
    kept: &'a [f32],
    dout: &'a [f32],
    rows: usize,
    gate_up: &'a Transposed<'a>,
    down: &'a Transposed<'a>,
    /// Whether the gradient of the gates and ups is needed.
    inner: bool,
    out: Slopes,
}

pub(in crate::frozen) fn backward(
    mlp: &FrozenMlp<'_>,
    x: &[f32],
    saved: &MlpSaved,
    kept: &[f32],
    dout: &[f32],
    rows: usize,
    wanted: MlpWanted,
) -> MlpGradients {
    let path = processor();
    let (hidden, inner) = (mlp.hidden(), mlp.inner());
    assert_eq!(
        kept.len(),
        rows.next_multiple_of(UNIT) * inner,
        "kept of other rows"
    );
    let groups = [&mlp.gate_up, &mlp.down]
        .map(|group| Group::new(group.layers, rows, group.inputs, group.update));
    let [wants_gate_up, wants_down] = [&mlp.gate_up, &mlp.down].map(|group| group.update.is_some());
    let gate_up_b =
        |half: usize| wants_gate_up && wanted.gate_up_b && mlp.gate_up.layers[half].adapted;
    let words = |wanted: bool, columns: usize| match wanted {
        true => packed_words::<COLUMNS>(columns, rows),
        false => 0,
    };
    let lens = [
        words(wants_down && wanted.down_b, hidden),
        words(wants_down && wanted.down_a, inner),
        words(gate_up_b(0), inner),
        words(gate_up_b(1), inner),
        words(wants_gate_up && wanted.gate_up_a, hidden),
        rows * groups[0].ranks,
        rows * groups[1].ranks,
    ];
    with_scratch_parts(lens, |parts| {
        let [dout_right, gated, gates, ups, normed, gate_up_dh, down_dh] = parts;
        let shared = |words: &mut [f32]| (!words.is_empty()).then(|| SharedOut::new(words));
        let mut run = |dx: Option<SharedOut>| {
            let out = Slopes {
                x: dx,
                gate_up_h: SharedOut::new(gate_up_dh),
                down_h: SharedOut::new(down_dh),
                dout: shared(dout_right),
                gated: shared(gated),
                halves: [shared(gates), shared(ups)],
                normed: shared(normed),
            };
            with_transposed(&mlp.gate_up, |gate_up| {
                with_transposed(&mlp.down, |down| {
                    let pass = Backward {
                        mlp,
                        path,
                        x,
                        rstd: &saved.rstd,
                        kept,
                        dout,
                        rows,
                        gate_up,
                        down,
                        inner: wanted.inner(),
                        out,
                    };
                    let blocks = row_blocks(path, rows, BACKWARD_ROWS);
                    blocks.for_each(3 * rows * hidden * inner, |rows| {
                        // SAFETY: the blocks are disjoint rows, whole units but for the last one's end, of outputs of the
                        // lengths above.
                        unsafe { pass.block(rows) };
                    });
                });
            });
        };
        let dx = match wanted.x {
            // SAFETY: the blocks write every row.
            true => Some(unsafe { written(rows * hidden, |dx| run(Some(dx))) }),
            false => {
                run(None);
                None
            }
        };
        let b = |group: usize, h: &[f32], rights: &[&[f32]]| {
            let update = [&mlp.gate_up, &mlp.down][group].update?;
            Some(up_gradient(
                &groups[group],
                &groups[group].places(),
                update,
                h,
                rights,
            ))
        };
        let a = |wanted: bool, group: usize, right: &[f32], dh: &[f32]| {
            (wanted && [wants_gate_up, wants_down][group])
                .then(|| down_product(&groups[group], right, dh))
        };
        MlpGradients {
            x: dx,
            gate_up_a: a(wanted.gate_up_a, 0, normed, gate_up_dh),
            gate_up_b: wanted
                .gate_up_b
                .then(|| b(0, &saved.gate_up_h, &[gates, ups]))
                .flatten(),
            down_a: a(wanted.down_a, 1, gated, down_dh),
            down_b: wanted
                .down_b
                .then(|| b(1, &saved.down_h, &[dout_right]))
                .flatten(),
        }
    })
}

impl Backward<'_> {
    /// # Safety
    /// The outputs have room for `rows`, which are the caller's alone: whole units, or the last ones.
    unsafe fn block(&self, rows: Range<usize>) {
        let (hidden, inner) = (self.mlp.hidden(), self.mlp.inner());
        let (first, count) = (rows.start, rows.len());
        let ranks = [self.gate_up.ranks(), self.down.ranks()];
        // SAFETY: the caller's promise.
        let (gate_up_dh, down_dh) = unsafe {
            (
                self.out.gate_up_h.slice(first * ranks[0], count * ranks[0]),
                self.out.down_h.slice(first * ranks[1], count * ranks[1]),
            )
        };
        let dout = &self.dout[first * hidden..][..count * hidden];
        let multiplier = Multiplier::on(self.path);
        let words = [
            left_words(count, hidden),
            left_words(count, inner),
            left_words(count, inner),
            self.gate_up.dh_words(count),
            self.down.dh_words(count),
            count * CHUNK,
            count * CHUNK,
            count * CHUNK,
            count * hidden,
        ];
        with_scratch_parts(words, |parts| {
            let [
                left,
                gates,
                ups,
                gate_up_pack,
                down_pack,
                gate,
                up,
                slope,
                sums,
            ] = parts;
            let block = BlockRows {
                values: dout,
                stride: hidden,
                rows: count,
                columns: hidden,
            };
            block.pack_left(multiplier.path(), left, hidden, 0);
            if let Some(right) = self.out.dout {
                // SAFETY: the rows are the caller's.
                unsafe { block.pack_right(right, self.rows, first, 0) };
            }
            let left = &*left;
            let lefts = std::iter::once(left);
            self.down
                .hidden(&multiplier, lefts, hidden, count, down_dh, down_pack);
            let whole = Segment::whole(left, self.down.weights[0], hidden);
            let segments: Vec<_> = [whole]
                .into_iter()
                .chain(self.down.segment(down_pack))
                .collect();
            for columns in chunks(inner) {
                if !self.inner && self.out.gated.is_none() {
                    break;
                }
                let width = columns.len();
                let [gate, up, slope] =
                    [&mut *gate, &mut *up, &mut *slope].map(|part| &mut part[..count * width]);
                if self.inner {
                    multiplier.multiply(&segments, count, columns.clone(), slope, width);
                } else {
                    slope.fill(0.0);
                }
                for row in 0..count {
                    let at = row * width..(row + 1) * width;
                    let kept = &self.kept[kept_at(first + row, inner, &columns)..][..width];
                    let (gate, up) = (&mut gate[at.clone()], &mut up[at.clone()]);
                    widen_row(kept, gate, up);
                    gate_row_gradient_in_place(gate, up, &mut slope[at]);
                }
                let block = |values| BlockRows {
                    values,
                    stride: width,
                    rows: count,
                    columns: width,
                };
                if let Some(gated) = self.out.gated {
                    // SAFETY: the rows are the caller's.
                    unsafe { block(&*slope).pack_right(gated, self.rows, first, columns.start) };
                }
                let halves = [(&*gate, &mut *gates), (&*up, &mut *ups)];
                for ((values, left), right) in halves.into_iter().zip(self.out.halves) {
                    if self.inner {
                        block(values).pack_left(multiplier.path(), left, inner, columns.start);
                    }
                    if let Some(right) = right {
                        // SAFETY: as above.
                        unsafe { block(values).pack_right(right, self.rows, first, columns.start) };
                    }
                }
            }
            if !self.inner {
                return;
            }
            let lefts = [&*gates, &*ups];
            let layers = self.mlp.gate_up.layers;
            let adapted = layers.iter().zip(lefts).filter(|(layer, _)| layer.adapted);
            let adapted = adapted.map(|(_, left)| left);
            self.gate_up
                .hidden(&multiplier, adapted, inner, count, gate_up_dh, gate_up_pack);
            let x = &self.x[first * hidden..][..count * hidden];
            let rstd = &self.rstd[first..][..count];
            let (weight, _) = self.mlp.norm();
            if let Some(dx) = self.out.x {
                let weights = self.gate_up.weights.iter().zip(lefts);
                let segments: Vec<_> = weights
                    .map(|(weight, left)| Segment::whole(left, weight, inner))
                    .chain(self.gate_up.segment(gate_up_pack))
                    .collect();
                multiplier.multiply(&segments, count, 0..hidden, sums, hidden);
                // SAFETY: the rows are the caller's.
                let dx = unsafe { dx.slice(first * hidden, count * hidden) };
                for (row, &rstd) in rstd.iter().enumerate() {
                    let at = row * hidden..(row + 1) * hidden;
                    let dx = &mut dx[at.clone()];
                    row_input_gradient(&x[at.clone()], weight, rstd, &sums[at.clone()], dx);
                    dx.iter_mut()
                        .zip(&dout[at])
                        .for_each(|(dx, dout)| *dx += dout);
                }
            }
            if let Some(right) = self.out.normed {
                for_normed(weight, x, rstd, sums, |row, block| {
                    // SAFETY: the rows are the caller's.
                    unsafe { block.pack_right(right, self.rows, first + row, 0) };
                });
            }
        });
    }
}
