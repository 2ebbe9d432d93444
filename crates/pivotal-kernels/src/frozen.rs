//! Linear layers that read one input and are not trained, with a trained low-rank update (Hu et al. 2021,
//! arXiv:2106.09685) on some of them.
//!
//! ```text
//! h_i = s·x A_iᵀ,  y_i = x W_iᵀ + h_i B_iᵀ + bias_i,  dh_i = s·dy_i B_i
//! dx = Σ_i dy_i W_i + dh_i A_i,  dA_i = dh_iᵀ x,  dB_i = dy_iᵀ h_i
//! ```
//!
//! The outputs lie side by side in a row. With bf16 operands the frozen weights are packed once, for both directions, the
//! input is packed once for all layers, and an output is stored once with its update already in it.

#[cfg(target_arch = "x86_64")]
use std::sync::OnceLock;

use crate::matmul::{
    FEW_ROWS, Precision, ProductShape, Store, f32_product, matmul_nn, matmul_nt, matmul_tn,
    parallelism,
};
use crate::parallel::{SharedOut, check_len, for_each_block, rows_per_block, with_scratch};
use crate::small;

#[cfg(target_arch = "x86_64")]
mod bf16;

/// A frozen weight's bf16 panels: made at first use, kept as long as this value.
///
/// They belong to the weight that was given first; hand in another one's and the products are wrong.
#[derive(Debug, Default)]
pub struct FrozenPanels {
    /// For `x Wᵀ`.
    #[cfg(target_arch = "x86_64")]
    forward: OnceLock<crate::parallel::AlignedFloats>,
    /// For `dy W`.
    #[cfg(target_arch = "x86_64")]
    backward: OnceLock<crate::parallel::AlignedFloats>,
}

/// One frozen layer of a group.
#[derive(Clone, Copy, Debug)]
pub struct FrozenLinear<'a> {
    /// `[outputs, inputs]`.
    pub weight: &'a [f32],
    /// `[outputs]`.
    pub bias: Option<&'a [f32]>,
    /// The weight's panels.
    pub panels: &'a FrozenPanels,
    /// Length of an output row.
    pub outputs: usize,
    /// Whether the low-rank update has a part for this layer.
    pub adapted: bool,
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

/// Where [`frozen_linears_backward`] puts the gradients that are wanted; all are overwritten.
#[derive(Debug)]
pub struct FrozenGradients<'a> {
    /// `[rows, inputs]`.
    pub x: Option<&'a mut [f32]>,
    /// As [`LowRankUpdate::a`].
    pub a: Option<&'a mut [f32]>,
    /// As [`LowRankUpdate::b`].
    pub b: Option<&'a mut [f32]>,
}

