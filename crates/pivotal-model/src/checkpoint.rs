//! A model on disk: config, weights, tokenizer, chat template.

mod gguf;
mod gguf_decoder;
mod map;
mod quantized;
pub(crate) mod safetensors;
mod stored;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::OnceLock;

use pivotal_core::{TokenizerSource, read_file};
use serde_json::{Map, Value};

use crate::config::DecoderConfig;
use crate::error::{Error, Result};

use self::stored::Stored;

pub use self::safetensors::{read_tensors, tensors_to_bytes};

/// A missing name is only worth listing so often; a config that announces 2^28 layers is refused after these.
const MISSING_LIMIT: usize = 64;

/// The value head's name in transformers' sequence classifiers, `[1, hidden]` and without bias.
pub(crate) const VALUE_HEAD: &str = "score.weight";
const VOCABULARY_HEAD: &str = "lm_head.weight";

/// An array in main memory, row-major. One of a file stays there until its values are asked for.
#[derive(Clone, Debug)]
pub struct HostTensor {
    shape: Vec<usize>,
    values: Values,
}

#[derive(Clone, Debug)]
enum Values {
    Here(Vec<f32>),
    Stored {
        stored: Stored,
        /// Once somebody has asked to see them.
        read: OnceLock<Vec<f32>>,
    },
}

impl PartialEq for HostTensor {
    fn eq(&self, other: &Self) -> bool {
        self.shape == other.shape && self.values() == other.values()
    }
}

impl HostTensor {
    /// An array of `shape` over its `values`.
    ///
    /// # Errors
    /// [`Error::Shape`] if the shape's product is not the number of values.
    pub fn new(shape: Vec<usize>, values: Vec<f32>) -> Result<Self> {
        Self::with(shape, values.len(), Values::Here(values))
    }

    /// An array of `shape` whose values are in a file.
    ///
    /// # Errors
    /// [`Error::Shape`] if the shape's product is not the number of values.
    fn stored(shape: Vec<usize>, stored: Stored) -> Result<Self> {
        let read = OnceLock::new();
        Self::with(shape, stored.elements(), Values::Stored { stored, read })
    }

    fn with(shape: Vec<usize>, elements: usize, values: Values) -> Result<Self> {
        let size = shape
            .iter()
            .try_fold(1usize, |size, &dim| size.checked_mul(dim));
        if size != Some(elements) {
            return Err(Error::Shape {
                what: "values".into(),
                expected: shape,
                found: vec![elements],
            });
        }
        Ok(Self { shape, values })
    }

    /// The shape; for a weight `[out, in]`.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// The values, row-major; those of a file are read now, and stay.
    pub fn values(&self) -> &[f32] {
        match &self.values {
            Values::Here(values) => values,
            Values::Stored { stored, read } => read.get_or_init(|| stored.read()),
        }
    }

    /// Reads what is still in a file, which is then needed no more.
    pub(crate) fn leave_file(&mut self) {
        if let Values::Stored { stored, read } = &mut self.values {
            self.values = Values::Here(read.take().unwrap_or_else(|| stored.read()));
        }
    }

    /// The values, to change in place.
    pub fn values_mut(&mut self) -> &mut [f32] {
        self.values();
        match &mut self.values {
            Values::Here(values) => values,
            Values::Stored { read, .. } => read.get_mut().expect("they have just been read"),
        }
    }

    /// The values, taken out.
    pub fn into_values(self) -> Vec<f32> {
        match self.values {
            Values::Here(values) => values,
            Values::Stored { stored, read } => read.into_inner().unwrap_or_else(|| stored.read()),
        }
    }
}

