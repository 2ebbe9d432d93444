//! Against the plain cache, and what changes no bit.

use super::laid::Bf16;
use super::*;
use crate::cached::{CachedContext, attend_cached};
use crate::rope::RopeTable;
use crate::team::with_team;
use crate::testing::{assert_close, on_each, on_each_vector, on_threads, random, widen};

// Two f32 softmaxes over up to 150 keys, summed in different orders.
const TOLERANCE: f64 = 2e-6;
// A weight is off by a part in 512 at most, and they sum to 1.
const BF16_TOLERANCE: f64 = 1.0 / 500.0;

fn filled(shape: AttentionShape, keys: &[f32], values: &[f32]) -> KeyValues {
    filled_in(Precision::F32, shape, keys, values)
}

fn filled_in(
    precision: Precision,
    shape: AttentionShape,
    keys: &[f32],
    values: &[f32],
) -> KeyValues {
    let mut cache = KeyValues::new(shape, precision);
    // In two parts, so that a block is filled up.
    let cut = keys.len() / shape.key_width() / 3 * shape.key_width();
    cache.extend(&keys[..cut], &values[..cut]);
    cache.extend(&keys[cut..], &values[cut..]);
    cache
}

/// Prefixes and own lengths around the block; the sequences with the same prefix are neighbours.
const CONTEXTS: [(usize, usize); 9] = [
    (0, 0),
    (0, 1),
    (37, 0),
    (37, 15),
    (37, 16),
    (16, 17),
    (63, 64),
    (64, 65),
    (65, 63),
];

/// Rounded to bf16.
fn rounded(x: &[f32]) -> Vec<f32> {
    let upper = |x: &f32| f32::from_bits(u32::from(Bf16::of(*x).0) << 16);
    x.iter().map(upper).collect()
}

#[test]
fn agrees_with_the_plain_cache_row_by_row() {
    for (heads, kv_heads, head_dim) in [(1, 1, 5), (3, 1, 8), (9, 3, 64), (16, 2, 20)] {
        let shape = AttentionShape {
            heads,
            kv_heads,
            head_dim,
        };
        agrees_with_the_plain_cache(Precision::F32, shape);
        on_each_vector(|| agrees_with_the_plain_cache(Precision::Bf16, shape));
    }
}

/// With bf16 the plain cache gets what the other rounds, but for the weights.
fn agrees_with_the_plain_cache(precision: Precision, shape: AttentionShape) {
    let is_rounded = precision == Precision::Bf16;
    let operand = |x: Vec<f32>| if is_rounded { rounded(&x) } else { x };
    let width = shape.key_width();
    let raw: Vec<_> = CONTEXTS
        .iter()
        .enumerate()
        .map(|(at, &(prefix, own))| {
            let seed = at as u64;
            let of = |len, part| random(len * width, 4 * seed + part);
            (of(prefix, 0), of(prefix, 1), of(own, 2), of(own, 3))
        })
        .collect();
    let caches: Vec<_> = raw
        .iter()
        .map(|(pk, pv, k, v)| [(pk, pv), (k, v)].map(|(k, v)| filled_in(precision, shape, k, v)))
        .collect();
    let contexts: Vec<_> = caches
        .iter()
        .map(|[prefix, own]| StepContext { prefix, own })
        .collect();
    let raw = raw
        .into_iter()
        .map(|(pk, pv, k, v)| [pk, pv, k, v].map(operand));
    let raw: Vec<_> = raw.collect();
    let plain: Vec<_> = raw
        .iter()
        .map(|[prefix_keys, prefix_values, keys, values]| CachedContext {
            prefix_keys,
            prefix_values,
            keys,
            values,
        })
        .collect();
    let q = random(contexts.len() * shape.query_width(), 99);
    let q: Vec<f32> = q.iter().map(|x| x * 4.0).collect();
    let (mut fast, mut slow) = (vec![f32::NAN; q.len()], vec![f32::NAN; q.len()]);
    attend_step(shape, &q, &contexts, &mut fast);
    let scaled = q.iter().map(|q| q * shape.scale()).collect();
    let scaled = operand(scaled);
    let q: Vec<f32> = scaled.iter().map(|q| q / shape.scale()).collect();
    attend_cached(shape, &q, &plain, &mut slow);
    let tolerance = if is_rounded {
        BF16_TOLERANCE
    } else {
        TOLERANCE
    };
    assert_close("step", &fast, &widen(&slow), tolerance);
    assert!(fast[..shape.query_width()].iter().all(|&x| x == 0.0));
}

