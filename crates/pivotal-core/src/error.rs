//! What an error means to the person who ran the program.

use std::path::PathBuf;

/// Who has to act on an error; the exit code and the Python exception hang on this, never on the text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorKind {
    /// The input is at fault: a file, a row, a flag, a config key. Exit code 2.
    Input,
    /// The system is at fault: disk full, permission denied, out of memory. Exit code 1.
    System,
    /// The run diverged: a loss, a gradient or a signal is not finite. Exit code 3.
    NotFinite,
}

impl ErrorKind {
    /// The process exit code of this kind.
    ///
    /// # Examples
    /// ```
    /// assert_eq!(pivotal_core::ErrorKind::Input.exit_code(), 2);
    /// ```
    pub const fn exit_code(self) -> u8 {
        match self {
            Self::System => 1,
            Self::Input => 2,
            Self::NotFinite => 3,
        }
    }
}

/// An error that knows its [`ErrorKind`]: every error enum of the workspace implements it.
pub trait HasKind: std::error::Error {
    /// Whose fault it is.
    fn kind(&self) -> ErrorKind;
}

/// A file that could not be read or written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FileError {
    /// The path does not exist, or is not what was asked for.
    #[error("`{}`: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The write, the sync or the rename failed; what stood there before is untouched.
    #[error("could not write `{}`: {source}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The content does not match the checksum stored with it.
    #[error(
        "`{}` is damaged: its checksum is {found}, expected {expected}; use the previous checkpoint",
        path.display()
    )]
    Damaged {
        /// The file.
        path: PathBuf,
        /// The checksum stored.
        expected: String,
        /// The checksum of the content found.
        found: String,
    },
}

impl HasKind for FileError {
    fn kind(&self) -> ErrorKind {
        match self {
            Self::Read { source, .. } => match source.kind() {
                std::io::ErrorKind::NotFound
                | std::io::ErrorKind::IsADirectory
                | std::io::ErrorKind::NotADirectory
                | std::io::ErrorKind::InvalidData => ErrorKind::Input,
                _ => ErrorKind::System,
            },
            Self::Write { .. } => ErrorKind::System,
            Self::Damaged { .. } => ErrorKind::Input,
        }
    }
}
