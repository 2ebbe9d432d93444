//! `config.json` and `generation_config.json`, in and out.
//!
//! Defaults of absent keys are those of transformers 5; what it would ignore or a decoder here does not have is an error.

use std::path::Path;

use serde_json::{Map, Value, json};

use super::{DecoderConfig, Family, RopeScaling, SpecialIds};
use crate::error::{Error, Result};

impl Family {
    /// The `model_type` of Hugging Face and the architecture's name in GGUF.
    pub fn model_type(self) -> &'static str {
        match self {
            Self::Llama => "llama",
            Self::Mistral => "mistral",
            Self::Qwen2 => "qwen2",
        }
    }

    pub(crate) fn from_model_type(name: &str) -> Option<Self> {
        [Self::Llama, Self::Mistral, Self::Qwen2]
            .into_iter()
            .find(|family| family.model_type() == name)
    }

    fn class(self, task: &str) -> String {
        let prefix = match self {
            Self::Llama => "Llama",
            Self::Mistral => "Mistral",
            Self::Qwen2 => "Qwen2",
        };
        format!("{prefix}For{task}")
    }
}

impl DecoderConfig {
    /// Reads the content of a `config.json`; `path` is only for messages.
    ///
    /// # Errors
    /// [`Error::Json`], [`Error::MissingKey`], [`Error::Value`] or [`Error::UnknownArchitecture`].
    pub fn from_json(bytes: &[u8], path: &Path) -> Result<Self> {
        let keys = Keys::parse(bytes, path)?;
        let found = keys
            .text("model_type")?
            .ok_or_else(|| keys.missing("model_type"))?;
        let family = Family::from_model_type(found).ok_or_else(|| Error::UnknownArchitecture {
            path: path.into(),
            found: found.into(),
        })?;
        keys.only("hidden_act", &json!("silu"))?;
        keys.only("mlp_bias", &json!(false))?;
        keys.only("partial_rotary_factor", &json!(1.0))?;
        keys.only("quantization_config", &Value::Null)?;

        let heads = keys.required_size("num_attention_heads")?;
        let hidden_size = keys.required_size("hidden_size")?;
        let default_kv_heads = match family {
            Family::Llama => heads,
            Family::Mistral => 8,
            Family::Qwen2 => 32,
        };
        let default_positions = match family {
            Family::Llama => 2048,
            Family::Mistral => 4096 * 32,
            Family::Qwen2 => 32768,
        };
        let max_positions = keys
            .size("max_position_embeddings")?
            .unwrap_or(default_positions);
        let attention_bias =
            family == Family::Llama && keys.flag("attention_bias")?.unwrap_or(false);
        let (rope_theta, rope_scaling) = keys.rope(max_positions)?;
        Self {
            family,
            vocab_size: keys.required_size("vocab_size")?,
            hidden_size,
            intermediate_size: keys.required_size("intermediate_size")?,
            layers: keys.required_size("num_hidden_layers")?,
            heads,
            kv_heads: keys
                .size("num_key_value_heads")?
                .unwrap_or(default_kv_heads),
            head_dim: match keys.size("head_dim")? {
                Some(size) => size,
                None => hidden_size.checked_div(heads).unwrap_or(0),
            },
            rms_norm_eps: keys.number("rms_norm_eps")?.unwrap_or(1e-6),
            rope_theta,
            rope_scaling,
            tie_word_embeddings: keys.flag("tie_word_embeddings")?.unwrap_or(false),
            qkv_bias: family == Family::Qwen2 || attention_bias,
            output_bias: attention_bias,
            max_positions,
            sliding_window: keys.sliding_window(family)?,
            special_ids: keys.special_ids()?,
        }
        .checked(path)
    }

