//! A decoder in a GGUF file: its names, its metadata and its vocabulary, in Hugging Face's terms.

use std::collections::BTreeMap;
use std::path::Path;

use pivotal_core::{BpeVocabulary, TokenKind, TokenizerSource};
use serde_json::Map;

use super::gguf::{Gguf, Tensor, Value};
use super::map::{MappedFile, map_file};
use super::stored::Stored;
use super::{Checkpoint, HostTensor, names_to_read};
use crate::config::{DecoderConfig, Family, RopeScaling, SpecialIds};
use crate::error::{Error, Result};

/// Divisors of the rotary frequencies, which llama.cpp writes for Llama 3.1 and later.
const ROPE_DIVISORS: &str = "rope_freqs.weight";

/// How far the file's f32 divisors may be from those computed here in f64.
const DIVISOR_TOLERANCE: f64 = 1e-4;

/// Reads a GGUF file.
pub(super) fn load(path: &Path) -> Result<Checkpoint> {
    let file = map_file(path)?;
    let gguf = Gguf::parse(&file, path)?;
    let keys = Keys { path, gguf: &gguf };
    let config = keys.config()?;
    let chat_template = keys.text("tokenizer.chat_template")?.map(str::to_owned);
    let tokenizer = keys
        .vocabulary(config.vocab_size)?
        .map(TokenizerSource::Bpe);

    let mut sources = BTreeMap::new();
    for (&name, tensor) in &gguf.tensors {
        if name == ROPE_DIVISORS {
            continue;
        }
        // A name without a counterpart stays as it is, and is reported as having no place.
        sources.insert(
            hugging_face_name(name).unwrap_or_else(|| name.into()),
            tensor,
        );
    }
    let shapes = sources
        .iter()
        .map(|(name, tensor)| (name.clone(), tensor.shape.clone()))
        .collect();
    let tensors = names_to_read(path, &config, &shapes)?
        .into_iter()
        .map(|name| {
            let tensor = to_host(&file, &name, sources[&name], &config)?;
            Ok((name, tensor))
        })
        .collect::<Result<_>>()?;
    Ok(Checkpoint {
        config,
        tensors,
        tokenizer,
        tokenizer_config: Map::new(),
        chat_template,
    })
}

/// The Hugging Face name of a tensor that llama.cpp's converter named.
fn hugging_face_name(name: &str) -> Option<String> {
    match name {
        "token_embd.weight" => return Some("model.embed_tokens.weight".into()),
        "output_norm.weight" => return Some("model.norm.weight".into()),
        "output.weight" => return Some("lm_head.weight".into()),
        _ => {}
    }
    let (layer, rest) = name.strip_prefix("blk.")?.split_once('.')?;
    let (module, kind) = rest.split_once('.')?;
    let module = match module {
        "attn_norm" => "input_layernorm",
        "ffn_norm" => "post_attention_layernorm",
        "attn_q" => "self_attn.q_proj",
        "attn_k" => "self_attn.k_proj",
        "attn_v" => "self_attn.v_proj",
        "attn_output" => "self_attn.o_proj",
        "ffn_gate" => "mlp.gate_proj",
        "ffn_up" => "mlp.up_proj",
        "ffn_down" => "mlp.down_proj",
        _ => return None,
    };
    Some(format!("model.layers.{layer}.{module}.{kind}"))
}

fn to_host(
    file: &MappedFile,
    name: &str,
    tensor: &Tensor<'_>,
    config: &DecoderConfig,
) -> Result<HostTensor> {
    let heads = match config.family {
        Family::Llama if name.contains(".q_proj.") => Some(config.heads),
        Family::Llama if name.contains(".k_proj.") => Some(config.kv_heads),
        _ => None,
    };
    let stored = Stored {
        interleaved: heads.map(|heads| [heads, config.head_dim]),
        ..Stored::new(file, tensor.data, tensor.storage)
    };
    HostTensor::stored(tensor.shape.clone(), stored)
}

