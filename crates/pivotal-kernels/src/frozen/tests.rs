//! Values and gradients against f64, and what changes no bit.

use super::*;
use crate::testing::{
    assert_close, naive_product, on_each, on_each_vector, on_threads, random, widen,
};

// f32 sums of up to 1100 terms.
const F32_TOLERANCE: f64 = 5e-5;
// bf16 operands, and for the update a bf16 intermediate.
const BF16_TOLERANCE: f64 = 1.0 / 64.0;
const SCALE: f32 = 0.5;
const ALL: FrozenWanted = FrozenWanted {
    x: true,
    a: true,
    b: true,
};

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
    /// Whether the products are given panels alone.
    packed: bool,
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
            packed: false,
            a: random(self.ranks() * self.inputs, 3),
            b: random(adapted_outputs * self.rank, 4),
        }
    }

    fn run(&self, data: &Data, update: bool, precision: Precision) -> Results {
        let layers: Vec<_> = (0..self.outputs.len())
            .map(|i| FrozenLinear {
                weight: (!data.packed).then_some(&data.weights[i]),
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
        let group = FrozenGroup {
            prologue: Prologue::Plain,
            inputs: self.inputs,
            layers: &layers,
            update,
            precision,
        };
        let FrozenOutputs { y, h, rstd } = group.forward(&data.x, self.rows);
        assert!(rstd.is_empty());
        let saved = FrozenSaved {
            x: &data.x,
            h: &h,
            rstd: &rstd,
        };
        let gradients = group.backward(saved, &data.dout, self.rows, ALL);
        Results {
            out: y,
            dx: gradients.x.unwrap(),
            da: gradients.a.unwrap_or_default(),
            db: gradients.b.unwrap_or_default(),
        }
    }

    /// The formulas at the head of the file, layer by layer, in f64.
    fn check(&self, data: &Data, got: &Results, update: bool, tolerance: f64) {
        let (rows, inputs, total, rank) = (self.rows, self.inputs, self.total(), self.rank);
        let product = |a: &[f32], a_strides, b: &[f32], b_strides, m, n, k| {
            let shape = ProductShape { m, n, k };
            naive_product(a, a_strides, b, b_strides, &[], shape, Store::Replace)
        };
        let narrow = |x: Vec<f64>| -> Vec<f32> { x.iter().map(|&x| x as f32 * SCALE).collect() };
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
            let mut add = |part: Vec<f64>| dx.iter_mut().zip(part).for_each(|(sum, x)| *sum += x);
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
    on_each(|| {
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
    });
}

#[test]
fn an_update_of_zero_changes_no_bit() {
    on_each(|| {
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
    });
}

#[test]
fn panels_alone_are_the_weights_bit_for_bit() {
    on_each_vector(|| {
        for case in cases() {
            let kept = case.data();
            let mut packed = case.data();
            packed.packed = true;
            packed.panels = (0..case.outputs.len())
                .map(|i| {
                    let panels =
                        FrozenPanels::pack(&kept.weights[i], case.outputs[i], case.inputs).unwrap();
                    let again = panels.unpack(case.outputs[i], case.inputs);
                    assert_close("unpacked", &again, &widen(&kept.weights[i]), 1.0 / 256.0);
                    panels
                })
                .collect();
            let [kept, packed] = [kept, packed].map(|data| case.run(&data, true, Precision::Bf16));
            assert_eq!(kept.out, packed.out);
            assert_eq!(
                (&kept.dx, &kept.da, &kept.db),
                (&packed.dx, &packed.da, &packed.db)
            );
        }
    });
}

#[test]
#[should_panic(expected = "takes part in bf16 products alone")]
fn panels_alone_are_no_weight_in_f32() {
    let case = &cases()[0];
    let mut data = case.data();
    data.packed = true;
    case.run(&data, true, Precision::F32);
}

#[test]
fn threads_change_no_bit() {
    on_each(|| {
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
    });
}

#[test]
fn what_is_not_asked_for_leaves_the_rest_alone() {
    on_each(|| {
        let case = &cases()[1];
        let data = case.data();
        for precision in [Precision::F32, Precision::Bf16] {
            let all = case.run(&data, true, precision);
            let layers: Vec<_> = (0..3)
                .map(|i| FrozenLinear {
                    weight: Some(&data.weights[i]),
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
            let group = FrozenGroup {
                prologue: Prologue::Plain,
                inputs: case.inputs,
                layers: &layers,
                update: Some(update),
                precision,
            };
            let FrozenOutputs { h, .. } = group.forward(&data.x, case.rows);
            let saved = FrozenSaved {
                x: &[],
                h: &h,
                rstd: &[],
            };
            let only = FrozenWanted {
                x: true,
                a: false,
                b: false,
            };
            let gradients = group.backward(saved, &data.dout, case.rows, only);
            assert!(gradients.a.is_none() && gradients.b.is_none());
            let dx = gradients.x.unwrap();
            assert_eq!(dx, all.dx);
        }
    });
}

/// The group over what a norm or a gate makes of the input, step by step through the public kernels.
fn by_steps(
    group: &FrozenGroup<'_>,
    x: &[f32],
    dout: &[f32],
    rows: usize,
) -> (Vec<f32>, FrozenGradients) {
    let inputs = group.inputs;
    let mut made = vec![f32::NAN; rows * inputs];
    let mut rstd = vec![f32::NAN; rows];
    match group.prologue {
        Prologue::Plain => made.copy_from_slice(x),
        Prologue::Normed { weight, eps } => {
            crate::rms_norm_forward(x, weight, eps, &mut made, &mut rstd);
        }
        Prologue::Gated => crate::swiglu_joined_forward(x, inputs, &mut made),
    }
    let plain = FrozenGroup {
        prologue: Prologue::Plain,
        ..*group
    };
    let FrozenOutputs { y, h, .. } = plain.forward(&made, rows);
    let saved = FrozenSaved {
        x: &made,
        h: &h,
        rstd: &[],
    };
    let mut gradients = plain.backward(saved, dout, rows, ALL);
    let dmade = gradients.x.take().unwrap();
    let mut dx = vec![f32::NAN; x.len()];
    match group.prologue {
        Prologue::Plain => dx.copy_from_slice(&dmade),
        Prologue::Normed { weight, .. } => {
            let gradients = crate::RmsNormGradients {
                x: &mut dx,
                weight: None,
            };
            crate::rms_norm_backward(x, weight, &rstd, &dmade, gradients);
        }
        Prologue::Gated => crate::swiglu_joined_backward(x, inputs, &dmade, &mut dx),
    }
    gradients.x = Some(dx);
    (y, gradients)
}

#[test]
fn a_prologue_is_its_kernel_before_the_products_bit_for_bit() {
    on_each(|| {
        for case in cases() {
            let data = case.data();
            let gain = random(case.inputs, 30);
            let normed = Prologue::Normed {
                weight: &gain,
                eps: 1e-5,
            };
            for prologue in [Prologue::Plain, normed, Prologue::Gated] {
                let x = random(case.rows * prologue.width(case.inputs), 31);
                for (precision, update) in [
                    (Precision::F32, true),
                    (Precision::Bf16, true),
                    (Precision::Bf16, false),
                ] {
                    let layers: Vec<_> = (0..case.outputs.len())
                        .map(|i| FrozenLinear {
                            weight: Some(&data.weights[i]),
                            bias: case.bias.then_some(&data.biases[i]),
                            panels: &data.panels[i],
                            outputs: case.outputs[i],
                            adapted: case.adapted[i],
                        })
                        .collect();
                    let group = FrozenGroup {
                        prologue,
                        inputs: case.inputs,
                        layers: &layers,
                        update: update.then_some(LowRankUpdate {
                            a: &data.a,
                            b: &data.b,
                            rank: case.rank,
                            scale: SCALE,
                        }),
                        precision,
                    };
                    let (y, expected) = by_steps(&group, &x, &data.dout, case.rows);
                    let outputs = group.forward(&x, case.rows);
                    let saved = FrozenSaved {
                        x: &x,
                        h: &outputs.h,
                        rstd: &outputs.rstd,
                    };
                    let got = group.backward(saved, &data.dout, case.rows, ALL);
                    assert_eq!(outputs.y, y);
                    assert_eq!((got.x, got.a, got.b), (expected.x, expected.a, expected.b));
                }
            }
        }
    });
}
