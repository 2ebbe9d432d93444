//! Decoding on the processor with a key-value cache, straight through the kernels.
//!
//! The weights are packed once (an adapter merged), a prompt is read in one pass, and its keys and values are shared by
//! all its samples. What a sequence gets does not depend on the others of its batch, bit for bit.

use std::sync::Arc;

use burn::tensor::{Device, Int, Tensor, TensorData};
use pivotal_kernels::{
    AttentionInput, AttentionPlan, AttentionShape, CachedContext, PackedWeight, Precision,
    RopeTable, Span, attend_cached, attention_forward, rms_norm_forward, swiglu_forward,
};

use crate::config::DecoderConfig;
use crate::decoder::{Decoder, Layer};
use crate::error::{Error, Result};
use crate::parameter::{off_tape, to_host};
use crate::projection::Projection;

/// Prompts are read together up to this many tokens; a longer one is read alone.
const PREFILL_TOKENS: usize = 1024;

/// A decoder's weights laid out for decoding on the processor.
#[derive(Clone, Debug)]
pub struct Generator {
    config: DecoderConfig,
    inverse_frequencies: Vec<f32>,
    /// Shared with the decoder where that is on the processor already.
    embed_tokens: Tensor<2>,
    layers: Vec<PackedLayer>,
    norm: Vec<f32>,
    head: PackedWeight,
}

/// The keys and values of a prompt, shared by its samples, and what it predicts.
#[derive(Clone, Debug)]
pub struct PromptCache {
    tokens: usize,
    layers: Vec<KeyValues>,
    logits: Vec<f32>,
}

/// A response on its way: a prompt, and the keys and values of its own tokens.
#[derive(Clone, Debug)]
pub struct Sequence {
    prompt: Arc<PromptCache>,
    layers: Vec<KeyValues>,
    tokens: usize,
}

/// Both `[tokens, kv_heads * head_dim]`, keys rotated.
#[derive(Clone, Debug, Default)]
struct KeyValues {
    keys: Vec<f32>,
    values: Vec<f32>,
}

#[derive(Clone, Debug)]
struct PackedLayer {
    input_layernorm: Vec<f32>,
    /// q, k and v in one product.
    qkv: PackedLinear,
    o_proj: PackedLinear,
    post_attention_layernorm: Vec<f32>,
    gate_proj: PackedLinear,
    up_proj: PackedLinear,
    down_proj: PackedLinear,
}

#[derive(Clone, Debug)]
struct PackedLinear {
    weight: PackedWeight,
    bias: Vec<f32>,
}

/// Buffers that steps use again: fresh ones would cost a page fault every 4 KiB of logits.
#[derive(Debug, Default)]
pub(crate) struct Scratch {
    x: Vec<f32>,
    normed: Vec<f32>,
    rstd: Vec<f32>,
    qkv: Vec<f32>,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    attended: Vec<f32>,
    gate: Vec<f32>,
    up: Vec<f32>,
    activated: Vec<f32>,
    pub(crate) logits: Vec<f32>,
}

/// Rotated queries and keys, and values, of some rows.
struct Rows<'a> {
    q: &'a [f32],
    k: &'a [f32],
    v: &'a [f32],
}

impl Generator {
    /// Packs the weights of `decoder`, an adapter merged. Later updates of the decoder do not reach the generator.
    ///
    /// With [`Precision::F32`] this takes as much memory as the decoder's layers and head, with [`Precision::Bf16`] half.
    #[must_use]
    pub fn new(decoder: &Decoder, precision: Precision) -> Self {
        let layers = decoder.layers.iter();
        Self {
            config: decoder.config().clone(),
            inverse_frequencies: decoder.config().inverse_frequencies(),
            embed_tokens: off_tape(decoder.embed_tokens.clone()).to_device(&Device::flex()),
            layers: layers
                .map(|layer| PackedLayer::new(layer, precision))
                .collect(),
            norm: values(&decoder.norm),
            head: PackedLinear::new(
                &[values(decoder.head())],
                Vec::new(),
                decoder.head().dims()[1],
                precision,
            )
            .weight,
        }
    }

