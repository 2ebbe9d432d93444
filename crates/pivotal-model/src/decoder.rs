//! The Llama-shaped decoder: Llama 2 and 3, Mistral, Qwen2 and what shares their layout.
//!
//! A layer is `x + attention(norm(x))`, then `x + mlp(norm(x))`; the embedding may serve as the head. Everything works on
//! a tree-packed batch ([`Pack`]): no padding, a prompt stored once for all its responses, and log-probabilities taken
//! only where they are asked for. The names of the fields spell the keys of the checkpoint.

use burn::tensor::{Device, Int, Tensor, TensorData};
use pivotal_core::{Gather, Pack};
use pivotal_ops::{
    AttentionLayout, AttentionSpan, FrozenInput, FrozenLinears, FrozenWeight, LowRank, Precision,
};

use crate::checkpoint::Checkpoint;
use crate::config::DecoderConfig;
use crate::error::Result;
use crate::frozen::FrozenCache;
use crate::parameter::{Parameter, Parameters, Visitor, WeightSource, off_tape, on_tape};
use crate::projection::{Projection, Weight};

/// A decoder whose parameters are tensors of one device.
///
/// Cloning is cheap: tensors are shared until one of them is updated.
#[derive(Clone, Debug)]
pub struct Decoder {
    config: DecoderConfig,
    device: Device,
    precision: Precision,
    inverse_frequencies: Vec<f32>,
    pub(crate) embed_tokens: Tensor<2>,
    pub(crate) layers: Vec<Layer>,
    pub(crate) norm: Tensor<1>,
    lm_head: Option<Tensor<2>>,
    frozen_head: FrozenCache,
}

#[derive(Clone, Debug)]
pub(crate) struct Layer {
    pub(crate) input_layernorm: Tensor<1>,
    pub(crate) q_proj: Projection,
    pub(crate) k_proj: Projection,
    pub(crate) v_proj: Projection,
    pub(crate) o_proj: Projection,
    pub(crate) post_attention_layernorm: Tensor<1>,
    pub(crate) gate_proj: Projection,
    pub(crate) up_proj: Projection,
    pub(crate) down_proj: Projection,
    /// Packs of the four groups of projections that share an input.
    frozen: [FrozenCache; 4],
}

impl Decoder {
    /// The decoder of a checkpoint, frozen: call [`Decoder::trainable`] or add an adapter to train it.
    ///
    /// # Errors
    /// If a tensor is missing or has another shape than the configuration says; the error names it.
    pub fn from_checkpoint(
        checkpoint: &Checkpoint,
        device: &Device,
        precision: Precision,
    ) -> Result<Self> {
        Self::take_from(&mut checkpoint.clone(), device, precision)
    }

    /// [`Decoder::from_checkpoint`], with the weights taken out of `checkpoint`: they are never in memory twice.
    ///
    /// What the decoder has no place for stays: a value head, say.
    ///
    /// # Errors
    /// As [`Decoder::from_checkpoint`]; the weights before the one at fault are then gone.
    pub fn take_from(
        checkpoint: &mut Checkpoint,
        device: &Device,
        precision: Precision,
    ) -> Result<Self> {
        Self::taken_from(checkpoint, device, precision, false)
    }

    /// [`Decoder::take_from`], and [`Decoder::packed`] a layer at a time: of a checkpoint that has just been opened no more than
    /// one layer's weights are in memory in f32.
    ///
    /// # Errors
    /// As [`Decoder::take_from`].
    pub fn take_packed_from(
        checkpoint: &mut Checkpoint,
        device: &Device,
        precision: Precision,
    ) -> Result<Self> {
        let is_packed = precision == Precision::Bf16;
        Self::taken_from(checkpoint, device, precision, is_packed)
    }

