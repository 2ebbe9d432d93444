//! LoRA adapters in peft's format, in and out.
//!
//! Hu et al. 2021, arXiv:2106.09685: `y = x Wᵀ + s·(x Aᵀ) Bᵀ` with `s = alpha / rank`, or `alpha / √rank` with rank
//! stabilisation (Kalajdzievski 2023, arXiv:2312.03732). A directory has `adapter_config.json` and
//! `adapter_model.safetensors` with `base_model.model.<module>.lora_A.weight` `[rank, in]` and `lora_B.weight`
//! `[out, rank]`.
//!
//! A value head lies in the same file as `base_model.model.score.weight` `[1, hidden]`, named in `modules_to_save`, with
//! the task `SEQ_CLS`: what peft itself writes for a transformers sequence classifier of one label, and loads.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use pivotal_core::{FileError, read_file, write_checked};
use serde_json::{Map, Value, json};

use crate::checkpoint::{HostTensor, VALUE_HEAD, safetensors};
use crate::config::DecoderConfig;
use crate::error::{Error, Result};
use crate::save::write_json;

const CONFIG: &str = "adapter_config.json";
const WEIGHTS: &str = "adapter_model.safetensors";
/// What peft can switch on and this cannot; each changes what the two factors mean, or adds weights.
const UNSUPPORTED: [&str; 13] = [
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "fan_in_fan_out",
    "lora_bias",
    "rank_pattern",
    "alpha_pattern",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
];
const PREFIX: &str = "base_model.model.";

/// What an adapted model is for; peft picks its model class by it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum AdapterTask {
    /// A policy: `CAUSAL_LM`.
    CausalLm,
    /// A reward or value model: `SEQ_CLS`, with one label.
    SequenceClassification,
}

impl AdapterTask {
    fn name(self) -> &'static str {
        match self {
            Self::CausalLm => "CAUSAL_LM",
            Self::SequenceClassification => "SEQ_CLS",
        }
    }
}

/// The two factors on one linear module.
#[derive(Clone, Debug, PartialEq)]
pub struct LoraModule {
    /// `[rank, in]`.
    pub a: HostTensor,
    /// `[out, rank]`.
    pub b: HostTensor,
}

/// A LoRA adapter.
#[derive(Clone, Debug, PartialEq)]
pub struct LoraAdapter {
    /// The inner dimension, the same for every module.
    pub rank: usize,
    /// The strength; see [`LoraAdapter::scale`].
    pub alpha: f64,
    /// Whether the scale is `alpha / √rank` instead of `alpha / rank`.
    pub rank_stabilised: bool,
    /// What the adapted model is for.
    pub task: AdapterTask,
    /// The base model's path or name, for peft and for people.
    pub base_model: Option<String>,
    /// The factors by module path: `model.layers.0.self_attn.q_proj`, …
    pub modules: BTreeMap<String, LoraModule>,
    /// The value head's weight, `[1, hidden]`, if the adapter carries one.
    pub value_head: Option<HostTensor>,
}

impl LoraAdapter {
    /// The factor on `(x Aᵀ) Bᵀ`.
    pub fn scale(&self) -> f64 {
        let rank = self.rank as f64;
        self.alpha
            / if self.rank_stabilised {
                rank.sqrt()
            } else {
                rank
            }
    }

    /// Reads a directory that peft, or [`LoraAdapter::save`], wrote.
    ///
    /// # Errors
    /// Whatever is wrong with the files, by name; [`Error::Value`] for what peft can do and this cannot (DoRA, biases,
    /// ranks that differ, embeddings).
    pub fn load(directory: &Path) -> Result<Self> {
        let path = directory.join(CONFIG);
        let bytes = read_file(&path)?;
        let config: Map<String, Value> =
            serde_json::from_slice(&bytes).map_err(|source| Error::Json {
                path: path.clone(),
                source,
            })?;
        let weights_path = directory.join(WEIGHTS);
        if !weights_path.is_file() && directory.join("adapter_model.bin").is_file() {
            return Err(Error::NoWeights {
                path: directory.into(),
            });
        }
        let mut adapter = Self::from_config(&config, &path)?;
        adapter.take_tensors(safetensors::read_all(&weights_path)?, &weights_path)?;
        Ok(adapter)
    }

