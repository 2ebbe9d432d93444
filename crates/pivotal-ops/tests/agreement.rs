//! Each fused operation against the same one composed of Burn's: value and every gradient, at awkward sizes.

use burn::tensor::{Device, Int, Tensor, TensorData};
use pivotal_ops::{
    AttentionLayout, AttentionSpan, Precision, linear, lora_linear, portable, residual, rms_norm,
    rope_attention, swiglu, token_logps, vocabulary_kl,
};

/// Largest difference, relative to the largest element of the reference. Both sides sum in f32 in different orders.
const TOLERANCE: f64 = 4e-6;
/// bfloat16 keeps 8 bits: each operand is off by up to 2^-9, and sums of products of random signs lose little more.
const TOLERANCE_BF16: f64 = 2e-2;

/// Numbers between -1 and 1 from a multiplicative congruence: the same on every machine.
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
    Tensor::from_data(data, &Device::flex().autodiff())
}

fn vector(seed: u64, len: usize) -> Tensor<1> {
    let data = TensorData::new(numbers(seed, len), [len]);
    Tensor::from_data(data, &Device::flex().autodiff())
}

fn floats<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.try_into_vec_as().unwrap()
}

fn assert_close(name: &str, found: &[f32], expected: &[f32], tolerance: f64) {
    assert_eq!(found.len(), expected.len(), "{name}");
    let largest = expected.iter().fold(1e-6f32, |a, b| a.max(b.abs()));
    let worst = found
        .iter()
        .zip(expected)
        .map(|(a, b)| f64::from((a - b).abs() / largest))
        .fold(0.0, f64::max);
    assert!(
        worst <= tolerance,
        "{name}: off by {worst:e} of the largest"
    );
    // The largest of some differences is not one that is no number.
    let finite = |values: &[f32]| values.iter().all(|value| value.is_finite());
    assert!(finite(found) && finite(expected), "{name}");
}

/// The value, then the gradient by each input, of `Σ out·(fixed random weights)`.
fn value_and_gradients<const D: usize>(
    inputs: &[Tensor<2>],
    operation: impl Fn(&[Tensor<2>]) -> Tensor<D>,
) -> Vec<Vec<f32>> {
    let inputs: Vec<_> = inputs
        .iter()
        .map(|input| input.clone().detach().require_grad())
        .collect();
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
    fused: impl Fn(&[Tensor<2>]) -> Tensor<D>,
    composed: impl Fn(&[Tensor<2>]) -> Tensor<D>,
    tolerance: f64,
) {
    let fused = value_and_gradients(inputs, fused);
    let composed = value_and_gradients(inputs, composed);
    for (part, (fused, composed)) in fused.iter().zip(&composed).enumerate() {
        assert_close(&format!("{name}, part {part}"), fused, composed, tolerance);
    }
}

const PRECISIONS: [(Precision, f64); 2] = [
    (Precision::F32, TOLERANCE),
    (Precision::Bf16, TOLERANCE_BF16),
];

#[test]
fn linear_agrees() {
    for (rows, input, output) in [
        (1, 1, 1),
        (7, 33, 19),
        (63, 4, 64),
        (64, 63, 3),
        (130, 65, 71),
    ] {
        let inputs = [matrix(1, rows, input), matrix(2, output, input)];
        for (precision, tolerance) in PRECISIONS {
            assert_agrees(
                &format!("{rows} {input} {output} {precision:?}"),
                &inputs,
                |i| linear(i[0].clone(), i[1].clone(), precision),
                |i| portable::linear(i[0].clone(), i[1].clone()),
                tolerance,
            );
        }
    }
}

#[test]
fn lora_linear_agrees() {
    for (rows, input, output, rank) in [
        (1, 3, 2, 1),
        (9, 35, 21, 4),
        (63, 5, 65, 3),
        (64, 65, 5, 2),
        (65, 6, 63, 1),
        (101, 67, 66, 16),
    ] {
        let inputs = [
            matrix(1, rows, input),
            matrix(2, output, input),
            matrix(3, rank, input),
            matrix(4, output, rank),
        ];
        for (precision, tolerance) in PRECISIONS {
            assert_agrees(
                &format!("{rows} {input} {output} {rank} {precision:?}"),
                &inputs,
                |i| {
                    let [x, w, a, b] = [0, 1, 2, 3].map(|at: usize| i[at].clone());
                    lora_linear(x, w, a, b, 0.5, precision)
                },
                |i| {
                    let [x, w, a, b] = [0, 1, 2, 3].map(|at: usize| i[at].clone());
                    portable::lora_linear(x, w, a, b, 0.5)
                },
                tolerance,
            );
        }
    }
}

