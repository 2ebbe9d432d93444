//! Frozen layers against the same ones composed of Burn's operations: value and every gradient.

use burn::tensor::{Device, Int, Tensor, TensorData};
use pivotal_ops::{
    AttentionLayout, AttentionSpan, FrozenInput, FrozenLinears, FrozenWeight, LowRank,
    PackedMatrix, Precision, portable, rope_attention_joined,
};

/// Relative to the largest element of the reference. Both sides sum in f32 in different orders.
const TOLERANCE: f64 = 1e-5;
/// bfloat16 keeps 8 bits; the update rounds its input, its factors and what lies between them.
const TOLERANCE_BF16: f64 = 3e-2;
const PRECISIONS: [(Precision, f64); 2] = [
    (Precision::F32, TOLERANCE),
    (Precision::Bf16, TOLERANCE_BF16),
];

fn numbers(seed: u64, len: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    (0..len)
        .map(|_| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            ((state >> 40) as f32 / (1u64 << 23) as f32) - 1.0
        })
        .collect()
}

fn matrix(seed: u64, rows: usize, columns: usize) -> Tensor<2> {
    let data = TensorData::new(numbers(seed, rows * columns), [rows, columns]);
    Tensor::from_data(data, &Device::flex())
}

fn vector(seed: u64, len: usize) -> Tensor<1> {
    Tensor::from_data(TensorData::new(numbers(seed, len), [len]), &Device::flex())
}

fn floats<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.try_into_vec_as().unwrap()
}

/// The value, then the gradient by each input, of `Σ out·(fixed random weights)`.
fn value_and_gradients<const D: usize>(
    inputs: &[Tensor<2>],
    operation: &dyn Fn(&[Tensor<2>]) -> Tensor<D>,
) -> Vec<Vec<f32>> {
    let leaf = |input: &Tensor<2>| input.clone().autodiff().require_grad();
    let inputs: Vec<_> = inputs.iter().map(leaf).collect();
    let out = operation(&inputs);
    let shape = out.dims();
    let upstream = TensorData::new(numbers(99, shape.iter().product()), shape);
    let upstream = Tensor::<D>::from_data(upstream, &out.device());
    let grads = (out.clone() * upstream).sum().backward();
    let gradients = inputs
        .iter()
        .map(|input| floats(input.grad(&grads).unwrap()));
    std::iter::once(floats(out)).chain(gradients).collect()
}

fn assert_agrees<const D: usize>(
    name: &str,
    inputs: &[Tensor<2>],
    fused: &dyn Fn(&[Tensor<2>]) -> Tensor<D>,
    composed: &dyn Fn(&[Tensor<2>]) -> Tensor<D>,
    tolerance: f64,
) {
    let fused = value_and_gradients(inputs, fused);
    let composed = value_and_gradients(inputs, composed);
    for (part, (fused, composed)) in fused.iter().zip(&composed).enumerate() {
        assert_eq!(fused.len(), composed.len());
        let largest = composed.iter().fold(1e-6f32, |a, b| a.max(b.abs()));
        let differences = fused
            .iter()
            .zip(composed)
            .map(|(a, b)| f64::from((a - b).abs() / largest));
        let worst = differences.fold(0.0, f64::max);
        assert!(
            worst <= tolerance,
            "{name}, part {part}: off by {worst:e} of the largest"
        );
        // The largest of some differences is not one that is no number.
        let finite = |values: &[f32]| values.iter().all(|value| value.is_finite());
        assert!(finite(fused) && finite(composed), "{name}, part {part}");
    }
}

/// What the layers see: the input after its norm or gate, composed.
fn prepared(x: &Tensor<2>, input: &FrozenInput<'_>) -> Tensor<2> {
    match input {
        FrozenInput::Plain => x.clone(),
        FrozenInput::Normed { weight, eps } => {
            portable::rms_norm(x.clone(), (*weight).clone(), *eps)
        }
        FrozenInput::Gated => {
            let width = x.dims()[1] / 2;
            let half = |first| x.clone().narrow(1, first, width);
            portable::swiglu(half(0), half(width))
        }
    }
}

