//! Timings of the kernels that dominate a training step, at SmolLM2-135M's shapes.

use divan::Bencher;
use divan::counter::ItemsCount;
use pivotal_kernels::{
    AttentionInput, AttentionPlan, AttentionSaved, AttentionShape, HeadShape, PackedWeight,
    Precision, ProductShape, RopeTable, Span, Store, attention_backward, attention_forward,
    matmul_nn, matmul_nt, matmul_tn, rope_attention, token_logps_backward, token_logps_forward,
};

fn main() {
    divan::main();
}

/// Numbers in -0.5..0.5.
fn values(len: usize) -> Vec<f32> {
    (0..len)
        .map(|index| (index * 7919 % 1009) as f32 / 1009.0 - 0.5)
        .collect()
}

const SHAPES: [(usize, usize, usize); 9] = [
    (1024, 1536, 576),
    (1024, 576, 1536),
    (1024, 1024, 576),
    (64, 1536, 576),
    (48, 1536, 576),
    (16, 1536, 576),
    (4, 1536, 576),
    (64, 96, 64),
    (16, 96, 64),
];

type Product = fn(&[f32], &[f32], &mut [f32], ProductShape, Store, Precision);

fn product(
    bencher: Bencher,
    (m, n, k): (usize, usize, usize),
    product: Product,
    precision: Precision,
) {
    let (a, b, mut out) = (values(m * k), values(n * k), vec![0.0; m * n]);
    let shape = ProductShape { m, n, k };
    bencher
        .counter(ItemsCount::new(2 * m * n * k))
        .bench_local(|| product(&a, &b, &mut out, shape, Store::Replace, precision));
}

#[divan::bench(args = SHAPES)]
fn nt_f32(bencher: Bencher, shape: (usize, usize, usize)) {
    product(bencher, shape, matmul_nt, Precision::F32);
}

#[divan::bench(args = SHAPES)]
fn nt_bf16(bencher: Bencher, shape: (usize, usize, usize)) {
    product(bencher, shape, matmul_nt, Precision::Bf16);
}

#[divan::bench(args = SHAPES)]
fn nn_f32(bencher: Bencher, shape: (usize, usize, usize)) {
    product(bencher, shape, matmul_nn, Precision::F32);
}

#[divan::bench(args = SHAPES)]
fn nn_bf16(bencher: Bencher, shape: (usize, usize, usize)) {
    product(bencher, shape, matmul_nn, Precision::Bf16);
}

#[divan::bench(args = [(576, 1536, 1024), (1536, 576, 1024)])]
fn tn_f32(bencher: Bencher, shape: (usize, usize, usize)) {
    product(bencher, shape, matmul_tn, Precision::F32);
}

#[divan::bench(args = [(576, 1536, 1024), (1536, 576, 1024)])]
fn tn_bf16(bencher: Bencher, shape: (usize, usize, usize)) {
    product(bencher, shape, matmul_tn, Precision::Bf16);
}

/// The head of a decoding step.
#[divan::bench(args = [1, 4, 16, 64], consts = [0, 1])]
fn packed_head<const BF16: usize>(bencher: Bencher, rows: usize) {
    let (outputs, inputs) = (49_152, 576);
    let precision = if BF16 == 1 {
        Precision::Bf16
    } else {
        Precision::F32
    };
    let weight = PackedWeight::new(&values(outputs * inputs), outputs, inputs, precision);
    let (x, mut out) = (values(rows * inputs), vec![0.0; rows * outputs]);
    bencher
        .counter(ItemsCount::new(2 * rows * outputs * inputs))
        .bench_local(|| weight.forward(&x, rows, &mut out));
}

const HEADS: AttentionShape = AttentionShape {
    heads: 9,
    kv_heads: 3,
    head_dim: 64,
};

/// Four prompts of 128 tokens with two responses of 64 each.
fn trees() -> AttentionPlan {
    let spans: Vec<Span> = (0..4)
        .flat_map(|tree| {
            let prompt = tree * 256;
            [(0, 128, 0), (128, 64, 128), (192, 64, 128)].map(|(start, len, prefix_len)| Span {
                start: prompt + start,
                len,
                prefix_start: prompt,
                prefix_len,
            })
        })
        .collect();
    AttentionPlan::new(&spans, 1024, HEADS)
}

/// A prompt of 64 tokens with two responses of `len`.
fn pair(len: usize) -> AttentionPlan {
    let span = |start, len, prefix_len| Span {
        start,
        len,
        prefix_start: 0,
        prefix_len,
    };
    let spans = [span(0, 64, 0), span(64, len, 64), span(64 + len, len, 64)];
    AttentionPlan::new(&spans, 64 + 2 * len, HEADS)
}

fn precision(bf16: usize) -> Precision {
    if bf16 == 1 {
        Precision::Bf16
    } else {
        Precision::F32
    }
}

