//! The operations on a card against the same ones on the processor: value and every gradient, at awkward sizes.
//!
//! Built for the device features alone. A card that is not there is a failure, not a pass.

#![cfg(any(feature = "cuda", feature = "vulkan", feature = "metal"))]

use burn::tensor::{Device, Int, Tensor, TensorData};
use pivotal_ops::{
    AttentionLayout, AttentionSpan, DeviceError, DeviceName, Precision, linear, lora_linear,
    rms_norm, rope_attention, swiglu, token_logps, vocabulary_kl,
};

/// Largest difference, relative to the largest element on the processor. Both sides sum in f32 in different orders, and a
/// card's exponential may be off by a few units in the last place.
const TOLERANCE: f64 = 1e-5;

/// An input matrix, in host memory.
struct Host {
    values: Vec<f32>,
    shape: [usize; 2],
}

/// Numbers between -1 and 1, times `scale`, from a congruence: the same on every machine.
fn host(seed: u64, rows: usize, columns: usize, scale: f32) -> Host {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut number = || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (((state >> 40) as f32 / (1u64 << 23) as f32) - 1.0) * scale
    };
    Host {
        values: (0..rows * columns).map(|_| number()).collect(),
        shape: [rows, columns],
    }
}

impl Host {
    fn on(&self, device: &Device) -> Tensor<2> {
        Tensor::from_data(TensorData::new(self.values.clone(), self.shape), device)
    }
}

fn cards() -> Vec<(DeviceName, Device)> {
    let names = [DeviceName::Cuda, DeviceName::Vulkan, DeviceName::Metal].into_iter();
    let cards: Vec<_> = names
        .map(|name| (name, name.open()))
        .filter(|(_, card)| !matches!(card, Err(DeviceError::NotBuilt(_))))
        .map(|(name, card)| (name, card.unwrap()))
        .collect();
    assert!(!cards.is_empty());
    cards
}

/// The value, then the gradient by each input, of `Σ out·(fixed random weights)`.
fn value_and_gradients<const D: usize>(
    inputs: &[Host],
    device: &Device,
    operation: &impl Fn(&[Tensor<2>]) -> Tensor<D>,
) -> Vec<Vec<f32>> {
    let device = device.clone().autodiff();
    let inputs: Vec<_> = inputs
        .iter()
        .map(|input| input.on(&device).require_grad())
        .collect();
    let out = operation(&inputs);
    let shape = out.dims();
    let upstream = host(99, 1, shape.iter().product(), 1.0).values;
    let upstream = Tensor::<D>::from_data(TensorData::new(upstream, shape), &device);
    let grads = (out.clone() * upstream).sum().backward();
    let floats = |tensor: Tensor<2>| tensor.try_into_vec_as::<f32>().unwrap();
    let gradients = inputs
        .iter()
        .map(|input| floats(input.grad(&grads).unwrap()));
    std::iter::once(out.try_into_vec_as::<f32>().unwrap())
        .chain(gradients)
        .collect()
}

fn assert_agrees<const D: usize>(
    what: &str,
    inputs: &[Host],
    operation: impl Fn(&[Tensor<2>]) -> Tensor<D>,
) {
    let expected = value_and_gradients(inputs, &Device::flex(), &operation);
    for (name, card) in cards() {
        let found = value_and_gradients(inputs, &card, &operation);
        for (part, (found, expected)) in found.iter().zip(&expected).enumerate() {
            let largest = expected.iter().fold(1e-6f32, |a, b| a.max(b.abs()));
            assert!(
                found.iter().all(|value| value.is_finite()),
                "{what}, {name:?}"
            );
            assert_eq!(found.len(), expected.len(), "{what}, {name:?}");
            let differences = found.iter().zip(expected).map(|(a, b)| (a - b).abs());
            let worst = f64::from(differences.fold(0f32, f32::max) / largest);
            println!("{what}, part {part}, {name:?}: {worst:.1e}");
            assert!(
                worst <= TOLERANCE,
                "{what}, part {part}, {name:?}: off by {worst:e} of the largest"
            );
        }
    }
}

#[test]
fn linear_agrees() {
    for (rows, input, output) in [(1, 1, 1), (63, 33, 19), (64, 64, 64), (65, 65, 71)] {
        let inputs = [host(1, rows, input, 1.0), host(2, output, input, 1.0)];
        assert_agrees(&format!("linear {rows} {input} {output}"), &inputs, |i| {
            linear(i[0].clone(), i[1].clone(), Precision::F32)
        });
    }
}