    /// The `config.json` of this decoder, as transformers 4 and 5 read it; `value_head` says which class it is.
    pub fn to_json(&self, value_head: bool) -> Value {
        let task = if value_head {
            "SequenceClassification"
        } else {
            "CausalLM"
        };
        let scaling = self.rope_scaling.to_json();
        let mut parameters = match &scaling {
            Value::Object(keys) => keys.clone(),
            _ => Map::from_iter([("rope_type".to_owned(), json!("default"))]),
        };
        parameters.insert("rope_theta".into(), json!(self.rope_theta));
        let mut config = json!({
            "architectures": [self.family.class(task)],
            "model_type": self.family.model_type(),
            "dtype": "float32",
            "hidden_act": "silu",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope_theta,
            "rope_scaling": scaling,
            "rope_parameters": parameters,
            "tie_word_embeddings": self.tie_word_embeddings,
            "max_position_embeddings": self.max_positions,
            "sliding_window": self.sliding_window,
            "bos_token_id": self.special_ids.bos,
            "eos_token_id": self.special_ids.eos_json(),
            "pad_token_id": self.special_ids.pad,
        });
        let keys = config.as_object_mut().expect("an object literal");
        match self.family {
            Family::Llama => {
                keys.insert("attention_bias".into(), json!(self.qkv_bias));
                keys.insert("mlp_bias".into(), json!(false));
                keys.remove("sliding_window");
            }
            Family::Mistral => {}
            Family::Qwen2 => {
                keys.insert(
                    "use_sliding_window".into(),
                    json!(self.sliding_window.is_some()),
                );
            }
        }
        if value_head {
            keys.insert("id2label".into(), json!({"0": "value"}));
            keys.insert("label2id".into(), json!({"value": 0}));
        }
        config
    }
}

impl SpecialIds {
    /// Adds what a `generation_config.json` says.
    pub(crate) fn merge_generation(&mut self, bytes: &[u8], path: &Path) -> Result<()> {
        let other = Keys::parse(bytes, path)?.special_ids()?;
        self.bos = self.bos.or(other.bos);
        self.pad = self.pad.or(other.pad);
        for id in other.eos {
            if !self.eos.contains(&id) {
                self.eos.push(id);
            }
        }
        Ok(())
    }

    pub(crate) fn eos_json(&self) -> Value {
        match self.eos[..] {
            [] => Value::Null,
            [id] => json!(id),
            ref ids => json!(ids),
        }
    }
}

impl RopeScaling {
    fn to_json(self) -> Value {
        match self {
            Self::None => Value::Null,
            Self::Linear { factor } => json!({"rope_type": "linear", "factor": factor}),
            Self::Llama3 {
                factor,
                low_frequency_factor,
                high_frequency_factor,
                original_positions,
            } => json!({
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": low_frequency_factor,
                "high_freq_factor": high_frequency_factor,
                "original_max_position_embeddings": original_positions,
            }),
        }
    }
}

/// The keys of one JSON object, read by type; `null` and absent are the same, as in transformers.
struct Keys<'a> {
    path: &'a Path,
    prefix: &'a str,
    map: Map<String, Value>,
}

impl<'a> Keys<'a> {
    fn parse(bytes: &[u8], path: &'a Path) -> Result<Self> {
        let value = serde_json::from_slice(bytes).map_err(|source| Error::Json {
            path: path.into(),
            source,
        })?;
        match value {
            Value::Object(map) => Ok(Self {
                path,
                prefix: "",
                map,
            }),
            other => Err(Error::value(path, "the file", "a JSON object", other)),
        }
    }

    fn get(&self, key: &str) -> Option<&Value> {
        self.map.get(key).filter(|value| !value.is_null())
    }

    fn wrong(&self, key: &str, expected: &'static str, found: &Value) -> Error {
        Error::value(self.path, &format!("{}{key}", self.prefix), expected, found)
    }

    fn missing(&self, key: &str) -> Error {
        Error::MissingKey {
            path: self.path.into(),
            key: format!("{}{key}", self.prefix),
        }
    }

    /// The key's value as `read` sees it.
    fn typed<'v, T>(
        &'v self,
        key: &str,
        expected: &'static str,
        read: impl FnOnce(&'v Value) -> Option<T>,
    ) -> Result<Option<T>> {
        self.get(key)
            .map(|value| read(value).ok_or_else(|| self.wrong(key, expected, value)))
            .transpose()
    }

    fn size(&self, key: &str) -> Result<Option<usize>> {
        self.typed(key, "a whole number", |value| {
            value.as_u64().and_then(|size| size.try_into().ok())
        })
    }

    fn required_size(&self, key: &str) -> Result<usize> {
        self.size(key)?.ok_or_else(|| self.missing(key))
    }

    fn number(&self, key: &str) -> Result<Option<f64>> {
        self.typed(key, "a number", Value::as_f64)
    }

    fn required_number(&self, key: &str) -> Result<f64> {
        self.number(key)?.ok_or_else(|| self.missing(key))
    }

    fn flag(&self, key: &str) -> Result<Option<bool>> {
        self.typed(key, "true or false", Value::as_bool)
    }

    fn text(&self, key: &str) -> Result<Option<&str>> {
        self.typed(key, "a string", Value::as_str)
    }

