//! What the tests of several kernels share: seeded numbers, a naive product, comparison, thread pools.

use std::cell::Cell;

use crate::matmul::{ProductShape, Store};
use crate::processor::{Processor, processor};

thread_local! {
    static FORCED: Cell<Option<Processor>> = const { Cell::new(None) };
}

/// The most that this thread is inside [`on`] for.
pub(crate) fn forced_processor() -> Option<Processor> {
    FORCED.get()
}

/// Runs `body` as on a processor with no more than `most`. Kernels choose their path where they are called, or plans where they
/// are made, so it is enough that this happens on the calling thread.
pub(crate) fn on<T>(most: Processor, body: impl FnOnce() -> T) -> T {
    let before = FORCED.replace(Some(most));
    let result = body();
    FORCED.set(before);
    result
}

/// Runs `body` on every path that this processor has.
pub(crate) fn on_each(mut body: impl FnMut()) {
    for most in [Processor::Portable, Processor::Avx512, Processor::Amx] {
        on(most, || {
            if processor() == most {
                body();
            }
        });
    }
}

/// Runs `body` on every path that this processor has with products in bf16.
pub(crate) fn on_each_vector(mut body: impl FnMut()) {
    on_each(|| {
        if processor() > Processor::Portable {
            body();
        }
    });
}

/// `len` floats in -1..1 from a small linear congruential generator.
pub(crate) fn random(len: usize, seed: u64) -> Vec<f32> {
    let mut state = seed
        .wrapping_mul(0x9E37_79B9_7F4A_7C15)
        .wrapping_add(0x1234_5678);
    (0..len)
        .map(|_| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            ((state >> 40) as f32 / (1u64 << 24) as f32) * 2.0 - 1.0
        })
        .collect()
}

/// Rows, width and vocabulary of small heads, about the lengths of a block and the sizes of a tile of logits.
pub(crate) const HEADS: [(usize, usize, usize); 7] = [
    (0, 4, 9),
    (1, 1, 1),
    (5, 16, 1023),
    (3, 33, 1024),
    (63, 5, 1023),
    (65, 8, 1025),
    (64, 17, 3000),
];

/// A number a row as [`random`] makes them, but 0 for every third row, which a mask drops.
pub(crate) fn masked(rows: usize, seed: u64) -> Vec<f32> {
    let mut slopes = random(rows, seed);
    slopes
        .iter_mut()
        .skip(2)
        .step_by(3)
        .for_each(|slope| *slope = 0.0);
    slopes
}

/// `out (+)= a · b` in f64; strides are (row, column) of the logical `[m, k]` and `[k, n]` operands.
pub(crate) fn naive_product(
    a: &[f32],
    a_strides: (usize, usize),
    b: &[f32],
    b_strides: (usize, usize),
    start: &[f32],
    shape: ProductShape,
    store: Store,
) -> Vec<f64> {
    let ProductShape { m, n, k } = shape;
    let mut out = Vec::with_capacity(m * n);
    for row in 0..m {
        for column in 0..n {
            let mut sum = if store == Store::Add {
                f64::from(start[row * n + column])
            } else {
                0.0
            };
            for p in 0..k {
                sum += f64::from(a[row * a_strides.0 + p * a_strides.1])
                    * f64::from(b[p * b_strides.0 + column * b_strides.1]);
            }
            out.push(sum);
        }
    }
    out
}

/// Panics unless all elements agree within `tolerance` times the larger of 1 and the largest expected element.
#[track_caller]
pub(crate) fn assert_close(what: &str, got: &[f32], expected: &[f64], tolerance: f64) {
    assert_eq!(got.len(), expected.len(), "{what}: lengths differ");
    let scale = expected.iter().fold(1.0f64, |scale, x| scale.max(x.abs()));
    for (index, (&got, &expected)) in got.iter().zip(expected).enumerate() {
        let error = (f64::from(got) - expected).abs() / scale;
        assert!(
            error <= tolerance,
            "{what}[{index}]: got {got}, expected {expected}, off by {error:e}"
        );
    }
}

/// Panics unless `got` is at most `tolerance` of the length of `expected` away from it, both as one vector: unlike
/// [`assert_close`], which bounds each element by the largest, this sees a small error that all elements share. Vectors shorter
/// than 1 are let pass, for most such gradients are 0 but for rounding.
#[track_caller]
pub(crate) fn assert_near(what: &str, got: &[f32], expected: &[f64], tolerance: f64) {
    assert_eq!(got.len(), expected.len(), "{what}: lengths differ");
    let pairs = got.iter().zip(expected);
    let squares = pairs.map(|(&got, &expected)| (f64::from(got) - expected).powi(2));
    let distance = squares.sum::<f64>().sqrt();
    let length = expected.iter().map(|x| x * x).sum::<f64>().sqrt();
    assert!(
        length < 1.0 || distance <= tolerance * length,
        "{what}: {distance:e} away from a vector of length {length:e}"
    );
}

/// Runs `body` in a rayon pool of its own.
pub(crate) fn on_threads<T: Send>(threads: usize, body: impl FnOnce() -> T + Send) -> T {
    let forced = FORCED.get();
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
    pool.unwrap().install(|| {
        FORCED.set(forced);
        body()
    })
}

/// The same numbers in f64.
pub(crate) fn widen(x: &[f32]) -> Vec<f64> {
    x.iter().map(|&x| f64::from(x)).collect()
}

/// Copies columns of `joined` `[rows, all widths]` into `parts`, one after the other; a part is `[rows, width]`.
pub(crate) fn split_columns(joined: &[f32], rows: usize, parts: &mut [&mut [f32]]) {
    let width = joined.len() / rows.max(1);
    let mut first = 0;
    for part in parts {
        let own = part.len() / rows.max(1);
        for (row, part) in part.chunks_exact_mut(own.max(1)).enumerate() {
            part.copy_from_slice(&joined[row * width + first..][..own]);
        }
        first += own;
    }
    assert_eq!(first, width);
}
