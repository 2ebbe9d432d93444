//! The run directory: resolved configuration, manifest, metrics, checkpoints, results.
//!
//! ```text
//! run/
//!   config.toml       resolved: `--config run/config.toml` repeats the run
//!   manifest.json     versions, seed, device, hashes of the inputs
//!   metrics.jsonl     one line a step
//!   tensorboard/      the same as TensorBoard events (`run.tensorboard`)
//!   credit.jsonl      what credit made of every response (sft, dpo)
//!   checkpoints/      the last two
//!   adapter/ model/   the result
//!   summary.json      written last: the run is done
//! ```

use std::ffi::OsString;
use std::fs::{File, OpenOptions, TryLockError};
use std::io::Write;
use std::path::{Path, PathBuf};

use burn::tensor::Device;
use pivotal_core::{
    FileError, FileHash, Manifest, SCHEMA_VERSION, content_hash, is_stream, read_file,
    remove_temporaries, sync_directory, write_atomic,
};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::config_file::show_config;
use crate::error::{Error, Result};
use crate::event_file::EventFile;
use same::{config_hash, same_config, same_recipe, same_run, stored_manifest, unedited};

mod same;

const CONFIG: &str = "config.toml";
const MANIFEST: &str = "manifest.json";
const METRICS: &str = "metrics.jsonl";
const SUMMARY: &str = "summary.json";
const TENSORBOARD: &str = "tensorboard";
/// What to do with a run directory that is there already.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum StartMode {
    /// Refuse it.
    #[default]
    Fresh,
    /// Continue it.
    Resume,
    /// Replace it, if it is a run.
    Overwrite,
}

/// An open run directory.
#[derive(Debug)]
pub struct Run {
    path: PathBuf,
    metrics: File,
    events: Option<EventFile>,
    /// Open for as long as the run is: see [`hold`].
    _held: Option<File>,
}

impl Run {
    /// Checks that a run may start at `path` under `mode`, before anything is loaded. `inputs` are what it will read: files or
    /// directories, and an overwritten run must not hold them.
    ///
    /// # Errors
    /// [`Error::Setting`] for an empty path, [`Error::RunExists`], [`Error::NotARun`], [`Error::InUse`], [`Error::InputInside`],
    /// [`Error::NotAFile`].
    pub fn check(path: &Path, mode: StartMode, inputs: &[&Path]) -> Result<()> {
        if path.as_os_str().is_empty() {
            let expected = "the run directory to make";
            return Err(Error::Setting {
                key: "out",
                found: "empty".into(),
                expected,
            });
        }
        check_files(inputs)?;
        match (mode, path.exists()) {
            (StartMode::Fresh, true) => Err(Error::RunExists { path: path.into() }),
            (StartMode::Overwrite, true) => {
                stored_manifest(path)?;
                hold(path)?;
                let inside = |input: &&&Path| match (input.canonicalize(), path.canonicalize()) {
                    (Ok(input), Ok(path)) => input.starts_with(path),
                    _ => false,
                };
                match inputs.iter().find(inside) {
                    Some(input) => Err(Error::InputInside {
                        path: path.into(),
                        input: input.to_path_buf(),
                    }),
                    None => Ok(()),
                }
            }
            (StartMode::Resume, _) => {
                stored_manifest(path)?;
                hold(path).map(|_| ())
            }
            _ => Ok(()),
        }
    }

    /// Checks that `path` is a run of `recipe` with the configuration that it began with, before that is read.
    ///
    /// # Errors
    /// [`Error::NotARun`]; [`Error::OtherConfig`] if it is of another recipe or its configuration was edited; [`Error::File`].
    pub fn check_resumed(path: &Path, recipe: &str) -> Result<()> {
        let stored = stored_manifest(path)?;
        same_recipe(path, &stored, recipe)?;
        unedited(path, &stored)
    }

