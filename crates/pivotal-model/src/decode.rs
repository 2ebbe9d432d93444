//! Decoding on the processor with a key-value cache, straight through the kernels.
//!
//! The weights are packed once (an adapter merged), a prompt is read in one pass, and its keys and values are shared by
//! all its samples. What a sequence gets does not depend on the others of its batch, bit for bit.

use std::cmp::Reverse;
use std::sync::Arc;

use burn::tensor::{Device, Int, Tensor, TensorData};
use pivotal_kernels::{
    AttentionInput, AttentionPlan, AttentionShape, EvenBlocks, KeyValues, PackedWeight, Precision,
    Processor, RopeTable, Span, StepContext, add_into, append_step, attend_step, attention_forward,
    for_each_item, processor, rms_norm_forward, swiglu_interleaved_forward, with_scratch_parts,
    with_team,
};

use crate::config::DecoderConfig;
use crate::decoder::Decoder;
use crate::error::{Error, Result};
use crate::packed_layer::{LayerAdapters, PackedDecoder, PackedLayer, PackedLinear};
use crate::parameter::{off_tape, to_host};

/// Prompts are read together up to this many tokens; a longer one is read alone.
const PREFILL_TOKENS: usize = 1024;
/// What a thread with prompts of its own reads together.
const SHARE_TOKENS: usize = 512;
/// The most that a thread may have to read beyond the mean, in percent: less than what threads wait for each other in the products.
const UNEVEN: usize = 3;
/// Rows that go through a layer's second half together, all threads on each product: those of a step of decoding, which is bound
/// by reading the weights.
const MOST_STEP_ROWS: usize = 64;
/// From so many sequences for each thread on, each takes its own through the whole step: the weights are then read once by each, which
/// at so many rows costs less than what goes from core to core between the products.
const SHARE_ROWS: usize = 24;
/// Of more rows each thread takes so many through the whole half, so that what is between the products stays in its caches.
const BLOCK_ROWS: usize = 96;
/// Rows that products take together on some processor: cut elsewhere, they would take fewer twice.
const TILE_ROWS: usize = 16;

/// A decoder's weights laid out for decoding on the processor.
///
/// Cloning is cheap: the packed weights are shared.
#[derive(Clone, Debug)]
pub struct Generator {
    config: DecoderConfig,
    inverse_frequencies: Vec<f32>,
    /// Shared with the decoder where that is on the processor already.
    embed_tokens: Tensor<2>,
    base: Arc<PackedDecoder>,
    /// One a layer, or none.
    adapters: Vec<LayerAdapters>,
    /// Whether an adapter is inside `base`.
    merged: bool,
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

/// Buffers that steps use again: fresh ones would cost a page fault every 4 KiB of logits.
#[derive(Debug, Default)]
struct Scratch {
    x: Vec<f32>,
    normed: Vec<f32>,
    rstd: Vec<f32>,
    qkv: Vec<f32>,
    attended: Vec<f32>,
    low: Vec<f32>,
}

/// Buffers of a step: of each thread that takes a share of the sequences, and what comes of all of them.
#[derive(Debug, Default)]
pub(crate) struct StepScratch {
    shares: Vec<Scratch>,
    pub(crate) logits: Vec<f32>,
}

/// Rows that are about to attend.
struct Rows<'a> {
    /// Query, key and value side by side, not rotated yet: `[rows, query_size + 2 * kv_size]`.
    joined: &'a [f32],
    rope: &'a RopeTable,
}

impl Generator {
    /// Packs the weights of `decoder`, an adapter merged: the fastest decoding. Later updates of the decoder do not reach the
    /// generator.
    ///
    /// With [`Precision::F32`] this takes as much memory as the decoder's layers and head, with [`Precision::Bf16`] half.
    #[must_use]
    pub fn new(decoder: &Decoder, precision: Precision) -> Self {
        Self::packed(decoder, precision, true)
    }

    /// Packs the frozen weights of `decoder` and leaves its adapter beside them (`W x + scale · B A x`), so that
    /// [`Generator::refresh`] can follow its training without packing anything but the adapter.
    #[must_use]
    pub fn unmerged(decoder: &Decoder, precision: Precision) -> Self {
        let mut generator = Self::packed(decoder, precision, false);
        generator.refresh(decoder);
        generator
    }