    fn from_config(config: &Map<String, Value>, path: &Path) -> Result<Self> {
        let get = |key: &str| config.get(key).unwrap_or(&Value::Null);
        let wrong = |key: &str, expected| Err(Error::value(path, key, expected, get(key)));
        if get("peft_type") != "LORA" {
            return wrong("peft_type", "\"LORA\"");
        }
        if !matches!(get("bias"), Value::Null) && get("bias") != "none" {
            return wrong("bias", "\"none\"");
        }
        for key in UNSUPPORTED {
            let value = get(key);
            let off = value.is_null()
                || *value == Value::Bool(false)
                || value.as_object().is_some_and(Map::is_empty);
            if !off {
                return wrong(key, "absent, null, false or empty");
            }
        }
        // The others (PiSSA, OLoRA, CorDA, LoftQ) change the base weights too.
        let init = get("init_lora_weights");
        if !(init.is_null() || init.is_boolean() || init == "gaussian" || init == "orthogonal") {
            return wrong(
                "init_lora_weights",
                "true, false, \"gaussian\" or \"orthogonal\"",
            );
        }
        let rank = get("r")
            .as_u64()
            .and_then(|rank| usize::try_from(rank).ok());
        let Some(rank) = rank.filter(|&rank| rank > 0) else {
            return wrong("r", "a whole number above 0");
        };
        let Some(alpha) = get("lora_alpha").as_f64().filter(|alpha| alpha.is_finite()) else {
            return wrong("lora_alpha", "a number");
        };
        let rank_stabilised = match get("use_rslora") {
            Value::Null => false,
            Value::Bool(flag) => *flag,
            _ => return wrong("use_rslora", "true or false"),
        };
        let task = match get("task_type").as_str() {
            None | Some("CAUSAL_LM") => AdapterTask::CausalLm,
            Some("SEQ_CLS") => AdapterTask::SequenceClassification,
            Some(_) => return wrong("task_type", "\"CAUSAL_LM\" or \"SEQ_CLS\""),
        };
        Ok(Self {
            rank,
            alpha,
            rank_stabilised,
            task,
            base_model: get("base_model_name_or_path").as_str().map(str::to_owned),
            modules: BTreeMap::new(),
            value_head: None,
        })
    }

    fn take_tensors(&mut self, tensors: BTreeMap<String, HostTensor>, path: &Path) -> Result<()> {
        let mut factors = BTreeMap::<String, [Option<HostTensor>; 2]>::new();
        let mut extra = Vec::new();
        for (name, tensor) in tensors {
            let module = name.strip_prefix(PREFIX).unwrap_or(&name);
            if module == VALUE_HEAD {
                self.value_head = Some(tensor);
            } else if let Some(module) = module.strip_suffix(".lora_A.weight") {
                factors.entry(module.to_owned()).or_default()[0] = Some(tensor);
            } else if let Some(module) = module.strip_suffix(".lora_B.weight") {
                factors.entry(module.to_owned()).or_default()[1] = Some(tensor);
            } else {
                extra.push(name);
            }
        }
        if !extra.is_empty() {
            return Err(Error::ExtraTensors {
                path: path.into(),
                names: extra,
            });
        }
        for (module, pair) in factors {
            let [Some(a), Some(b)] = pair else {
                let lacking = if pair[0].is_none() {
                    "lora_A"
                } else {
                    "lora_B"
                };
                return Err(Error::MissingTensors {
                    path: path.into(),
                    names: vec![format!("{PREFIX}{module}.{lacking}.weight")],
                });
            };
            self.modules.insert(module, LoraModule { a, b });
        }
        Ok(())
    }