#[test]
fn every_path_gives_the_same_bits() {
    for (heads, kv_heads, head_dim) in [(9, 3, 64), (7, 1, 24), (16, 2, 16)] {
        let shape = AttentionShape {
            heads,
            kv_heads,
            head_dim,
        };
        let width = shape.key_width();
        let cache = |len: usize, seed| {
            let keys = random(len * width, seed);
            filled(shape, &keys, &random(len * width, seed + 1))
        };
        let prefix = cache(37, 5);
        let own: Vec<KeyValues> = (0..11).map(|len| cache(3 * len, len as u64)).collect();
        let contexts: Vec<_> = own
            .iter()
            .map(|own| StepContext {
                prefix: &prefix,
                own,
            })
            .collect();
        let q = random(contexts.len() * shape.query_width(), 3);
        let results = std::sync::Mutex::new(Vec::new());
        on_each(|| {
            let mut out = vec![f32::NAN; q.len()];
            attend_step(shape, &q, &contexts, &mut out);
            results.lock().unwrap().push(out);
        });
        let results = results.into_inner().unwrap();
        assert!(results.iter().all(|out| *out == results[0]));
    }
}

#[test]
fn neither_company_nor_threads_change_a_bit() {
    on_each(|| {
        for precision in [Precision::F32, Precision::Bf16] {
            neither_company_nor_threads_change(precision);
        }
    });
}

fn neither_company_nor_threads_change(precision: Precision) {
    let filled = |shape, keys: &[f32], values: &[f32]| filled_in(precision, shape, keys, values);
    let shape = AttentionShape {
        heads: 6,
        kv_heads: 2,
        head_dim: 24,
    };
    let width = shape.key_width();
    let prefixes = [45, 80].map(|len| {
        filled(
            shape,
            &random(len * width, len as u64),
            &random(len * width, 7),
        )
    });
    let own: Vec<KeyValues> = (1..24)
        .map(|len| {
            filled(
                shape,
                &random(len * width, len as u64),
                &random(len * width, 9),
            )
        })
        .collect();
    // Eleven neighbours share the first prefix, more than a task has.
    let contexts: Vec<_> = own
        .iter()
        .enumerate()
        .map(|(at, own)| StepContext {
            prefix: &prefixes[usize::from(at >= 11)],
            own,
        })
        .collect();
    let q = random(contexts.len() * shape.query_width(), 3);
    let run = |q: &[f32], contexts: &[StepContext<'_>]| {
        let mut out = vec![f32::NAN; q.len()];
        attend_step(shape, q, contexts, &mut out);
        out
    };
    let all = on_threads(1, || run(&q, &contexts));
    assert_eq!(all, on_threads(2, || run(&q, &contexts)));
    assert_eq!(all, on_threads(2, || with_team(|| run(&q, &contexts))));
    for (at, context) in contexts.iter().enumerate() {
        let row = at * shape.query_width()..(at + 1) * shape.query_width();
        assert_eq!(run(&q[row.clone()], &[*context]), all[row]);
    }
}

#[test]
fn appending_is_the_steps_one_by_one() {
    on_each(|| {
        for (heads, kv_heads, head_dim) in [(1, 1, 6), (3, 3, 8), (9, 3, 64), (8, 1, 18)] {
            appends(AttentionShape {
                heads,
                kv_heads,
                head_dim,
            });
        }
    });
}