    fn packed(decoder: &Decoder, precision: Precision, merge: bool) -> Self {
        Self {
            config: decoder.config().clone(),
            inverse_frequencies: decoder.config().inverse_frequencies(),
            embed_tokens: off_tape(decoder.embed_tokens.clone()).to_device(&Device::flex()),
            base: Arc::new(PackedDecoder::new(decoder, precision, merge)),
            adapters: Vec::new(),
            merged: merge && decoder.layers.iter().any(LayerAdapters::adapted),
        }
    }

    /// Takes the adapter of `decoder` in place of the one before; the packed weights stay, and are still shared with clones.
    ///
    /// `decoder` must have the weights this generator was packed from: only its adapter is read.
    ///
    /// # Panics
    /// If an adapter was merged when the generator was made ([`Generator::new`]), or `decoder` has another configuration.
    pub fn refresh(&mut self, decoder: &Decoder) {
        assert!(
            !self.merged,
            "a generator with a merged adapter cannot take another: make it with `Generator::unmerged`"
        );
        assert!(
            *decoder.config() == self.config,
            "the decoder is not the one this generator was packed from"
        );
        let adapted = decoder.layers.iter().any(LayerAdapters::adapted);
        let layers = decoder.layers.iter().filter(|_| adapted);
        self.adapters = layers
            .map(|layer| LayerAdapters::new(layer, self.precision()))
            .collect();
    }

    /// The configuration.
    #[must_use]
    pub fn config(&self) -> &DecoderConfig {
        &self.config
    }

    /// What the weights were rounded to: never bf16 where the processor cannot multiply that.
    #[must_use]
    pub fn precision(&self) -> Precision {
        self.base.head.precision()
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
        let shares = dealt(prompts);
        if let [_] = shares[..] {
            return Ok(self.prefill_share(prompts, PREFILL_TOKENS));
        }
        let mut read: Vec<_> = shares.iter().map(|share| (share, Vec::new())).collect();
        with_team(|| {
            for_each_item(&mut read, |(share, caches)| {
                let prompts: Vec<&[u32]> = share.iter().map(|&index| prompts[index]).collect();
                *caches = self.prefill_share(&prompts, SHARE_TOKENS);
            });
        });
        let read = read.into_iter();
        let mut caches: Vec<_> = read
            .flat_map(|(share, caches)| share.iter().zip(caches))
            .collect();
        caches.sort_unstable_by_key(|&(index, _)| index);
        Ok(caches.into_iter().map(|(_, cache)| cache).collect())
    }

    /// Reads prompts in order, together up to so many tokens.
    fn prefill_share(&self, prompts: &[&[u32]], most: usize) -> Vec<PromptCache> {
        let (mut caches, mut scratch) = (Vec::with_capacity(prompts.len()), Scratch::default());
        let mut rest = prompts;
        while !rest.is_empty() {
            let mut tokens = 0;
            let fitting = rest.iter().take_while(|prompt| {
                tokens += prompt.len();
                tokens <= most
            });
            let (group, later) = rest.split_at(fitting.count().max(1));
            self.prefill_group(group, &mut scratch, &mut caches);
            rest = later;
        }
        caches
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
        let (shape, width) = (self.attention_shape(), self.config.kv_size());
        let plan = AttentionPlan::new(&spans, tokens, shape).with_precision(self.precision());
        let [mut q, mut k, mut v] =
            [self.config.query_size(), width, width].map(|width| vec![0.0; tokens * width]);
        let mut lse = vec![0.0; tokens * self.config.heads];
        let mut layers = vec![Vec::with_capacity(self.config.layers); prompts.len()];
        let last: Vec<usize> = spans.iter().map(|span| span.start + span.len - 1).collect();
        self.embed(prompts.concat(), scratch);
        let mut logits = Vec::new();
        rayon::scope(|_| {
            self.forward(
                &positions,
                &last,
                scratch,
                |_, Rows { joined, rope }, out| {
                    rope.split_into(joined, shape, [&mut q, &mut k, &mut v]);
                    let (q, k, v) = (&q, &k, &v);
                    attention_forward(&plan, AttentionInput { q, k, v }, out, &mut lse);
                    for_each_item(spans.iter().zip(&mut layers), |(span, layers)| {
                        let own = span.start * width..(span.start + span.len) * width;
                        let mut cache = KeyValues::new(shape, self.precision());
                        cache.extend(&k[own.clone()], &v[own]);
                        layers.push(cache);
                    });
                },
            );
            let logits = sized(&mut logits, prompts.len() * self.config.vocab_size);
            self.predict(scratch, logits);
        });
        let logits = logits.chunks_exact(self.config.vocab_size);
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
        let mut scratch = StepScratch::default();
        self.step_in(sequences, token_ids, &mut scratch)?;
        Ok(scratch.logits)
    }

