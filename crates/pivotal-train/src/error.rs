//! What can go wrong in a run.

use std::path::PathBuf;

use pivotal_core::{ErrorKind, FileError, HasKind, PackError};

/// The result of everything in this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What can go wrong in a run.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file could not be read or written.
    #[error(transparent)]
    File(#[from] FileError),
    /// The model, or one of its files.
    #[error(transparent)]
    Model(#[from] pivotal_model::Error),
    /// The device asked for cannot be had.
    #[error("`device` cannot be used: {0}")]
    Device(#[from] pivotal_ops::DeviceError),
    /// The data set, the tokenizer or the chat template.
    #[error(transparent)]
    Data(#[from] pivotal_data::DataError),
    /// The tokenizer of a model.
    #[error("`{}`: {source}", path.display())]
    Tokenizer {
        /// The file that holds it.
        path: PathBuf,
        /// What is wrong with it.
        source: Box<pivotal_data::DataError>,
    },
    /// The credit rule, or a signal.
    #[error(transparent)]
    Credit(#[from] pivotal_credit::Error),
    /// A loss refused its input.
    #[error(transparent)]
    Loss(#[from] pivotal_loss::LossError),
    /// A sequence that cannot be packed.
    #[error(transparent)]
    Pack(#[from] PackError),
    /// A configuration file does not parse, or has a key that does not exist.
    #[error("`{}`: {}", path.display(), source.to_string().trim_end())]
    Config {
        /// The file.
        path: PathBuf,
        /// Where, and what was expected there.
        source: toml::de::Error,
    },
    /// A setting outside its domain, or missing.
    #[error("`{key}` is {found}, expected {expected}")]
    Setting {
        /// The key, or flag.
        key: &'static str,
        /// What it is.
        found: String,
        /// What it may be.
        expected: &'static str,
    },
    /// A setting that the loss does not use.
    #[error("`{key}` has no part in loss `{loss}`: leave it out, or choose a loss that uses it")]
    UnusedSetting {
        /// The key, or flag.
        key: &'static str,
        /// The loss.
        loss: String,
    },
    /// KTO's baseline needs a response behind a prompt that is not its own.
    #[error("all pairs have the same prompt: loss `kto` needs at least two")]
    OnePrompt,
    /// The run directory is there already.
    #[error("`{0}` exists: give `--resume {0}` to continue it, `--overwrite` to replace it, or another `--out`", path.display())]
    RunExists {
        /// The directory.
        path: PathBuf,
    },
    /// A directory that was to be overwritten is not a run.
    #[error("`{}` is not a run directory: it has no `manifest.json` of a run, so it is neither resumed nor overwritten", path.display())]
    NotARun {
        /// The directory.
        path: PathBuf,
    },
    /// Another process has the run.
    #[error("`{}` is in use by another run: wait for it to end, or give another `--out`", path.display())]
    InUse {
        /// The directory.
        path: PathBuf,
    },
    /// An input that can be read only once.
    #[error("`{}` is a pipe or a device, expected a file: it is read again for its hash; write what it gives to a file first", path.display())]
    NotAFile {
        /// The input.
        path: PathBuf,
    },
    /// A run that was to be overwritten holds what the new one reads.
    #[error("`{}` lies in `{}`, which `--overwrite` would remove first: give another `--out`", input.display(), path.display())]
    InputInside {
        /// The directory.
        path: PathBuf,
        /// The input in it.
        input: PathBuf,
    },
    /// A file that was to be overwritten is one that is read.
    #[error("`{}` is `{}`, which this command reads: give another name", path.display(), input.display())]
    InputReplaced {
        /// The file to write.
        path: PathBuf,
        /// The input.
        input: PathBuf,
    },
    /// A file that is there already.
    #[error("`{}` exists: give `--overwrite` to replace it, or another name", path.display())]
    FileExists {
        /// The file.
        path: PathBuf,
    },
    /// A run resumed under another configuration.
    #[error("`{}` was made with another configuration: {what}; leave out what differs, or start a run of its own", path.display())]
    OtherConfig {
        /// The directory.
        path: PathBuf,
        /// The first key that differs.
        what: String,
    },
    /// No checkpoint of a run loads.
    #[error("`{}` has no checkpoint that loads{}; `--overwrite` starts again", path.display(), damaged(reasons))]
    NoCheckpoint {
        /// The directory.
        path: PathBuf,
        /// Why the ones that are there do not.
        reasons: Vec<String>,
    },
    /// A checkpoint lacks something.
    #[error("the checkpoint lacks {what}")]
    Checkpoint {
        /// What.
        what: String,
    },
    /// A line of a record file.
    #[error("`{}`, line {line}: {what}", path.display())]
    Record {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// What is wrong with it.
        what: String,
    },
    /// A file of records has none.
    #[error("`{}` has no records, expected those that `pivotal annotate` writes", path.display())]
    NoRecords {
        /// The file.
        path: PathBuf,
    },
    /// A response of the data has no record.
    #[error("`{}` has no record for the {side} response of row {row}: annotate this data set", path.display())]
    NoRecord {
        /// The file.
        path: PathBuf,
        /// The row of the data set.
        row: u64,
        /// Which response.
        side: &'static str,
    },
    /// A record was made of other tokens.
    #[error("the record of the {side} response of row {row} in `{}` has other token ids than the data: annotate again with this tokenizer and these limits", path.display())]
    OtherTokens {
        /// The file.
        path: PathBuf,
        /// The row of the data set.
        row: u64,
        /// Which response.
        side: &'static str,
    },
    /// The credit rule needs a signal and there is none.
    #[error(
        "selection `{selection}` needs a signal: give `--signals FILE` (see `pivotal annotate`), {columns} in every row, or `--credit-selection all` for plain {plain}"
    )]
    NoSignal {
        /// The selection rule.
        selection: String,
        /// The columns of the data that could hold one.
        columns: &'static str,
        /// What the recipe is without credit.
        plain: &'static str,
    },
    /// Some rows have a signal and this one has none.
    #[error(
        "row {row} has no `{side}_signal`, which other responses have: selection `{selection}` needs a signal for every response"
    )]
    PartialSignal {
        /// The row of the data set.
        row: u64,
        /// Which response.
        side: &'static str,
        /// The selection rule.
        selection: String,
    },
    /// The command that judges responses cannot be run.
    #[error("the command `{program}` cannot be run: {source}")]
    Command {
        /// The program.
        program: String,
        /// What the system said.
        source: std::io::Error,
    },
    /// The run diverged.
    #[error(
        "the run diverged: `{metric}` is not finite at step {step}{}",
        rows(samples)
    )]
    NotFinite {
        /// The optimizer step, from 1.
        step: u64,
        /// The number that is not finite.
        metric: &'static str,
        /// Ids of the samples of that step that have it, where known.
        samples: Vec<u64>,
    },
    /// The run diverged in the optimizer: its gradient was finite and what became of the weights is not.
    #[error(
        "the run diverged: the optimizer left `{tensor}` not finite at step {step}; a lower `lr` or other decays may hold"
    )]
    WeightsNotFinite {
        /// The optimizer step, from 1.
        step: u64,
        /// The parameter.
        tensor: String,
    },
}

