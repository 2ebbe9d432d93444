//! What can go wrong in a study.

use pivotal_core::{ErrorKind, HasKind};

use crate::world::WorldError;

/// The result of the studies of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What can go wrong in a study.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The world was asked for what it does not have.
    #[error(transparent)]
    World(#[from] WorldError),
    /// A training step or a scoring pass.
    #[error(transparent)]
    Train(Box<pivotal_train::Error>),
    /// The model.
    #[error(transparent)]
    Model(#[from] pivotal_model::Error),
    /// The world's tokenizer.
    #[error(transparent)]
    Data(#[from] pivotal_data::DataError),
    /// A credit rule.
    #[error(transparent)]
    Credit(#[from] pivotal_credit::Error),
    /// A sequence that cannot be packed.
    #[error(transparent)]
    Pack(#[from] pivotal_core::PackError),
    /// The study's own numbers.
    #[error(transparent)]
    Report(#[from] pivotal_report::Error),
    /// The bytes of a start policy are not one.
    #[error("the start policy's bytes do not read as safetensors: {source}")]
    StartPolicy {
        /// What the reader said.
        #[from]
        source: safetensors::SafeTensorError,
    },
    /// A tensor of a start policy is not stored as `f32`.
    #[error("`{name}` of the start policy is stored as {found}, expected F32")]
    StartPolicyType {
        /// The tensor.
        name: String,
        /// Its type.
        found: String,
    },
    /// A setting outside its domain.
    #[error("`{name}` is {found}, expected {expected}")]
    Setting {
        /// The setting.
        name: &'static str,
        /// What it is.
        found: String,
        /// What it may be.
        expected: &'static str,
    },
    /// The system gave no thread.
    #[error("a worker thread could not be started: {source}")]
    Thread {
        /// What the thread pool said.
        #[from]
        source: rayon::ThreadPoolBuildError,
    },
}

impl From<pivotal_train::Error> for Error {
    fn from(error: pivotal_train::Error) -> Self {
        Self::Train(Box::new(error))
    }
}

impl HasKind for Error {
    fn kind(&self) -> ErrorKind {
        match self {
            Self::World(error) => error.kind(),
            Self::Train(error) => error.kind(),
            Self::Model(error) => error.kind(),
            Self::Data(error) => error.kind(),
            Self::Credit(error) => error.kind(),
            Self::Report(error) => error.kind(),
            Self::Pack(_) | Self::Setting { .. } => ErrorKind::Input,
            Self::StartPolicy { .. } | Self::StartPolicyType { .. } => ErrorKind::Input,
            Self::Thread { .. } => ErrorKind::System,
        }
    }
}