    /// The configuration.
    #[must_use]
    pub fn config(&self) -> &DecoderConfig {
        &self.config
    }

    /// What the weights were rounded to: never bf16 where the processor cannot multiply that.
    #[must_use]
    pub fn precision(&self) -> Precision {
        self.head.precision()
    }

    /// Reads prompts, so that sequences can continue them.
    ///
    /// # Errors
    /// [`Error::Domain`] for an empty prompt, [`Error::TokenOutOfRange`], [`Error::SequenceTooLong`].
    pub fn prefill(&self, prompts: &[&[u32]]) -> Result<Vec<PromptCache>> {
        for prompt in prompts {
            if prompt.is_empty() {
                return Err(Error::Domain {
                    what: "prompt tokens",
                    expected: "at least 1",
                    found: 0.0,
                });
            }
            self.config.check_tokens(prompt)?;
            self.config.check_length(prompt.len())?;
        }
        let (mut caches, mut scratch) = (Vec::with_capacity(prompts.len()), Scratch::default());
        let mut rest = prompts;
        while !rest.is_empty() {
            let mut tokens = 0;
            let fitting = rest.iter().take_while(|prompt| {
                tokens += prompt.len();
                tokens <= PREFILL_TOKENS
            });
            let (group, later) = rest.split_at(fitting.count().max(1));
            self.prefill_group(group, &mut scratch, &mut caches);
            rest = later;
        }
        Ok(caches)
    }

    fn prefill_group(
        &self,
        prompts: &[&[u32]],
        scratch: &mut Scratch,
        caches: &mut Vec<PromptCache>,
    ) {
        let (mut spans, mut positions, mut tokens) = (Vec::new(), Vec::new(), 0);
        for prompt in prompts {
            spans.push(Span {
                start: tokens,
                len: prompt.len(),
                prefix_start: 0,
                prefix_len: 0,
            });
            positions.extend(0..prompt.len());
            tokens += prompt.len();
        }
        let plan = AttentionPlan::new(&spans, tokens, self.attention_shape());
        let mut lse = vec![0.0; tokens * self.config.heads];
        let mut layers = vec![Vec::with_capacity(self.layers.len()); prompts.len()];
        self.embed(prompts.concat(), scratch);
        self.forward(&positions, scratch, |_, Rows { q, k, v }, out| {
            attention_forward(&plan, AttentionInput { q, k, v }, out, &mut lse);
            for (span, layers) in spans.iter().zip(&mut layers) {
                let width = self.config.kv_size();
                let own = span.start * width..(span.start + span.len) * width;
                layers.push(KeyValues {
                    keys: k[own.clone()].to_vec(),
                    values: v[own].to_vec(),
                });
            }
        });
        let hidden = self.config.hidden_size;
        for (row, span) in spans.iter().enumerate() {
            let last = (span.start + span.len - 1) * hidden;
            scratch.x.copy_within(last..last + hidden, row * hidden);
        }
        self.predict(prompts.len(), scratch);
        let logits = scratch.logits.chunks_exact(self.config.vocab_size);
        for ((span, layers), logits) in spans.iter().zip(layers).zip(logits) {
            caches.push(PromptCache {
                tokens: span.len,
                layers,
                logits: logits.to_vec(),
            });
        }
    }

    /// Appends one token to each sequence.
    ///
    /// # Shapes
    /// Returns the logits of the tokens after them, `[sequences, vocab]`.
    ///
    /// # Errors
    /// [`Error::Shape`] if there is not one token a sequence, [`Error::TokenOutOfRange`], [`Error::SequenceTooLong`]; no
    /// sequence is then changed.
    pub fn step(&self, sequences: &mut [Sequence], token_ids: &[u32]) -> Result<Vec<f32>> {
        let mut scratch = Scratch::default();
        self.step_in(sequences, token_ids, &mut scratch)?;
        Ok(scratch.logits)
    }