impl Error {
    /// Names in a [`Error::NotFinite`] that names none those of `samples` whose own gradient `norm` finds not finite; all of
    /// them where only their sum is not.
    pub(crate) fn naming(
        self,
        samples: Vec<u64>,
        mut norm: impl FnMut(usize) -> Result<f64>,
    ) -> Self {
        match self {
            Self::NotFinite {
                step,
                metric,
                samples: named,
            } if named.is_empty() => {
                let mut bad = Vec::new();
                for (index, &sample) in samples.iter().enumerate() {
                    if !norm(index).is_ok_and(f64::is_finite) {
                        bad.push(sample);
                    }
                }
                let samples = if bad.is_empty() { samples } else { bad };
                Self::NotFinite {
                    step,
                    metric,
                    samples,
                }
            }
            other => other,
        }
    }
}

impl HasKind for Error {
    fn kind(&self) -> ErrorKind {
        match self {
            Self::File(error) => error.kind(),
            Self::Model(error) => error.kind(),
            Self::Data(error) => error.kind(),
            Self::Tokenizer { source, .. } => source.kind(),
            Self::Credit(error) => error.kind(),
            Self::Loss(error) => error.kind(),
            // Another build would do; a device that is not there is asked for in vain, like a file that is not there.
            Self::Device(pivotal_ops::DeviceError::NotBuilt(_)) | Self::InUse { .. } => {
                ErrorKind::System
            }
            Self::NotFinite { .. } | Self::WeightsNotFinite { .. } => ErrorKind::NotFinite,
            _ => ErrorKind::Input,
        }
    }
}

fn damaged(reasons: &[String]) -> String {
    reasons.iter().map(|reason| format!("; {reason}")).collect()
}

fn rows(samples: &[u64]) -> String {
    match samples {
        [] => String::new(),
        rows => format!(" (rows {rows:?})"),
    }
}
