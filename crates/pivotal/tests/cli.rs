//! The commands as a person runs them: good input, bad input, a run cut short. On a tiny random Llama.

#[path = "cli/bad_input.rs"]
mod bad_input;
#[path = "cli/bench.rs"]
mod bench;
#[path = "cli/cards.rs"]
mod cards;
#[path = "cli/contracts.rs"]
mod contracts;
#[path = "cli/killed.rs"]
mod killed;
#[path = "cli/onpolicy.rs"]
mod onpolicy;
#[path = "cli/output.rs"]
mod output;
#[path = "cli/ppo.rs"]
mod ppo;
#[path = "cli/progress.rs"]
mod progress;
#[path = "cli/recipes.rs"]
mod recipes;
#[path = "cli/refused.rs"]
mod refused;
#[path = "cli/reject.rs"]
mod reject;
#[path = "cli/resume.rs"]
mod resume;
#[path = "cli/sft.rs"]
mod sft;
#[path = "cli/studies.rs"]
mod studies;
#[path = "cli/written.rs"]
mod written;

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Output;

use assert_cmd::Command;

/// Four pairs that the tiny tokenizer of printable ASCII can read.
const PAIRS: &str = r#"{"prompt": "2+2=", "chosen": "4", "rejected": "5, or so"}
{"prompt": "sky?", "chosen": "It is blue.", "rejected": "It is green. It is."}
{"prompt": "say hi", "chosen": "hi there", "rejected": "no"}
{"prompt": "a b", "chosen": "c d e", "rejected": "z y x"}
"#;

fn golden(family: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../pivotal-model/tests/golden")
        .join(family)
}

/// A copy of the tiny Llama to change, in a directory of this name.
fn model_at(scratch: &Scratch, name: &str) -> PathBuf {
    let model = scratch.path(name);
    std::fs::create_dir(&model).unwrap();
    for file in std::fs::read_dir(golden("llama")).unwrap() {
        let file = file.unwrap();
        if file.file_type().unwrap().is_file() {
            std::fs::copy(file.path(), model.join(file.file_name())).unwrap();
        }
    }
    model
}

/// The tiny Llama with a chat template, in `chat`.
fn chat_model(scratch: &Scratch) {
    chat_model_at(scratch, "chat");
}

/// The same in a directory of this name.
fn chat_model_at(scratch: &Scratch, name: &str) {
    let model = model_at(scratch, name);
    let template = "{% for m in messages %}{{ m.role }}: {{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% else %}|{% endif %}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}";
    std::fs::write(model.join("chat_template.jinja"), template).unwrap();
}

/// A scratch directory with `pairs.jsonl` in it, in which commands run.
struct Scratch(tempfile::TempDir);

impl Scratch {
    fn new() -> Self {
        let scratch = Self(tempfile::tempdir().unwrap());
        scratch.write("pairs.jsonl", PAIRS);
        scratch
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn write(&self, name: &str, text: impl AsRef<[u8]>) {
        std::fs::write(self.path(name), text).unwrap();
    }

    fn read(&self, name: &str) -> String {
        std::fs::read_to_string(self.path(name)).unwrap()
    }

    fn run(&self, command: &str) -> Output {
        self.run_with(command, &[])
    }

    /// Runs a command with arguments that white space does not part, or that are no text.
    fn run_with(&self, command: &str, more: &[&OsStr]) -> Output {
        let model = golden("llama");
        let arguments = command.split_whitespace().map(|argument| match argument {
            "MODEL" => model.display().to_string(),
            other => other.to_owned(),
        });
        Command::cargo_bin("pivotal")
            .unwrap()
            .current_dir(self.0.path())
            .args(arguments)
            .args(more)
            .output()
            .unwrap()
    }

    /// Standard output of a command that succeeds.
    fn good(&self, command: &str) -> String {
        let output = self.run(command);
        let error = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(0), "`{command}` said {error}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// Standard error of a command whose input is at fault; `made` must not exist afterwards.
    fn bad(&self, command: &str, made: &str) -> String {
        let output = self.run(command);
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(2), "`{command}` said {error}");
        assert!(
            made.is_empty() || !self.path(made).exists(),
            "`{command}` left `{made}` behind"
        );
        error
    }
}

fn says(error: &str, parts: &[&str]) {
    for part in parts {
        assert!(error.contains(part), "expected `{part}` in: {error}");
    }
}