    /// Makes, replaces or opens the directory, and writes its configuration and manifest. With `run.tensorboard` in the
    /// configuration, metrics are written as TensorBoard events too.
    ///
    /// # Errors
    /// As [`Run::check`]; [`Error::OtherConfig`] if a resumed run had another recipe, configuration or input, or its
    /// configuration was edited; [`Error::File`].
    pub fn open<C: Serialize + DeserializeOwned>(
        path: &Path,
        mode: StartMode,
        config: &C,
        manifest: &Manifest,
    ) -> Result<Self> {
        Self::check(path, mode, &[])?;
        let held;
        if mode == StartMode::Resume {
            held = hold(path)?;
            same_run(path, manifest)?;
            same_config(path, config)?;
            remove_temporaries(path);
            // It is written last: while it is there, the run is done.
            match std::fs::remove_file(path.join(SUMMARY)) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    return Err(write_error(&path.join(SUMMARY), error));
                }
                _ => {}
            }
        } else {
            let replaced = match path.exists() {
                true => hold(path)?,
                false => None,
            };
            held = create(path, config, manifest)?;
            drop(replaced);
        }
        let metrics_path = path.join(METRICS);
        let metrics = OpenOptions::new()
            .create(true)
            .append(true)
            .open(&metrics_path);
        let metrics = metrics.map_err(|source| write_error(&metrics_path, source))?;
        let events = wants_events(config)
            .then(|| EventFile::open(&path.join(TENSORBOARD)))
            .transpose()?;
        Ok(Self {
            path: path.into(),
            metrics,
            events,
            _held: held,
        })
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Adds a line of metrics.
    ///
    /// # Errors
    /// [`Error::File`] if the disk is full.
    pub fn log(&mut self, step: u64, metrics: &impl Serialize) -> Result<()> {
        #[derive(Serialize)]
        struct Line<'a, M> {
            step: u64,
            #[serde(flatten)]
            metrics: &'a M,
        }
        let mut line = serde_json::to_string(&Line { step, metrics }).expect("metrics are numbers");
        line.push('\n');
        let written = self.metrics.write_all(line.as_bytes());
        written.map_err(|source| write_error(&self.path.join(METRICS), source))?;
        match &mut self.events {
            None => Ok(()),
            Some(events) => {
                let metrics = serde_json::to_value(metrics).expect("metrics are numbers");
                events.log(step, &metrics)
            }
        }
    }

    /// Forgets the metrics of steps after `step`: a resumed run writes them again.
    ///
    /// # Errors
    /// [`Error::File`].
    pub fn rewind(&mut self, step: u64) -> Result<()> {
        let path = self.path.join(METRICS);
        let text = String::from_utf8_lossy(&read_file(&path)?).into_owned();
        let kept: String = text
            .lines()
            .filter(|line| step_of(line).is_some_and(|logged| logged <= step))
            .flat_map(|line| [line, "\n"])
            .collect();
        write_atomic(&path, kept.as_bytes())?;
        let metrics = OpenOptions::new().append(true).open(&path);
        self.metrics = metrics.map_err(|source| write_error(&path, source))?;
        match &mut self.events {
            None => Ok(()),
            Some(events) => events.rewind(step),
        }
    }

    /// The metrics of the last step that was logged; a resumed run may have no step left to take.
    ///
    /// # Errors
    /// [`Error::File`].
    pub fn last<T: DeserializeOwned>(&self) -> Result<Option<T>> {
        let text = String::from_utf8_lossy(&read_file(&self.path.join(METRICS))?).into_owned();
        Ok(text
            .lines()
            .last()
            .and_then(|line| serde_json::from_str(line).ok()))
    }

    /// Writes what has been logged to the disk: before a checkpoint that counts on it.
    ///
    /// # Errors
    /// [`Error::File`].
    pub fn sync(&self) -> Result<()> {
        self.metrics
            .sync_data()
            .map_err(|source| write_error(&self.path.join(METRICS), source))?;
        self.events.as_ref().map_or(Ok(()), EventFile::sync)
    }

    /// Writes `summary.json`: the run is done.
    ///
    /// # Errors
    /// [`Error::File`].
    pub fn finish(&mut self, summary: &impl Serialize) -> Result<()> {
        let synced = self.metrics.sync_all();
        synced.map_err(|source| write_error(&self.path.join(METRICS), source))?;
        self.events.as_ref().map_or(Ok(()), EventFile::sync)?;
        let text = serde_json::to_string_pretty(summary).expect("a summary is plain data");
        Ok(write_atomic(
            &self.path.join(SUMMARY),
            format!("{text}\n").as_bytes(),
        )?)
    }
}

