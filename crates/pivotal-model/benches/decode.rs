//! One step of decoding on a decoder of SmolLM2-135M's shape and random weights, bf16.
//!
//! `cargo bench -p pivotal-model --bench decode`. Items are tokens: one a sequence. Every sequence has a prompt of 140 tokens
//! and 32 of its own; in `shared`, eight sequences have one prompt between them.

use std::collections::BTreeMap;
use std::sync::{Arc, LazyLock};

use burn::tensor::Device;
use divan::{Bencher, counter::ItemsCount};
use pivotal_core::random_stream;
use pivotal_kernels::Precision;
use pivotal_model::{
    Checkpoint, Decoder, DecoderConfig, Family, GenerateSettings, Generator, HostTensor,
    RopeScaling, Sampling, Sequence, SpecialIds,
};
use rand::RngExt;

const PROMPT_TOKENS: usize = 140;
const OWN_TOKENS: usize = 32;
const VOCAB: usize = 49_152;

static GENERATOR: LazyLock<Generator> =
    LazyLock::new(|| Generator::new(&decoder(), Precision::Bf16));

fn main() {
    divan::main();
}

fn decoder() -> Decoder {
    let config = DecoderConfig {
        family: Family::Llama,
        vocab_size: VOCAB,
        hidden_size: 576,
        intermediate_size: 1536,
        layers: 30,
        heads: 9,
        kv_heads: 3,
        head_dim: 64,
        rms_norm_eps: 1e-5,
        rope_theta: 100_000.0,
        rope_scaling: RopeScaling::None,
        tie_word_embeddings: true,
        qkv_bias: false,
        output_bias: false,
        max_positions: 8192,
        sliding_window: None,
        special_ids: SpecialIds::default(),
    };
    let mut stream = random_stream(1, "bench");
    let tensors: BTreeMap<_, _> = config
        .tensors()
        .map(|(name, shape)| {
            let values = (0..shape.iter().product()).map(|_| stream.random_range(-0.05..0.05));
            let tensor =
                HostTensor::new(shape, values.collect()).expect("as many as the shape says");
            (name, tensor)
        })
        .collect();
    let checkpoint = Checkpoint {
        config,
        tensors,
        tokenizer: None,
        tokenizer_config: serde_json::Map::new(),
        chat_template: None,
    };
    Decoder::from_checkpoint(&checkpoint, &Device::flex(), Precision::F32).expect("the tensors fit")
}

fn prompt(index: usize) -> Vec<u32> {
    let mut stream = random_stream(index as u64, "prompt");
    (0..PROMPT_TOKENS)
        .map(|_| stream.random_range(0..VOCAB as u32))
        .collect()
}

/// Sequences of [`OWN_TOKENS`] tokens, `samples` to a prompt.
fn sequences(count: usize, samples: usize) -> Vec<Sequence> {
    let prompts: Vec<Vec<u32>> = (0..count.div_ceil(samples)).map(prompt).collect();
    let prompts: Vec<&[u32]> = prompts.iter().map(Vec::as_slice).collect();
    let caches = GENERATOR.prefill(&prompts).expect("the prompts are fine");
    let caches: Vec<_> = caches.into_iter().map(Arc::new).collect();
    let mut sequences: Vec<_> = (0..count)
        .map(|index| Sequence::new(Arc::clone(&caches[index / samples])))
        .collect();
    for token in 0..OWN_TOKENS {
        step(&mut sequences, token);
    }
    sequences
}

/// A copy that has taken a step: the first one makes room for those after it, once in many steps.
fn warm(start: &[Sequence]) -> Vec<Sequence> {
    let mut sequences = start.to_vec();
    step(&mut sequences, OWN_TOKENS);
    sequences
}

fn step(sequences: &mut [Sequence], token: usize) -> Vec<f32> {
    let ids: Vec<u32> = (0..sequences.len())
        .map(|index| (token * 7919 + index * 104_729) as u32 % VOCAB as u32)
        .collect();
    GENERATOR
        .step(sequences, &ids)
        .expect("the tokens are fine")
}

#[divan::bench(args = [1, 2, 4, 8, 16, 32, 64], sample_count = 10, sample_size = 1)]
fn decode_step(bencher: Bencher, count: usize) {
    let start = sequences(count, 1);
    bencher
        .counter(ItemsCount::new(count))
        .with_inputs(|| warm(&start))
        .bench_local_values(|mut sequences| (step(&mut sequences, 99), sequences));
}

#[divan::bench(args = [16, 64], sample_count = 10, sample_size = 1)]
fn decode_step_shared(bencher: Bencher, count: usize) {
    let start = sequences(count, 8);
    bencher
        .counter(ItemsCount::new(count))
        .with_inputs(|| warm(&start))
        .bench_local_values(|mut sequences| (step(&mut sequences, 99), sequences));
}

/// Whole rollouts of 32 tokens, prompts read and tokens drawn.
fn rollouts(bencher: Bencher, prompts: usize, samples: usize) {
    let prompts: Vec<_> = (0..prompts).map(prompt).collect();
    let settings = GenerateSettings {
        sampling: Sampling::default(),
        samples,
        max_tokens: 32,
        eos: Vec::new(),
        batch: 64,
        seed: 1,
    };
    bencher
        .counter(ItemsCount::new(32 * prompts.len() * samples))
        .bench_local(|| GENERATOR.generate(&prompts, &settings));
}

#[divan::bench(sample_count = 3, sample_size = 1)]
fn sixteen_prompts(bencher: Bencher) {
    rollouts(bencher, 16, 1);
}

#[divan::bench(sample_count = 3, sample_size = 1)]
fn eight_samples_of_eight_prompts(bencher: Bencher) {
    rollouts(bencher, 8, 8);
}

/// Prompts of 140 tokens read.
#[divan::bench(args = [1, 16], sample_count = 3, sample_size = 1)]
fn prefill(bencher: Bencher, count: usize) {
    let prompts: Vec<Vec<u32>> = (0..count).map(prompt).collect();
    let prompts: Vec<&[u32]> = prompts.iter().map(Vec::as_slice).collect();
    bencher
        .counter(ItemsCount::new(count * PROMPT_TOKENS))
        .bench_local(|| GENERATOR.prefill(&prompts));
}