    fn object(&self, key: &'a str, prefix: &'a str) -> Result<Option<Keys<'a>>> {
        let map = self.typed(key, "an object", Value::as_object)?;
        Ok(map.map(|map| Keys {
            path: self.path,
            prefix,
            map: map.clone(),
        }))
    }

    /// Refuses any value but `only`, which is also the default.
    fn only(&self, key: &str, only: &Value) -> Result<()> {
        match self.get(key) {
            None => Ok(()),
            Some(value)
                if value == only || value.as_f64().is_some_and(|n| Some(n) == only.as_f64()) =>
            {
                Ok(())
            }
            Some(value) => Err(self.wrong(
                key,
                match only {
                    Value::String(_) => "\"silu\"",
                    Value::Bool(_) => "false",
                    Value::Null => "null (quantised safetensors are not read; GGUF is)",
                    _ => "1",
                },
                value,
            )),
        }
    }

    /// An id, or none: old Llama configs write -1 for an absent pad id.
    fn id(&self, key: &str) -> Result<Option<u32>> {
        if self
            .get(key)
            .and_then(Value::as_i64)
            .is_some_and(|id| id < 0)
        {
            return Ok(None);
        }
        self.typed(key, "a token id", one_id)
    }

    fn special_ids(&self) -> Result<SpecialIds> {
        let eos = self.typed(
            "eos_token_id",
            "a token id or a list of them",
            |value| match value {
                Value::Array(ids) => ids.iter().map(one_id).collect(),
                one => one_id(one).map(|id| vec![id]),
            },
        );
        Ok(SpecialIds {
            bos: self.id("bos_token_id")?,
            eos: eos?.unwrap_or_default(),
            pad: self.id("pad_token_id")?,
            add_bos: false,
        })
    }

    /// Llama has no window; Qwen2's counts only when switched on; Mistral's key is absent in no released config, and the
    /// class's default of 4096 stands for it.
    fn sliding_window(&self, family: Family) -> Result<Option<usize>> {
        match family {
            Family::Llama => Ok(None),
            Family::Mistral if !self.map.contains_key("sliding_window") => Ok(Some(4096)),
            Family::Mistral => self.size("sliding_window"),
            Family::Qwen2 if self.flag("use_sliding_window")? != Some(true) => Ok(None),
            Family::Qwen2 => Ok(Some(self.size("sliding_window")?.unwrap_or(4096))),
        }
    }

    /// Base and scaling from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before).
    fn rope(&self, max_positions: usize) -> Result<(f64, RopeScaling)> {
        let new = self.object("rope_parameters", "rope_parameters.")?;
        let old = self.object("rope_scaling", "rope_scaling.")?;
        let mut theta = None;
        for keys in [&new, &old].into_iter().flatten() {
            theta = theta.or(keys.number("rope_theta")?);
            keys.only("partial_rotary_factor", &json!(1.0))?;
        }
        let theta = theta.or(self.number("rope_theta")?).unwrap_or(10_000.0);
        let scaling = match old.or(new) {
            Some(keys) => keys.rope_scaling(max_positions)?,
            None => RopeScaling::None,
        };
        Ok((theta, scaling))
    }

    fn rope_scaling(&self, max_positions: usize) -> Result<RopeScaling> {
        let key = if self.get("rope_type").is_some() {
            "rope_type"
        } else {
            "type"
        };
        match self.text(key)? {
            None | Some("default") => Ok(RopeScaling::None),
            Some("linear") => Ok(RopeScaling::Linear {
                factor: self.required_number("factor")?,
            }),
            Some("llama3") => Ok(RopeScaling::Llama3 {
                factor: self.required_number("factor")?,
                low_frequency_factor: self.required_number("low_freq_factor")?,
                high_frequency_factor: self.required_number("high_freq_factor")?,
                original_positions: self
                    .size("original_max_position_embeddings")?
                    .unwrap_or(max_positions),
            }),
            Some(other) => Err(self.wrong(
                key,
                "one of \"default\", \"linear\", \"llama3\"",
                &json!(other),
            )),
        }
    }
}

