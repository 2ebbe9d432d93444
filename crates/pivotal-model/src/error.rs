//! What can go wrong with a model and its files.

use std::path::{Path, PathBuf};

use pivotal_core::{ErrorKind, FileError, HasKind};

/// The result of everything in this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// How many names an error lists before it only counts.
const NAMES_SHOWN: usize = 8;

/// What can go wrong with a model and its files.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file could not be read or written, or is damaged.
    #[error(transparent)]
    File(#[from] FileError),
    /// The name is that of a model hub, not of a file here.
    #[error(
        "`{id}` is not a path here and looks like a hub id: download the model and give its directory, or a .gguf file"
    )]
    HubId {
        /// The name given.
        id: String,
    },
    /// The path is neither a model directory nor a GGUF file.
    #[error(
        "`{}` is not a model: expected a Hugging Face directory with `config.json`, or a .gguf file",
        path.display()
    )]
    NotAModel {
        /// The path given.
        path: PathBuf,
    },
    /// A JSON file does not parse.
    #[error("`{}` is not valid JSON: {source}", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// Where, and what was expected there.
        source: serde_json::Error,
    },
    /// A key that must be there is not.
    #[error("`{}` lacks the key `{key}`", path.display())]
    MissingKey {
        /// The file.
        path: PathBuf,
        /// The key.
        key: String,
    },
    /// A key has a value that it cannot have, or that this family of decoders does not have.
    #[error("`{key}` in `{}` is {found}, expected {expected}", path.display())]
    Value {
        /// The file.
        path: PathBuf,
        /// The key.
        key: String,
        /// What it may be.
        expected: &'static str,
        /// What it is.
        found: String,
    },
    /// The model is of a family that this crate does not have.
    #[error(
        "`{}` is of architecture `{found}`, expected one of `llama`, `mistral`, `qwen2`",
        path.display()
    )]
    UnknownArchitecture {
        /// The file.
        path: PathBuf,
        /// The architecture it names.
        found: String,
    },
    /// A directory has no weights in a format that is read.
    #[error(
        "`{}` has no weights: expected `model.safetensors` or `model.safetensors.index.json` (pickled `.bin` files are not read)",
        path.display()
    )]
    NoWeights {
        /// The directory.
        path: PathBuf,
    },
    /// A safetensors file is truncated, has a bad header, or its tensors do not tile its data.
    #[error("`{}` is not a valid safetensors file: {source}", path.display())]
    Safetensors {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: safetensors::SafeTensorError,
    },
    /// A GGUF file is truncated or breaks a rule of the format.
    #[error("`{}` is not a valid GGUF file: at byte {offset}, {fault}", path.display())]
    Gguf {
        /// The file.
        path: PathBuf,
        /// Where the reader stood, in bytes from the start.
        offset: usize,
        /// What it found there.
        fault: GgufFault,
    },
    /// A tensor is stored in a type that is not read.
    #[error("tensor `{tensor}` in `{}` has type {found}, expected one of {expected}", path.display())]
    TensorType {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// Its type.
        found: String,
        /// The types that are read.
        expected: &'static str,
    },
    /// Tensors that the config asks for are not in the file.
    #[error("`{}` lacks {}", path.display(), listed(names))]
    MissingTensors {
        /// The file or directory.
        path: PathBuf,
        /// Their names, the first ones if there are many.
        names: Vec<String>,
    },
    /// The file has tensors that the config has no place for.
    #[error("`{}` has no place in the model for {}", path.display(), listed(names))]
    ExtraTensors {
        /// The file or directory.
        path: PathBuf,
        /// Their names.
        names: Vec<String>,
    },
    /// A tensor has another shape than the config says.
    #[error("tensor `{tensor}` in `{}` has shape {found:?}, expected {expected:?}", path.display())]
    TensorShape {
        /// The file or directory.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// The shape the config asks for.
        expected: Vec<usize>,
        /// The shape found.
        found: Vec<usize>,
    },
    /// Two files of one checkpoint hold the same tensor.
    #[error("tensor `{tensor}` is in `{}` and in another file of the same checkpoint", path.display())]
    DuplicateTensor {
        /// The second file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
    },
    /// A checkpoint's tokenizer cannot be written as `tokenizer.json`.
    #[error(
        "the tokenizer is a bare vocabulary, expected a `tokenizer.json`: build it from the vocabulary before saving"
    )]
    BareVocabulary,
    /// An array handed to this crate has the wrong shape.
    #[error("`{what}` has shape {found:?}, expected {expected:?}")]
    Shape {
        /// The array.
        what: String,
        /// The shape that fits.
        expected: Vec<usize>,
        /// The shape found.
        found: Vec<usize>,
    },
    /// A number handed to this crate is outside its domain.
    #[error("`{what}` is {found}, expected {expected}")]
    Domain {
        /// The argument.
        what: &'static str,
        /// What it may be.
        expected: &'static str,
        /// What it is.
        found: f64,
    },
    /// A new adapter's rank is above that of any layer it is for.
    #[error(
        "`lora-rank` is {rank}, expected at most {most}, the rank of the largest layer that is adapted"
    )]
    LoraRank {
        /// The rank asked for.
        rank: usize,
        /// The smaller side of the layer whose smaller side is largest.
        most: usize,
    },
    /// A new adapter is for a layer that the decoder does not have.
    #[error("`lora-targets` has `{target}`, expected linear layers of the model: {}", layers.join(", "))]
    LoraTarget {
        /// The name given.
        target: String,
        /// The names there are.
        layers: Vec<String>,
    },
    /// A token id is not in the vocabulary.
    #[error("token id {id} is outside the vocabulary, expected less than {vocab}")]
    TokenOutOfRange {
        /// The id.
        id: u32,
        /// The number of ids that exist.
        vocab: usize,
    },
    /// A sequence is longer than the model's positions or its attention window.
    #[error("a sequence of {tokens} tokens is longer than the model's `{what}` of {limit}")]
    SequenceTooLong {
        /// Its length in tokens.
        tokens: usize,
        /// The most that fits.
        limit: usize,
        /// The config key that says so.
        what: &'static str,
    },
    /// A number that the model computed is not finite.
    #[error("`{what}` is not finite")]
    NotFinite {
        /// The value.
        what: String,
    },
}

