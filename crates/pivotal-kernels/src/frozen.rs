//! Linear layers that read one input and are not trained, with a trained low-rank update (Hu et al. 2021,
//! arXiv:2106.09685) on some of them.
//!
//! ```text
//! h_i = s·x A_iᵀ,  y_i = x W_iᵀ + h_i B_iᵀ + bias_i,  dh_i = s·dy_i B_i
//! dx = Σ_i dy_i W_i + dh_i A_i,  dA_i = dh_iᵀ x,  dB_i = dy_iᵀ h_i
//! ```
//!
//! The outputs lie side by side in a row. With bf16 operands the frozen weights are packed once, for both directions, the
//! input is packed once for all layers, straight out of the norm or gate that makes it, and an output is stored once with its
//! update already in it.

use std::borrow::Cow;

use crate::account::time;
use crate::matmul::{
    FEW_ROWS, Precision, ProductShape, Store, f32_product, matmul_nn, matmul_nt, matmul_tn,
    parallelism,
};
use crate::parallel::{
    SharedOut, check_len, check_matrix, for_each_block, rows_per_block, with_scratch, zeros,
};
use crate::small;

#[cfg(target_arch = "x86_64")]
mod bf16;
mod mlp;
#[cfg(target_arch = "x86_64")]
mod mlp_blocks;
mod panels;
mod prologue;
#[cfg(test)]
mod tests;

pub use mlp::{FrozenMlp, MlpGradients, MlpOutputs, MlpSaved, MlpWanted};
pub use panels::FrozenPanels;
pub use prologue::Prologue;

/// One frozen layer of a group.
#[derive(Clone, Copy, Debug)]
pub struct FrozenLinear<'a> {
    /// `[outputs, inputs]`; `None` where only the panels are left of it ([`FrozenPanels::pack`]).
    pub weight: Option<&'a [f32]>,
    /// `[outputs]`.
    pub bias: Option<&'a [f32]>,
    /// The weight's panels.
    pub panels: &'a FrozenPanels,
    /// Length of an output row.
    pub outputs: usize,
    /// Whether the low-rank update has a part for this layer.
    pub adapted: bool,
}

impl<'a> FrozenLinear<'a> {
    /// The weight itself, for products that are not in bf16.
    #[track_caller]
    fn values(&self) -> &'a [f32] {
        self.weight
            .expect("a weight of which only bf16 panels are left takes part in bf16 products alone")
    }
}

/// The low-rank updates of the adapted layers of a group, one below the other.
#[derive(Clone, Copy, Debug)]
pub struct LowRankUpdate<'a> {
    /// `[adapted layers * rank, inputs]`.
    pub a: &'a [f32],
    /// `[outputs of the adapted layers, rank]`.
    pub b: &'a [f32],
    /// Rank of one layer's update.
    pub rank: usize,
    /// `s`.
    pub scale: f32,
}

/// Frozen layers that read one input, and what comes before and beside them.
#[derive(Clone, Copy, Debug)]
pub struct FrozenGroup<'a> {
    /// What is done to the input first.
    pub prologue: Prologue<'a>,
    /// Length of a row that the products read.
    pub inputs: usize,
    /// The layers, in the order of their outputs.
    pub layers: &'a [FrozenLinear<'a>],
    /// The adapted layers' updates.
    pub update: Option<LowRankUpdate<'a>>,
    /// What the operands are rounded to.
    pub precision: Precision,
}

/// What [`FrozenGroup::forward`] returns.
#[derive(Clone, Debug)]
pub struct FrozenOutputs {
    /// `[rows, all outputs]`.
    pub y: Vec<f32>,
    /// `s·x Aᵀ`, `[rows, adapted layers * rank]`; empty without an update.
    pub h: Vec<f32>,
    /// The norm's `1/√(mean(x²) + eps)`, `[rows]`; empty without a norm.
    pub rstd: Vec<f32>,
}

/// What [`FrozenGroup::backward`] needs of the forward pass.
#[derive(Clone, Copy, Debug)]
pub struct FrozenSaved<'a> {
    /// The input, before the prologue. Read for the gradient of `a`, and for that of `x` unless the prologue is plain.
    pub x: &'a [f32],
    /// [`FrozenOutputs::h`].
    pub h: &'a [f32],
    /// [`FrozenOutputs::rstd`].
    pub rstd: &'a [f32],
}

