//! What a decoder is made of: sizes, rotary embedding, biases, special ids.

mod hugging_face;

use std::path::Path;

use crate::error::{Error, Result};

/// No size of a model reaches this; products of any two sizes then fit in 64 bits.
const SIZE_LIMIT: usize = 1 << 28;

/// A family of decoders; they differ in biases, defaults and the names of their classes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Family {
    /// Llama 2, Llama 3.x, SmolLM2.
    Llama,
    /// Mistral 7B and its kin.
    Mistral,
    /// Qwen2 and Qwen2.5: biases on q, k and v.
    Qwen2,
}

/// How rotary frequencies are stretched for contexts longer than those of pre-training.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub enum RopeScaling {
    /// Not at all.
    None,
    /// Every frequency divided by `factor`.
    Linear {
        /// The divisor, at least 1.
        factor: f64,
    },
    /// Llama 3.1: low frequencies divided by `factor`, high ones left, a ramp between.
    Llama3 {
        /// The divisor of low frequencies, at least 1.
        factor: f64,
        /// Wavelengths above `original_positions / low_frequency_factor` are divided.
        low_frequency_factor: f64,
        /// Wavelengths below `original_positions / high_frequency_factor` are left.
        high_frequency_factor: f64,
        /// The context of pre-training, in tokens.
        original_positions: usize,
    },
}

/// Token ids with a meaning of their own.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SpecialIds {
    /// Begins a text.
    pub bos: Option<u32>,
    /// Each of these ends a response; `config.json`'s first, then those only `generation_config.json` has.
    pub eos: Vec<u32>,
    /// Fills a batch.
    pub pad: Option<u32>,
    /// Whether a bare vocabulary (GGUF) puts `bos` before every text. A `tokenizer.json` says so itself, and then this
    /// is false.
    pub add_bos: bool,
}

/// A decoder's architecture, checked: every size is positive, heads divide, and head size is even.
#[derive(Clone, Debug, PartialEq)]
pub struct DecoderConfig {
    /// The family.
    pub family: Family,
    /// Rows of the embedding: the number of token ids.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the feed-forward layer.
    pub intermediate_size: usize,
    /// Number of layers.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Width of a head; even. Not always `hidden_size / heads`.
    pub head_dim: usize,
    /// Added to the mean square in every norm.
    pub rms_norm_eps: f64,
    /// Base of the rotary wavelengths.
    pub rope_theta: f64,
    /// Their stretching.
    pub rope_scaling: RopeScaling,
    /// Whether the vocabulary projection is the embedding itself.
    pub tie_word_embeddings: bool,
    /// Whether q, k and v have biases.
    pub qkv_bias: bool,
    /// Whether the attention's output has a bias.
    pub output_bias: bool,
    /// The longest sequence, in tokens.
    pub max_positions: usize,
    /// A token attends to this many tokens at most, itself included; sequences that fit need no window.
    pub sliding_window: Option<usize>,
    /// Token ids with a meaning of their own.
    pub special_ids: SpecialIds,
}

impl DecoderConfig {
    /// Width of all query heads together.
    pub fn query_size(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Width of all key (or value) heads together.
    pub fn kv_size(&self) -> usize {
        self.kv_heads * self.head_dim
    }

    /// The rotary frequencies in radians a token, scaling applied, `[head_dim / 2]`; computed in f64.
    ///
    /// # Examples
    /// With `head_dim` 4 and `rope_theta` 10000: one radian a token, and 10000^(-2/4) = 1/100.
    pub fn inverse_frequencies(&self) -> Vec<f32> {
        let size = self.head_dim as f64;
        (0..self.head_dim / 2)
            .map(|pair| {
                let frequency = self.rope_theta.powf(-((2 * pair) as f64) / size);
                (frequency / self.rope_scaling.divisor(frequency)) as f32
            })
            .collect()
    }

    /// The factor on attention's cosines and sines: 1 for every scaling here.
    pub fn rope_attention_scale(&self) -> f32 {
        1.0
    }

    /// Checks that a sequence of `tokens` fits.
    ///
    /// # Errors
    /// [`Error::SequenceTooLong`] beyond `max_positions`, or beyond the sliding window, which is not implemented.
    pub fn check_length(&self, tokens: usize) -> Result<()> {
        let limits = [
            (Some(self.max_positions), "max_position_embeddings"),
            (self.sliding_window, "sliding_window"),
        ];
        for (limit, what) in limits {
            if let Some(limit) = limit.filter(|&limit| tokens > limit) {
                return Err(Error::SequenceTooLong {
                    tokens,
                    limit,
                    what,
                });
            }
        }
        Ok(())
    }

    /// Checks that every id is in the vocabulary.
    ///
    /// # Errors
    /// [`Error::TokenOutOfRange`], with the first that is not.
    pub fn check_tokens(&self, ids: &[u32]) -> Result<()> {
        match ids.iter().find(|&&id| id as usize >= self.vocab_size) {
            None => Ok(()),
            Some(&id) => Err(Error::TokenOutOfRange {
                id,
                vocab: self.vocab_size,
            }),
        }
    }

    /// Every tensor of the decoder with its shape, by Hugging Face name; without the vocabulary projection if tied.
    pub fn tensors(&self) -> impl Iterator<Item = (String, Vec<usize>)> + '_ {
        let outer = [
            (
                "model.embed_tokens.weight",
                vec![self.vocab_size, self.hidden_size],
            ),
            ("model.norm.weight", vec![self.hidden_size]),
        ];
        let head = (!self.tie_word_embeddings).then(|| {
            (
                "lm_head.weight".to_owned(),
                vec![self.vocab_size, self.hidden_size],
            )
        });
        outer
            .into_iter()
            .map(|(name, shape)| (name.to_owned(), shape))
            .chain(head)
            .chain((0..self.layers).flat_map(|layer| self.layer_tensors(layer)))
    }