#[test]
fn lora_linear_agrees() {
    for (rows, input, output, rank) in [(1, 3, 2, 1), (63, 35, 21, 4), (101, 67, 66, 16)] {
        let inputs = [
            host(1, rows, input, 1.0),
            host(2, output, input, 1.0),
            host(3, rank, input, 1.0),
            host(4, output, rank, 1.0),
        ];
        assert_agrees(&format!("lora {rows} {input} {output}"), &inputs, |i| {
            let [x, w, a, b] = [0, 1, 2, 3].map(|at: usize| i[at].clone());
            lora_linear(x, w, a, b, 0.5, Precision::F32)
        });
    }
}

#[test]
fn rms_norm_agrees() {
    for (rows, hidden) in [(1, 3), (65, 37), (129, 64)] {
        let inputs = [host(5, rows, hidden, 1.0), host(6, 1, hidden, 1.0)];
        assert_agrees(&format!("rms_norm {rows} {hidden}"), &inputs, |i| {
            rms_norm(i[0].clone(), i[1].clone().squeeze_dim(0), 1e-5)
        });
    }
}

#[test]
fn swiglu_agrees() {
    for (rows, width) in [(1, 1), (65, 29)] {
        // Eight: where the sigmoid is flat on both sides.
        let inputs = [host(7, rows, width, 8.0), host(8, rows, width, 1.0)];
        assert_agrees(&format!("swiglu {rows} {width}"), &inputs, |i| {
            swiglu(i[0].clone(), i[1].clone())
        });
    }
}

#[test]
fn token_logps_agrees() {
    for (rows, hidden, vocab) in [(1, 1, 2), (63, 17, 31), (70, 33, 1500)] {
        let ids: Vec<i32> = (0..rows as i32).map(|row| (row * 7919) % vocab).collect();
        let inputs = [
            host(16, rows, hidden, 1.0),
            host(17, vocab as usize, hidden, 2.0),
        ];
        assert_agrees(
            &format!("token_logps {rows} {hidden} {vocab}"),
            &inputs,
            |i| {
                let device = i[0].device().without_autodiff();
                let ids = TensorData::new(ids.clone(), [rows]);
                let targets = Tensor::<1, Int>::from_data(ids, &device);
                token_logps(i[0].clone(), i[1].clone(), targets, Precision::F32)
            },
        );
    }
}

#[test]
fn vocabulary_kl_agrees() {
    for (rows, hidden, vocab) in [(1, 1, 2), (63, 17, 31), (70, 33, 1500)] {
        let inputs = [host(16, rows, hidden, 1.0), host(17, vocab, hidden, 2.0)];
        let reference = [host(22, rows, hidden, 1.0), host(23, vocab, hidden, 2.0)];
        assert_agrees(
            &format!("vocabulary_kl {rows} {hidden} {vocab}"),
            &inputs,
            |i| {
                let device = i[0].device().without_autodiff();
                let [hidden, head] = reference.each_ref().map(|side| side.on(&device));
                vocabulary_kl(i[0].clone(), i[1].clone(), hidden, head, Precision::F32)
            },
        );
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

#[test]
fn rope_attention_agrees() {
    let alone = |len| vec![span(0, len, 0, 0)];
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
    for (spans, heads, kv_heads, dim) in [
        (alone(1), 1, 1, 2),
        (alone(63), 3, 1, 10),
        (alone(64), 8, 1, 16),
        (alone(65), 2, 2, 6),
        (shared.clone(), 6, 2, 10),
        (shared, 1, 1, 64),
    ] {
        let tokens = spans.iter().map(|span| span.len).sum();
        let frequencies: Vec<f32> = (0..dim / 2)
            .map(|i| 100f32.powf(-(i as f32) * 2.0 / dim as f32))
            .collect();
        let inputs = [
            host(9, tokens, heads * dim, 3.0),
            host(10, tokens, kv_heads * dim, 3.0),
            host(11, tokens, kv_heads * dim, 1.0),
        ];
        let what = format!("rope_attention {tokens} tokens, {heads} {kv_heads} {dim}");
        assert_agrees(&what, &inputs, |i| {
            let device = i[0].device();
            let layout =
                AttentionLayout::new(&spans, heads, kv_heads, dim, &frequencies, 1.25, &device);
            rope_attention(i[0].clone(), i[1].clone(), i[2].clone(), &layout.unwrap())
        });
    }
}