/// Which gradients are wanted: the others are not computed.
#[derive(Clone, Copy, Debug)]
pub struct FrozenWanted {
    /// Of the input, before the prologue.
    pub x: bool,
    /// Of [`LowRankUpdate::a`].
    pub a: bool,
    /// Of [`LowRankUpdate::b`].
    pub b: bool,
}

/// The wanted gradients, each shaped as what it is of; those of an update only where there is one.
#[derive(Clone, Debug)]
pub struct FrozenGradients {
    /// Of the input, before the prologue.
    pub x: Option<Vec<f32>>,
    /// Of [`LowRankUpdate::a`].
    pub a: Option<Vec<f32>>,
    /// Of [`LowRankUpdate::b`].
    pub b: Option<Vec<f32>>,
}

/// A group's layers and sizes.
#[derive(Clone, Copy)]
struct Group<'a> {
    layers: &'a [FrozenLinear<'a>],
    rows: usize,
    inputs: usize,
    /// Length of an output row: all layers' together.
    outputs: usize,
    /// Length of a row of `h`.
    ranks: usize,
}

/// A layer's place: its first output, and where its part of the update begins if it has one.
struct Place {
    first: usize,
    update: Option<UpdatePlace>,
}

struct UpdatePlace {
    /// First element of a row of `h`, and first row of `a`.
    rank: usize,
    /// First row of `b`.
    output: usize,
}

impl<'a> Group<'a> {
    #[track_caller]
    fn new(
        layers: &'a [FrozenLinear<'a>],
        rows: usize,
        inputs: usize,
        update: Option<LowRankUpdate<'_>>,
    ) -> Self {
        for layer in layers {
            if let Some(weight) = layer.weight {
                check_matrix("weight", weight, layer.outputs, inputs);
            }
            if let Some(bias) = layer.bias {
                check_len("bias", bias, layer.outputs);
            }
        }
        let adapted = layers.iter().filter(|layer| layer.adapted);
        let mut ranks = 0;
        if let Some(update) = update {
            ranks = adapted.clone().count() * update.rank;
            check_matrix("a", update.a, ranks, inputs);
            let outputs: usize = adapted.map(|layer| layer.outputs).sum();
            check_matrix("b", update.b, outputs, update.rank);
        }
        Self {
            layers,
            rows,
            inputs,
            outputs: layers.iter().map(|layer| layer.outputs).sum(),
            ranks,
        }
    }

    fn places(&self) -> Vec<Place> {
        let (mut first, mut rank, mut output) = (0, 0, 0);
        let adapted = self
            .layers
            .iter()
            .filter(|layer| layer.adapted)
            .count()
            .max(1);
        let step = self.ranks / adapted;
        self.layers
            .iter()
            .map(|layer| {
                let update = (layer.adapted && step > 0).then_some(UpdatePlace { rank, output });
                let place = Place { first, update };
                first += layer.outputs;
                if layer.adapted {
                    rank += step;
                    output += layer.outputs;
                }
                place
            })
            .collect()
    }
}