/// The manifest of a run that starts now, on these files and these weights.
///
/// # Errors
/// [`Error::File`] if an input cannot be read.
pub fn manifest(
    recipe: &str,
    seed: u64,
    device: &Device,
    inputs: &[&Path],
    weights: &[FileHash],
) -> Result<Manifest> {
    let features = ["avx2", "avx512f", "avx512bf16", "amx"];
    let found = features
        .into_iter()
        .zip(processor_features())
        .filter(|(_, has)| *has);
    let found: Vec<&str> = found.map(|(name, _)| name).collect();
    let hash = |path: &&Path| -> Result<FileHash> {
        let blake3 = content_hash(&read_file(path)?);
        Ok(FileHash {
            path: path.display().to_string(),
            blake3,
        })
    };
    let files = inputs.iter().map(hash).collect::<Result<Vec<_>>>()?;
    Ok(Manifest {
        schema_version: SCHEMA_VERSION,
        pivotal_version: env!("CARGO_PKG_VERSION").to_owned(),
        recipe: recipe.to_owned(),
        seed,
        device: pivotal_ops::card(device).unwrap_or_else(|| {
            let processor = format!("cpu {} {}", std::env::consts::ARCH, found.join(" "));
            processor.trim_end().to_owned()
        }),
        threads: rayon::current_num_threads(),
        inputs: files.into_iter().chain(weights.iter().cloned()).collect(),
        config_blake3: None,
    })
}

/// Refuses a pipe or a terminal as an input: files are read once for what is in them and once for their hash.
///
/// # Errors
/// [`Error::NotAFile`].
pub(crate) fn check_files(inputs: &[&Path]) -> Result<()> {
    match inputs.iter().find(|input| is_stream(input)) {
        None => Ok(()),
        Some(input) => Err(Error::NotAFile {
            path: input.to_path_buf(),
        }),
    }
}

/// What products of f32 find by themselves, and what the kernels use: less than there is where they are told to.
#[cfg(target_arch = "x86_64")]
fn processor_features() -> [bool; 4] {
    use pivotal_kernels::{Processor, processor};
    [
        std::arch::is_x86_feature_detected!("avx2"),
        std::arch::is_x86_feature_detected!("avx512f"),
        processor() >= Processor::Avx512,
        processor() == Processor::Amx,
    ]
}

#[cfg(not(target_arch = "x86_64"))]
fn processor_features() -> [bool; 4] {
    [false; 4]
}

/// Writes the resolved configuration and the manifest beside a result that is one file: `<file>.config.toml` and
/// `<file>.manifest.json`.
pub(crate) fn write_beside(
    path: &Path,
    config: &impl Serialize,
    manifest: &Manifest,
) -> Result<()> {
    let beside = |name: &str| {
        let mut file = path.file_name().unwrap_or_default().to_owned();
        file.push(".");
        file.push(name);
        path.with_file_name(file)
    };
    let manifest = serde_json::to_string_pretty(manifest).expect("a manifest is plain data");
    write_atomic(&beside(MANIFEST), format!("{manifest}\n").as_bytes())?;
    Ok(write_atomic(
        &beside(CONFIG),
        show_config(config).as_bytes(),
    )?)
}