fn appends(shape: AttentionShape) {
    let (queries, width) = (shape.query_width(), shape.key_width());
    let frequencies: Vec<f32> = (0..shape.head_dim / 2)
        .map(|i| 0.7f32.powi(i as i32))
        .collect();
    for precision in [Precision::F32, Precision::Bf16] {
        for sequences in [0, 1, 17] {
            let positions: Vec<usize> = (0..sequences).map(|at| 7 * at).collect();
            let rope = RopeTable::new(&frequencies, &positions, 1.0);
            let before: Vec<KeyValues> = positions
                .iter()
                .map(|&len| {
                    let (keys, values) = (random(len * width, 1), random(len * width, 2));
                    filled_in(precision, shape, &keys, &values)
                })
                .collect();
            let joined = random(sequences * shape.joined_width(), 3);

            let [mut q, mut k, mut v] =
                [queries, width, width].map(|width| vec![0.0; sequences * width]);
            crate::testing::split_columns(&joined, sequences, &mut [&mut q, &mut k, &mut v]);
            rope.apply(&mut q, shape.heads);
            rope.apply(&mut k, shape.kv_heads);
            let mut expected = before.clone();
            for (cache, (key, value)) in expected
                .iter_mut()
                .zip(k.chunks(width).zip(v.chunks(width)))
            {
                cache.extend(key, value);
            }

            for threads in [1, 2] {
                let (mut got, mut rotated) = (before.clone(), vec![f32::NAN; q.len()]);
                on_threads(threads, || {
                    let mut caches: Vec<&mut KeyValues> = got.iter_mut().collect();
                    append_step(&rope, shape, &joined, &mut caches, &mut rotated);
                });
                assert_eq!(rotated, q);
                assert!(got == expected);
            }
        }
    }
}

#[test]
fn nan_stays_with_its_sequence() {
    let shape = AttentionShape {
        heads: 3,
        kv_heads: 1,
        head_dim: 64,
    };
    let width = shape.key_width();
    on_each(|| {
        for precision in [Precision::F32, Precision::Bf16] {
            let prefix = filled_in(
                precision,
                shape,
                &random(19 * width, 1),
                &random(19 * width, 2),
            );
            let own = filled_in(precision, shape, &random(width, 3), &random(width, 4));
            let contexts = [StepContext {
                prefix: &prefix,
                own: &own,
            }; 2];
            let mut q = random(2 * shape.query_width(), 5);
            q[0] = f32::NAN;
            let mut out = vec![0.0; q.len()];
            attend_step(shape, &q, &contexts, &mut out);
            assert!(out[..64].iter().all(|x| x.is_nan()));
            assert!(out[64..].iter().all(|x| x.is_finite()));
        }
    });
}

#[test]
#[should_panic(expected = "a prefix and a cache of two precisions")]
fn two_precisions_are_refused() {
    let shape = AttentionShape {
        heads: 1,
        kv_heads: 1,
        head_dim: 2,
    };
    if !crate::bf16_available() {
        panic!("a prefix and a cache of two precisions: there is but one here");
    }
    let [prefix, own] = [Precision::F32, Precision::Bf16].map(|p| KeyValues::new(shape, p));
    let context = StepContext {
        prefix: &prefix,
        own: &own,
    };
    attend_step(shape, &[0.0; 2], &[context], &mut [0.0; 2]);
}

#[test]
fn what_is_read_next_is_asked_for_in_order_and_once() {
    let (first, second) = (vec![0.0f32; 64], vec![0.0f32; 100]);
    let mut ahead = Ahead::default();
    ahead.extend([&first, &second].map(|read| {
        let Range { start, end } = read.as_ptr_range();
        start.cast()..end.cast()
    }));
    // Four lines, then seven: the last one is begun.
    assert_eq!(ahead.lines_left(), 11);
    ahead.ask(&[0.0f32; 16], 1);
    assert_eq!(ahead.lines_left(), 8);
    ahead.ask(&[0.0f32; 80], 1);
    assert_eq!(ahead.lines_left(), 3);
    ahead.ask(&[0.0f32; 16], 2);
    assert_eq!(ahead.lines_left(), 0);
}

#[test]
fn rounding_to_bf16_is_to_nearest_even_and_keeps_nan() {
    let cases = [
        (1.0, 0x3f80),
        (1.0 + 1.0 / 256.0, 0x3f80),
        (1.0 + 3.0 / 256.0, 0x3f82),
        (1.0 + 5.0 / 1024.0, 0x3f81),
        (f32::INFINITY, 0x7f80),
        (f32::MAX, 0x7f80),
        (-0.0, 0x8000),
    ];
    for (value, bits) in cases {
        assert_eq!(Bf16::of(value), Bf16(bits), "{value}");
    }
    let quiet = f32::from_bits(0x7fff_ffff);
    let signalling = f32::from_bits(0x7f80_0001);
    for nan in [quiet, signalling, -quiet] {
        assert!(f32::from_bits(u32::from(Bf16::of(nan).0) << 16).is_nan());
    }
}
