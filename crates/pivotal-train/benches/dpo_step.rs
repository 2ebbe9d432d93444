//! One optimizer step of DPO: four pairs of 128 prompt and 2 × 64 response tokens, on a decoder of random weights.
//!
//! `cargo bench -p pivotal-train --bench dpo_step`. Items are response and prompt tokens, each prompt counted once.

use std::collections::BTreeMap;

use burn::tensor::Device;
use divan::{Bencher, counter::ItemsCount};
use pivotal_core::{TokenMask, TokenizedPair, random_stream};
use pivotal_loss::Normalisation;
use pivotal_model::{
    Checkpoint, Decoder, DecoderConfig, Family, HostTensor, LoraSpec, RopeScaling, SpecialIds,
};
use pivotal_ops::Precision;
use pivotal_train::dpo::{DpoItem, DpoObjective, PreferenceLoss, gradients};
use pivotal_train::optimizer::NamedAdamW;
use pivotal_train::settings::OptimizerSettings;
use rand::RngExt;

const PROMPT_TOKENS: usize = 128;
const RESPONSE_TOKENS: usize = 64;
const PAIRS: usize = 4;

fn main() {
    divan::main();
}

/// Half the layers of SmolLM2-135M: large enough for products to dominate, small enough for a quick bench.
fn decoder(precision: Precision) -> Decoder {
    let config = DecoderConfig {
        family: Family::Llama,
        vocab_size: 49_152,
        hidden_size: 576,
        intermediate_size: 1536,
        layers: 15,
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
    Decoder::from_checkpoint(&checkpoint, &Device::flex(), precision).expect("the tensors fit")
}

fn items(kept: f64) -> Vec<DpoItem> {
    let mut stream = random_stream(2, "bench");
    let mut ids = |count: usize| (0..count).map(|_| stream.random_range(0..49_152)).collect();
    let mask = || {
        let flags = (0..RESPONSE_TOKENS).map(|i| (i as f64) < kept * RESPONSE_TOKENS as f64);
        TokenMask::from(flags.collect::<Vec<_>>())
    };
    (0..PAIRS)
        .map(|index| DpoItem {
            mismatched: None,
            pair: TokenizedPair {
                id: index as u64,
                prompt: ids(PROMPT_TOKENS),
                chosen: ids(RESPONSE_TOKENS),
                rejected: ids(RESPONSE_TOKENS),
            },
            keep: [mask(), mask()],
            reference_logps: [vec![-10.0; RESPONSE_TOKENS], vec![-10.0; RESPONSE_TOKENS]],
        })
        .collect()
}

fn step(bencher: Bencher, lora: bool, kept: f64) {
    let base = decoder(Precision::Bf16);
    let mut policy = match lora {
        true => {
            let spec = LoraSpec {
                rank: 16,
                alpha: 32.0,
                targets: Vec::new(),
            };
            base.with_lora(&spec, 1).expect("the rank is not 0")
        }
        false => base.trainable(),
    };
    let items = items(kept);
    let items: Vec<&DpoItem> = items.iter().collect();
    let settings = OptimizerSettings::default();
    let mut optimizer = NamedAdamW::new(&settings);
    let objective = DpoObjective {
        loss: PreferenceLoss::Dpo,
        beta: 0.1,
        normalisation: Normalisation::Sum,
        dropped_every: 0,
        reference: None,
    };
    bencher
        .counter(ItemsCount::new(
            PAIRS * (PROMPT_TOKENS + 2 * RESPONSE_TOKENS),
        ))
        .bench_local(|| {
            let (sum, _) =
                gradients(&mut policy, &items, objective, &settings, 1).expect("it fits");
            optimizer
                .step(&mut policy, sum, 1e-6, 1)
                .expect("it is finite")
        });
}

/// LoRA of rank 16 on every linear layer; `kept` is the share of response tokens that the mask keeps.
#[divan::bench(args = [1.0, 0.5, 0.1], sample_count = 8, sample_size = 1)]
fn lora(bencher: Bencher, kept: f64) {
    step(bencher, true, kept);
}

/// Every parameter.
#[divan::bench(args = [1.0, 0.5], sample_count = 5, sample_size = 1)]
fn full(bencher: Bencher, kept: f64) {
    step(bencher, false, kept);
}