fn one_id(value: &Value) -> Option<u32> {
    value.as_u64().and_then(|id| id.try_into().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn llama() -> Value {
        json!({
            "model_type": "llama", "vocab_size": 128, "hidden_size": 32, "intermediate_size": 64,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
            "rms_norm_eps": 1e-5, "bos_token_id": 1, "eos_token_id": [2, 3], "pad_token_id": -1,
        })
    }

    fn read(config: &Value) -> Result<DecoderConfig> {
        DecoderConfig::from_json(config.to_string().as_bytes(), Path::new("config.json"))
    }

    fn with(key: &str, value: Value) -> Value {
        let mut config = llama();
        config[key] = value;
        config
    }

    #[test]
    fn defaults_are_those_of_transformers() {
        let config = read(&llama()).unwrap();
        assert_eq!((config.head_dim, config.max_positions), (8, 2048));
        assert_eq!(
            (config.rope_theta, config.rope_scaling),
            (1e4, RopeScaling::None)
        );
        assert_eq!(config.special_ids.eos, [2, 3]);
        assert_eq!(config.special_ids.pad, None);
        assert!(!config.tie_word_embeddings && !config.qkv_bias && config.sliding_window.is_none());
        let mistral = read(&with("model_type", json!("mistral"))).unwrap();
        assert_eq!(mistral.sliding_window, Some(4096));
        let qwen = read(&with("model_type", json!("qwen2"))).unwrap();
        assert!(qwen.qkv_bias && !qwen.output_bias && qwen.sliding_window.is_none());
    }

    #[test]
    fn both_spellings_of_rope_scaling_say_the_same() {
        let scaling = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 64});
        let mut old = with("rope_scaling", scaling.clone());
        old["rope_theta"] = json!(500_000.0);
        let mut parameters = scaling;
        parameters["rope_theta"] = json!(500_000.0);
        let new = with("rope_parameters", parameters);
        let config = read(&new).unwrap();
        assert_eq!(read(&old).unwrap(), config);
        assert_eq!(config.rope_theta, 5e5);
        assert!(matches!(
            config.rope_scaling,
            RopeScaling::Llama3 {
                original_positions: 64,
                ..
            }
        ));
        let linear = read(&with(
            "rope_scaling",
            json!({"type": "linear", "factor": 2}),
        ))
        .unwrap();
        assert_eq!(linear.rope_scaling, RopeScaling::Linear { factor: 2.0 });
    }

    #[test]
    fn what_is_written_reads_back() {
        for family in ["llama", "mistral", "qwen2"] {
            for scaling in [json!(null), json!({"rope_type": "linear", "factor": 2.0})] {
                let mut config = with("rope_scaling", scaling);
                config["model_type"] = json!(family);
                let config = read(&config).unwrap();
                assert_eq!(read(&config.to_json(false)).unwrap(), config);
                assert_eq!(read(&config.to_json(true)).unwrap(), config);
            }
        }
    }

    #[test]
    fn every_fault_is_named() {
        let cases = [
            (with("model_type", json!("gpt2")), "architecture `gpt2`"),
            (
                with("model_type", json!(null)),
                "lacks the key `model_type`",
            ),
            (
                with("hidden_size", json!("32")),
                "`hidden_size` in `config.json` is \"32\"",
            ),
            (
                with("hidden_size", json!(-1)),
                "`hidden_size` in `config.json` is -1",
            ),
            (
                with("hidden_size", json!(null)),
                "lacks the key `hidden_size`",
            ),
            (
                with("hidden_size", json!(u64::MAX)),
                "expected from 1 to 2^28",
            ),
            (
                with("num_attention_heads", json!(0)),
                "`num_attention_heads`",
            ),
            (with("num_key_value_heads", json!(3)), "a divisor"),
            (with("head_dim", json!(7)), "expected even"),
            (with("rms_norm_eps", json!(0.0)), "`rms_norm_eps`"),
            (with("hidden_act", json!("gelu")), "`hidden_act`"),
            (with("mlp_bias", json!(true)), "`mlp_bias`"),
            (
                with("partial_rotary_factor", json!(0.5)),
                "`partial_rotary_factor`",
            ),
            (
                with("quantization_config", json!({"bits": 4})),
                "`quantization_config`",
            ),
            (with("eos_token_id", json!([1, "a"])), "`eos_token_id`"),
            (
                with("rope_scaling", json!({"rope_type": "yarn"})),
                "`rope_scaling.rope_type`",
            ),
            (
                with("rope_scaling", json!({"rope_type": "linear"})),
                "`rope_scaling.factor`",
            ),
            (
                with("rope_scaling", json!({"type": "linear", "factor": 0.5})),
                "at least 1",
            ),
        ];
        for (config, expected) in cases {
            let message = read(&config).unwrap_err().to_string();
            assert!(message.contains(expected), "{message} has no {expected}");
        }
        let message = DecoderConfig::from_json(b"[1", Path::new("x/config.json")).unwrap_err();
        assert!(
            message
                .to_string()
                .starts_with("`x/config.json` is not valid JSON")
        );
        assert!(read(&json!([])).is_err());
    }
}
