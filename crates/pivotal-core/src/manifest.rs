//! What a run was made of: enough to repeat it, and to see what differs when a repetition does.

use serde::{Deserialize, Serialize};

/// The manifest of a run directory, `manifest.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// Version of the record schema.
    pub schema_version: u32,
    /// Version of Pivotal.
    pub pivotal_version: String,
    /// The recipe: `sft`, `reward`, `dpo`, …
    pub recipe: String,
    /// Seed of every random stream of the run.
    pub seed: u64,
    /// Where the run computed: `cpu`, with the processor features that chose the kernels, or the card as it names itself.
    pub device: String,
    /// Threads the run used: for the record, results do not depend on it.
    pub threads: usize,
    /// BLAKE3 of each input, by the path it was given as.
    pub inputs: Vec<FileHash>,
    /// BLAKE3 of the lines of `config.toml` that make the run what it is; absent where there is no such file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub config_blake3: Option<String>,
}

/// An input file and its hash.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileHash {
    /// The path as given.
    pub path: String,
    /// BLAKE3 of the content, hexadecimal.
    pub blake3: String,
}
