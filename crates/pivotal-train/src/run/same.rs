//! Whether a run directory is the run that is to be continued.

use std::path::Path;

use pivotal_core::{FileError, Manifest, content_hash, read_file};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::{CONFIG, MANIFEST};
use crate::config_file::{read_config, show_config};
use crate::error::{Error, Result};

/// Lines of the configuration that do not make another run: one that was moved, or is watched in another way, is the same.
const FREE: [&str; 2] = ["out = ", "progress = "];

/// The manifest that is there: what makes a directory a run, which may be resumed or overwritten.
pub(super) fn stored_manifest(path: &Path) -> Result<Manifest> {
    use std::io::ErrorKind::{NotADirectory, NotFound};
    let manifest = path.join(MANIFEST);
    let bytes = match std::fs::read(&manifest) {
        Ok(bytes) => bytes,
        Err(error) if matches!(error.kind(), NotFound | NotADirectory) => Vec::new(),
        Err(source) => {
            return Err(Error::File(FileError::Read {
                path: manifest,
                source,
            }));
        }
    };
    serde_json::from_slice(&bytes).map_err(|_| Error::NotARun { path: path.into() })
}

pub(super) fn same_recipe(path: &Path, stored: &Manifest, recipe: &str) -> Result<()> {
    match stored.recipe == recipe {
        true => Ok(()),
        false => Err(Error::OtherConfig {
            path: path.into(),
            what: format!("it is a run of `{}`", stored.recipe),
        }),
    }
}

/// Refuses a configuration that is not the one the run began with: half of the steps would have been taken under another.
pub(super) fn unedited(path: &Path, stored: &Manifest) -> Result<()> {
    let text = read_file(&path.join(CONFIG))?;
    let now = config_hash(&String::from_utf8_lossy(&text));
    // Runs of before it was written down have none.
    match stored
        .config_blake3
        .as_ref()
        .is_none_or(|began| *began == now)
    {
        true => Ok(()),
        false => Err(Error::OtherConfig {
            path: path.into(),
            what: format!("its `{CONFIG}` was edited since it began"),
        }),
    }
}

pub(super) fn config_hash(text: &str) -> String {
    let lines = text.lines().filter(|line| !is_free(line));
    content_hash(
        lines
            .flat_map(|line| [line, "\n"])
            .collect::<String>()
            .as_bytes(),
    )
}

fn is_free(line: &str) -> bool {
    FREE.iter().any(|key| line.starts_with(key))
}

pub(super) fn same_run(path: &Path, manifest: &Manifest) -> Result<()> {
    let stored = stored_manifest(path)?;
    let other = |what| {
        Err(Error::OtherConfig {
            path: path.into(),
            what,
        })
    };
    same_recipe(path, &stored, &manifest.recipe)?;
    unedited(path, &stored)?;
    if stored.inputs.len() != manifest.inputs.len() {
        return other("it was made of other inputs".to_owned());
    }
    let inputs = stored.inputs.iter().zip(&manifest.inputs);
    let changed: Vec<String> = inputs
        .filter(|(stored, given)| stored.blake3 != given.blake3)
        .map(|(_, given)| format!("`{}`", given.path))
        .collect();
    match changed.is_empty() {
        true => Ok(()),
        false => other(format!("{} changed since it began", changed.join(" and "))),
    }
}

pub(super) fn same_config<C: Serialize + DeserializeOwned>(path: &Path, config: &C) -> Result<()> {
    let stored: C = read_config(&path.join(CONFIG))?;
    let lines = |config: &C| -> Vec<String> {
        let text = show_config(config);
        text.lines()
            .filter(|line| !is_free(line))
            .map(str::to_owned)
            .collect()
    };
    let (stored, given) = (lines(&stored), lines(config));
    if stored == given {
        return Ok(());
    }
    let mut pairs = stored
        .iter()
        .zip(&given)
        .filter(|(stored, given)| stored != given);
    let what = pairs.next().map_or_else(
        || "a key was added or left out".to_owned(),
        |(stored, given)| format!("it has `{stored}`, not `{given}`"),
    );
    Err(Error::OtherConfig {
        path: path.into(),
        what,
    })
}