/// Makes a run directory with its manifest and configuration in it, in place of one that is there, and holds it.
///
/// It is made under another name and renamed, and one that is there is renamed before it is removed: whenever the process
/// is killed, `path` is a run that resumes, or is not there.
fn create(path: &Path, config: &impl Serialize, manifest: &Manifest) -> Result<Option<File>> {
    let aside = |suffix: &str| {
        let mut name = OsString::from(".");
        name.push(path.file_name().unwrap_or_default());
        name.push(suffix);
        path.with_file_name(name)
    };
    let fail = |source| write_error(path, source);
    let (unfinished, replaced) = (aside(".unfinished"), aside(".replaced"));
    for leftover in [&unfinished, &replaced] {
        remove_all(leftover)?;
    }
    std::fs::create_dir_all(&unfinished).map_err(fail)?;
    let config = show_config(config);
    let manifest = Manifest {
        config_blake3: Some(config_hash(&config)),
        ..manifest.clone()
    };
    let manifest = serde_json::to_string_pretty(&manifest).expect("a manifest is plain data");
    let written = write_atomic(
        &unfinished.join(MANIFEST),
        format!("{manifest}\n").as_bytes(),
    )
    .and_then(|()| write_atomic(&unfinished.join(CONFIG), config.as_bytes()))
    .map_err(Error::from)
    .and_then(|()| hold(&unfinished));
    let held = match written {
        Ok(held) => held,
        Err(error) => {
            // The first error is the one to report.
            let _ = std::fs::remove_dir_all(&unfinished);
            return Err(error);
        }
    };
    if path.exists() {
        std::fs::rename(path, &replaced).map_err(fail)?;
    }
    std::fs::rename(&unfinished, path)
        .and_then(|()| sync_directory(path.parent().unwrap_or(Path::new("."))))
        .map_err(fail)?;
    remove_all(&replaced)?;
    Ok(held)
}

/// Takes the run at `path` for this process until the file is closed, by whatever ends the process too.
///
/// What is locked is the manifest: it is written once, it moves with its directory, and a file for the purpose would be one more
/// in every run.
///
/// # Errors
/// [`Error::InUse`] if another process, or this one, has it; [`Error::File`].
fn hold(path: &Path) -> Result<Option<File>> {
    let manifest = path.join(MANIFEST);
    // For writing, or a lock over a network is refused.
    let file = OpenOptions::new().read(true).write(true).open(&manifest);
    let file = file.map_err(|source| write_error(&manifest, source))?;
    match file.try_lock() {
        Ok(()) => Ok(Some(file)),
        Err(TryLockError::WouldBlock) => Err(Error::InUse { path: path.into() }),
        // A file system without locks is no reason not to train.
        Err(TryLockError::Error(_)) => Ok(None),
    }
}

/// Removes a directory, if it is there.
fn remove_all(path: &Path) -> Result<()> {
    use std::io::ErrorKind::{NotADirectory, NotFound};
    match std::fs::remove_dir_all(path) {
        // Below a file there is nothing either; whoever makes something there will say so.
        Err(source) if !matches!(source.kind(), NotFound | NotADirectory) => {
            Err(write_error(path, source))
        }
        _ => Ok(()),
    }
}

/// Every recipe has its `[run]` table under this name.
fn wants_events(config: &impl Serialize) -> bool {
    let config = serde_json::to_value(config).unwrap_or_default();
    config["run"]["tensorboard"] == true
}

pub(crate) fn step_of(line: &str) -> Option<u64> {
    count_of(line, "step")
}

/// The whole number under `key` in a line of JSON.
pub(crate) fn count_of(line: &str, key: &str) -> Option<u64> {
    serde_json::from_str::<serde_json::Value>(line)
        .ok()?
        .get(key)?
        .as_u64()
}