#[test]
fn lora_with_a_zero_b_is_the_base_bit_for_bit() {
    for precision in [Precision::F32, Precision::Bf16] {
        let (x, weight, a) = (matrix(1, 77, 65), matrix(2, 43, 65), matrix(3, 8, 65));
        let b = Tensor::<2>::zeros([43, 8], &x.device());
        let base = linear(x.clone(), weight.clone(), precision);
        let adapted = lora_linear(x, weight, a, b, 2.0, precision);
        let bits = |t: Tensor<2>| floats(t).into_iter().map(f32::to_bits).collect::<Vec<_>>();
        assert_eq!(bits(adapted), bits(base));
    }
}

#[test]
fn rms_norm_agrees() {
    // Not one column: its gradient is a difference of two nearly equal numbers.
    for (rows, hidden) in [(1, 3), (5, 37), (63, 9), (64, 65), (65, 63), (129, 64)] {
        let inputs = [matrix(5, rows, hidden), matrix(6, 1, hidden)];
        assert_agrees(
            &format!("{rows} {hidden}"),
            &inputs,
            |i| rms_norm(i[0].clone(), i[1].clone().squeeze_dim(0), 1e-5),
            |i| portable::rms_norm(i[0].clone(), i[1].clone().squeeze_dim(0), 1e-5),
            TOLERANCE,
        );
    }
}

#[test]
fn swiglu_agrees() {
    for (rows, width) in [(1, 1), (13, 29), (63, 65), (64, 3), (65, 64)] {
        let inputs = [
            matrix(7, rows, width).mul_scalar(8.0),
            matrix(8, rows, width),
        ];
        assert_agrees(
            &format!("{rows} {width}"),
            &inputs,
            |i| swiglu(i[0].clone(), i[1].clone()),
            |i| portable::swiglu(i[0].clone(), i[1].clone()),
            TOLERANCE,
        );
    }
}

#[test]
fn residual_agrees() {
    for (rows, width) in [(1, 1), (13, 29), (63, 65), (64, 3), (65, 64), (300, 70)] {
        let inputs = [matrix(7, rows, width), matrix(8, rows, width)];
        assert_agrees(
            &format!("{rows} {width}"),
            &inputs,
            |i| residual(i[0].clone(), i[1].clone()),
            |i| i[0].clone() + i[1].clone(),
            0.0,
        );
        // What somebody else holds is left as it was.
        let [x, y] = inputs;
        let before: Vec<f32> = y.clone().try_into_vec_as().unwrap();
        let _ = residual(x, y.clone());
        assert_eq!(y.try_into_vec_as::<f32>().unwrap(), before);
    }
}

fn span(start: usize, len: usize, prefix_start: usize, prefix_len: usize) -> AttentionSpan {
    AttentionSpan {
        start,
        len,
        prefix_start,
        prefix_len,
    }
}

fn layout(spans: &[AttentionSpan], heads: usize, kv_heads: usize, dim: usize) -> AttentionLayout {
    let frequencies: Vec<f32> = (0..dim / 2)
        .map(|i| 100f32.powf(-(i as f32) * 2.0 / dim as f32))
        .collect();
    let device = Device::flex();
    AttentionLayout::new(spans, heads, kv_heads, dim, &frequencies, 1.25, &device).unwrap()
}