/// A model on disk; its weights are read as they are asked for.
#[derive(Clone, Debug, PartialEq)]
pub struct Checkpoint {
    /// The architecture.
    pub config: DecoderConfig,
    /// Every weight by its Hugging Face name: those of [`DecoderConfig::tensors`], and `score.weight` `[1, hidden]` if
    /// there is a value head. A model with a value head may lack `lm_head.weight`.
    pub tensors: BTreeMap<String, HostTensor>,
    /// Where the tokenizer comes from, if the checkpoint has one.
    pub tokenizer: Option<TokenizerSource>,
    /// The content of `tokenizer_config.json` without its chat template, kept for [`crate::save`].
    pub tokenizer_config: Map<String, Value>,
    /// The chat template, in Jinja.
    pub chat_template: Option<String>,
}

impl Checkpoint {
    /// The weight called `name`.
    ///
    /// # Errors
    /// [`Error::MissingTensors`].
    pub fn tensor(&self, name: &str) -> Result<&HostTensor> {
        self.tensors.get(name).ok_or_else(|| missing_tensor(name))
    }

    /// The weight called `name`, taken out.
    ///
    /// # Errors
    /// [`Error::MissingTensors`].
    pub(crate) fn take_tensor(&mut self, name: &str) -> Result<HostTensor> {
        let missing = || missing_tensor(name);
        self.tensors.remove(name).ok_or_else(missing)
    }

    /// The value head's weight, `[1, hidden]`, if there is one.
    pub fn value_head(&self) -> Option<&HostTensor> {
        self.tensors.get(VALUE_HEAD)
    }

    /// The vocabulary projection, `[vocab, hidden]`: the embedding itself if tied.
    ///
    /// # Errors
    /// [`Error::MissingTensors`] for a reward model saved without one.
    pub fn vocabulary_head(&self) -> Result<&HostTensor> {
        self.tensor(if self.config.tie_word_embeddings {
            "model.embed_tokens.weight"
        } else {
            VOCABULARY_HEAD
        })
    }
}

fn missing_tensor(name: &str) -> Error {
    Error::MissingTensors {
        path: "the checkpoint".into(),
        names: vec![name.into()],
    }
}

/// Opens a Hugging Face directory or a GGUF file and checks everything but the weights' values, which are read from it as `f32` when
/// they are asked for: the file must stay as it is until a decoder has been made of them.
///
/// # Errors
/// [`Error::HubId`] for a name that is no path; otherwise whatever is wrong with the files, by name.
pub fn load(path: &Path) -> Result<Checkpoint> {
    if path.is_dir() {
        return load_directory(path);
    }
    if path.is_file() {
        return if path
            .extension()
            .is_some_and(|extension| extension == "gguf")
        {
            gguf_decoder::load(path)
        } else {
            Err(Error::NotAModel { path: path.into() })
        };
    }
    match path.to_str().filter(|id| looks_like_hub_id(id)) {
        Some(id) => Err(Error::HubId { id: id.into() }),
        None => {
            let nothing = std::io::Error::new(
                std::io::ErrorKind::NotFound,
                "there is no such file or directory",
            );
            Err(Error::read(path, nothing))
        }
    }
}

/// `owner/name`, as hubs write it.
fn looks_like_hub_id(text: &str) -> bool {
    let plain = |part: &str| {
        !part.is_empty()
            && !part.starts_with('.')
            && part
                .chars()
                .all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
    };
    !text.ends_with(".gguf")
        && text
            .split_once('/')
            .is_some_and(|(owner, name)| plain(owner) && plain(name))
}

