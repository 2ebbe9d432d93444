//! The linear layers of one step of decoding with SmolLM2-135M, 270 MB of bf16 weights, read once; and its attention.
//!
//! `cargo bench -p pivotal-kernels --bench decoding`. Items are rows: tokens.

use divan::Bencher;
use divan::counter::{BytesCount, ItemsCount};
use pivotal_kernels::{
    AttentionShape, KeyValues, PackedWeight, Precision, StepContext, attend_step, with_team,
};
use rayon::prelude::*;

fn main() {
    divan::main();
}

/// Outputs and inputs of a layer's products: q, k and v; o; gate and up; down.
const LAYER: [(usize, usize); 4] = [(960, 576), (576, 576), (3072, 576), (576, 1536)];
const LAYERS: usize = 30;
const VOCAB: usize = 49_152;

fn weights(precision: Precision) -> Vec<PackedWeight> {
    let pack = |(outputs, inputs): (usize, usize)| {
        let values: Vec<f32> = (0..outputs * inputs)
            .map(|index| (index * 7919 % 1009) as f32 / 1009.0 - 0.5)
            .collect();
        PackedWeight::new(&values, outputs, inputs, precision)
    };
    let layers = (0..LAYERS).flat_map(|_| LAYER).map(pack);
    layers.chain([pack((VOCAB, 576))]).collect()
}

fn step(bencher: Bencher, rows: usize, precision: Precision) {
    let weights = weights(precision);
    let x = vec![0.5; rows * 1536];
    let mut out = vec![0.0; rows * VOCAB];
    bencher.counter(ItemsCount::new(rows)).bench_local(|| {
        for weight in &weights {
            let x = &x[..rows * weight.inputs()];
            weight.forward(x, rows, &mut out[..rows * weight.outputs()]);
        }
    });
}

#[divan::bench(args = [1, 2, 4, 8, 12, 16, 32, 64, 512], sample_count = 20, sample_size = 1)]
fn bf16(bencher: Bencher, rows: usize) {
    step(bencher, rows, Precision::Bf16);
}

#[divan::bench(args = [1, 4, 16, 64, 512], sample_count = 5, sample_size = 1)]
fn f32(bencher: Bencher, rows: usize) {
    step(bencher, rows, Precision::F32);
}

const HEADS: AttentionShape = AttentionShape {
    heads: 9,
    kv_heads: 3,
    head_dim: 64,
};
const PROMPT: usize = 147;
const RESPONSE: usize = 32;

fn cache(tokens: usize, precision: Precision) -> KeyValues {
    let values: Vec<f32> = (0..tokens * HEADS.kv_heads * HEADS.head_dim)
        .map(|index| (index * 7919 % 1009) as f32 / 1009.0 - 0.5)
        .collect();
    let mut cache = KeyValues::new(HEADS, precision);
    cache.extend(&values, &values);
    cache
}

/// All layers' attention in the middle of responses of 64 tokens: prompts, and samples of each.
#[divan::bench(args = [(16, 1), (8, 8)], consts = [false, true], sample_count = 40, sample_size = 1)]
fn attention<const BF16: bool>(bencher: Bencher, (prompts, samples): (usize, usize)) {
    let precision = match BF16 {
        true => Precision::Bf16,
        false => Precision::F32,
    };
    let caches = |count: usize, tokens| -> Vec<KeyValues> {
        (0..count).map(|_| cache(tokens, precision)).collect()
    };
    let layers: Vec<_> = (0..LAYERS)
        .map(|_| (caches(prompts, PROMPT), caches(prompts * samples, RESPONSE)))
        .collect();
    let contexts: Vec<Vec<StepContext<'_>>> = layers
        .iter()
        .map(|(prefixes, own)| {
            let owns = own.iter().enumerate();
            owns.map(|(index, own)| StepContext {
                prefix: &prefixes[index / samples],
                own,
            })
            .collect()
        })
        .collect();
    let rows = prompts * samples;
    let q: Vec<f32> = (0..rows * HEADS.heads * HEADS.head_dim)
        .map(|index| (index % 251) as f32 / 251.0 - 0.5)
        .collect();
    let mut out = vec![0.0; q.len()];
    bencher.counter(ItemsCount::new(rows)).bench_local(|| {
        with_team(|| {
            for contexts in &contexts {
                attend_step(HEADS, &q, contexts, &mut out);
            }
        });
    });
}

/// The floor: as many bytes as the bf16 weights have, read by all threads and nothing done with them.
#[divan::bench(sample_count = 20, sample_size = 1)]
fn reading_alone(bencher: Bencher) {
    const BYTES: usize = 270_000_000;
    let words: Vec<u64> = (0..BYTES as u64 / 8).collect();
    bencher.counter(BytesCount::new(BYTES)).bench_local(|| {
        let parts = words.par_chunks(1 << 14);
        let folded = parts.map(|part| part.iter().fold(0, |all, word| all ^ word));
        folded.reduce(|| 0, |a, b| a ^ b)
    });
}