    /// [`Generator::step`], the logits left in `scratch`.
    pub(crate) fn step_in(
        &self,
        sequences: &mut [Sequence],
        token_ids: &[u32],
        scratch: &mut StepScratch,
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
        let (rows, vocab) = (sequences.len(), self.config.vocab_size);
        let threads = rayon::current_num_threads();
        // Tiles multiply faster than a weight is read, so that it is read but once.
        let shares = match rows >= SHARE_ROWS * threads && processor() < Processor::Amx {
            true => threads,
            false => 1,
        };
        scratch.shares.resize_with(shares, Scratch::default);
        let logits = sized(&mut scratch.logits, rows * vocab);
        let share = rows.div_ceil(shares).max(1);
        let parts = sequences
            .chunks_mut(share)
            .zip(token_ids.chunks(share))
            .zip(&mut scratch.shares)
            .zip(logits.chunks_mut(share * vocab));
        let step = || {
            for_each_item(parts, |(((sequences, token_ids), scratch), logits)| {
                self.step_share(sequences, token_ids, scratch, logits);
            });
        };
        // On the pool once, or each of the hundreds of short kernels would have to go there by itself.
        if shares > 1 || rows <= MOST_STEP_ROWS {
            with_team(step);
        } else {
            rayon::scope(|_| step());
        }
        for sequence in sequences.iter_mut() {
            sequence.tokens += 1;
        }
        Ok(())
    }

