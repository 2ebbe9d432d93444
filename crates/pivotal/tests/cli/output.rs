//! A reader that goes away.

use std::process::Stdio;

use super::Scratch;

#[test]
fn a_closed_pipe_is_no_panic_and_the_work_is_done() {
    let scratch = Scratch::new();
    let model = super::golden("llama").display().to_string();
    let commands = [
        "dpo --show-config",
        "logps --model MODEL --text hi",
        "generate --model MODEL --prompt hi --max-new-tokens 2",
        "sft --model MODEL --data pairs.jsonl --out run --steps 1",
    ];
    for command in commands {
        let mut child = std::process::Command::new(assert_cmd::cargo::cargo_bin("pivotal"))
            .current_dir(scratch.0.path())
            .args(command.replace("MODEL", &model).split_whitespace())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        drop(child.stdout.take());
        let output = child.wait_with_output().unwrap();
        let error = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(0), "`{command}` said {error}");
        assert!(!error.contains("panicked"), "{error}");
    }
    assert!(scratch.path("run/summary.json").is_file());
}