    fn taken_from(
        checkpoint: &mut Checkpoint,
        device: &Device,
        precision: Precision,
        is_packed: bool,
    ) -> Result<Self> {
        let config = checkpoint.config.clone();
        let mut source = WeightSource::new(checkpoint, device);
        let layers = (0..config.layers)
            .map(|index| {
                let path = format!("model.layers.{index}");
                let layer = Layer::from_source(&mut source, &config, &path)?;
                Ok(if is_packed { layer.packed() } else { layer })
            })
            .collect::<Result<Vec<_>>>()?;
        let (vocab, hidden) = (config.vocab_size, config.hidden_size);
        let lm_head = match config.tie_word_embeddings {
            true => None,
            false => Some(source.tensor("lm_head.weight", [vocab, hidden])?),
        };
        let embed_tokens = source.tensor("model.embed_tokens.weight", [vocab, hidden])?;
        let norm = source.tensor("model.norm.weight", [hidden])?;
        // A value head: nobody knows how long it will lie there.
        for tensor in checkpoint.tensors.values_mut() {
            tensor.leave_file();
        }
        Ok(Self {
            inverse_frequencies: config.inverse_frequencies(),
            embed_tokens,
            layers,
            norm,
            lm_head,
            frozen_head: FrozenCache::default(),
            config,
            device: device.clone(),
            precision,
        })
    }

    /// The configuration.
    pub fn config(&self) -> &DecoderConfig {
        &self.config
    }

    /// The device of the parameters.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// How matrix products round their operands.
    pub fn precision(&self) -> Precision {
        self.precision
    }

    /// Hidden states after the last norm, one a token, or one for each that the pack says is [read](Pack::read): what follows the
    /// last attention is computed for those alone.
    ///
    /// # Shapes
    /// Returns `[tokens, hidden]`; `[read, hidden]` where the pack says so.
    ///
    /// # Errors
    /// [`Error::TokenOutOfRange`](crate::Error::TokenOutOfRange) for an id that is not in the vocabulary,
    /// [`Error::SequenceTooLong`](crate::Error::SequenceTooLong) for a sequence longer than the model's positions.
    pub fn hidden(&self, pack: &Pack) -> Result<Tensor<2>> {
        self.check(pack)?;
        let (layout, read) = (self.layout(pack), self.read(pack));
        let mut x = self.embed_tokens.clone().select(0, self.token_ids(pack));
        for index in 0..self.layers.len() {
            x = self.layer(index, x, &layout, read.as_ref());
        }
        Ok(pivotal_ops::rms_norm(x, self.norm.clone(), self.eps()))
    }

    /// Layer `index`; the last one gives the rows that are `read`.
    pub(crate) fn layer(
        &self,
        index: usize,
        x: Tensor<2>,
        layout: &AttentionLayout,
        read: Option<&Tensor<1, Int>>,
    ) -> Tensor<2> {
        let is_last = index + 1 == self.layers.len();
        let read = if is_last { read } else { None };
        self.layers[index].forward(x, layout, read, self.eps(), self.precision)
    }

    /// Log-probabilities of the gathered tokens, in nats; the logits of the others never exist.
    ///
    /// # Shapes
    /// `hidden` `[rows, hidden]`, what [`Decoder::hidden`] gives; returns `[gathers]`.
    ///
    /// # Panics
    /// If `gathers` is empty or points outside `hidden`.
    pub fn token_logps(&self, hidden: &Tensor<2>, gathers: &[Gather]) -> Tensor<1> {
        let rows = self.rows(hidden, gathers.iter().map(|gather| gather.source));
        let targets = self.indices(gathers.iter().map(|gather| gather.target as usize));
        match self.frozen_head.get(
            FrozenInput::Plain,
            &[(FrozenWeight::Tensor(self.head()), None)],
        ) {
            Some(head) => head.token_logps(rows, targets, self.precision),
            None => pivotal_ops::token_logps(rows, self.head().clone(), targets, self.precision),
        }
    }

