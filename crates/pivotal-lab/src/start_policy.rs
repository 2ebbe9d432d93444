//! The policy that every arm starts from: trained here from nothing, embedded as safetensors.
//!
//! [`train`] is a function of its settings alone: integers from ChaCha streams make the initial weights and the batches,
//! and no kernel's result depends on the number of threads. What the bytes do depend on is the processor's instructions:
//! kernels for AVX-512 and for AVX2 add in different orders, so that another kind of processor gives a policy that
//! is as good and not the same. [`EMBEDDED_BLAKE3`] is of the bytes made with AVX-512.

use std::collections::BTreeMap;

use burn::tensor::Device;
use pivotal_core::RandomStream;
use pivotal_core::{content_hash, random_stream};
use pivotal_model::{
    Checkpoint, Decoder, DecoderConfig, Family, HostTensor, RopeScaling, SpecialIds,
    tensors_to_bytes,
};
use pivotal_ops::Precision;
use pivotal_train::optimizer::NamedAdamW;
use pivotal_train::settings::OptimizerSettings;
use pivotal_train::sft::{self, SftMetrics};
use rand::Rng;
use safetensors::{Dtype, SafeTensors};

use crate::error::{Error, Result};
use crate::world::corpus::{CorpusSettings, training_batch};
use crate::world::vocabulary::{self, BEGIN, DIGIT_WAVES_NANO, END, ZERO};

/// Standard deviation of the initial weights.
const INIT_STD: f64 = 0.06;
/// What the digits' waves are scaled to in the initial embedding.
const WAVE_SCALE: f64 = 0.3;

/// The embedded policy: what [`train`] makes of [`StartPolicySettings::EMBEDDED`].
pub const EMBEDDED: &[u8] = include_bytes!("../assets/start_policy.safetensors");

/// The BLAKE3 hash of [`EMBEDDED`].
pub const EMBEDDED_BLAKE3: &str =
    "19caaac149f21a8691dd5222dc34803d3e7aa00d99fc27e9421c7b7b9a1a9d69";

/// How a start policy is made.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StartPolicySettings {
    /// Seed of the initial weights and of the corpus.
    pub seed: u64,
    /// Optimizer steps.
    pub steps: u64,
    /// Peak learning rate.
    pub lr: f64,
    /// Steps of linear warm-up.
    pub warmup_steps: u64,
    /// Steps over which the learning rate falls to 0 in a line at the end.
    pub falling_steps: u64,
    /// What it is trained on.
    pub corpus: CorpusSettings,
}

impl StartPolicySettings {
    /// The settings of the embedded policy.
    pub const EMBEDDED: Self = Self {
        seed: 1,
        steps: 3000,
        lr: 2e-3,
        warmup_steps: 50,
        falling_steps: 1800,
        corpus: CorpusSettings::EMBEDDED,
    };

    /// The learning rate of step `step`, counted from 0.
    fn lr(&self, step: u64) -> f64 {
        let rising = (step + 1) as f64 / self.warmup_steps.max(1) as f64;
        let falling = (self.steps - step) as f64 / self.falling_steps.max(1) as f64;
        self.lr * rising.min(falling).min(1.0)
    }
}

/// The architecture: a Llama of 224 thousand parameters.
pub fn config() -> DecoderConfig {
    DecoderConfig {
        family: Family::Llama,
        vocab_size: vocabulary::SIZE,
        hidden_size: 96,
        intermediate_size: 256,
        layers: 2,
        heads: 4,
        kv_heads: 4,
        head_dim: 24,
        rms_norm_eps: 1e-5,
        rope_theta: 100.0,
        rope_scaling: RopeScaling::None,
        tie_word_embeddings: true,
        qkv_bias: false,
        output_bias: false,
        max_positions: 256,
        sliding_window: None,
        special_ids: SpecialIds {
            bos: Some(BEGIN),
            eos: vec![END],
            pad: None,
            add_bos: false,
        },
    }
}

/// A policy before its first step.
///
/// Matrices are normal with standard deviation 0.06, those that write to the residual stream 0.06/√(2·layers); the first
/// ten columns of a digit's embedding are its waves, without which a model this small sits on a plateau.
///
/// # Errors
/// Never for the architecture of [`config`].
pub fn initial(seed: u64) -> Result<Decoder> {
    let config = config();
    let mut tensors = BTreeMap::new();
    for (name, shape) in config.tensors() {
        let size = shape.iter().product();
        let mut values = vec![1.0; size];
        if shape.len() == 2 {
            let residual = name.ends_with("o_proj.weight") || name.ends_with("down_proj.weight");
            let std = match residual {
                true => INIT_STD / ((2 * config.layers) as f64).sqrt(),
                false => INIT_STD,
            };
            let mut stream = random_stream(seed, &format!("start policy/{name}"));
            values.fill_with(|| (std * normal(&mut stream)) as f32);
        }
        if name == "model.embed_tokens.weight" {
            for (digit, waves) in DIGIT_WAVES_NANO.iter().enumerate() {
                let row = (ZERO as usize + digit) * config.hidden_size;
                for (value, &wave) in values[row..].iter_mut().zip(waves) {
                    *value = (WAVE_SCALE * 1e-9 * f64::from(wave)) as f32;
                }
            }
        }
        tensors.insert(name, HostTensor::new(shape, values)?);
    }
    decoder(tensors)
}