    /// [`Generator::step`], the logits left in `scratch`.
    pub(crate) fn step_in(
        &self,
        sequences: &mut [Sequence],
        token_ids: &[u32],
        scratch: &mut Scratch,
    ) -> Result<()> {
        if sequences.len() != token_ids.len() {
            return Err(Error::Shape {
                what: "token_ids".into(),
                expected: vec![sequences.len()],
                found: vec![token_ids.len()],
            });
        }
        self.config.check_tokens(token_ids)?;
        for sequence in sequences.iter() {
            self.config.check_length(sequence.len() + 1)?;
        }
        let positions: Vec<usize> = sequences.iter().map(Sequence::len).collect();
        self.embed(token_ids.to_vec(), scratch);
        let width = self.config.kv_size();
        self.forward(&positions, scratch, |layer, Rows { q, k, v }, out| {
            let rows = k.chunks_exact(width).zip(v.chunks_exact(width));
            for (sequence, (k, v)) in sequences.iter_mut().zip(rows) {
                sequence.layers[layer].keys.extend_from_slice(k);
                sequence.layers[layer].values.extend_from_slice(v);
            }
            let contexts: Vec<_> = sequences
                .iter()
                .map(|sequence| sequence.context(layer))
                .collect();
            attend_cached(self.attention_shape(), q, &contexts, out);
        });
        for sequence in sequences.iter_mut() {
            sequence.tokens += 1;
        }
        self.predict(sequences.len(), scratch);
        Ok(())
    }

    fn attention_shape(&self) -> AttentionShape {
        AttentionShape {
            heads: self.config.heads,
            kv_heads: self.config.kv_heads,
            head_dim: self.config.head_dim,
        }
    }

    fn embed(&self, token_ids: Vec<u32>, scratch: &mut Scratch) {
        let ids: Vec<i32> = token_ids.iter().map(|&id| id as i32).collect();
        let ids = TensorData::new(ids, [token_ids.len()]);
        let ids = Tensor::<1, Int>::from_data(ids, &self.embed_tokens.device());
        scratch.x = to_host(self.embed_tokens.clone().select(0, ids)).into_values();
    }

    /// Runs `scratch.x` `[rows, hidden]` through all layers; `attend` gets the layer's index and fills the attended rows.
    fn forward(
        &self,
        positions: &[usize],
        scratch: &mut Scratch,
        mut attend: impl FnMut(usize, Rows<'_>, &mut [f32]),
    ) {
        let (rows, hidden) = (positions.len(), self.config.hidden_size);
        let (queries, keys) = (self.config.query_size(), self.config.kv_size());
        let scale = self.config.rope_attention_scale();
        let rope = RopeTable::new(&self.inverse_frequencies, positions, scale);
        let eps = self.config.rms_norm_eps as f32;
        let inner = rows * self.config.intermediate_size;
        let Scratch { x, .. } = scratch;
        let normed = sized(&mut scratch.normed, rows * hidden);
        let rstd = sized(&mut scratch.rstd, rows);
        let qkv = sized(&mut scratch.qkv, rows * (queries + 2 * keys));
        let q = sized(&mut scratch.q, rows * queries);
        let k = sized(&mut scratch.k, rows * keys);
        let v = sized(&mut scratch.v, rows * keys);
        let attended = sized(&mut scratch.attended, rows * queries);
        let gate = sized(&mut scratch.gate, inner);
        let up = sized(&mut scratch.up, inner);
        let activated = sized(&mut scratch.activated, inner);
        for (index, layer) in self.layers.iter().enumerate() {
            rms_norm_forward(x, &layer.input_layernorm, eps, normed, rstd);
            layer.qkv.forward(normed, rows, qkv);
            for (row, qkv) in qkv.chunks_exact(queries + 2 * keys).enumerate() {
                q[row * queries..][..queries].copy_from_slice(&qkv[..queries]);
                k[row * keys..][..keys].copy_from_slice(&qkv[queries..][..keys]);
                v[row * keys..][..keys].copy_from_slice(&qkv[queries + keys..]);
            }
            rope.apply(q, self.config.heads);
            rope.apply(k, self.config.kv_heads);
            attend(index, Rows { q, k, v }, attended);
            layer.o_proj.forward(attended, rows, normed);
            add(x, normed);

            rms_norm_forward(x, &layer.post_attention_layernorm, eps, normed, rstd);
            layer.gate_proj.forward(normed, rows, gate);
            layer.up_proj.forward(normed, rows, up);
            swiglu_forward(gate, up, activated);
            layer.down_proj.forward(activated, rows, normed);
            add(x, normed);
        }
    }

    /// The logits of the first `rows` rows of `scratch.x`.
    fn predict(&self, rows: usize, scratch: &mut Scratch) {
        let hidden = self.config.hidden_size;
        let normed = sized(&mut scratch.normed, rows * hidden);
        let rstd = sized(&mut scratch.rstd, rows);
        let eps = self.config.rms_norm_eps as f32;
        rms_norm_forward(&scratch.x[..rows * hidden], &self.norm, eps, normed, rstd);
        let logits = sized(&mut scratch.logits, rows * self.config.vocab_size);
        self.head.forward(normed, rows, logits);
    }
}

impl PromptCache {
    /// The logits of the token after the prompt, `[vocab]`.
    #[must_use]
    pub fn logits(&self) -> &[f32] {
        &self.logits
    }

