//! Gradients against f64, and what changes no bit.

use super::*;
use crate::attention::{attention, attention_forward};
use crate::matmul::Precision;
use crate::plan::{AttentionShape, Span};
use crate::processor::Processor;
use crate::testing::{assert_close, assert_near, on, on_threads, random, widen};

/// How to compute, how far value, log-sum-exp and gradient may be off (of the largest element, at least 1), and how far a
/// whole gradient (of its length).
struct Path {
    name: &'static str,
    precision: Precision,
    most: Processor,
    value: f64,
    lse: f64,
    gradient: f64,
    distance: f64,
}

// f32: softmax over up to 200 keys. bf16: an operand is off by up to 2^-9 of itself, so a score of 10 by 0.02 and its
// weight by 2 %; gradients are sums of such terms.
const PATHS: [Path; 4] = [
    Path::new("f32", Precision::F32, Processor::Amx, F32),
    Path::new("portable f32", Precision::Bf16, Processor::Portable, F32),
    Path::new("bf16", Precision::Bf16, Processor::Avx512, BF16),
    Path::new("bf16 in tiles", Precision::Bf16, Processor::Amx, BF16),
];
const F32: [f64; 4] = [2e-6, 1e-5, 1e-5, 1e-5];
const BF16: [f64; 4] = [0.015, 0.03, 0.03, 0.03];

impl Path {
    const fn new(
        name: &'static str,
        precision: Precision,
        most: Processor,
        [value, lse, gradient, distance]: [f64; 4],
    ) -> Self {
        Self {
            name,
            precision,
            most,
            value,
            lse,
            gradient,
            distance,
        }
    }
}

struct Naive {
    out: Vec<f64>,
    lse: Vec<f64>,
    dq: Vec<f64>,
    dk: Vec<f64>,
    dv: Vec<f64>,
}

/// The formula token by token and head by head, in f64.
fn naive(spans: &[Span], tokens: usize, shape: AttentionShape, input: [&[f64]; 4]) -> Naive {
    let [q, k, v, dout] = input;
    let AttentionShape {
        heads,
        kv_heads,
        head_dim,
    } = shape;
    let (query_width, key_width) = (heads * head_dim, kv_heads * head_dim);
    let scale = 1.0 / (head_dim as f64).sqrt();
    let mut result = Naive {
        out: vec![0.0; tokens * query_width],
        lse: vec![f64::NEG_INFINITY; tokens * heads],
        dq: vec![0.0; tokens * query_width],
        dk: vec![0.0; tokens * key_width],
        dv: vec![0.0; tokens * key_width],
    };
    for span in spans {
        for index in 0..span.len {
            let token = span.start + index;
            let prefix = span.prefix_start..span.prefix_start + span.prefix_len;
            let keys: Vec<usize> = prefix.chain(span.start..=token).collect();
            for head in 0..heads {
                let at = token * query_width + head * head_dim;
                let key_at = |key: usize| key * key_width + head / (heads / kv_heads) * head_dim;
                let inner = |a: &[f64], a_at: usize, b: &[f64], b_at: usize| -> f64 {
                    (0..head_dim).map(|i| a[a_at + i] * b[b_at + i]).sum()
                };
                let scores: Vec<f64> = keys
                    .iter()
                    .map(|&key| inner(q, at, k, key_at(key)) * scale)
                    .collect();
                let lse = scores.iter().map(|s| s.exp()).sum::<f64>().ln();
                let weights: Vec<f64> = scores.iter().map(|s| (s - lse).exp()).collect();
                result.lse[token * heads + head] = lse;
                let slopes: Vec<f64> = keys
                    .iter()
                    .map(|&key| inner(dout, at, v, key_at(key)))
                    .collect();
                let mean: f64 = weights.iter().zip(&slopes).map(|(w, s)| w * s).sum();
                for ((&key, weight), slope) in keys.iter().zip(&weights).zip(&slopes) {
                    let slope = weight * (slope - mean) * scale;
                    for i in 0..head_dim {
                        result.out[at + i] += weight * v[key_at(key) + i];
                        result.dv[key_at(key) + i] += weight * dout[at + i];
                        result.dq[at + i] += slope * k[key_at(key) + i];
                        result.dk[key_at(key) + i] += slope * q[at + i];
                    }
                }
            }
        }
    }
    result
}

struct Case {
    out: Vec<f32>,
    lse: Vec<f32>,
    dq: Vec<f32>,
    dk: Vec<f32>,
    dv: Vec<f32>,
}