    /// KL(reference‖this) of the next-token distributions that predict the gathered tokens, over the whole vocabulary, in
    /// nats; neither model's logits ever exist. The reference gets no gradient.
    ///
    /// # Shapes
    /// `hidden` and `reference_hidden` `[rows, hidden]`, what [`Decoder::hidden`] gives of one pack; returns `[gathers]`.
    ///
    /// # Panics
    /// If `gathers` points outside a hidden state, or the two decoders differ in shape.
    pub fn vocabulary_kl(
        &self,
        hidden: &Tensor<2>,
        reference: &Self,
        reference_hidden: &Tensor<2>,
        gathers: &[Gather],
    ) -> Tensor<1> {
        let rows = |hidden| self.rows(hidden, gathers.iter().map(|gather| gather.source));
        pivotal_ops::vocabulary_kl(
            rows(hidden),
            self.head().clone(),
            rows(reference_hidden),
            reference.head().clone(),
            self.precision,
        )
    }

    /// The logits of chosen tokens: for vocabularies and selections small enough to look at whole.
    ///
    /// # Shapes
    /// `hidden` `[rows, hidden]`; returns `[sources, vocab]`.
    pub fn logits(&self, hidden: &Tensor<2>, sources: &[usize]) -> Tensor<2> {
        let rows = self.rows(hidden, sources.iter().copied());
        pivotal_ops::linear(rows, self.head().clone(), self.precision)
    }

    /// Rows of `hidden`, in the order asked for; one may be taken several times.
    ///
    /// # Shapes
    /// `hidden` `[rows, hidden]`; returns `[sources, hidden]`.
    pub fn rows(
        &self,
        hidden: &Tensor<2>,
        sources: impl ExactSizeIterator<Item = usize>,
    ) -> Tensor<2> {
        hidden.clone().select(0, self.indices(sources))
    }

    /// The head's weight: its own, or the embedding where they are tied. `[vocab, hidden]`.
    pub fn head(&self) -> &Tensor<2> {
        self.lm_head.as_ref().unwrap_or(&self.embed_tokens)
    }

    /// The linear layers that an adapter may change, with their peft module paths (`model.layers.0.self_attn.q_proj`).
    pub(crate) fn projections(&mut self) -> impl Iterator<Item = (String, &mut Projection)> {
        self.layers
            .iter_mut()
            .enumerate()
            .flat_map(|(index, layer)| {
                layer
                    .projections()
                    .into_iter()
                    .map(move |(name, projection)| {
                        (format!("model.layers.{index}.{name}"), projection)
                    })
            })
    }

    /// The same decoder with only what bf16 products read of its layers' weights, where those are frozen and such products are
    /// what it computes with: two bytes a weight in place of four, and two more once a gradient goes through it. What it
    /// computes stays the same bit for bit. Elsewhere, and of trained weights, everything is kept.
    ///
    /// Clones made before keep what they have. To train a packed weight, load the checkpoint again: its lower bits are gone.
    #[must_use]
    pub fn packed(mut self) -> Self {
        if self.precision == Precision::Bf16 {
            self.layers = self.layers.into_iter().map(Layer::packed).collect();
        }
        self
    }

    /// The same decoder with every parameter marked as trainable.
    ///
    /// # Panics
    /// If it is [`Decoder::packed`].
    #[must_use]
    pub fn trainable(mut self) -> Self {
        assert!(
            self.projections()
                .all(|(_, projection)| matches!(projection.weight, Weight::Tensor(_))),
            "a packed weight cannot be trained"
        );
        self.visit_parameters(&mut |_, parameter| parameter.map(on_tape, on_tape));
        self
    }

    /// The same decoder off the tape: for evaluation, and as a reference that later updates do not touch.
    #[must_use]
    pub fn detached(&self) -> Self {
        let mut decoder = self.clone();
        decoder.visit_parameters(&mut |_, parameter| parameter.map(off_tape, off_tape));
        decoder
    }

    /// The decoder without its adapter, off the tape: LoRA's reference policy.
    #[must_use]
    pub fn base(&self) -> Self {
        let mut decoder = self.detached();
        decoder
            .projections()
            .for_each(|(_, projection)| projection.adapter = None);
        decoder
    }

    /// Puts the decoder's weights in `checkpoint`, an adapter merged.
    pub fn store(&self, checkpoint: &mut Checkpoint) {
        self.merged().visit_parameters(&mut |name, parameter| {
            checkpoint
                .tensors
                .insert(name.to_owned(), parameter.to_host());
        });
    }