    /// Tokens of the prompt.
    #[must_use]
    pub fn tokens(&self) -> usize {
        self.tokens
    }
}

impl Sequence {
    /// A sequence that begins with a prompt.
    #[must_use]
    pub fn new(prompt: Arc<PromptCache>) -> Self {
        Self {
            layers: vec![KeyValues::default(); prompt.layers.len()],
            prompt,
            tokens: 0,
        }
    }

    /// Tokens of the prompt and those appended.
    #[must_use]
    #[expect(
        clippy::len_without_is_empty,
        reason = "a prompt has at least one token"
    )]
    pub fn len(&self) -> usize {
        self.prompt.tokens + self.tokens
    }

    fn context(&self, layer: usize) -> CachedContext<'_> {
        CachedContext {
            prefix_keys: &self.prompt.layers[layer].keys,
            prefix_values: &self.prompt.layers[layer].values,
            keys: &self.layers[layer].keys,
            values: &self.layers[layer].values,
        }
    }
}

impl PackedLayer {
    fn new(layer: &Layer, precision: Precision) -> Self {
        let pack = |projections: &[&Projection]| {
            let weights: Vec<Vec<f32>> = projections
                .iter()
                .map(|projection| values(&projection.merged_weight()))
                .collect();
            let biases = projections.iter().filter_map(|p| p.bias.as_ref());
            let bias = biases.flat_map(values).collect();
            PackedLinear::new(&weights, bias, projections[0].shape()[1], precision)
        };
        Self {
            input_layernorm: values(&layer.input_layernorm),
            qkv: pack(&[&layer.q_proj, &layer.k_proj, &layer.v_proj]),
            o_proj: pack(&[&layer.o_proj]),
            post_attention_layernorm: values(&layer.post_attention_layernorm),
            gate_proj: pack(&[&layer.gate_proj]),
            up_proj: pack(&[&layer.up_proj]),
            down_proj: pack(&[&layer.down_proj]),
        }
    }
}

impl PackedLinear {
    /// Packs weights `[out, inputs]` one below the other. `bias` is empty, or has an element for every output of all.
    fn new(weights: &[Vec<f32>], bias: Vec<f32>, inputs: usize, precision: Precision) -> Self {
        let rows = weights.concat();
        Self {
            weight: PackedWeight::new(&rows, rows.len() / inputs, inputs, precision),
            bias,
        }
    }

    fn forward(&self, x: &[f32], rows: usize, out: &mut [f32]) {
        self.weight.forward(x, rows, out);
        if !self.bias.is_empty() {
            out.chunks_exact_mut(self.bias.len())
                .for_each(|row| add(row, &self.bias));
        }
    }
}

fn values<const D: usize>(tensor: &Tensor<D>) -> Vec<f32> {
    to_host(tensor.clone()).into_values()
}

/// `buffer` with room for `len` elements, whatever they hold.
fn sized(buffer: &mut Vec<f32>, len: usize) -> &mut [f32] {
    buffer.resize(len, 0.0);
    buffer
}

fn add(x: &mut [f32], y: &[f32]) {
    for (x, y) in x.iter_mut().zip(y) {
        *x += y;
    }
}