/// The sizes of a group.
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
            check_len("weight", layer.weight, layer.outputs * inputs);
            if let Some(bias) = layer.bias {
                check_len("bias", bias, layer.outputs);
            }
        }
        let adapted = layers.iter().filter(|layer| layer.adapted);
        let mut ranks = 0;
        if let Some(update) = update {
            ranks = adapted.clone().count() * update.rank;
            check_len("a", update.a, ranks * inputs);
            let outputs: usize = adapted.map(|layer| layer.outputs).sum();
            check_len("b", update.b, outputs * update.rank);
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

/// `y = x Wᵀ + s·(x Aᵀ) Bᵀ + bias` of every layer, side by side; `h` gets `s·x Aᵀ`.
///
/// With `b` all zero the result is that without an update, bit for bit.
///
/// # Shapes
/// `x` `[rows, inputs]`, `out` `[rows, all outputs]`, `h` `[rows, adapted layers * rank]` (empty without an update).
///
/// # Panics
/// If a slice has another length.
#[expect(
    clippy::too_many_arguments,
    reason = "input, layers, update, two outputs and the sizes"
)]
pub fn frozen_linears_forward(
    x: &[f32],
    rows: usize,
    inputs: usize,
    layers: &[FrozenLinear<'_>],
    update: Option<LowRankUpdate<'_>>,
    out: &mut [f32],
    h: &mut [f32],
    precision: Precision,
) {
    let group = Group::new(layers, rows, inputs, update);
    check_len("x", x, rows * inputs);
    check_len("out", out, rows * group.outputs);
    check_len("h", h, rows * group.ranks);
    #[cfg(target_arch = "x86_64")]
    if precision == Precision::Bf16 && crate::bf16::available() {
        bf16::forward(&group, x, update, out, h);
        return add_biases(&group, out);
    }
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
                    return small::few_rows_nt(x, layer.weight, out, shape, store);
                }
                f32_product(
                    x,
                    (inputs, 1),
                    layer.weight,
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
    add_biases(&group, out);
}

/// The gradients of [`frozen_linears_forward`], which returned `h`, at the upstream gradient `dout` `[rows, all outputs]`.
///
/// What is not asked for is not computed; `x` is read only for the gradient of `a`.
///
/// # Panics
/// If a slice has another length.
#[expect(
    clippy::too_many_arguments,
    reason = "two inputs of the forward pass, its `h`, layers, update, upstream, sizes"
)]
pub fn frozen_linears_backward(
    x: &[f32],
    rows: usize,
    inputs: usize,
    layers: &[FrozenLinear<'_>],
    update: Option<LowRankUpdate<'_>>,
    h: &[f32],
    dout: &[f32],
    gradients: FrozenGradients<'_>,
    precision: Precision,
) {
    let group = Group::new(layers, rows, inputs, update);
    check_len("dout", dout, rows * group.outputs);
    if let Some(dx) = &gradients.x {
        check_len("gradients.x", dx, rows * inputs);
    }
    if let Some(update) = update {
        check_len("h", h, rows * group.ranks);
        if let Some(da) = &gradients.a {
            check_len("gradients.a", da, update.a.len());
            check_len("x", x, rows * inputs);
        }
        if let Some(db) = &gradients.b {
            check_len("gradients.b", db, update.b.len());
        }
    }
    with_scratch(rows * group.ranks, |dh| {
        #[cfg(target_arch = "x86_64")]
        if precision == Precision::Bf16 && crate::bf16::available() {
            return bf16::backward(&group, x, update, h, dout, dh, gradients);
        }
        backward_f32(&group, x, update, h, dout, dh, gradients, precision);
    });
}

#[expect(clippy::too_many_arguments, reason = "what its one caller was given")]
fn backward_f32(
    group: &Group<'_>,
    x: &[f32],
    update: Option<LowRankUpdate<'_>>,
    h: &[f32],
    dout: &[f32],
    dh: &mut [f32],
    gradients: FrozenGradients<'_>,
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
                layer.weight,
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{assert_close, naive_product, on_threads, random, widen};

    // f32 sums of up to 1100 terms.
    const F32_TOLERANCE: f64 = 5e-5;
    // bf16 operands, and for the update a bf16 intermediate.
    const BF16_TOLERANCE: f64 = 1.0 / 64.0;
    const SCALE: f32 = 0.5;

    struct Case {
        rows: usize,
        inputs: usize,
        outputs: Vec<usize>,
        adapted: Vec<bool>,
        rank: usize,
        bias: bool,
    }

    struct Data {
        x: Vec<f32>,
        dout: Vec<f32>,
        weights: Vec<Vec<f32>>,
        biases: Vec<Vec<f32>>,
        panels: Vec<FrozenPanels>,
        a: Vec<f32>,
        b: Vec<f32>,
    }

    struct Results {
        out: Vec<f32>,
        dx: Vec<f32>,
        da: Vec<f32>,
        db: Vec<f32>,
    }

    impl Case {
        fn total(&self) -> usize {
            self.outputs.iter().sum()
        }

        fn ranks(&self) -> usize {
            self.adapted.iter().filter(|&&adapted| adapted).count() * self.rank
        }

        fn data(&self) -> Data {
            let adapted = self
                .outputs
                .iter()
                .zip(&self.adapted)
                .filter(|(_, adapted)| **adapted);
            let adapted_outputs: usize = adapted.map(|(outputs, _)| outputs).sum();
            Data {
                x: random(self.rows * self.inputs, 1),
                dout: random(self.rows * self.total(), 2),
                weights: (0..)
                    .zip(&self.outputs)
                    .map(|(i, n)| random(n * self.inputs, 10 + i))
                    .collect(),
                biases: (0..)
                    .zip(&self.outputs)
                    .map(|(i, n)| random(*n, 20 + i))
                    .collect(),
                panels: self
                    .outputs
                    .iter()
                    .map(|_| FrozenPanels::default())
                    .collect(),
                a: random(self.ranks() * self.inputs, 3),
                b: random(adapted_outputs * self.rank, 4),
            }
        }

        fn run(&self, data: &Data, update: bool, precision: Precision) -> Results {
            let layers: Vec<_> = (0..self.outputs.len())
                .map(|i| FrozenLinear {
                    weight: &data.weights[i],
                    bias: self.bias.then_some(&data.biases[i]),
                    panels: &data.panels[i],
                    outputs: self.outputs[i],
                    adapted: self.adapted[i],
                })
                .collect();
            let update = update.then_some(LowRankUpdate {
                a: &data.a,
                b: &data.b,
                rank: self.rank,
                scale: SCALE,
            });
            let ranks = update.map_or(0, |_| self.ranks());
            let (rows, inputs) = (self.rows, self.inputs);
            let mut h = vec![f32::NAN; rows * ranks];
            let mut results = Results {
                out: vec![f32::NAN; rows * self.total()],
                dx: vec![f32::NAN; rows * inputs],
                da: vec![f32::NAN; ranks * inputs],
                db: vec![f32::NAN; update.map_or(0, |update| update.b.len())],
            };
            frozen_linears_forward(
                &data.x,
                rows,
                inputs,
                &layers,
                update,
                &mut results.out,
                &mut h,
                precision,
            );
            let gradients = FrozenGradients {
                x: Some(&mut results.dx),
                a: Some(&mut results.da),
                b: Some(&mut results.db),
            };
            frozen_linears_backward(
                &data.x, rows, inputs, &layers, update, &h, &data.dout, gradients, precision,
            );
            results
        }

        /// The formulas at the head of the file, layer by layer, in f64.
        fn check(&self, data: &Data, got: &Results, update: bool, tolerance: f64) {
            let (rows, inputs, total, rank) = (self.rows, self.inputs, self.total(), self.rank);
            let product = |a: &[f32], a_strides, b: &[f32], b_strides, m, n, k| {
                let shape = ProductShape { m, n, k };
                naive_product(a, a_strides, b, b_strides, &[], shape, Store::Replace)
            };
            let narrow =
                |x: Vec<f64>| -> Vec<f32> { x.iter().map(|&x| x as f32 * SCALE).collect() };
            let mut dx = vec![0.0; rows * inputs];
            let (mut first, mut slot, mut below) = (0, 0, 0);
            for (i, &outputs) in self.outputs.iter().enumerate() {
                let pick = |all: &[f32]| -> Vec<f32> {
                    all.chunks(total.max(1))
                        .flat_map(|row| row[first..first + outputs].to_vec())
                        .collect()
                };
                let (out, dout, weight) = (pick(&got.out), pick(&data.dout), &data.weights[i]);
                let mut y = product(
                    &data.x,
                    (inputs, 1),
                    weight,
                    (1, inputs),
                    rows,
                    outputs,
                    inputs,
                );
                if self.bias {
                    let bias = data.biases[i].iter().cycle();
                    y.iter_mut()
                        .zip(bias)
                        .for_each(|(y, b)| *y += f64::from(*b));
                }
                let mut add =
                    |part: Vec<f64>| dx.iter_mut().zip(part).for_each(|(sum, x)| *sum += x);
                add(product(
                    &dout,
                    (outputs, 1),
                    weight,
                    (inputs, 1),
                    rows,
                    inputs,
                    outputs,
                ));
                if update && self.adapted[i] {
                    let a = &data.a[slot * rank * inputs..][..rank * inputs];
                    let b = &data.b[below * rank..][..outputs * rank];
                    let h = narrow(product(
                        &data.x,
                        (inputs, 1),
                        a,
                        (1, inputs),
                        rows,
                        rank,
                        inputs,
                    ));
                    let more = product(&h, (rank, 1), b, (1, rank), rows, outputs, rank);
                    y.iter_mut().zip(more).for_each(|(y, more)| *y += more);
                    let dh = narrow(product(
                        &dout,
                        (outputs, 1),
                        b,
                        (rank, 1),
                        rows,
                        rank,
                        outputs,
                    ));
                    add(product(&dh, (rank, 1), a, (inputs, 1), rows, inputs, rank));
                    let da = product(&dh, (1, rank), &data.x, (inputs, 1), rank, inputs, rows);
                    assert_close(
                        "da",
                        &got.da[slot * rank * inputs..][..rank * inputs],
                        &da,
                        tolerance,
                    );
                    let db = product(&dout, (1, outputs), &h, (rank, 1), outputs, rank, rows);
                    assert_close(
                        "db",
                        &got.db[below * rank..][..outputs * rank],
                        &db,
                        tolerance,
                    );
                    slot += 1;
                    below += outputs;
                }
                assert_close("out", &out, &y, tolerance);
                first += outputs;
            }
            assert_close("dx", &got.dx, &dx, tolerance);
        }
    }

    fn cases() -> Vec<Case> {
        let case = |rows, inputs, outputs: &[usize], adapted: &[bool], rank, bias| Case {
            rows,
            inputs,
            outputs: outputs.to_vec(),
            adapted: adapted.to_vec(),
            rank,
            bias,
        };
        vec![
            case(1, 1, &[1], &[true], 1, false),
            case(65, 33, &[48, 16, 17], &[true, true, true], 4, false),
            case(64, 64, &[64, 20, 20], &[true, false, true], 3, true),
            case(63, 100, &[130, 50], &[false, true], 16, false),
            case(7, 31, &[9, 5], &[true, true], 2, true),
            case(70, 1100, &[48], &[true], 8, false),
            case(0, 8, &[5, 6], &[true, true], 2, true),
        ]
    }

    #[test]
    fn values_and_gradients_agree_with_f64() {
        for case in cases() {
            let data = case.data();
            for update in [true, false] {
                for (precision, tolerance) in [
                    (Precision::F32, F32_TOLERANCE),
                    (Precision::Bf16, BF16_TOLERANCE),
                ] {
                    let results = case.run(&data, update, precision);
                    case.check(&data, &results, update, tolerance);
                }
            }
        }
    }

    #[test]
    fn an_update_of_zero_changes_no_bit() {
        for case in cases() {
            let mut data = case.data();
            data.b.fill(0.0);
            for precision in [Precision::F32, Precision::Bf16] {
                let with = case.run(&data, true, precision);
                let without = case.run(&data, false, precision);
                assert_eq!(with.out, without.out);
                assert_close("dx", &with.dx, &widen(&without.dx), 1e-6);
            }
        }
    }

    #[test]
    fn threads_change_no_bit() {
        let case = Case {
            rows: 300,
            inputs: 96,
            outputs: vec![576, 100],
            adapted: vec![true, true],
            rank: 16,
            bias: true,
        };
        let data = case.data();
        for precision in [Precision::F32, Precision::Bf16] {
            let one = on_threads(1, || case.run(&data, true, precision));
            for threads in [2, 3] {
                let many = on_threads(threads, || case.run(&data, true, precision));
                assert_eq!(one.out, many.out);
                assert_eq!((&one.dx, &one.da, &one.db), (&many.dx, &many.da, &many.db));
            }
        }
    }

    #[test]
    fn what_is_not_asked_for_leaves_the_rest_alone() {
        let case = &cases()[1];
        let data = case.data();
        for precision in [Precision::F32, Precision::Bf16] {
            let all = case.run(&data, true, precision);
            let layers: Vec<_> = (0..3)
                .map(|i| FrozenLinear {
                    weight: &data.weights[i],
                    bias: None,
                    panels: &data.panels[i],
                    outputs: case.outputs[i],
                    adapted: true,
                })
                .collect();
            let update = LowRankUpdate {
                a: &data.a,
                b: &data.b,
                rank: case.rank,
                scale: SCALE,
            };
            let mut out = vec![0.0; all.out.len()];
            let mut h = vec![0.0; case.rows * case.ranks()];
            frozen_linears_forward(
                &data.x,
                case.rows,
                case.inputs,
                &layers,
                Some(update),
                &mut out,
                &mut h,
                precision,
            );
            let mut dx = vec![f32::NAN; all.dx.len()];
            let only = FrozenGradients {
                x: Some(&mut dx),
                a: None,
                b: None,
            };
            frozen_linears_backward(
                &[],
                case.rows,
                case.inputs,
                &layers,
                Some(update),
                &h,
                &data.dout,
                only,
                precision,
            );
            assert_eq!(dx, all.dx);
        }
    }
}