    fn layer_tensors(&self, layer: usize) -> Vec<(String, Vec<usize>)> {
        let mut tensors = Vec::with_capacity(13);
        for norm in ["input_layernorm", "post_attention_layernorm"] {
            tensors.push((
                format!("model.layers.{layer}.{norm}.weight"),
                vec![self.hidden_size],
            ));
        }
        for (module, [outputs, inputs]) in self.layer_linears() {
            let path = format!("model.layers.{layer}.{module}");
            if self.has_bias(module) {
                tensors.push((format!("{path}.bias"), vec![outputs]));
            }
            tensors.push((format!("{path}.weight"), vec![outputs, inputs]));
        }
        tensors
    }

    /// The linear modules of one layer and their `[out, in]`: what LoRA can adapt.
    pub fn layer_linears(&self) -> [(&'static str, [usize; 2]); 7] {
        let (hidden, inner) = (self.hidden_size, self.intermediate_size);
        let (queries, keys) = (self.query_size(), self.kv_size());
        [
            ("self_attn.q_proj", [queries, hidden]),
            ("self_attn.k_proj", [keys, hidden]),
            ("self_attn.v_proj", [keys, hidden]),
            ("self_attn.o_proj", [hidden, queries]),
            ("mlp.gate_proj", [inner, hidden]),
            ("mlp.up_proj", [inner, hidden]),
            ("mlp.down_proj", [hidden, inner]),
        ]
    }

    pub(crate) fn has_bias(&self, module: &str) -> bool {
        match module {
            "self_attn.q_proj" | "self_attn.k_proj" | "self_attn.v_proj" => self.qkv_bias,
            "self_attn.o_proj" => self.output_bias,
            _ => false,
        }
    }

    /// Refuses what no decoder can be, naming the key as Hugging Face writes it.
    pub(crate) fn checked(self, path: &Path) -> Result<Self> {
        let sizes = [
            ("vocab_size", self.vocab_size),
            ("hidden_size", self.hidden_size),
            ("intermediate_size", self.intermediate_size),
            ("num_hidden_layers", self.layers),
            ("num_attention_heads", self.heads),
            ("num_key_value_heads", self.kv_heads),
            ("head_dim", self.head_dim),
            ("max_position_embeddings", self.max_positions),
            ("sliding_window", self.sliding_window.unwrap_or(1)),
        ];
        for (key, size) in sizes {
            if size == 0 || size > SIZE_LIMIT {
                return Err(Error::value(path, key, "from 1 to 2^28", size));
            }
        }
        if !self.heads.is_multiple_of(self.kv_heads) {
            return Err(Error::value(
                path,
                "num_key_value_heads",
                "a divisor of `num_attention_heads`",
                self.kv_heads,
            ));
        }
        if !self.head_dim.is_multiple_of(2) {
            return Err(Error::value(path, "head_dim", "even", self.head_dim));
        }
        let positive = [
            ("rms_norm_eps", self.rms_norm_eps),
            ("rope_theta", self.rope_theta),
        ];
        for (key, number) in positive {
            if !(number.is_finite() && number > 0.0) {
                return Err(Error::value(path, key, "finite and above 0", number));
            }
        }
        self.rope_scaling.check(path)?;
        Ok(self)
    }
}

impl RopeScaling {
    /// What a frequency (radians a token) is divided by.
    pub(crate) fn divisor(self, frequency: f64) -> f64 {
        match self {
            Self::None => 1.0,
            Self::Linear { factor } => factor,
            Self::Llama3 {
                factor,
                low_frequency_factor: low,
                high_frequency_factor: high,
                original_positions,
            } => {
                // Wavelengths in the context of pre-training: below `low` of them, stretched in full.
                let turns = original_positions as f64 * frequency / std::f64::consts::TAU;
                if turns < low {
                    factor
                } else if turns > high {
                    1.0
                } else {
                    let smooth = (turns - low) / (high - low);
                    1.0 / ((1.0 - smooth) / factor + smooth)
                }
            }
        }
    }