/// What is wrong with a GGUF file.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum GgufFault {
    /// The first four bytes are not `GGUF`.
    #[error("the file does not begin with `GGUF`")]
    Magic,
    /// The version is not one that is read.
    #[error("the version is {0}, expected 2 or 3 in little-endian order")]
    Version(u32),
    /// The file ends before what it announces.
    #[error("{what} needs {needed} bytes and {left} are left")]
    Truncated {
        /// What was being read.
        what: &'static str,
        /// The bytes it takes.
        needed: u64,
        /// The bytes there are.
        left: usize,
    },
    /// A string is not UTF-8.
    #[error("{0} is not UTF-8")]
    Utf8(&'static str),
    /// A value type that the format does not have.
    #[error("`{key}` has value type {found}, expected 0 to 12")]
    ValueType {
        /// The metadata key.
        key: String,
        /// The type's number.
        found: u32,
    },
    /// Arrays inside arrays.
    #[error("`{0}` is an array of arrays, which no key of a decoder is")]
    NestedArray(String),
    /// A boolean that is neither 0 nor 1.
    #[error("`{key}` holds the boolean {found}, expected 0 or 1")]
    Boolean {
        /// The metadata key.
        key: String,
        /// The byte found.
        found: u8,
    },
    /// A metadata key or tensor name comes twice.
    #[error("`{0}` comes twice")]
    Duplicate(String),
    /// The alignment is not a power of two of at least 8.
    #[error("`general.alignment` is {0}, expected a power of two from 8 to 65536")]
    Alignment(u64),
    /// A tensor has too many dimensions, or an element count that overflows.
    #[error("tensor `{0}` has dimensions that no decoder has")]
    Dimensions(String),
    /// A quantised tensor's rows are not whole blocks.
    #[error(
        "tensor `{tensor}` has rows of {row} elements, expected a multiple of its block of {block}"
    )]
    Block {
        /// The tensor.
        tensor: String,
        /// Elements in a row.
        row: usize,
        /// Elements in a block.
        block: usize,
    },
    /// A tensor's data is not aligned, or lies outside the file.
    #[error(
        "tensor `{tensor}` of {length} bytes at offset {at} does not lie in the {data} bytes of data, aligned"
    )]
    Offset {
        /// The tensor.
        tensor: String,
        /// Its offset from the start of the data.
        at: u64,
        /// Its length in bytes.
        length: u64,
        /// The bytes of data in the file.
        data: usize,
    },
    /// Two tensors share bytes.
    #[error("tensors `{0}` and `{1}` overlap")]
    Overlap(String, String),
}

impl HasKind for Error {
    fn kind(&self) -> ErrorKind {
        match self {
            Self::File(error) => error.kind(),
            Self::NotFinite { .. } => ErrorKind::NotFinite,
            _ => ErrorKind::Input,
        }
    }
}

impl Error {
    pub(crate) fn value(
        path: &Path,
        key: &str,
        expected: &'static str,
        found: impl std::fmt::Display,
    ) -> Self {
        Self::Value {
            path: path.into(),
            key: key.into(),
            expected,
            found: found.to_string(),
        }
    }

    pub(crate) fn read(path: &Path, source: std::io::Error) -> Self {
        Self::File(FileError::Read {
            path: path.into(),
            source,
        })
    }
}

fn listed(names: &[String]) -> String {
    let shown = names
        .iter()
        .take(NAMES_SHOWN)
        .map(|name| format!("`{name}`"));
    let mut text = format!(
        "the tensor{} {}",
        if names.len() == 1 { "" } else { "s" },
        shown.collect::<Vec<_>>().join(", ")
    );
    if names.len() > NAMES_SHOWN {
        text += &format!(" and {} more", names.len() - NAMES_SHOWN);
    }
    text
}