impl FrozenGroup<'_> {
    /// `y = x Wᵀ + s·(x Aᵀ) Bᵀ + bias` of every layer, side by side, with `x` after the prologue.
    ///
    /// With `b` all zero the result is that without an update, bit for bit.
    ///
    /// # Shapes
    /// `x` `[rows, inputs]`, or `[rows, 2 * inputs]` if gated.
    ///
    /// # Panics
    /// If a slice has another length.
    #[must_use]
    pub fn forward(&self, x: &[f32], rows: usize) -> FrozenOutputs {
        let group = Group::new(self.layers, rows, self.inputs, self.update);
        check_matrix("x", x, rows, self.prologue.width(self.inputs));
        if let Prologue::Normed { weight, .. } = self.prologue {
            check_len("weight of the norm", weight, self.inputs);
        }
        let rstd = time(self.prologue.part(), || self.prologue.rstd(x, self.inputs));
        #[cfg(target_arch = "x86_64")]
        if self.precision == Precision::Bf16 && crate::bf16::available() {
            let (mut y, h) = bf16::forward(self, &group, x, &rstd);
            add_biases(&group, &mut y);
            return FrozenOutputs { y, h, rstd };
        }
        let input = self.prologue.outcome(x, &rstd, rows, self.inputs);
        let (mut y, mut h) = (zeros(rows * group.outputs), zeros(rows * group.ranks));
        forward_f32(&group, &input, self.update, &mut y, &mut h, self.precision);
        add_biases(&group, &mut y);
        FrozenOutputs { y, h, rstd }
    }

    /// The wanted gradients of [`FrozenGroup::forward`] at the upstream gradient `dout`.
    ///
    /// # Shapes
    /// `dout` `[rows, all outputs]`.
    ///
    /// # Panics
    /// If a slice that is needed has another length.
    #[must_use]
    pub fn backward(
        &self,
        saved: FrozenSaved<'_>,
        dout: &[f32],
        rows: usize,
        wanted: FrozenWanted,
    ) -> FrozenGradients {
        let group = Group::new(self.layers, rows, self.inputs, self.update);
        check_matrix("dout", dout, rows, group.outputs);
        let is_plain = matches!(self.prologue, Prologue::Plain);
        if wanted.a && self.update.is_some() || wanted.x && !is_plain {
            check_matrix("x", saved.x, rows, self.prologue.width(self.inputs));
            if let Prologue::Normed { weight, .. } = self.prologue {
                check_len("weight of the norm", weight, self.inputs);
                check_len("rstd", saved.rstd, rows);
            }
        }
        check_matrix("h", saved.h, rows, group.ranks);
        #[cfg(target_arch = "x86_64")]
        if self.precision == Precision::Bf16 && crate::bf16::available() {
            return bf16::backward(self, &group, saved, dout, wanted);
        }
        self.backward_f32(&group, saved, dout, wanted)
    }

    fn backward_f32(
        &self,
        group: &Group<'_>,
        saved: FrozenSaved<'_>,
        dout: &[f32],
        wanted: FrozenWanted,
    ) -> FrozenGradients {
        let &Group { rows, inputs, .. } = group;
        let wants_a = wanted.a && self.update.is_some();
        let input = match wants_a {
            true => self.prologue.outcome(saved.x, saved.rstd, rows, inputs),
            false => Cow::Borrowed(&[][..]),
        };
        let mut dinput = wanted.x.then(|| zeros(rows * inputs));
        let update = self.update.as_ref();
        let mut da = update
            .filter(|_| wanted.a)
            .map(|update| zeros(update.a.len()));
        let mut db = update
            .filter(|_| wanted.b)
            .map(|update| zeros(update.b.len()));
        with_scratch(rows * group.ranks, |dh| {
            let slopes = Slopes {
                x: dinput.as_deref_mut(),
                a: da.as_deref_mut(),
                b: db.as_deref_mut(),
            };
            backward_f32(
                group,
                &input,
                self.update,
                saved.h,
                dout,
                dh,
                slopes,
                self.precision,
            );
        });
        let x = dinput.map(|dinput| self.prologue.gradient(saved, inputs, dinput.into()));
        FrozenGradients { x, a: da, b: db }
    }
}

fn forward_f32(
    group: &Group<'_>,
    x: &[f32],
    update: Option<LowRankUpdate<'_>>,
    out: &mut [f32],
    h: &mut [f32],
    precision: Precision,
) {
    let &Group {
        layers,
        rows,
        inputs,
        ..
    } = group;
    if let Some(update) = update {
        let shape = ProductShape {
            m: rows,
            n: group.ranks,
            k: inputs,
        };
        matmul_nt(x, update.a, h, shape, Store::Replace, precision);
        scale(h, update.scale);
    }
    for (layer, place) in layers.iter().zip(group.places()) {
        let shape = ProductShape {
            m: rows,
            n: layer.outputs,
            k: inputs,
        };
        into_columns(
            out,
            group.outputs,
            place.first,
            shape,
            |out, stride, store| {
                if stride == shape.n && rows < FEW_ROWS {
                    return small::few_rows_nt(x, layer.values(), out, shape, store);
                }
                f32_product(
                    x,
                    (inputs, 1),
                    layer.values(),
                    (1, inputs),
                    out,
                    stride,
                    shape,
                    store,
                    parallelism(shape),
                );
            },
        );
        if let (Some(update), Some(at)) = (update, place.update) {
            let shape = ProductShape {
                m: rows,
                n: layer.outputs,
                k: update.rank,
            };
            f32_product(
                &h[at.rank.min(h.len())..],
                (group.ranks, 1),
                &update.b[at.output * update.rank..],
                (1, update.rank),
                &mut out[place.first.min(rows * group.outputs)..],
                group.outputs,
                shape,
                Store::Add,
                parallelism(shape),
            );
        }
    }
}