    /// Checks every module's name and shapes, and the value head's, against a decoder.
    ///
    /// # Errors
    /// [`Error::ExtraTensors`] for a module that the decoder does not have or that is not linear; [`Error::Shape`].
    pub fn check(&self, config: &DecoderConfig) -> Result<()> {
        let linears: BTreeMap<_, _> = config.layer_linears().into();
        for (module, factors) in &self.modules {
            let size = module
                .strip_prefix("model.layers.")
                .and_then(|rest| rest.split_once('.'))
                .filter(|(layer, _)| {
                    layer
                        .parse()
                        .is_ok_and(|layer: usize| layer < config.layers)
                })
                .and_then(|(_, name)| linears.get(name));
            let Some(&[outputs, inputs]) = size else {
                return Err(Error::ExtraTensors {
                    path: "the adapter".into(),
                    names: vec![module.clone()],
                });
            };
            same_shape(module, "lora_A.weight", &factors.a, [self.rank, inputs])?;
            same_shape(module, "lora_B.weight", &factors.b, [outputs, self.rank])?;
        }
        match &self.value_head {
            Some(head) => same_shape("score", "weight", head, [1, config.hidden_size]),
            None => Ok(()),
        }
    }

    /// Writes a directory that peft loads; the config last.
    ///
    /// # Errors
    /// [`Error::File`] if a write fails.
    pub fn save(&self, directory: &Path) -> Result<()> {
        std::fs::create_dir_all(directory).map_err(|source| {
            Error::File(FileError::Write {
                path: directory.into(),
                source,
            })
        })?;
        let mut tensors = BTreeMap::new();
        for (module, LoraModule { a, b }) in &self.modules {
            tensors.insert(format!("{PREFIX}{module}.lora_A.weight"), a);
            tensors.insert(format!("{PREFIX}{module}.lora_B.weight"), b);
        }
        if let Some(head) = &self.value_head {
            tensors.insert(format!("{PREFIX}{VALUE_HEAD}"), head);
        }
        let path = directory.join(WEIGHTS);
        let named = tensors
            .iter()
            .map(|(name, &tensor)| (name.as_str(), tensor));
        let bytes = safetensors::serialize(named).map_err(|source| Error::Safetensors {
            path: path.clone(),
            source,
        })?;
        write_checked(&path, &bytes)?;
        write_json(&directory.join(CONFIG), &self.to_config())
    }

    fn to_config(&self) -> Value {
        // The last part of each path is enough for peft when the module is adapted in every layer; exact paths always are.
        let mut layers = BTreeMap::<&str, BTreeSet<&str>>::new();
        let mut all = BTreeSet::new();
        for module in self.modules.keys() {
            let name = module.rsplit('.').next().unwrap_or(module);
            let layer = module.split('.').nth(2).unwrap_or_default();
            layers.entry(name).or_default().insert(layer);
            all.insert(layer);
        }
        let targets: Vec<&str> = if layers.values().all(|adapted| *adapted == all) {
            layers.into_keys().collect()
        } else {
            self.modules.keys().map(String::as_str).collect()
        };
        json!({
            "peft_type": "LORA",
            "task_type": self.task.name(),
            "base_model_name_or_path": self.base_model,
            "r": self.rank,
            "lora_alpha": self.alpha,
            "use_rslora": self.rank_stabilised,
            "lora_dropout": 0.0,
            "bias": "none",
            "fan_in_fan_out": false,
            "inference_mode": true,
            "target_modules": targets,
            "modules_to_save": self.value_head.as_ref().map(|_| ["score"]),
        })
    }
}

fn same_shape(module: &str, part: &str, tensor: &HostTensor, expected: [usize; 2]) -> Result<()> {
    if tensor.shape() == expected {
        return Ok(());
    }
    Err(Error::Shape {
        what: format!("{module}.{part}"),
        expected: expected.into(),
        found: tensor.shape().to_vec(),
    })
}