pub(crate) fn write_error(path: &Path, source: std::io::Error) -> Error {
    Error::File(FileError::Write {
        path: path.into(),
        source,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::settings::RunSettings;

    fn open(path: &Path, mode: StartMode, seed: u64) -> Result<Run> {
        let config = RunSettings {
            seed,
            ..RunSettings::default()
        };
        Run::open(
            path,
            mode,
            &config,
            &manifest("dpo", seed, &Device::flex(), &[], &[])?,
        )
    }

    #[test]
    fn a_run_is_never_written_over_unasked() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("run");
        open(&path, StartMode::Fresh, 1).unwrap();
        assert!(matches!(
            open(&path, StartMode::Fresh, 1),
            Err(Error::RunExists { .. })
        ));
        open(&path, StartMode::Resume, 1).unwrap();
        let other = open(&path, StartMode::Resume, 2).unwrap_err().to_string();
        assert!(
            other.contains("it has `seed = 1`, not `seed = 2`"),
            "{other}"
        );
        std::fs::write(path.join("mine.txt"), "x").unwrap();
        open(&path, StartMode::Overwrite, 2).unwrap();
        assert!(!path.join("mine.txt").exists());
    }

    #[test]
    fn a_run_appears_whole_whatever_a_killed_process_left_beside_it() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("run");
        for leftover in [".run.unfinished", ".run.replaced"] {
            let leftover = directory.path().join(leftover);
            std::fs::create_dir(&leftover).unwrap();
            std::fs::write(leftover.join(MANIFEST), "{").unwrap();
        }
        open(&path, StartMode::Fresh, 1).unwrap();
        open(&path, StartMode::Overwrite, 2).unwrap();
        let names = |path: &Path| {
            let entries = std::fs::read_dir(path).unwrap();
            let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
            let mut names: Vec<String> = names.collect();
            names.sort();
            names
        };
        assert_eq!(names(directory.path()), ["run"]);
        assert_eq!(names(&path), [CONFIG, MANIFEST, METRICS]);
        // An output that cannot be made leaves nothing.
        let below = path.join(CONFIG).join("run");
        assert!(open(&below, StartMode::Fresh, 1).is_err());
        assert_eq!(names(&path), [CONFIG, MANIFEST, METRICS]);
    }

    #[test]
    fn a_directory_that_is_no_run_is_not_overwritten() {
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("mine.txt"), "x").unwrap();
        let error = open(directory.path(), StartMode::Overwrite, 1).unwrap_err();
        assert!(matches!(error, Error::NotARun { .. }));
        assert!(directory.path().join("mine.txt").exists());
    }

    #[test]
    fn one_run_at_a_time_has_a_directory() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("run");
        let mut run = open(&path, StartMode::Fresh, 1).unwrap();
        for again in [StartMode::Resume, StartMode::Overwrite] {
            let error = open(&path, again, 1).unwrap_err();
            assert!(matches!(error, Error::InUse { .. }), "{error}");
            assert_eq!(pivotal_core::HasKind::kind(&error).exit_code(), 1);
            // Its hold moves with it from one directory to the next.
            drop(run);
            run = open(&path, again, 1).unwrap();
        }
        drop(run);
        open(&path, StartMode::Resume, 1).unwrap();
    }

    #[test]
    fn rewinding_forgets_later_steps_and_torn_lines() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("run");
        let mut run = open(&path, StartMode::Fresh, 1).unwrap();
        for step in 1..=3 {
            run.log(step, &serde_json::json!({ "loss": 0.5 })).unwrap();
        }
        let mut torn = OpenOptions::new()
            .append(true)
            .open(path.join(METRICS))
            .unwrap();
        torn.write_all(b"{\"step\":4,\"lo").unwrap();
        run.rewind(2).unwrap();
        run.log(3, &serde_json::json!({ "loss": 0.25 })).unwrap();
        let text = std::fs::read_to_string(path.join(METRICS)).unwrap();
        assert_eq!(text.lines().count(), 3);
        assert!(text.ends_with("{\"step\":3,\"loss\":0.25}\n"), "{text}");
    }
}