    fn check(self, path: &Path) -> Result<()> {
        let (Self::Linear { factor } | Self::Llama3 { factor, .. }) = self else {
            return Ok(());
        };
        if !(factor.is_finite() && factor >= 1.0) {
            return Err(Error::value(
                path,
                "rope_scaling.factor",
                "finite and at least 1",
                factor,
            ));
        }
        if let Self::Llama3 {
            low_frequency_factor: low,
            high_frequency_factor: high,
            original_positions,
            ..
        } = self
        {
            if !(low.is_finite() && low > 0.0) {
                return Err(Error::value(
                    path,
                    "rope_scaling.low_freq_factor",
                    "finite and above 0",
                    low,
                ));
            }
            if !(high.is_finite() && high > low) {
                return Err(Error::value(
                    path,
                    "rope_scaling.high_freq_factor",
                    "finite and above `low_freq_factor`",
                    high,
                ));
            }
            if original_positions == 0 || original_positions > SIZE_LIMIT {
                return Err(Error::value(
                    path,
                    "rope_scaling.original_max_position_embeddings",
                    "from 1 to 2^28",
                    original_positions,
                ));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(scaling: RopeScaling) -> DecoderConfig {
        DecoderConfig {
            family: Family::Llama,
            vocab_size: 16,
            hidden_size: 8,
            intermediate_size: 12,
            layers: 2,
            heads: 2,
            kv_heads: 1,
            head_dim: 4,
            rms_norm_eps: 1e-5,
            rope_theta: 10_000.0,
            rope_scaling: scaling,
            tie_word_embeddings: true,
            qkv_bias: false,
            output_bias: false,
            max_positions: 32,
            sliding_window: Some(16),
            special_ids: SpecialIds::default(),
        }
    }

    #[test]
    fn frequencies_of_four_dimensions_are_one_and_a_hundredth() {
        assert_eq!(config(RopeScaling::None).inverse_frequencies(), [1.0, 0.01]);
        let linear = RopeScaling::Linear { factor: 4.0 };
        assert_eq!(config(linear).inverse_frequencies(), [0.25, 0.0025]);
    }

    /// Wavelengths are 2π and 200π ≈ 628 tokens; against 1024 tokens that is 163 turns and 1.63.
    #[test]
    fn llama3_scaling_leaves_high_divides_low_and_ramps_between() {
        let scaling = |low, high| RopeScaling::Llama3 {
            factor: 8.0,
            low_frequency_factor: low,
            high_frequency_factor: high,
            original_positions: 1024,
        };
        let low = config(scaling(2.0, 4.0)).inverse_frequencies();
        assert_eq!(low, [1.0, 0.00125]);
        let high = config(scaling(1.0, 1.5)).inverse_frequencies();
        assert_eq!(high, [1.0, 0.01]);
        let ramp = config(scaling(1.0, 4.0)).inverse_frequencies();
        let smooth = (10.24 / std::f64::consts::TAU - 1.0) / 3.0;
        let expected = 0.01 * ((1.0 - smooth) / 8.0 + smooth);
        assert!((f64::from(ramp[1]) - expected).abs() < 1e-9, "{ramp:?}");
    }

    #[test]
    fn a_sequence_beyond_the_window_is_refused_with_the_key_that_says_so() {
        let config = config(RopeScaling::None);
        assert!(config.check_length(16).is_ok());
        let error = config.check_length(17).unwrap_err().to_string();
        assert_eq!(
            error,
            "a sequence of 17 tokens is longer than the model's `sliding_window` of 16"
        );
        assert!(config.check_length(33).is_err());
        assert!(config.check_tokens(&[0, 15]).is_ok());
        assert!(config.check_tokens(&[16]).is_err());
    }

    #[test]
    fn tensors_count_the_parameters() {
        let count: usize = config(RopeScaling::None)
            .tensors()
            .map(|(_, shape)| shape.iter().product::<usize>())
            .sum();
        let layer = 2 * 8 + 8 * 8 + 2 * (4 * 8) + 8 * 8 + 3 * 8 * 12;
        assert_eq!(count, 16 * 8 + 8 + 2 * layer);
    }
}