    pub(crate) fn eps(&self) -> f32 {
        self.config.rms_norm_eps as f32
    }

    /// [`Pack::needed_by`] of a pack that fits the model whole: what is left out is checked as if it were computed.
    ///
    /// # Errors
    /// [`Error::TokenOutOfRange`](crate::Error::TokenOutOfRange), [`Error::SequenceTooLong`](crate::Error::SequenceTooLong).
    pub fn needed(&self, pack: &Pack, gathers: &[Gather]) -> Result<(Pack, Vec<Gather>)> {
        self.check(pack)?;
        Ok(pack.needed_by(gathers))
    }

    pub(crate) fn check(&self, pack: &Pack) -> Result<()> {
        self.config.check_tokens(&pack.token_ids)?;
        self.config.check_length(
            pack.position_ids
                .iter()
                .max()
                .map_or(0, |&last| last as usize + 1),
        )
    }

    pub(crate) fn token_ids(&self, pack: &Pack) -> Tensor<1, Int> {
        self.indices(pack.token_ids.iter().map(|&id| id as usize))
    }

    /// The rows that the pack says are read, if it says so.
    pub(crate) fn read(&self, pack: &Pack) -> Option<Tensor<1, Int>> {
        let read = pack.read.as_ref()?;
        Some(self.indices(read.iter().copied()))
    }

    fn indices(&self, indices: impl ExactSizeIterator<Item = usize>) -> Tensor<1, Int> {
        let count = indices.len();
        let indices: Vec<i32> = indices.map(|index| index as i32).collect();
        Tensor::from_data(TensorData::new(indices, [count]), &self.device)
    }

    pub(crate) fn layout(&self, pack: &Pack) -> AttentionLayout {
        let spans: Vec<_> = pack
            .spans
            .iter()
            .map(|span| AttentionSpan {
                start: span.start,
                len: span.len,
                prefix_start: span.prefix_start,
                prefix_len: span.prefix_len,
            })
            .collect();
        let DecoderConfig {
            heads,
            kv_heads,
            head_dim,
            ..
        } = self.config;
        AttentionLayout::new(
            &spans,
            heads,
            kv_heads,
            head_dim,
            &self.inverse_frequencies,
            self.config.rope_attention_scale(),
            &self.device,
        )
        .expect(
            "a pack's spans tile it and the configuration's heads were checked when it was read",
        )
        .with_precision(self.precision)
    }
}

impl Parameters for Decoder {
    fn visit_parameters(&mut self, visit: &mut Visitor<'_>) {
        visit(
            "model.embed_tokens.weight",
            Parameter::Matrix(&mut self.embed_tokens),
        );
        for (index, layer) in self.layers.iter_mut().enumerate() {
            layer.visit(&format!("model.layers.{index}"), visit);
        }
        visit("model.norm.weight", Parameter::Vector(&mut self.norm));
        if let Some(head) = &mut self.lm_head {
            visit("lm_head.weight", Parameter::Matrix(head));
        }
    }
}

impl Layer {
    fn from_source(
        source: &mut WeightSource<'_>,
        config: &DecoderConfig,
        path: &str,
    ) -> Result<Self> {
        let hidden = config.hidden_size;
        let mut norm = |name: &str| source.tensor(&format!("{path}.{name}.weight"), [hidden]);
        let input_layernorm = norm("input_layernorm")?;
        let post_attention_layernorm = norm("post_attention_layernorm")?;
        let [q, k, v, o, gate, up, down] = config.layer_linears().map(|(name, shape)| {
            source.projection(&format!("{path}.{name}"), shape, config.has_bias(name))
        });
        Ok(Self {
            input_layernorm,
            q_proj: q?,
            k_proj: k?,
            v_proj: v?,
            o_proj: o?,
            post_attention_layernorm,
            gate_proj: gate?,
            up_proj: up?,
            down_proj: down?,
            frozen: Default::default(),
        })
    }

    /// With what bf16 products read of those that are frozen.
    fn packed(mut self) -> Self {
        for (_, projection) in self.projections() {
            projection.pack();
        }
        self
    }