fn inputs(tokens: usize, shape: AttentionShape) -> [Vec<f32>; 4] {
    let (queries, keys) = (tokens * shape.query_width(), tokens * shape.key_width());
    let q = random(queries, 1).iter().map(|x| x * 4.0).collect();
    [q, random(keys, 2), random(keys, 3), random(queries, 4)]
}

impl Path {
    fn plan(&self, spans: &[Span], tokens: usize, shape: AttentionShape) -> AttentionPlan {
        let new = || AttentionPlan::new(spans, tokens, shape).with_precision(self.precision);
        on(self.most, new)
    }
}

fn run(path: &Path, spans: &[Span], tokens: usize, shape: AttentionShape) -> Case {
    let [q, k, v, dout] = inputs(tokens, shape);
    let plan = path.plan(spans, tokens, shape);
    let input = AttentionInput {
        q: &q,
        k: &k,
        v: &v,
    };
    let mut out = vec![f32::NAN; q.len()];
    let mut lse = vec![f32::NAN; tokens * shape.heads];
    attention_forward(&plan, input, &mut out, &mut lse);
    assert_eq!(attention(&plan, input), (out.clone(), lse.clone()));
    let saved = AttentionSaved {
        out: &out,
        lse: &lse,
    };
    let [dq, dk, dv] = attention_backward(&plan, input, saved, &dout);
    Case {
        out,
        lse,
        dq,
        dk,
        dv,
    }
}

fn compare(spans: &[Span], tokens: usize, shape: AttentionShape) {
    let wide = inputs(tokens, shape).map(|x| widen(&x));
    let expected = naive(
        spans,
        tokens,
        shape,
        [&wide[0], &wide[1], &wide[2], &wide[3]],
    );
    for path in &PATHS {
        let got = run(path, spans, tokens, shape);
        let what = format!("{} {shape:?} {spans:?}", path.name);
        for (got, expected) in got.lse.iter().zip(&expected.lse) {
            let same = f64::from(*got) == *expected;
            assert!(
                same || (f64::from(*got) - expected).abs() < path.lse,
                "lse {got} {expected} of {what}"
            );
        }
        for (name, got, expected, tolerance) in [
            ("out", &got.out, &expected.out, path.value),
            ("dq", &got.dq, &expected.dq, path.gradient),
            ("dk", &got.dk, &expected.dk, path.gradient),
            ("dv", &got.dv, &expected.dv, path.gradient),
        ] {
            assert_close(&format!("{name} of {what}"), got, expected, tolerance);
            assert_near(&format!("{name} of {what}"), got, expected, path.distance);
        }
    }
}

fn span(start: usize, len: usize, prefix_start: usize, prefix_len: usize) -> Span {
    Span {
        start,
        len,
        prefix_start,
        prefix_len,
    }
}

fn shapes() -> [AttentionShape; 7] {
    [
        (1, 1, 3),
        (1, 1, 64),
        (2, 2, 8),
        (6, 2, 16),
        (16, 2, 4),
        (3, 1, 80),
        (1, 1, 144),
    ]
    .map(|(heads, kv_heads, head_dim)| AttentionShape {
        heads,
        kv_heads,
        head_dim,
    })
}

#[test]
fn single_spans_agree_with_f64() {
    for shape in shapes() {
        for len in [0, 1, 2, 63, 64, 65, 130] {
            compare(&[span(0, len, 0, 0)], len, shape);
        }
    }
}

#[test]
fn trees_agree_with_f64() {
    for shape in shapes() {
        // A prompt of 65 with three responses, one of them empty and one of a single token; a prompt alone; a gap; a
        // response to part of a prompt.
        let spans = [
            span(0, 65, 0, 0),
            span(65, 63, 0, 65),
            span(128, 0, 0, 65),
            span(128, 1, 0, 65),
            span(129, 7, 0, 0),
            span(140, 33, 129, 5),
        ];
        compare(&spans, 175, shape);
    }
    compare(&[], 3, shapes()[0]);
    compare(&[], 0, shapes()[0]);
}