#[test]
fn rope_attention_agrees() {
    let alone = vec![span(0, 1, 0, 0)];
    let long = vec![span(0, 150, 0, 0)];
    // Two prompts, three and two responses: the shape of a preference batch.
    let shared = vec![
        span(0, 11, 0, 0),
        span(11, 5, 0, 11),
        span(16, 1, 0, 11),
        span(17, 9, 0, 11),
        span(26, 3, 0, 0),
        span(29, 40, 26, 3),
        span(69, 2, 26, 3),
    ];
    // The lengths about a block of 64.
    let lengths = vec![
        span(0, 63, 0, 0),
        span(63, 64, 0, 63),
        span(127, 65, 0, 0),
        span(192, 1, 127, 65),
    ];
    for (spans, heads, kv_heads, dim) in [
        (&alone, 1, 1, 2),
        (&long, 2, 2, 6),
        (&shared, 6, 2, 10),
        (&shared, 3, 1, 16),
        (&lengths, 1, 1, 4),
        (&lengths, 8, 1, 8),
    ] {
        let exact = layout(spans, heads, kv_heads, dim);
        let tokens = exact.tokens();
        let inputs = [
            matrix(9, tokens, heads * dim).mul_scalar(3.0),
            matrix(10, tokens, kv_heads * dim).mul_scalar(3.0),
            matrix(11, tokens, kv_heads * dim),
        ];
        // Of a token alone, the gradients by query and key are 0 but for rounding.
        let precisions = &PRECISIONS[..if tokens == 1 { 1 } else { 2 }];
        for &(precision, tolerance) in precisions {
            let rounded = exact.clone().with_precision(precision);
            assert_agrees(
                &format!("{tokens} tokens, {heads} {kv_heads} {dim} {precision:?}"),
                &inputs,
                |i| rope_attention(i[0].clone(), i[1].clone(), i[2].clone(), &rounded),
                |i| portable::rope_attention(i[0].clone(), i[1].clone(), i[2].clone(), &exact),
                tolerance,
            );
        }
    }
}

#[test]
fn a_response_on_a_shared_prompt_is_as_if_alone() {
    let (heads, kv_heads, dim) = (4, 2, 8);
    let packed = layout(
        &[span(0, 7, 0, 0), span(7, 4, 0, 7), span(11, 5, 0, 7)],
        heads,
        kv_heads,
        dim,
    );
    let alone = layout(&[span(0, 12, 0, 0)], heads, kv_heads, dim);
    let (q, k, v) = (
        matrix(12, 16, heads * dim),
        matrix(13, 16, kv_heads * dim),
        matrix(14, 16, kv_heads * dim),
    );
    let second = |x: &Tensor<2>| {
        Tensor::cat(
            vec![x.clone().narrow(0, 0, 7), x.clone().narrow(0, 11, 5)],
            0,
        )
    };
    let expected = rope_attention(second(&q), second(&k), second(&v), &alone);
    let found = second(&rope_attention(q, k, v, &packed));
    assert_close("value", &floats(found), &floats(expected), TOLERANCE);
}

#[test]
fn rope_attention_leaves_a_shared_input_as_it_was() {
    let layout = layout(&[span(0, 5, 0, 0)], 2, 2, 4);
    let fused = matrix(15, 5, 24);
    let before = floats(fused.clone());
    // Views of one buffer, as a fused projection gives them.
    let part = |at: usize| fused.clone().narrow(1, at * 8, 8);
    let first = floats(rope_attention(part(0), part(1), part(2), &layout));
    assert_eq!(floats(fused.clone()), before);
    assert_eq!(
        floats(rope_attention(part(0), part(1), part(2), &layout)),
        first
    );
}

fn targets(ids: &[i64]) -> Tensor<1, Int> {
    let data = TensorData::new(ids.to_vec(), [ids.len()]);
    Tensor::from_data(data, &Device::flex())
}

#[test]
fn token_logps_agrees() {
    for (rows, hidden, vocab) in [
        (1, 1, 2),
        (6, 17, 31),
        (63, 5, 65),
        (64, 4, 63),
        (65, 3, 64),
        (70, 33, 1500),
    ] {
        let ids: Vec<i64> = (0..rows as i64).map(|row| (row * 7919) % vocab).collect();
        let inputs = [
            matrix(16, rows, hidden),
            matrix(17, vocab as usize, hidden).mul_scalar(2.0),
        ];
        for (precision, tolerance) in PRECISIONS {
            assert_agrees(
                &format!("{rows} {hidden} {vocab} {precision:?}"),
                &inputs,
                |i| token_logps(i[0].clone(), i[1].clone(), targets(&ids), precision),
                |i| portable::token_logps(i[0].clone(), i[1].clone(), targets(&ids)),
                tolerance,
            );
        }
    }
}

