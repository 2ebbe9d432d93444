//! Standard output and standard error, where the reader may have gone; and what a file to write must be, before the work.

use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};

use pivotal_core::{check_writable, is_stream, same_file};

use crate::failure::Failure;

/// Writes `bytes` to standard output. A reader that has closed it (`| head`) wants no more: the command goes on, in silence.
pub(crate) fn print(bytes: &[u8]) -> Result<(), Failure> {
    let mut output = std::io::stdout().lock();
    match output.write_all(bytes).and_then(|()| output.flush()) {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => Err(Failure::system(&format!(
            "could not write to standard output: {error}"
        ))),
        _ => Ok(()),
    }
}

/// [`print()`], with an end of line.
pub(crate) fn print_line(text: &str) -> Result<(), Failure> {
    print(format!("{text}\n").as_bytes())
}

/// Writes a line to standard error. What cannot be said there, to a reader that has gone or a device that is full, is left
/// unsaid: the work and its exit code do not depend on it.
pub(crate) fn tell(text: &str) {
    let _ = std::io::stderr()
        .lock()
        .write_all(format!("{text}\n").as_bytes());
}

/// Refuses what `flag` names if it could not be written once the work is done, or if that would destroy one of the command's
/// `inputs`. A device or a pipe holds nothing that `--overwrite` would have to allow.
pub(crate) fn check_file(
    flag: &str,
    path: &Path,
    overwrite: bool,
    inputs: &[Option<&PathBuf>],
) -> Result<(), Failure> {
    let name = path.display();
    if path.is_dir() {
        return Err(Failure::input(format!(
            "`{name}` is a directory: give a file as `{flag}`"
        )));
    }
    if path.exists() && !is_stream(path) && !overwrite {
        return Err(Failure::input(format!(
            "`{name}` exists: give `--overwrite` or another `{flag}`"
        )));
    }
    let mut inputs = inputs.iter().flatten();
    if let Some(input) = inputs.find(|input| same_file(input, path)) {
        return Err(Failure::input(format!(
            "`{name}` is `{}`, which this command reads: give another `{flag}`",
            input.display()
        )));
    }
    let parent = path.parent().filter(|path| !path.as_os_str().is_empty());
    if parent.is_some_and(|parent| !parent.is_dir()) {
        return Err(Failure::input(format!(
            "`{flag}` lies in no directory that exists"
        )));
    }
    Ok(check_writable(path)?)
}