/// Trains a policy from nothing; `after` sees each step's number (from 1) and metrics.
///
/// AdamW with moments 0.9 and 0.98 and no weight decay, gradients clipped to norm 1; [`StartPolicySettings`] has the rest.
/// Training that stops early with `stop` gives the policy as it stood after that step of the whole schedule.
///
/// # Errors
/// [`Error::World`] for settings out of range, [`Error::Train`] for a loss that is not finite.
pub fn train(
    settings: &StartPolicySettings,
    stop: Option<u64>,
    after: &mut dyn FnMut(u64, SftMetrics),
) -> Result<Decoder> {
    let optimizer_settings = OptimizerSettings {
        beta2: 0.98,
        ..OptimizerSettings::default()
    };
    let mut policy = initial(settings.seed)?.trainable();
    let mut optimizer = NamedAdamW::new(&optimizer_settings);
    for step in 0..stop.unwrap_or(settings.steps).min(settings.steps) {
        let batch = training_batch(&settings.corpus, settings.seed, step)?;
        let batch: Vec<_> = batch.iter().collect();
        let (gradients, mut metrics) =
            sft::gradients(&mut policy, &batch, &optimizer_settings, step + 1)?;
        metrics.lr = settings.lr(step);
        metrics.grad_norm = optimizer.step(&mut policy, gradients, metrics.lr, step + 1)?;
        after(step + 1, metrics);
    }
    Ok(policy.detached())
}

/// A policy as a safetensors file's bytes, in `f32`: equal policies give equal bytes.
///
/// # Errors
/// [`Error::Model`] if a tensor does not fit the format.
pub fn to_bytes(policy: &Decoder) -> Result<Vec<u8>> {
    let mut checkpoint = empty_checkpoint();
    policy.store(&mut checkpoint);
    Ok(tensors_to_bytes(&checkpoint.tensors)?)
}

/// The embedded policy, frozen.
///
/// # Errors
/// Never for the bytes that are embedded.
pub fn embedded() -> Result<Decoder> {
    from_bytes(EMBEDDED)
}

/// The policy of such bytes, frozen.
///
/// # Errors
/// [`Error::StartPolicy`] for bytes that are no safetensors file, [`Error::StartPolicyType`] for tensors that are not
/// `f32`, [`Error::Model`] for missing or misshapen ones.
pub fn from_bytes(bytes: &[u8]) -> Result<Decoder> {
    let file = SafeTensors::deserialize(bytes)?;
    let mut tensors = BTreeMap::new();
    for (name, view) in file.tensors() {
        if view.dtype() != Dtype::F32 {
            return Err(Error::StartPolicyType {
                found: format!("{:?}", view.dtype()),
                name,
            });
        }
        let (values, _) = view.data().as_chunks::<4>();
        let values = values.iter().map(|&bytes| f32::from_le_bytes(bytes));
        let tensor = HostTensor::new(view.shape().to_vec(), values.collect())?;
        tensors.insert(name, tensor);
    }
    decoder(tensors)
}

/// The BLAKE3 hash of a policy's bytes, in hexadecimal.
pub fn hash(bytes: &[u8]) -> String {
    content_hash(bytes)
}

fn decoder(tensors: BTreeMap<String, HostTensor>) -> Result<Decoder> {
    let checkpoint = Checkpoint {
        tensors,
        ..empty_checkpoint()
    };
    // Half-width operands would save little here, and make the bytes depend on more of the processor.
    Ok(Decoder::from_checkpoint(
        &checkpoint,
        &Device::flex(),
        Precision::F32,
    )?)
}

fn empty_checkpoint() -> Checkpoint {
    Checkpoint {
        config: config(),
        tensors: BTreeMap::new(),
        tokenizer: None,
        tokenizer_config: Default::default(),
        chat_template: None,
    }
}

/// A nearly normal number: twelve uniform ones less six (variance 1). No logarithm and no cosine, whose last bits
/// differ between platforms.
fn normal(stream: &mut RandomStream) -> f64 {
    let uniform = |stream: &mut RandomStream| f64::from(stream.next_u32()) / 4_294_967_296.0;
    (0..12).map(|_| uniform(stream)).sum::<f64>() - 6.0
}
