//! Values and gradients against f64, and what changes no bit.

use super::*;
use crate::testing::{assert_close, naive_product, on_each, on_threads, random, widen};

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
    });
}
