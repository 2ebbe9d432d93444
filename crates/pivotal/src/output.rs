//! Standard output and standard error, where the reader may have gone.

use std::io::{ErrorKind, Write};

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