#[test]
fn layers_with_updates_agree() {
    let norm = vector(7, 33);
    let inputs = [
        FrozenInput::Plain,
        FrozenInput::Normed {
            weight: &norm,
            eps: 1e-5,
        },
        FrozenInput::Gated,
    ];
    let weights = [matrix(11, 48, 33), matrix(12, 17, 33), matrix(13, 20, 33)];
    let bias = vector(14, 17);
    let layers = [
        (FrozenWeight::Tensor(&weights[0]), None),
        (FrozenWeight::Tensor(&weights[1]), Some(&bias)),
        (FrozenWeight::Tensor(&weights[2]), None),
    ];
    let scale = 0.5;
    for input in inputs {
        let frozen = FrozenLinears::new(input, &layers).expect("frozen, on Flex");
        for rows in [1, 63, 64, 65] {
            let width = if matches!(input, FrozenInput::Gated) {
                66
            } else {
                33
            };
            // x, then A and B of the first and the last layer.
            let leaves = [
                matrix(1, rows, width),
                matrix(2, 4, 33),
                matrix(3, 48, 4),
                matrix(4, 4, 33),
                matrix(5, 20, 4),
            ];
            for (precision, tolerance) in PRECISIONS {
                assert_agrees(
                    &format!("{input:?} {rows} {precision:?}"),
                    &leaves,
                    &|i| {
                        let update = |at: usize| LowRank {
                            a: &i[at],
                            b: &i[at + 1],
                            scale,
                        };
                        frozen.forward(
                            i[0].clone(),
                            &[Some(update(1)), None, Some(update(3))],
                            precision,
                        )
                    },
                    &|i| {
                        let x = prepared(&i[0], &input);
                        let lora = |layer: usize, at: usize| {
                            let (a, b) = (i[at].clone(), i[at + 1].clone());
                            portable::lora_linear(x.clone(), weights[layer].clone(), a, b, scale)
                        };
                        let middle = portable::linear(x.clone(), weights[1].clone());
                        let middle = middle + bias.clone().unsqueeze();
                        Tensor::cat(vec![lora(0, 1), middle, lora(2, 3)], 1)
                    },
                    tolerance,
                );
            }
        }
    }
}

/// A perceptron of 33 and 200: norm, gate, up and down, each composed.
fn perceptron(
    i: &[Tensor<2>],
    norm: &Tensor<1>,
    weights: &[Tensor<2>; 3],
    linear: &dyn Fn(usize, Tensor<2>, Tensor<2>) -> Tensor<2>,
) -> Tensor<2> {
    let [gate, up, down] = weights.each_ref();
    let x = portable::rms_norm(i[0].clone(), norm.clone(), 1e-5);
    let gated = portable::swiglu(linear(0, x.clone(), gate.clone()), linear(1, x, up.clone()));
    i[0].clone() + linear(2, gated, down.clone())
}