#[test]
fn vocabulary_kl_agrees() {
    for (rows, hidden, vocab) in [
        (1, 3, 2),
        (6, 17, 31),
        (63, 5, 65),
        (64, 4, 63),
        (65, 3, 64),
        (70, 33, 1500),
    ] {
        // Far apart: the largest divergence is what both sides' differences are measured by.
        let head = |seed| matrix(seed, vocab, hidden).mul_scalar(2.0);
        let inputs = [matrix(16, rows, hidden).mul_scalar(2.0), head(17)];
        let reference = (matrix(22, rows, hidden).mul_scalar(-2.0), head(23));
        for (precision, tolerance) in PRECISIONS {
            let (hidden, head) = reference.clone();
            assert_agrees(
                &format!("{rows} {vocab} {precision:?}"),
                &inputs,
                |i| {
                    let (hidden, head) = (hidden.clone(), head.clone());
                    vocabulary_kl(i[0].clone(), i[1].clone(), hidden, head, precision)
                },
                |i| {
                    let (hidden, head) = reference.clone();
                    portable::vocabulary_kl(i[0].clone(), i[1].clone(), hidden, head)
                },
                tolerance,
            );
        }
    }
}

#[test]
fn a_reference_on_the_tape_gets_no_gradient() {
    let (hidden, head) = (matrix(16, 5, 3), matrix(17, 7, 3));
    type Operation = fn([Tensor<2>; 4]) -> Tensor<1>;
    let operations: [Operation; 2] = [
        |[a, b, c, d]| vocabulary_kl(a, b, c, d, Precision::F32),
        |[a, b, c, d]| portable::vocabulary_kl(a, b, c, d),
    ];
    for operation in operations {
        let leaf = |tensor: &Tensor<2>| tensor.clone().detach().require_grad();
        let reference = [leaf(&hidden).mul_scalar(2.0), leaf(&head)];
        let policy = leaf(&hidden);
        let [c, d] = reference.clone();
        let grads = operation([policy.clone(), leaf(&head), c, d])
            .sum()
            .backward();
        assert!(policy.grad(&grads).is_some());
        assert!(reference.iter().all(|side| side.grad(&grads).is_none()));
    }
}

#[test]
fn token_ids_may_be_of_either_width() {
    let (hidden, head) = (matrix(18, 2, 3), matrix(19, 5, 3));
    let narrow = TensorData::new(vec![4i32, 0], [2]);
    let device = Device::flex();
    let narrow = Tensor::<1, Int>::from_data(narrow, (&device, burn::tensor::DType::I32));
    assert_eq!(
        floats(token_logps(
            hidden.clone(),
            head.clone(),
            narrow,
            Precision::F32
        )),
        floats(token_logps(hidden, head, targets(&[4, 0]), Precision::F32)),
    );
}

#[test]
#[should_panic(expected = "vocab")]
fn a_token_outside_the_vocabulary_is_refused() {
    let _ = token_logps(
        matrix(18, 1, 3),
        matrix(19, 5, 3),
        targets(&[-1]),
        Precision::F32,
    );
}

#[test]
fn no_row_is_no_work() {
    let device = Device::flex().autodiff();
    let hidden = Tensor::<2>::zeros([0, 3], &device).require_grad();
    let logps = token_logps(hidden, matrix(19, 5, 3), targets(&[]), Precision::F32);
    assert_eq!(logps.dims(), [0]);
}

#[test]
fn a_strided_view_is_an_input_like_any_other() {
    let x = matrix(20, 9, 5);
    let weight = matrix(21, 4, 9);
    let found = linear(x.clone().transpose(), weight.clone(), Precision::F32);
    let expected = portable::linear(x.transpose(), weight);
    assert_close("value", &floats(found), &floats(expected), TOLERANCE);
}

/// Only `tracked` of the inputs require a gradient; the others must get none, and the tracked one the same as ever.
fn assert_frozen_parents_get_nothing<const D: usize>(
    inputs: &[Tensor<2>],
    operation: impl Fn(&[Tensor<2>]) -> Tensor<D>,
) {
    let all = value_and_gradients(inputs, &operation);
    for tracked in 0..inputs.len() {
        let inputs: Vec<_> = inputs
            .iter()
            .enumerate()
            .map(|(at, input)| input.clone().detach().set_require_grad(at == tracked))
            .collect();
        let out = operation(&inputs);
        let shape = out.dims();
        let upstream = TensorData::new(numbers(99, shape.iter().product()), shape);
        let upstream = Tensor::<D>::from_data(upstream, &out.device());
        let grads = (out * upstream).sum().backward();
        for (at, input) in inputs.iter().enumerate() {
            match input.grad(&grads) {
                Some(gradient) => assert_eq!(floats(gradient), all[at + 1], "input {at}"),
                None => assert_ne!(at, tracked, "the tracked input has no gradient"),
            }
        }
    }
    let frozen: Vec<_> = inputs.iter().map(|input| input.clone().detach()).collect();
    assert!(!operation(&frozen).is_tracked());
    let plain: Vec<_> = inputs.iter().map(|input| input.clone().inner()).collect();
    let out = operation(&plain);
    assert!(!out.is_autodiff());
    assert_eq!(floats(out), all[0]);
}