/// Undoes the row order of llama.cpp's converter for Llama, which interleaves the two halves of each head for its
/// pairwise rotary embedding; Hugging Face keeps the halves apart.
pub(super) fn separate_halves(values: &[f32], heads: usize, head_dim: usize) -> Vec<f32> {
    let width = values.len() / (heads * head_dim);
    let mut out = Vec::with_capacity(values.len());
    for head in 0..heads {
        for half in 0..2 {
            for pair in 0..head_dim / 2 {
                let row = head * head_dim + 2 * pair + half;
                out.extend_from_slice(&values[row * width..][..width]);
            }
        }
    }
    out
}

/// The metadata, by type.
struct Keys<'a> {
    path: &'a Path,
    gguf: &'a Gguf<'a>,
}

impl<'a> Keys<'a> {
    fn wrong(&self, key: &str, expected: &'static str, found: &Value<'_>) -> Error {
        Error::value(self.path, key, expected, found.describe())
    }

    fn missing(&self, key: &str) -> Error {
        Error::MissingKey {
            path: self.path.into(),
            key: key.into(),
        }
    }

    fn typed<T>(
        &self,
        key: &str,
        expected: &'static str,
        read: impl FnOnce(&'a Value<'a>) -> Option<T>,
    ) -> Result<Option<T>> {
        self.gguf
            .metadata
            .get(key)
            .map(|value| read(value).ok_or_else(|| self.wrong(key, expected, value)))
            .transpose()
    }