    /// The layer's output at every row, or at those that are `read`.
    pub(crate) fn forward(
        &self,
        x: Tensor<2>,
        layout: &AttentionLayout,
        read: Option<&Tensor<1, Int>>,
        eps: f32,
        precision: Precision,
    ) -> Tensor<2> {
        let attended = self.attend(&x, layout, eps, precision);
        let [x, attended] = match read {
            Some(rows) => [x, attended].map(|x| x.select(0, rows.clone())),
            None => [x, attended],
        };
        let x = pivotal_ops::residual(x, self.project_output(attended, precision));
        self.perceptron(x, eps, precision)
    }

    /// Norm, query, key and value, and attention.
    fn attend(
        &self,
        x: &Tensor<2>,
        layout: &AttentionLayout,
        eps: f32,
        precision: Precision,
    ) -> Tensor<2> {
        let norm = FrozenInput::Normed {
            weight: &self.input_layernorm,
            eps,
        };
        let group = [&self.q_proj, &self.k_proj, &self.v_proj];
        if let Some(qkv) = self.frozen[0].project(x, norm, &group, precision) {
            return pivotal_ops::rope_attention_joined(qkv, layout);
        }
        let normed = pivotal_ops::rms_norm(x.clone(), self.input_layernorm.clone(), eps);
        let [q, k, v] = group.map(|projection| projection.forward(normed.clone(), precision));
        pivotal_ops::rope_attention(q, k, v, layout)
    }

    /// Norm, gated perceptron, and the residual sum.
    fn perceptron(&self, x: Tensor<2>, eps: f32, precision: Precision) -> Tensor<2> {
        let norm = FrozenInput::Normed {
            weight: &self.post_attention_layernorm,
            eps,
        };
        let group = [&self.gate_proj, &self.up_proj];
        let frozen = (
            self.frozen[2].group(norm, &group),
            self.frozen[3].group(FrozenInput::Gated, &[&self.down_proj]),
        );
        if let (Some((gate_up, updates)), Some((down, down_updates))) = frozen {
            let adapted = |updates: &[Option<LowRank<'_>>]| updates.iter().any(Option::is_some);
            if adapted(&updates) == adapted(&down_updates) {
                return FrozenLinears::mlp(&gate_up, &down, x, &updates, &down_updates, precision);
            }
            let joined = gate_up.forward(x.clone(), &updates, precision);
            return pivotal_ops::residual(x, down.forward(joined, &down_updates, precision));
        }
        let normed = pivotal_ops::rms_norm(x.clone(), self.post_attention_layernorm.clone(), eps);
        let [gate, up] = group.map(|projection| projection.forward(normed.clone(), precision));
        let gated = pivotal_ops::swiglu(gate, up);
        pivotal_ops::residual(x, self.down_proj.forward(gated, precision))
    }

    fn project_output(&self, attended: Tensor<2>, precision: Precision) -> Tensor<2> {
        self.frozen[1]
            .project(&attended, FrozenInput::Plain, &[&self.o_proj], precision)
            .unwrap_or_else(|| self.o_proj.forward(attended, precision))
    }

    fn projections(&mut self) -> [(&'static str, &mut Projection); 7] {
        [
            ("self_attn.q_proj", &mut self.q_proj),
            ("self_attn.k_proj", &mut self.k_proj),
            ("self_attn.v_proj", &mut self.v_proj),
            ("self_attn.o_proj", &mut self.o_proj),
            ("mlp.gate_proj", &mut self.gate_proj),
            ("mlp.up_proj", &mut self.up_proj),
            ("mlp.down_proj", &mut self.down_proj),
        ]
    }

    pub(crate) fn visit(&mut self, path: &str, visit: &mut Visitor<'_>) {
        let norm = &mut self.input_layernorm;
        visit(
            &format!("{path}.input_layernorm.weight"),
            Parameter::Vector(norm),
        );
        let norm = &mut self.post_attention_layernorm;
        visit(
            &format!("{path}.post_attention_layernorm.weight"),
            Parameter::Vector(norm),
        );
        for (name, projection) in self.projections() {
            projection.visit(&format!("{path}.{name}"), visit);
        }
    }
}