#[test]
fn a_perceptron_agrees() {
    let norm = vector(7, 33);
    let weights = [
        matrix(11, 200, 33),
        matrix(12, 200, 33),
        matrix(13, 33, 200).mul_scalar(0.1),
    ];
    let [gate, up, down] = weights.each_ref();
    let normed = FrozenInput::Normed {
        weight: &norm,
        eps: 1e-5,
    };
    let gate_up = FrozenLinears::new(
        normed,
        &[
            (FrozenWeight::Tensor(gate), None),
            (FrozenWeight::Tensor(up), None),
        ],
    )
    .unwrap();
    let down =
        FrozenLinears::new(FrozenInput::Gated, &[(FrozenWeight::Tensor(down), None)]).unwrap();
    for rows in [1, 63, 64, 65] {
        // x, then A and B of gate and down; up has none.
        let leaves = [
            matrix(1, rows, 33),
            matrix(2, 4, 33),
            matrix(3, 200, 4),
            matrix(4, 6, 200),
            matrix(5, 33, 6),
        ];
        for (precision, tolerance) in PRECISIONS {
            assert_agrees(
                &format!("updates, {rows} {precision:?}"),
                &leaves,
                &|i| {
                    let update = |at: usize, scale| LowRank {
                        a: &i[at],
                        b: &i[at + 1],
                        scale,
                    };
                    let updates = ([Some(update(1, 0.5)), None], [Some(update(3, 0.25))]);
                    let x = i[0].clone();
                    FrozenLinears::mlp(&gate_up, &down, x, &updates.0, &updates.1, precision)
                },
                &|i| {
                    perceptron(i, &norm, &weights, &|layer, x, weight| match layer {
                        0 => portable::lora_linear(x, weight, i[1].clone(), i[2].clone(), 0.5),
                        2 => portable::lora_linear(x, weight, i[3].clone(), i[4].clone(), 0.25),
                        _ => portable::linear(x, weight),
                    })
                },
                tolerance,
            );
            assert_agrees(
                &format!("no updates, {rows} {precision:?}"),
                &leaves[..1],
                &|i| {
                    let x = i[0].clone();
                    FrozenLinears::mlp(&gate_up, &down, x, &[None, None], &[None], precision)
                },
                &|i| {
                    perceptron(i, &norm, &weights, &|_, x, weight| {
                        portable::linear(x, weight)
                    })
                },
                tolerance,
            );
        }
    }
}

#[test]
fn layers_without_updates_agree() {
    let (norm, weight) = (vector(7, 65), matrix(11, 50, 65));
    let input = FrozenInput::Normed {
        weight: &norm,
        eps: 1e-5,
    };
    let frozen = FrozenLinears::new(input, &[(FrozenWeight::Tensor(&weight), None)]).unwrap();
    for (precision, tolerance) in PRECISIONS {
        assert_agrees(
            &format!("{precision:?}"),
            &[matrix(1, 70, 65)],
            &|i| frozen.forward(i[0].clone(), &[None], precision),
            &|i| portable::linear(prepared(&i[0], &input), weight.clone()),
            tolerance,
        );
    }
}

#[test]
fn log_probabilities_under_a_frozen_head_agree() {
    for (rows, hidden, vocab) in [(1, 8, 5), (65, 33, 1009), (20, 48, 3000)] {
        let head = matrix(3, vocab, hidden);
        let frozen =
            FrozenLinears::new(FrozenInput::Plain, &[(FrozenWeight::Tensor(&head), None)]).unwrap();
        let ids: Vec<i32> = (0..rows).map(|row| (row * 7919 % vocab) as i32).collect();
        let targets = Tensor::<1, Int>::from_data(TensorData::new(ids, [rows]), &Device::flex());
        for (precision, tolerance) in PRECISIONS {
            assert_agrees(
                &format!("{rows} {hidden} {vocab} {precision:?}"),
                &[matrix(1, rows, hidden)],
                &|i| frozen.token_logps(i[0].clone(), targets.clone(), precision),
                &|i| portable::token_logps(i[0].clone(), head.clone(), targets.clone()),
                tolerance,
            );
        }
    }
}

#[test]
fn joined_attention_agrees() {
    let spans = [(0, 65, 0, 0), (65, 7, 0, 65), (72, 64, 0, 65)];
    let spans = spans.map(|(start, len, prefix_start, prefix_len)| AttentionSpan {
        start,
        len,
        prefix_start,
        prefix_len,
    });
    for (heads, kv_heads) in [(1, 1), (3, 1), (8, 1), (6, 2)] {
        let frequencies = [1.0, 0.3, 0.1, 0.02];
        let layout = AttentionLayout::new(
            &spans,
            heads,
            kv_heads,
            8,
            &frequencies,
            1.0,
            &Device::flex(),
        )
        .unwrap();
        let (width, key_width) = (8 * heads, 8 * kv_heads);
        for (precision, tolerance) in PRECISIONS {
            let layout = layout.clone().with_precision(precision);
            assert_agrees(
                &format!("{heads} {kv_heads} {precision:?}"),
                &[matrix(1, 136, width + 2 * key_width)],
                &|i| rope_attention_joined(i[0].clone(), &layout),
                &|i| {
                    let part = |first, width| i[0].clone().narrow(1, first, width);
                    let (q, k) = (part(0, width), part(width, key_width));
                    portable::rope_attention(q, k, part(width + key_width, key_width), &layout)
                },
                tolerance,
            );
        }
    }
}