#[test]
fn sharing_a_prompt_is_repeating_it() {
    let shape = AttentionShape {
        heads: 4,
        kv_heads: 2,
        head_dim: 8,
    };
    let [mut q, mut k, mut v, mut dout] = inputs(30, shape);
    // Tokens 0..10 are the prompt, 10..15 and 15..20 its responses; then 20..30 repeats the prompt for the second.
    for (x, width) in [(&mut q, 32), (&mut k, 16), (&mut v, 16)] {
        x.copy_within(0..10 * width, 20 * width);
    }
    dout[20 * 32..].fill(0.0);
    let outcome = |path: &Path, second_prefix: usize| {
        let spans = [
            span(0, 10, 0, 0),
            span(10, 5, 0, 10),
            span(15, 5, second_prefix, 10),
            span(20, 10, 0, 0),
        ];
        let plan = path.plan(&spans, 30, shape);
        let input = AttentionInput {
            q: &q,
            k: &k,
            v: &v,
        };
        let (mut out, mut lse) = (vec![0.0; q.len()], vec![0.0; 120]);
        attention_forward(&plan, input, &mut out, &mut lse);
        let saved = AttentionSaved {
            out: &out,
            lse: &lse,
        };
        let [_, dk, _] = attention_backward(&plan, input, saved, &dout);
        (out, dk)
    };
    for path in &PATHS {
        let ((shared, shared_dk), (apart, apart_dk)) = (outcome(path, 0), outcome(path, 20));
        assert_eq!(shared, apart, "{}", path.name);
        let summed: Vec<f64> = (0..160)
            .map(|i| f64::from(apart_dk[i] + apart_dk[320 + i]))
            .collect();
        assert_close("dk of the prompt", &shared_dk[..160], &summed, 1e-6);
    }
}

#[test]
fn a_place_in_the_batch_changes_no_bit() {
    let shape = shapes()[3];
    let [q, k, v, dout] = inputs(97, shape);
    for path in &PATHS {
        // A prompt of 31 and a response of 66; then the same one token further on, behind another sequence.
        let outcome = |shift: usize| {
            let moved = |x: &[f32], width: usize| [random(shift * width, 9), x.to_vec()].concat();
            let (q, dout) = (moved(&q, 96), moved(&dout, 96));
            let (k, v) = (moved(&k, 32), moved(&v, 32));
            let spans = [
                span(0, shift, 0, 0),
                span(shift, 31, 0, 0),
                span(shift + 31, 66, shift, 31),
            ];
            let plan = path.plan(&spans, 97 + shift, shape);
            let input = AttentionInput {
                q: &q,
                k: &k,
                v: &v,
            };
            let (mut out, mut lse) = (vec![0.0; q.len()], vec![0.0; (97 + shift) * 6]);
            attention_forward(&plan, input, &mut out, &mut lse);
            let saved = AttentionSaved {
                out: &out,
                lse: &lse,
            };
            let [dq, dk, dv] = attention_backward(&plan, input, saved, &dout);
            [out, dq]
                .map(|x| x[shift * 96..].to_vec())
                .into_iter()
                .chain([dk, dv].map(|x| x[shift * 32..].to_vec()))
                .collect::<Vec<_>>()
        };
        assert_eq!(outcome(0), outcome(1), "{}", path.name);
    }
}

#[test]
fn threads_change_no_bit() {
    let shape = AttentionShape {
        heads: 6,
        kv_heads: 2,
        head_dim: 32,
    };
    let spans = [
        span(0, 90, 0, 0),
        span(90, 60, 0, 90),
        span(150, 50, 0, 90),
        span(200, 70, 0, 0),
    ];
    for path in &PATHS {
        let flat = || {
            let case = run(path, &spans, 270, shape);
            [case.out, case.lse, case.dq, case.dk, case.dv]
        };
        let one = on_threads(1, flat);
        assert_eq!(one, on_threads(2, flat), "{}", path.name);
        assert_eq!(one, on_threads(3, flat), "{}", path.name);
    }
}

#[test]
fn a_family_with_much_work_is_cut_the_same_on_any_threads() {
    let shape = AttentionShape {
        heads: 3,
        kv_heads: 1,
        head_dim: 64,
    };
    // 3 heads, 64 elements and 700 + 900·(700 + 450) pairs: several runs of blocks on the vector path.
    let spans = [span(0, 700, 0, 0), span(700, 900, 0, 700)];
    for path in &PATHS {
        let flat = || {
            let case = run(path, &spans, 1600, shape);
            [case.dq, case.dk, case.dv]
        };
        let one = on_threads(1, flat);
        assert_eq!(one, on_threads(2, flat), "{}", path.name);
        assert_eq!(one, on_threads(3, flat), "{}", path.name);
        let exact = run(&PATHS[1], &spans, 1600, shape);
        for (got, exact) in one.iter().zip([&exact.dq, &exact.dk, &exact.dv]) {
            assert_close(path.name, got, &widen(exact), 2.0 * path.gradient);
        }
    }
}