fn load_directory(directory: &Path) -> Result<Checkpoint> {
    let config_path = directory.join("config.json");
    if !config_path.is_file() {
        return Err(Error::NotAModel {
            path: directory.into(),
        });
    }
    let mut config = DecoderConfig::from_json(&read_file(&config_path)?, &config_path)?;
    let generation_path = directory.join("generation_config.json");
    if let Some(bytes) = read_optional(&generation_path)? {
        config
            .special_ids
            .merge_generation(&bytes, &generation_path)?;
    }
    let tokenizer_config_path = directory.join("tokenizer_config.json");
    let mut tokenizer_config = match read_optional(&tokenizer_config_path)? {
        Some(bytes) => serde_json::from_slice(&bytes).map_err(|source| Error::Json {
            path: tokenizer_config_path.clone(),
            source,
        })?,
        None => Map::new(),
    };
    let in_config = tokenizer_config.remove("chat_template");
    let template_path = directory.join("chat_template.jinja");
    let chat_template = match read_optional(&template_path)? {
        Some(bytes) => Some(
            String::from_utf8(bytes)
                .map_err(|_| Error::value(&template_path, "the file", "UTF-8 text", "not UTF-8"))?,
        ),
        None => in_config
            .map(|value| default_template(value, &tokenizer_config_path))
            .transpose()?
            .flatten(),
    };
    Ok(Checkpoint {
        tensors: safetensors::read_weights(directory, &config)?,
        tokenizer: read_optional(&directory.join("tokenizer.json"))?.map(TokenizerSource::Json),
        tokenizer_config,
        chat_template,
        config,
    })
}

/// One template, or the one named `default` of several.
fn default_template(value: Value, path: &Path) -> Result<Option<String>> {
    let wrong = |value| {
        Error::value(
            path,
            "chat_template",
            "a string, or a list of objects with `name` and `template`, one named \"default\"",
            value,
        )
    };
    match value {
        Value::Null => Ok(None),
        Value::String(template) => Ok(Some(template)),
        Value::Array(ref several) => several
            .iter()
            .find(|one| one["name"] == "default")
            .and_then(|one| one["template"].as_str())
            .map(|template| Some(template.to_owned()))
            .ok_or_else(|| wrong(value.clone())),
        other => Err(wrong(other)),
    }
}

fn read_optional(path: &Path) -> Result<Option<Vec<u8>>> {
    match std::fs::read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Error::read(path, error)),
    }
}

/// Compares the shapes found in a checkpoint with those its config asks for, and names what is to be read.
///
/// # Errors
/// [`Error::MissingTensors`], [`Error::ExtraTensors`] or [`Error::TensorShape`].
fn names_to_read(
    path: &Path,
    config: &DecoderConfig,
    found: &BTreeMap<String, Vec<usize>>,
) -> Result<BTreeSet<String>> {
    let has_value_head = found.contains_key(VALUE_HEAD);
    let missing: Vec<String> = config
        .tensors()
        .map(|(name, _)| name)
        .filter(|name| !found.contains_key(name))
        .filter(|name| !has_value_head || name != VOCABULARY_HEAD)
        .take(MISSING_LIMIT)
        .collect();
    if !missing.is_empty() {
        return Err(Error::MissingTensors {
            path: path.into(),
            names: missing,
        });
    }
    // From here on the config announces no more tensors than the file has.
    let mut wanted: BTreeMap<String, Vec<usize>> = config.tensors().collect();
    wanted.insert(VALUE_HEAD.into(), vec![1, config.hidden_size]);
    let mut names = BTreeSet::new();
    let mut extra = Vec::new();
    for (name, shape) in found {
        match wanted.get(name) {
            Some(expected) if expected == shape => {
                names.insert(name.clone());
            }
            Some(expected) => {
                return Err(Error::TensorShape {
                    path: path.into(),
                    tensor: name.clone(),
                    expected: expected.clone(),
                    found: shape.clone(),
                });
            }
            None if is_redundant(name, config) => {}
            None => extra.push(name.clone()),
        }
    }
    if extra.is_empty() {
        Ok(names)
    } else {
        Err(Error::ExtraTensors {
            path: path.into(),
            names: extra,
        })
    }
}

/// What checkpoints hold beside the weights and every loader passes over: rotary tables of old Llamas, and a projection
/// that the config ties to the embedding.
fn is_redundant(name: &str, config: &DecoderConfig) -> bool {
    name.ends_with(".rotary_emb.inv_freq")
        || (config.tie_word_embeddings && name == VOCABULARY_HEAD)
}