#[test]
fn only_what_is_frozen_and_the_same_memory_counts() {
    let (weight, other) = (matrix(1, 3, 2), matrix(2, 3, 2));
    let frozen =
        FrozenLinears::new(FrozenInput::Plain, &[(FrozenWeight::Tensor(&weight), None)]).unwrap();
    assert!(frozen.is_made_of(
        FrozenInput::Plain,
        &[(FrozenWeight::Tensor(&weight.clone()), None)]
    ));
    assert!(!frozen.is_made_of(FrozenInput::Plain, &[(FrozenWeight::Tensor(&other), None)]));
    assert!(!frozen.is_made_of(FrozenInput::Gated, &[(FrozenWeight::Tensor(&weight), None)]));
    // The same values elsewhere in memory are another weight: they may change on their own.
    let copy = weight.clone().mul_scalar(1.0);
    assert!(!frozen.is_made_of(FrozenInput::Plain, &[(FrozenWeight::Tensor(&copy), None)]));
    let trained = weight.clone().autodiff().require_grad();
    assert!(
        FrozenLinears::new(
            FrozenInput::Plain,
            &[(FrozenWeight::Tensor(&trained), None)]
        )
        .is_none()
    );
    assert!(!frozen.is_made_of(
        FrozenInput::Plain,
        &[(FrozenWeight::Tensor(&trained), None)]
    ));

    let (a, b) = (matrix(3, 1, 2), matrix(4, 3, 1));
    let update = LowRank {
        a: &a,
        b: &b,
        scale: 1.0,
    };
    assert!(frozen.takes(&[Some(update)]) && frozen.takes(&[None]));
    assert!(!frozen.takes(&[]) && !frozen.takes(&[Some(LowRank { b: &a, ..update })]));
}

#[test]
fn a_packed_matrix_is_its_tensor_in_bf16_bit_for_bit() {
    let (weight, bias) = (matrix(1, 50, 65), vector(2, 50));
    let trained = weight.clone().autodiff().require_grad();
    assert!(PackedMatrix::new(&trained).is_none());
    let Some(packed) = PackedMatrix::new(&weight) else {
        assert!(!pivotal_kernels::bf16_available());
        return;
    };
    assert_eq!(packed.dims(), [50, 65]);
    let again = floats(packed.to_tensor());
    let rounded =
        |(&a, &b): (&f32, &f32)| (a - b).abs() <= b.abs() / 256.0 && a.to_bits() & 0xffff == 0;
    assert!(again.iter().zip(&floats(weight.clone())).all(rounded));

    let leaves = [matrix(3, 70, 65), matrix(4, 2, 65), matrix(5, 50, 2)];
    let run = |weight: FrozenWeight<'_>| {
        let frozen = FrozenLinears::new(FrozenInput::Plain, &[(weight, Some(&bias))]).unwrap();
        assert!(frozen.is_made_of(FrozenInput::Plain, &[(weight, Some(&bias))]));
        value_and_gradients(&leaves, &|i| {
            let update = LowRank {
                a: &i[1],
                b: &i[2],
                scale: 0.5,
            };
            frozen.forward(i[0].clone(), &[Some(update)], Precision::Bf16)
        })
    };
    assert_eq!(
        run(FrozenWeight::Tensor(&weight)),
        run(FrozenWeight::Packed(&packed))
    );
    let other = PackedMatrix::new(&weight).unwrap();
    let layers = [(FrozenWeight::Packed(&packed), None)];
    let frozen = FrozenLinears::new(FrozenInput::Plain, &layers).unwrap();
    for weight in [FrozenWeight::Packed(&other), FrozenWeight::Tensor(&weight)] {
        assert!(!frozen.is_made_of(FrozenInput::Plain, &[(weight, None)]));
    }
}
