//! Checkpoints: whole or not there, with checksums, the last two kept.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use pivotal_core::{FileError, read_checked, sync_directory, write_checked};
use pivotal_model::{HostTensor, Parameters, read_tensors, tensors_to_bytes};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::optimizer::NamedAdamW;
use crate::run::write_error;

/// How many checkpoints a run keeps: should the last be damaged, the one before it loads.
const KEPT: usize = 2;
const PARAMETERS: &str = "parameters.safetensors";
const OPTIMIZER: &str = "optimizer.safetensors";
const STATE: &str = "state.json";

/// Where a run stands; the data's order is a function of seed and step. `more` is what else a recipe remembers, as text: numbers
/// in JSON lose their last bit.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct State {
    step: u64,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    more: String,
}

/// Writes the trainable parameters and the optimizer's state after `step` steps.
///
/// The files go to a hidden directory that is renamed last; older checkpoints than the last two are then removed.
///
/// # Errors
/// [`Error::File`]; the checkpoints that were there stay.
pub(crate) fn save(
    run: &Path,
    step: u64,
    model: &mut impl Parameters,
    optimizer: &NamedAdamW,
) -> Result<()> {
    save_more(run, step, model, optimizer, "")
}

/// [`save`], with what else the recipe remembers.
///
/// # Errors
/// As [`save`].
pub(crate) fn save_more(
    run: &Path,
    step: u64,
    model: &mut impl Parameters,
    optimizer: &NamedAdamW,
    more: &str,
) -> Result<()> {
    let directory = run.join("checkpoints");
    let temporary = directory.join(".unfinished");
    let _ = std::fs::remove_dir_all(&temporary);
    std::fs::create_dir_all(&temporary).map_err(|source| write_error(&temporary, source))?;
    let mut parameters = BTreeMap::new();
    model.visit_parameters(&mut |name, parameter| {
        if parameter.is_trainable() {
            parameters.insert(name.to_owned(), parameter.to_host());
        }
    });
    write_checked(&temporary.join(PARAMETERS), &tensors_to_bytes(&parameters)?)?;
    write_checked(
        &temporary.join(OPTIMIZER),
        &tensors_to_bytes(&optimizer.state())?,
    )?;
    let more = more.to_owned();
    let state = serde_json::to_vec(&State { step, more }).expect("a state is plain data");
    write_checked(&temporary.join(STATE), &state)?;
    let path = directory.join(format!("step-{step:08}"));
    let _ = std::fs::remove_dir_all(&path);
    std::fs::rename(&temporary, &path)
        .and_then(|()| sync_directory(&directory))
        .map_err(|source| write_error(&path, source))?;
    for old in list(run)?.iter().rev().skip(KEPT) {
        std::fs::remove_dir_all(old).map_err(|source| write_error(old, source))?;
    }
    Ok(())
}

/// Removes what a writer that was killed left: a checkpoint that was not finished, and older ones than are kept.
fn tidy(run: &Path) {
    // A courtesy: what stays takes room and harms nothing.
    let _ = std::fs::remove_dir_all(run.join("checkpoints/.unfinished"));
    for old in list(run).iter().flatten().rev().skip(KEPT) {
        let _ = std::fs::remove_dir_all(old);
    }
}

/// Puts the newest checkpoint that loads into `model` and `optimizer`, and returns its step.
///
/// # Errors
/// [`Error::NoCheckpoint`] with the fault of each, if none loads; [`Error::Checkpoint`] if it belongs to another model;
/// [`Error::File`] if it cannot be said which there are.
pub(crate) fn restore(
    run: &Path,
    model: &mut impl Parameters,
    optimizer: &mut NamedAdamW,
) -> Result<u64> {
    restore_more(run, model, optimizer).map(|(step, _)| step)
}

/// [`restore`], with what else the recipe remembered; empty where no checkpoint was written yet.
///
/// # Errors
/// As [`restore`].
pub(crate) fn restore_more(
    run: &Path,
    model: &mut impl Parameters,
    optimizer: &mut NamedAdamW,
) -> Result<(u64, String)> {
    let mut reasons = Vec::new();
    for path in list(run)?.iter().rev() {
        match read(path) {
            Ok((state, mut parameters, moments)) => {
                assign(model, &mut parameters)?;
                optimizer.restore(model, &moments)?;
                tidy(run);
                return Ok((state.step, state.more));
            }
            Err(error) => reasons.push(error.to_string()),
        }
    }
    if reasons.is_empty() {
        // Cut short before its first checkpoint: the run begins again, the same.
        return Ok((0, String::new()));
    }
    Err(Error::NoCheckpoint {
        path: run.into(),
        reasons,
    })
}

type Tensors = BTreeMap<String, HostTensor>;

fn read(path: &Path) -> Result<(State, Tensors, Tensors)> {
    let state: State =
        serde_json::from_slice(&read_checked(&path.join(STATE))?).map_err(|error| {
            Error::Checkpoint {
                what: format!("a readable `{STATE}`: {error}"),
            }
        })?;
    for file in [PARAMETERS, OPTIMIZER] {
        let checksum = path.join(format!("{file}.blake3"));
        if !checksum.is_file() {
            let source = std::io::ErrorKind::NotFound.into();
            return Err(Error::File(FileError::Read {
                path: checksum,
                source,
            }));
        }
    }
    Ok((
        state,
        read_tensors(&path.join(PARAMETERS))?,
        read_tensors(&path.join(OPTIMIZER))?,
    ))
}

fn assign(model: &mut impl Parameters, parameters: &mut Tensors) -> Result<()> {
    let mut outcome = Ok(());
    model.visit_parameters(&mut |name, parameter| {
        if outcome.is_ok() && parameter.is_trainable() {
            outcome = match parameters.remove(name) {
                Some(value) => parameter.assign(name, &value).map_err(Error::from),
                None => Err(Error::Checkpoint {
                    what: format!("`{name}`"),
                }),
            };
        }
    });
    outcome?;
    match parameters.keys().next() {
        None => Ok(()),
        Some(name) => Err(Error::Checkpoint {
            what: format!("a place for `{name}`"),
        }),
    }
}

/// The checkpoints of a run, oldest first; none where no directory of them was made yet.
///
/// # Errors
/// [`Error::File`] if the directory cannot be read.
fn list(run: &Path) -> Result<Vec<PathBuf>> {
    let directory = run.join("checkpoints");
    let fault = |source| {
        let path = directory.clone();
        Error::File(FileError::Read { path, source })
    };
    let entries = match std::fs::read_dir(&directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(fault(error)),
    };
    let mut paths = Vec::new();
    for entry in entries {
        let entry = entry.map_err(fault)?;
        if entry.file_name().to_string_lossy().starts_with("step-") {
            paths.push(entry.path());
        }
    }
    paths.sort();
    Ok(paths)
}