    fn text(&self, key: &str) -> Result<Option<&'a str>> {
        self.typed(key, "a string", |value| match value {
            Value::Text(text) => Some(*text),
            _ => None,
        })
    }

    fn number(&self, key: &str) -> Result<Option<f64>> {
        self.typed(key, "a number", |value| match value {
            Value::Float(number) => Some(*number),
            other => other.size().map(|size| size as f64),
        })
    }

    fn size(&self, key: &str) -> Result<Option<usize>> {
        self.typed(key, "a whole number", |value| value.size()?.try_into().ok())
    }

    fn flag(&self, key: &str) -> Result<Option<bool>> {
        self.typed(key, "a boolean", |value| match value {
            Value::Bool(flag) => Some(*flag),
            _ => None,
        })
    }

    fn id(&self, key: &str) -> Result<Option<u32>> {
        self.typed(key, "a token id", |value| value.size()?.try_into().ok())
    }

    fn texts(&self, key: &str) -> Result<Option<&'a [&'a str]>> {
        self.typed(key, "an array of strings", |value| match value {
            Value::Texts(texts) => Some(&texts[..]),
            // Writers that do not know the type of nothing.
            Value::Numbers(_, []) => Some(&[][..]),
            _ => None,
        })
    }

    /// One size for all layers, or an array that repeats it.
    fn uniform_size(&self, key: &str) -> Result<Option<usize>> {
        self.typed(key, "a whole number, the same for every layer", |value| {
            let size = match value.elements() {
                None => value.size()?,
                Some(mut layers) => {
                    let first = layers.next()?.size()?;
                    layers
                        .all(|layer| layer.size() == Some(first))
                        .then_some(first)?
                }
            };
            size.try_into().ok()
        })
    }

    fn config(&self) -> Result<DecoderConfig> {
        let name = "general.architecture";
        let found = self.text(name)?.ok_or_else(|| self.missing(name))?;
        // llama.cpp has no architecture of its own for Mistral: it writes `llama`.
        let family = Family::from_model_type(found).filter(|&family| family != Family::Mistral);
        let family = family.ok_or_else(|| Error::UnknownArchitecture {
            path: self.path.into(),
            found: found.into(),
        })?;
        let key = |suffix: &str| format!("{found}.{suffix}");
        let required = |suffix: &str| {
            let key = key(suffix);
            self.uniform_size(&key)?.ok_or_else(|| self.missing(&key))
        };
        let embedding = self.gguf.tensors.get("token_embd.weight");
        let vocab_size = embedding.and_then(|tensor| tensor.shape.first().copied());
        let vocab_size = vocab_size.ok_or_else(|| Error::MissingTensors {
            path: self.path.into(),
            names: vec!["token_embd.weight".into()],
        })?;
        let hidden_size = required("embedding_length")?;
        let heads = required("attention.head_count")?;
        let head_dim = match self.size(&key("attention.key_length"))? {
            Some(size) => size,
            None => hidden_size.checked_div(heads).unwrap_or(0),
        };
        let rotated_key = key("rope.dimension_count");
        if let Some(rotated) = self.size(&rotated_key)?.filter(|&size| size != head_dim) {
            return Err(Error::value(
                self.path,
                &rotated_key,
                "the size of a head",
                rotated,
            ));
        }
        let attention_bias = self.gguf.tensors.contains_key("blk.0.attn_q.bias");
        let epsilon = key("attention.layer_norm_rms_epsilon");
        let config = DecoderConfig {
            family,
            vocab_size,
            hidden_size,
            intermediate_size: required("feed_forward_length")?,
            layers: required("block_count")?,
            heads,
            kv_heads: self
                .uniform_size(&key("attention.head_count_kv"))?
                .unwrap_or(heads),
            head_dim,
            rms_norm_eps: self
                .number(&epsilon)?
                .ok_or_else(|| self.missing(&epsilon))?,
            rope_theta: self.number(&key("rope.freq_base"))?.unwrap_or(10_000.0),
            rope_scaling: self.scaling(&key("rope.scaling.type"), &key("rope.scaling.factor"))?,
            tie_word_embeddings: !self.gguf.tensors.contains_key("output.weight"),
            qkv_bias: family == Family::Qwen2 || attention_bias,
            output_bias: family == Family::Llama && attention_bias,
            max_positions: required("context_length")?,
            sliding_window: self
                .size(&key("attention.sliding_window"))?
                .filter(|&size| size > 0),
            special_ids: self.special_ids()?,
        }
        .checked(self.path)?;
        self.with_divisors(config)
    }

    fn scaling(&self, kind: &str, factor: &str) -> Result<RopeScaling> {
        match self.text(kind)? {
            None | Some("none") => Ok(RopeScaling::None),
            Some("linear") => Ok(RopeScaling::Linear {
                factor: self.number(factor)?.ok_or_else(|| self.missing(factor))?,
            }),
            Some(other) => Err(Error::value(
                self.path,
                kind,
                "\"none\" or \"linear\"",
                format!("{other:?}"),
            )),
        }
    }

    /// Names the scaling behind the divisors that the file gives, if it gives any.
    ///
    /// The file has the divisors but not the rule. Llama 3.x always ramps from 1 to 4 turns of the context of
    /// pre-training; whichever power of two reproduces the divisors is as good as the true one.
    fn with_divisors(&self, mut config: DecoderConfig) -> Result<DecoderConfig> {
        let Some(tensor) = self.gguf.tensors.get(ROPE_DIVISORS) else {
            return Ok(config);
        };
        let expected = [config.head_dim / 2];
        if tensor.shape != expected {
            return Err(Error::TensorShape {
                path: self.path.into(),
                tensor: ROPE_DIVISORS.into(),
                expected: expected.into(),
                found: tensor.shape.clone(),
            });
        }
        let divisors = tensor.storage.expand(tensor.data);
        let factor = f64::from(divisors.last().copied().unwrap_or(1.0));
        let rules = (4..=24).map(|power| RopeScaling::Llama3 {
            factor,
            low_frequency_factor: 1.0,
            high_frequency_factor: 4.0,
            original_positions: 1 << power,
        });
        let fits = |rule: &RopeScaling| {
            divisors.iter().enumerate().all(|(pair, &divisor)| {
                let exponent = -((2 * pair) as f64) / config.head_dim as f64;
                let expected = rule.divisor(config.rope_theta.powf(exponent));
                (f64::from(divisor) - expected).abs() <= DIVISOR_TOLERANCE * expected
            })
        };
        let rule = [RopeScaling::None, RopeScaling::Linear { factor }]
            .into_iter()
            .chain(rules)
            .find(fits);
        let Some(rule) = rule else {
            return Err(Error::value(
                self.path,
                ROPE_DIVISORS,
                "the divisors of linear or Llama 3 scaling",
                format!("{divisors:?}"),
            ));
        };
        if config.rope_scaling != RopeScaling::None {
            return Err(Error::value(
                self.path,
                ROPE_DIVISORS,
                "absent where the metadata scale the frequencies too",
                "there",
            ));
        }
        config.rope_scaling = rule;
        config.checked(self.path)
    }

    fn special_ids(&self) -> Result<SpecialIds> {
        let ends = ["tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id"];
        let mut eos = Vec::new();
        for key in ends {
            eos.extend(self.id(key)?.filter(|id| !eos.contains(id)));
        }
        // llama.cpp's defaults where the key is absent, by pre-tokenizer.
        let llama3 = ["llama3", "llama-v3", "llama-bpe"];
        let pre = self.text("tokenizer.ggml.pre")?.unwrap_or_default();
        Ok(SpecialIds {
            bos: self.id("tokenizer.ggml.bos_token_id")?,
            eos,
            pad: self.id("tokenizer.ggml.padding_token_id")?,
            add_bos: self
                .flag("tokenizer.ggml.add_bos_token")?
                .unwrap_or_else(|| llama3.contains(&pre)),
        })
    }

    fn vocabulary(&self, vocab_size: usize) -> Result<Option<BpeVocabulary>> {
        match self.text("tokenizer.ggml.model")? {
            None | Some("none") => return Ok(None),
            Some("gpt2") => {}
            Some(other) => {
                return Err(Error::value(
                    self.path,
                    "tokenizer.ggml.model",
                    "\"gpt2\" (byte-level BPE)",
                    format!("{other:?}"),
                ));
            }
        }
        let names = ["tokenizer.ggml.tokens", "tokenizer.ggml.merges"];
        let [tokens, merges] = names.map(|key| {
            let texts = self.texts(key)?.ok_or_else(|| self.missing(key))?;
            Ok(texts
                .iter()
                .map(|&text| text.to_owned())
                .collect::<Vec<_>>())
        });
        let (tokens, merges): (_, Result<_>) = (tokens?, merges);
        if tokens.len() > vocab_size {
            return Err(Error::value(
                self.path,
                names[0],
                "no more tokens than the embedding has rows",
                tokens.len(),
            ));
        }
        Ok(Some(BpeVocabulary {
            kinds: self.kinds(tokens.len())?,
            tokens,
            merges: merges?,
            pre_tokenizer: self.text("tokenizer.ggml.pre")?.unwrap_or("default").into(),
        }))
    }

    fn kinds(&self, tokens: usize) -> Result<Vec<TokenKind>> {
        let key = "tokenizer.ggml.token_type";
        let kinds = self.typed(key, "an array of numbers from 0 to 6", |value| {
            value
                .elements()?
                .map(|kind| match kind.size()? {
                    0 | 1 => Some(TokenKind::Normal),
                    2 => Some(TokenKind::Unknown),
                    3 => Some(TokenKind::Control),
                    4 => Some(TokenKind::UserDefined),
                    5 => Some(TokenKind::Unused),
                    6 => Some(TokenKind::Byte),
                    _ => None,
                })
                .collect::<Option<Vec<_>>>()
        })?;
        match kinds {
            None => Ok(vec![TokenKind::Normal; tokens]),
            Some(kinds) if kinds.len() == tokens => Ok(kinds),
            Some(kinds) => Err(Error::value(
                self.path,
                key,
                "as many entries as there are tokens",
                kinds.len(),
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interleaved_rows_come_apart_by_halves() {
        // Two heads of four rows of two values; the converter wrote rows 0 2 1 3 of each head.
        let written = [0, 2, 1, 3, 4, 6, 5, 7].map(|row| [row as f32, -(row as f32)]);
        let expected = [0, 1, 2, 3, 4, 5, 6, 7].map(|row| [row as f32, -(row as f32)]);
        let got = separate_halves(written.as_flattened(), 2, 4);
        assert_eq!(got, expected.as_flattened());
    }

    #[test]
    fn names_are_those_of_hugging_face() {
        let name = |name| hugging_face_name(name).unwrap();
        assert_eq!(name("output.weight"), "lm_head.weight");
        assert_eq!(
            name("blk.12.attn_output.weight"),
            "model.layers.12.self_attn.o_proj.weight"
        );
        assert_eq!(
            name("blk.0.attn_q.bias"),
            "model.layers.0.self_attn.q_proj.bias"
        );
        assert_eq!(hugging_face_name("blk.0.ffn_gate_inp.weight"), None);
    }
}
