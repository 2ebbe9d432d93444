//! A program that judges a response: unit tests, a compiler, anything with an exit status.

use std::fs::{File, OpenOptions};
use std::io::{Seek, SeekFrom, Write};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use pivotal_core::FileError;
use serde_json::Value;

use crate::error::{Error, Result};

/// A program that is run on each response, without a shell, for a limited time.
///
/// It is named by the configuration, never by the data: a file of prompts cannot run anything.
#[derive(Clone, Debug)]
pub struct CommandCheck {
    arguments: Vec<String>,
    limit: Duration,
}

impl CommandCheck {
    /// The program and arguments in `text`, split at white space; `None` if it is empty.
    pub fn new(text: &str, limit_seconds: f64) -> Option<Self> {
        let arguments: Vec<String> = text.split_whitespace().map(str::to_owned).collect();
        (!arguments.is_empty()).then(|| Self {
            arguments,
            limit: Duration::from_secs_f64(limit_seconds),
        })
    }

    /// Whether it exits with status 0 in time when it reads `{"id":…,"response":…,"reference":…}`. What it prints is dropped. One
    /// that is out of time is killed with all that it started.
    ///
    /// # Errors
    /// [`Error::Command`] if it cannot be started; [`Error::File`] if its input cannot be written.
    pub fn holds(&self, id: u64, response: &str, reference: &Value) -> Result<bool> {
        let input = serde_json::json!({ "id": id, "response": response, "reference": reference });
        let fault = |source| Error::Command {
            program: self.arguments[0].clone(),
            source,
        };
        let mut command = Command::new(&self.arguments[0]);
        own_group(&mut command)
            .args(&self.arguments[1..])
            .stdin(Stdio::from(input_file(input.to_string().as_bytes())?))
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let mut child = command.spawn().map_err(fault)?;
        let begin = Instant::now();
        let mut pause = Duration::from_micros(200);
        loop {
            if let Some(status) = child.try_wait().map_err(fault)? {
                return Ok(status.success());
            }
            if begin.elapsed() >= self.limit {
                end_group(&child);
                child.kill().map_err(fault)?;
                child.wait().map_err(fault)?;
                return Ok(false);
            }
            std::thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(10));
        }
    }
}

/// A program, with what it starts, in a group of its own: a test runner that is out of time has children that are too.
#[cfg(unix)]
fn own_group(command: &mut Command) -> &mut Command {
    std::os::unix::process::CommandExt::process_group(command, 0)
}

#[cfg(not(unix))]
fn own_group(command: &mut Command) -> &mut Command {
    command
}

/// Ends the group that `child` leads. The standard library has no call for it, and every Unix has a shell that does.
fn end_group(child: &Child) {
    let group = child.id().to_string();
    // Should there be none, the child is killed all the same.
    let _ = Command::new("sh")
        .args(["-c", "kill -s KILL -- \"-$0\"", &group])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
}

/// A file that holds `bytes` and has no name any more. A pipe would need a thread that writes while the program may not read.
fn input_file(bytes: &[u8]) -> Result<File> {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    let name = format!("pivotal-command-{}-{count}", std::process::id());
    let path: PathBuf = std::env::temp_dir().join(name);
    let written = || -> std::io::Result<File> {
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .open(&path)?;
        file.write_all(bytes)?;
        file.seek(SeekFrom::Start(0))?;
        std::fs::remove_file(&path)?;
        Ok(file)
    };
    written().map_err(|source| Error::File(FileError::Write { path, source }))
}

#[cfg(all(test, unix))]
mod tests {
    use super::*;

    fn holds(command: &str, seconds: f64, response: &str) -> Result<bool> {
        let command = CommandCheck::new(command, seconds).unwrap();
        command.holds(3, response, &serde_json::json!({ "tests": "x" }))
    }

    #[test]
    fn the_exit_status_decides() {
        assert!(holds("grep -q \"response\":\"a;b\"", 5.0, "a;b").unwrap());
        assert!(!holds("grep -q \"response\":\"a;b\"", 5.0, "c").unwrap());
        assert!(holds("grep -q \"tests\":\"x\"", 5.0, "c").unwrap());
    }

    #[test]
    fn nothing_goes_through_a_shell() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("made").display().to_string();
        let command = format!("true ; touch {path}");
        assert!(holds(&command, 5.0, &format!("$(touch {path})")).unwrap());
        assert!(!directory.path().join("made").exists());
    }

    #[test]
    fn it_is_killed_in_time() {
        let begin = Instant::now();
        assert!(!holds("sleep 30", 0.05, "x").unwrap());
        assert!(begin.elapsed() < Duration::from_secs(5));
    }

    #[test]
    fn what_it_started_is_killed_with_it() {
        let directory = tempfile::tempdir().unwrap();
        let (script, started) = (directory.path().join("run"), directory.path().join("child"));
        let text = format!("sleep 30 & echo $! > {}; wait", started.display());
        std::fs::write(&script, text).unwrap();
        assert!(!holds(&format!("sh {}", script.display()), 0.5, "x").unwrap());
        let child = std::fs::read_to_string(started).unwrap();
        let is_there = || {
            let state = std::fs::read_to_string(format!("/proc/{}/stat", child.trim()));
            // Whoever inherits it may not have waited for it yet: then it is a zombie.
            state.is_ok_and(|state| !state.contains(") Z "))
        };
        let begin = Instant::now();
        while is_there() && begin.elapsed() < Duration::from_secs(5) {
            std::thread::sleep(Duration::from_millis(10));
        }
        assert!(!is_there());
    }

    #[test]
    fn one_that_does_not_exist_is_an_error_not_a_score() {
        let error = holds("no-such-program-here", 1.0, "x").unwrap_err();
        assert!(
            error.to_string().contains("`no-such-program-here`"),
            "{error}"
        );
    }
}
