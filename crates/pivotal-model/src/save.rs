//! A checkpoint as a Hugging Face directory.

use std::path::Path;

use pivotal_core::{FileError, TokenizerSource, write_atomic, write_checked};
use serde_json::{Value, json};

use crate::checkpoint::{Checkpoint, safetensors};
use crate::error::{Error, Result};

/// Writes a checkpoint as a directory that transformers loads: `model.safetensors` in `f32` (with its checksum beside
/// it), `tokenizer.json`, `tokenizer_config.json`, `chat_template.jinja`, `generation_config.json` and, last of all,
/// `config.json`: a directory without it is not a model.
///
/// Files that are there are replaced one by one, each whole; write to a fresh directory if readers may come meanwhile.
///
/// # Errors
/// [`Error::BareVocabulary`] for a tokenizer without `tokenizer.json`; [`Error::File`] if a write fails.
pub fn save(checkpoint: &Checkpoint, directory: &Path) -> Result<()> {
    let tokenizer = match &checkpoint.tokenizer {
        None => None,
        Some(TokenizerSource::Json(bytes)) => Some(bytes),
        Some(_) => return Err(Error::BareVocabulary),
    };
    std::fs::create_dir_all(directory).map_err(|source| {
        Error::File(FileError::Write {
            path: directory.into(),
            source,
        })
    })?;
    let tensors = checkpoint.tensors.iter();
    let weights_path = directory.join("model.safetensors");
    let weights = safetensors::serialize(tensors.map(|(name, tensor)| (name.as_str(), tensor)))
        .map_err(|source| Error::Safetensors {
            path: weights_path.clone(),
            source,
        })?;
    write_checked(&weights_path, &weights)?;
    if let Some(bytes) = tokenizer {
        write_atomic(&directory.join("tokenizer.json"), bytes)?;
    }
    let mut tokenizer_config = checkpoint.tokenizer_config.clone();
    if let Some(template) = &checkpoint.chat_template {
        write_atomic(&directory.join("chat_template.jinja"), template.as_bytes())?;
        // Readers older than the separate file look here.
        tokenizer_config.insert("chat_template".into(), json!(template));
    }
    if !tokenizer_config.is_empty() {
        let config = Value::Object(tokenizer_config);
        write_json(&directory.join("tokenizer_config.json"), &config)?;
    }
    let ids = &checkpoint.config.special_ids;
    let generation = json!({
        "bos_token_id": ids.bos,
        "eos_token_id": ids.eos_json(),
        "pad_token_id": ids.pad,
    });
    write_json(&directory.join("generation_config.json"), &generation)?;
    let config = checkpoint.config.to_json(checkpoint.value_head().is_some());
    write_json(&directory.join("config.json"), &config)
}

/// Writes JSON that people read: indented, with a final line end.
pub(crate) fn write_json(path: &Path, value: &Value) -> Result<()> {
    Ok(write_atomic(path, format!("{value:#}\n").as_bytes())?)
}
