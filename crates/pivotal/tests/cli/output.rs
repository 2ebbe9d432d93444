//! A reader that goes away.

use std::process::{Child, Command, Stdio};

use super::Scratch;

fn start(scratch: &Scratch, command: &str, error: Stdio) -> Child {
    let model = super::golden("llama").display().to_string();
    Command::new(assert_cmd::cargo::cargo_bin("pivotal"))
        .current_dir(scratch.0.path())
        .args(command.replace("MODEL", &model).split_whitespace())
        .stdout(Stdio::piped())
        .stderr(error)
        .spawn()
        .unwrap()
}

#[test]
fn a_closed_pipe_is_no_panic_and_the_work_is_done() {
    let scratch = Scratch::new();
    let commands = [
        "dpo --show-config",
        "logps --model MODEL --text hi",
        "generate --model MODEL --prompt hi --max-new-tokens 2",
        "sft --model MODEL --data pairs.jsonl --out run --steps 1",
    ];
    for command in commands {
        let mut child = start(&scratch, command, Stdio::piped());
        drop(child.stdout.take());
        let output = child.wait_with_output().unwrap();
        let error = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(0), "`{command}` said {error}");
        assert!(!error.contains("panicked"), "{error}");
    }
    assert!(scratch.path("run/summary.json").is_file());
}

/// Commands that have something to say on standard error, and how they end.
const SPEAKING: [(&str, i32); 4] = [
    ("logps --model MODEL --ids []", 2),
    (
        "dpo --model MODEL --data told.jsonl --batch 2 --out run --overwrite",
        0,
    ),
    ("bench scaling --model MODEL", 0),
    ("quickstart --smoke --out study --overwrite", 0),
];

fn speaking() -> Scratch {
    let scratch = Scratch::new();
    let signal = |chosen: &str| {
        format!(
            "{{\"prompt\": \"a\", \"chosen\": \"{chosen}\", \"rejected\": \"c\", \
             \"chosen_signal\": [0.5, -0.25], \"rejected_signal\": [0.5, -1]}}\n"
        )
    };
    scratch.write("told.jsonl", signal("b") + &signal("d"));
    scratch.good("dpo --model MODEL --data told.jsonl --batch 2 --out run");
    scratch
}

/// A device that is always full, where the system lets the test make one.
#[cfg(target_os = "linux")]
fn full_device(scratch: &Scratch) -> Option<std::fs::File> {
    let path = scratch.path("full");
    let made = Command::new("mknod")
        .arg(&path)
        .args(["c", "1", "7"])
        .output();
    made.is_ok_and(|output| output.status.success())
        .then(|| std::fs::File::options().write(true).open(path).ok())
        .flatten()
}

#[cfg(not(target_os = "linux"))]
fn full_device(_: &Scratch) -> Option<std::fs::File> {
    None
}

#[test]
fn what_cannot_be_said_on_standard_error_changes_no_exit_code() {
    let scratch = speaking();
    for (command, expected) in SPEAKING {
        let mut child = start(&scratch, command, Stdio::piped());
        drop(child.stderr.take());
        let code = child.wait_with_output().unwrap().status.code();
        assert_eq!(code, Some(expected), "`{command}`, standard error closed");
    }
    let Some(full) = full_device(&scratch) else {
        return;
    };
    let (command, expected) = SPEAKING[0];
    let child = start(&scratch, command, full.into());
    let code = child.wait_with_output().unwrap().status.code();
    assert_eq!(code, Some(expected), "`{command}`, standard error full");
}