fn attend(bencher: Bencher, plan: &AttentionPlan) {
    let tokens = plan.tokens();
    let (q, k, v) = (
        values(tokens * 576),
        values(tokens * 192),
        values(tokens * 192),
    );
    let (mut out, mut lse) = (vec![0.0; tokens * 576], vec![0.0; tokens * 9]);
    let input = AttentionInput {
        q: &q,
        k: &k,
        v: &v,
    };
    bencher
        .counter(ItemsCount::new(tokens))
        .bench_local(|| attention_forward(plan, input, &mut out, &mut lse));
}

fn attend_back(bencher: Bencher, plan: &AttentionPlan) {
    let tokens = plan.tokens();
    let (q, k, v) = (
        values(tokens * 576),
        values(tokens * 192),
        values(tokens * 192),
    );
    let (mut out, mut lse) = (vec![0.0; tokens * 576], vec![0.0; tokens * 9]);
    let input = AttentionInput {
        q: &q,
        k: &k,
        v: &v,
    };
    attention_forward(plan, input, &mut out, &mut lse);
    let saved = AttentionSaved {
        out: &out,
        lse: &lse,
    };
    bencher
        .counter(ItemsCount::new(tokens))
        .bench_local(|| attention_backward(plan, input, saved, &q));
}

/// Sixteen pairs as scoring packs them: about 4,096 tokens of prompts of 139 with two responses of 60.
fn families() -> AttentionPlan {
    let span = |start, len, prefix_start, prefix_len| Span {
        start,
        len,
        prefix_start,
        prefix_len,
    };
    let spans: Vec<Span> = (0..16)
        .map(|family| 259 * family)
        .flat_map(|start| {
            [
                span(start, 139, start, 0),
                span(start + 139, 60, start, 139),
                span(start + 199, 60, start, 139),
            ]
        })
        .collect();
    AttentionPlan::new(&spans, 16 * 259, HEADS)
}

/// Rotation and attention of those.
#[divan::bench(consts = [0, 1])]
fn scoring_attention<const BF16: usize>(bencher: Bencher) {
    let plan = families().with_precision(precision(BF16));
    let frequencies: Vec<f32> = (0..32).map(|i| 0.8f32.powi(i)).collect();
    let positions: Vec<usize> = (0..plan.tokens()).map(|token| token % 259).collect();
    let rope = RopeTable::new(&frequencies, &positions, 1.0);
    let joined = values(plan.tokens() * 960);
    bencher
        .counter(ItemsCount::new(plan.tokens()))
        .bench_local(|| rope_attention(&plan, &rope, &joined));
}

#[divan::bench(consts = [0, 1])]
fn attention<const BF16: usize>(bencher: Bencher) {
    attend(bencher, &trees().with_precision(precision(BF16)));
}

#[divan::bench(consts = [0, 1])]
fn attention_gradient<const BF16: usize>(bencher: Bencher) {
    attend_back(bencher, &trees().with_precision(precision(BF16)));
}

/// A pair whose responses are that long.
#[divan::bench(args = [64, 512, 2048, 4096], consts = [0, 1], sample_count = 10)]
fn attention_long<const BF16: usize>(bencher: Bencher, len: usize) {
    attend(bencher, &pair(len).with_precision(precision(BF16)));
}

/// The gradient of the same.
#[divan::bench(args = [64, 512, 2048, 4096], consts = [0, 1], sample_count = 10)]
fn attention_long_gradient<const BF16: usize>(bencher: Bencher, len: usize) {
    attend_back(bencher, &pair(len).with_precision(precision(BF16)));
}

const HEAD: HeadShape = HeadShape {
    hidden: 576,
    vocab: 49_152,
};

#[divan::bench(consts = [0, 1], sample_count = 5)]
fn logps<const BF16: usize>(bencher: Bencher) {
    let precision = if BF16 == 1 {
        Precision::Bf16
    } else {
        Precision::F32
    };
    let (hidden, head) = (values(512 * 576), values(HEAD.vocab * 576));
    let targets: Vec<u32> = (0..512).map(|row| row * 90).collect();
    bencher
        .counter(ItemsCount::new(512usize))
        .bench_local(|| token_logps_forward(&hidden, &head, &targets, HEAD, precision));
}

#[divan::bench(consts = [0, 1], sample_count = 5)]
fn logps_gradient<const BF16: usize>(bencher: Bencher) {
    let precision = if BF16 == 1 {
        Precision::Bf16
    } else {
        Precision::F32
    };
    let (hidden, head) = (values(512 * 576), values(HEAD.vocab * 576));
    let targets: Vec<u32> = (0..512).map(|row| row * 90).collect();
    let lse = token_logps_forward(&hidden, &head, &targets, HEAD, precision).lse;
    let (mut dhidden, mut dhead) = (hidden.clone(), head.clone());
    bencher.counter(ItemsCount::new(512usize)).bench_local(|| {
        token_logps_backward(
            &hidden,
            &head,
            &targets,
            &lse,
            &lse,
            HEAD,
            precision,
            &mut dhidden,
            Some(&mut dhead),
        );
    });
}