    /// A step of some of the sequences, except that they are not longer yet.
    fn step_share(
        &self,
        sequences: &mut [Sequence],
        token_ids: &[u32],
        scratch: &mut Scratch,
        logits: &mut [f32],
    ) {
        let positions: Vec<usize> = sequences.iter().map(Sequence::len).collect();
        self.embed(token_ids.to_vec(), scratch);
        let shape = self.attention_shape();
        let all: Vec<usize> = (0..sequences.len()).collect();
        let mut q = vec![0.0; sequences.len() * self.config.query_size()];
        self.forward(
            &positions,
            &all,
            scratch,
            |layer, Rows { joined, rope }, out| {
                let mut caches: Vec<_> = sequences
                    .iter_mut()
                    .map(|sequence| &mut sequence.layers[layer])
                    .collect();
                append_step(rope, shape, joined, &mut caches, &mut q);
                let contexts: Vec<_> = sequences
                    .iter()
                    .map(|sequence| sequence.context(layer))
                    .collect();
                attend_step(shape, &q, &contexts, out);
            },
        );
        self.predict(scratch, logits);
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
    /// After the last layer's attention only the rows `wanted`, in ascending order, are needed: they are what is left.
    fn forward(
        &self,
        positions: &[usize],
        wanted: &[usize],
        scratch: &mut Scratch,
        mut attend: impl FnMut(usize, Rows<'_>, &mut [f32]),
    ) {
        let (mut rows, hidden) = (positions.len(), self.config.hidden_size);
        let (queries, keys) = (self.config.query_size(), self.config.kv_size());
        let scale = self.config.rope_attention_scale();
        let rope = RopeTable::new(&self.inverse_frequencies, positions, scale);
        let eps = self.config.rms_norm_eps as f32;
        let none = LayerAdapters::default();
        let Scratch { x, low, .. } = scratch;
        let normed = sized(&mut scratch.normed, rows * hidden);
        let rstd = sized(&mut scratch.rstd, rows);
        let qkv = sized(&mut scratch.qkv, rows * (queries + 2 * keys));
        let mut attended = sized(&mut scratch.attended, rows * queries);
        for (index, layer) in self.base.layers.iter().enumerate() {
            let adapters = self.adapters.get(index).unwrap_or(&none);
            rms_norm_forward(x, &layer.input_layernorm, eps, normed, rstd);
            let o_proj = &layer.o_proj.weight;
            layer
                .qkv
                .forward(&adapters.qkv, o_proj, normed, rows, low, qkv);
            let joined = Rows {
                joined: qkv,
                rope: &rope,
            };
            attend(index, joined, attended);
            if index + 1 == self.config.layers && wanted.len() < rows {
                rows = wanted.len();
                for (row, &from) in wanted.iter().enumerate() {
                    x.copy_within(from * hidden..(from + 1) * hidden, row * hidden);
                    attended.copy_within(from * queries..(from + 1) * queries, row * queries);
                }
                x.truncate(rows * hidden);
                attended = &mut attended[..rows * queries];
            }
            let following = self.base.layers.get(index + 1);
            let next = following.map_or(&self.base.head, |layer| &layer.qkv.weight);
            let after = |x: &mut [f32], attended: &[f32]| {
                self.after_attention(layer, adapters, next, attended, x);
            };
            if rows <= MOST_STEP_ROWS {
                after(x, attended);
            } else {
                let (mut rest, mut parts) = (&mut x[..], Vec::new());
                let threads = rayon::current_num_threads();
                for block in EvenBlocks::new(rows, TILE_ROWS, BLOCK_ROWS, threads).iter() {
                    let (part, others) = rest.split_at_mut(block.len() * hidden);
                    parts.push((part, &attended[block.start * queries..block.end * queries]));
                    rest = others;
                }
                for_each_item(parts, |(x, attended)| after(x, attended));
            }
        }
    }

    /// What a layer does to rows `x` once they have attended: the output projection, the norm and the gated perceptron, with
    /// both residual sums. `next` is what is multiplied by after it.
    fn after_attention(
        &self,
        layer: &PackedLayer,
        adapters: &LayerAdapters,
        next: &PackedWeight,
        attended: &[f32],
        x: &mut [f32],
    ) {
        let (hidden, inner) = (self.config.hidden_size, self.config.intermediate_size);
        let rows = x.len() / hidden;
        let eps = self.config.rms_norm_eps as f32;
        let lens = [rows * hidden, rows, rows * 2 * inner, rows * inner];
        with_scratch_parts(lens, |[normed, rstd, gate_up, activated]| {
            let mut low = Vec::new();
            let mut linear = |weight: &PackedLinear, adapter, next, x: &[f32], out: &mut [f32]| {
                weight.forward(adapter, next, x, rows, &mut low, out);
            };
            let (gate_up_proj, down_proj) = (&layer.gate_up.weight, &layer.down_proj.weight);
            linear(
                &layer.o_proj,
                &adapters.o_proj,
                gate_up_proj,
                attended,
                normed,
            );
            add_into(x, normed);
            rms_norm_forward(x, &layer.post_attention_layernorm, eps, normed, rstd);
            linear(
                &layer.gate_up,
                &adapters.gate_up,
                down_proj,
                normed,
                gate_up,
            );
            swiglu_interleaved_forward(gate_up, inner, activated);
            linear(
                &layer.down_proj,
                &adapters.down_proj,
                next,
                activated,
                normed,
            );
            add_into(x, normed);
        });
    }

    /// The logits of the first rows of `scratch.x`, as many as there are logits for.
    fn predict(&self, scratch: &mut Scratch, logits: &mut [f32]) {
        let hidden = self.config.hidden_size;
        let rows = logits.len() / self.config.vocab_size;
        let normed = sized(&mut scratch.normed, rows * hidden);
        let rstd = sized(&mut scratch.rstd, rows);
        let eps = self.config.rms_norm_eps as f32;
        rms_norm_forward(
            &scratch.x[..rows * hidden],
            &self.base.norm,
            eps,
            normed,
            rstd,
        );
        self.base.head.forward(normed, rows, logits);
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
            layers: prompt.layers.iter().map(KeyValues::emptied).collect(),
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

    fn context(&self, layer: usize) -> StepContext<'_> {
        StepContext {
            prefix: &self.prompt.layers[layer],
            own: &self.layers[layer],
        }
    }
}

/// Prompts dealt to as many shares as there are threads, the longest first, each to the one that has least to read; one share of all
/// where that comes out uneven.
fn dealt(prompts: &[&[u32]]) -> Vec<Vec<usize>> {
    let threads = rayon::current_num_threads();
    let mut shares = vec![(0, Vec::new()); threads];
    let mut order: Vec<usize> = (0..prompts.len()).collect();
    order.sort_by_key(|&index| Reverse(prompts[index].len()));
    for index in order {
        if let Some((tokens, share)) = shares.iter_mut().min_by_key(|share| share.0) {
            *tokens += prompts[index].len();
            share.push(index);
        }
    }
    let total: usize = shares.iter().map(|share| share.0).sum();
    let most = shares.iter().map(|share| share.0).max().unwrap_or(0);
    if most * threads * 100 > total * (100 + UNEVEN) {
        return vec![(0..prompts.len()).collect()];
    }
    shares.into_iter().map(|(_, share)| share).collect()
}

/// `buffer` with room for `len` elements, whatever they hold.
pub(crate) fn sized(buffer: &mut Vec<f32>, len: usize) -> &mut [f32] {
    buffer.resize(len, 0.0);
    buffer
}