/// Where the gradients go; `x` is that of the products' input.
struct Slopes<'a> {
    x: Option<&'a mut [f32]>,
    a: Option<&'a mut [f32]>,
    b: Option<&'a mut [f32]>,
}

#[expect(clippy::too_many_arguments, reason = "what its one caller was given")]
fn backward_f32(
    group: &Group<'_>,
    x: &[f32],
    update: Option<LowRankUpdate<'_>>,
    h: &[f32],
    dout: &[f32],
    dh: &mut [f32],
    gradients: Slopes<'_>,
    precision: Precision,
) {
    let &Group {
        layers,
        rows,
        inputs,
        outputs,
        ranks,
    } = group;
    let places = group.places();
    let columns = |first: usize| &dout[first.min(dout.len())..];
    if let Some(update) = update {
        for (layer, place) in layers.iter().zip(&places) {
            let Some(at) = &place.update else { continue };
            let shape = ProductShape {
                m: rows,
                n: update.rank,
                k: layer.outputs,
            };
            f32_product(
                columns(place.first),
                (outputs, 1),
                &update.b[at.output * update.rank..],
                (update.rank, 1),
                &mut dh[at.rank.min(rows * ranks)..],
                ranks,
                shape,
                Store::Replace,
                parallelism(shape),
            );
        }
        scale(dh, update.scale);
    }
    if let Some(dx) = gradients.x {
        dx.fill(0.0);
        for (layer, place) in layers.iter().zip(&places) {
            let shape = ProductShape {
                m: rows,
                n: inputs,
                k: layer.outputs,
            };
            f32_product(
                columns(place.first),
                (outputs, 1),
                layer.values(),
                (inputs, 1),
                dx,
                inputs,
                shape,
                Store::Add,
                parallelism(shape),
            );
        }
        if let Some(update) = update {
            let shape = ProductShape {
                m: rows,
                n: inputs,
                k: ranks,
            };
            matmul_nn(dh, update.a, dx, shape, Store::Add, precision);
        }
    }
    let Some(update) = update else { return };
    if let Some(da) = gradients.a {
        let shape = ProductShape {
            m: ranks,
            n: inputs,
            k: rows,
        };
        matmul_tn(dh, x, da, shape, Store::Replace, precision);
    }
    if let Some(db) = gradients.b {
        for (layer, place) in layers.iter().zip(&places) {
            let Some(at) = &place.update else { continue };
            let shape = ProductShape {
                m: layer.outputs,
                n: update.rank,
                k: rows,
            };
            f32_product(
                columns(place.first),
                (1, outputs),
                &h[at.rank.min(h.len())..],
                (ranks, 1),
                &mut db[at.output * update.rank..],
                update.rank,
                shape,
                Store::Replace,
                parallelism(shape),
            );
        }
    }
}

/// Calls `product` with a place for `[m, n]` values that end up in columns `first..first + n` of `out`: there itself, or for
/// few rows in a dense buffer that is copied.
fn into_columns(
    out: &mut [f32],
    stride: usize,
    first: usize,
    shape: ProductShape,
    product: impl FnOnce(&mut [f32], usize, Store),
) {
    if shape.m >= FEW_ROWS || shape.n == stride {
        let first = first.min(out.len());
        return product(&mut out[first..], stride, Store::Replace);
    }
    with_scratch(shape.m * shape.n, |dense| {
        product(dense, shape.n, Store::Replace);
        for (row, values) in dense.chunks_exact(shape.n.max(1)).enumerate() {
            out[row * stride + first..][..shape.n].copy_from_slice(values);
        }
    });
}

fn add_biases(group: &Group<'_>, out: &mut [f32]) {
    if group.layers.iter().all(|layer| layer.bias.is_none()) {
        return;
    }
    let shared = SharedOut::new(out);
    for_each_block(
        group.rows,
        rows_per_block(group.outputs),
        group.rows * group.outputs,
        |rows| {
            for row in rows {
                let mut first = row * group.outputs;
                for layer in group.layers {
                    // SAFETY: row `row` of `out` is this block's own, and a row is all layers' outputs.
                    let out = unsafe { shared.slice(first, layer.outputs) };
                    if let Some(bias) = layer.bias {
                        out.iter_mut()
                            .zip(bias)
                            .for_each(|(out, bias)| *out += bias);
                    }
                    first += layer.outputs;
                }
            }
        },
    );
}

fn scale(values: &mut [f32], factor: f32) {
    values.iter_mut().for_each(|value| *value *= factor);
}