#[test]
fn frozen_parents_get_no_gradient() {
    let precision = Precision::F32;
    let (x, weight) = (matrix(1, 7, 5), matrix(2, 6, 5));
    let (a, b) = (matrix(3, 2, 5), matrix(4, 6, 2));
    assert_frozen_parents_get_nothing(&[x.clone(), weight.clone()], |i| {
        linear(i[0].clone(), i[1].clone(), precision)
    });
    assert_frozen_parents_get_nothing(&[x.clone(), weight.clone(), a, b], |i| {
        let [x, w, a, b] = [0, 1, 2, 3].map(|at: usize| i[at].clone());
        lora_linear(x, w, a, b, 0.5, precision)
    });
    assert_frozen_parents_get_nothing(&[x.clone(), x.clone()], |i| {
        swiglu(i[0].clone(), i[1].clone())
    });
    assert_frozen_parents_get_nothing(&[x.clone(), vector(6, 5).unsqueeze()], |i| {
        rms_norm(i[0].clone(), i[1].clone().squeeze_dim(0), 1e-5)
    });
    let ids = [5, 0, 3, 3, 1, 2, 4];
    assert_frozen_parents_get_nothing(&[x.clone(), weight.clone()], |i| {
        token_logps(i[0].clone(), i[1].clone(), targets(&ids), precision)
    });
    // The reference is off the tape, as a recipe's is.
    let reference = [matrix(24, 7, 5), matrix(25, 6, 5)].map(Tensor::inner);
    assert_frozen_parents_get_nothing(&[x, weight], |i| {
        let [hidden, head] = reference.clone();
        vocabulary_kl(i[0].clone(), i[1].clone(), hidden, head, precision)
    });
    let layout = layout(&[span(0, 4, 0, 0), span(4, 3, 0, 4)], 2, 1, 4);
    let (q, k, v) = (matrix(9, 7, 8), matrix(10, 7, 4), matrix(11, 7, 4));
    assert_frozen_parents_get_nothing(&[q, k, v], |i| {
        rope_attention(i[0].clone(), i[1].clone(), i[2].clone(), &layout)
    });
}

#[test]
fn the_number_of_threads_changes_no_bit() {
    let layout = layout(
        &[span(0, 40, 0, 0), span(40, 90, 0, 40), span(130, 61, 0, 40)],
        4,
        2,
        16,
    );
    let run = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
        pool.unwrap().install(|| {
            let (x, weight, head) = (matrix(1, 191, 64), matrix(2, 96, 64), matrix(3, 1300, 64));
            let (a, b) = (matrix(4, 8, 64), matrix(5, 96, 8));
            let ids: Vec<i64> = (0..191).map(|row| row * 37 % 1300).collect();
            [Precision::F32, Precision::Bf16].map(|precision| {
                [
                    value_and_gradients(&[x.clone(), weight.clone(), a.clone(), b.clone()], |i| {
                        let [x, w, a, b] = [0, 1, 2, 3].map(|at: usize| i[at].clone());
                        let y = linear(x.clone(), w.clone(), precision);
                        swiglu(y, lora_linear(x, w, a, b, 0.5, precision))
                    }),
                    value_and_gradients(&[x.clone(), head.clone()], |i| {
                        let x = rms_norm(i[0].clone(), vector(6, 64), 1e-5);
                        let (k, v) = (x.clone().narrow(1, 0, 32), x.clone().narrow(1, 32, 32));
                        let y = rope_attention(x, k, v, &layout);
                        token_logps(y, i[1].clone(), targets(&ids), precision)
                    }),
                ]
            })
        })
    };
    let alone = run(1);
    assert_eq!(run(2), alone);
    assert_eq!(run(5), alone);
}
