//! Progress on standard error: lines where it is no terminal, a dashboard where it is one, and the same run either way.

use std::process::{Command, Stdio};

use super::{Scratch, golden, says};

const SFT: &str = "sft --model MODEL --data pairs.jsonl --batch 2 --epochs 3 --lora-rank 4";

fn stderr(scratch: &Scratch, command: &str) -> String {
    let output = scratch.run(command);
    let error = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(0), "`{command}` said {error}");
    let summary: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert!(summary["steps"].is_number(), "{summary}");
    error
}

#[test]
fn piped_progress_is_lines_without_escape_codes() {
    let scratch = Scratch::new();
    for mode in ["auto", "dashboard", "lines"] {
        let error = stderr(&scratch, &format!("{SFT} --progress {mode} --out {mode}"));
        assert!(!error.contains(['\x1b', '\r']), "{error:?}");
        // The first step and the last one; the others only if they are slow.
        let lines: Vec<&str> = error.lines().collect();
        assert!(lines.len() >= 2, "{error}");
        says(lines[0], &["sft 1/6: loss ", "grad ", "lr "]);
        says(
            lines[lines.len() - 1],
            &["sft 6/6: loss ", " tokens/s", "eta 0s"],
        );
    }
    assert_eq!(
        stderr(&scratch, &format!("{SFT} --progress off --out off")),
        ""
    );
    for run in ["dashboard", "lines", "off"] {
        let read = |run: &str| scratch.read(&format!("{run}/metrics.jsonl"));
        assert!(read("auto") == read(run), "{run}");
    }
}

#[test]
fn a_run_may_be_resumed_under_another_progress() {
    let scratch = Scratch::new();
    scratch.good(&format!("{SFT} --out run"));
    let metrics = scratch.read("run/metrics.jsonl");
    assert_eq!(stderr(&scratch, "sft --resume run --progress off"), "");
    assert_eq!(scratch.read("run/metrics.jsonl"), metrics);
    says(
        &scratch.bad("sft --resume run --seed 9", ""),
        &["another configuration", "seed"],
    );
}

#[test]
fn warnings_are_said_when_they_fire_and_stand_in_the_metrics() {
    let scratch = Scratch::new();
    let common = "dpo --model MODEL --data pairs.jsonl --batch 2 --epochs 2 --lora-rank 4";
    scratch.good(&format!("{common} --credit-selection all --out oracle"));
    scratch.good("annotate --model MODEL --data pairs.jsonl --oracle oracle --records r.jsonl");
    // A baseline far above every signal: nothing agrees with the chosen responses, all with the rejected ones.
    let masked = format!("{common} --signals r.jsonl --credit-baseline-value 100");
    let error = stderr(&scratch, &format!("{masked} --out run"));
    says(
        &error,
        &["warning: under-segmentation: ", "warning: empty-masks: "],
    );
    let told = error
        .lines()
        .filter(|line| line.contains("under-segmentation"));
    // Once while it runs, and once in the end with the summary.
    assert_eq!(told.count(), 2, "{error}");
    for line in scratch.read("run/metrics.jsonl").lines() {
        let line: serde_json::Value = serde_json::from_str(line).unwrap();
        assert!(
            line["warnings"].to_string().contains("under-segmentation"),
            "{line}"
        );
        assert_eq!(line["single_segment_fraction"], 1.0);
        assert_eq!(
            line["kept_by_position_positive"].as_array().unwrap().len(),
            10
        );
    }
    let quiet = "--warn-single-segment 2 --warn-empty-masks 2 --warn-keep-all 2 --warn-keep-none -1 --warn-segment-tokens 0";
    scratch.good(&format!("{masked} {quiet} --out quiet"));
    assert!(!scratch.read("quiet/metrics.jsonl").contains("warnings"));
}

/// `command` on a terminal of 80 columns and 24 rows; none where there is no `script` to make one.
#[expect(clippy::print_stderr, reason = "a test that is skipped says so")]
fn on_a_terminal(scratch: &Scratch, command: &str, environment: &[(&str, &str)]) -> Option<String> {
    let program = assert_cmd::cargo::cargo_bin("pivotal");
    let model = golden("llama").display().to_string();
    let command = format!(
        "stty rows 24 cols 80; {} {}",
        program.display(),
        command.replace("MODEL", &model)
    );
    let output = Command::new("script")
        .args(["-qec", &command, "/dev/null"])
        .current_dir(scratch.0.path())
        .env("TERM", "xterm-256color")
        .env_remove("NO_COLOR")
        .envs(environment.iter().copied())
        .stdin(Stdio::null())
        .output();
    let Ok(output) = output else {
        eprintln!("skipped: there is no `script`");
        return None;
    };
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert_eq!(output.status.code(), Some(0), "{text}");
    Some(text)
}

#[cfg(target_os = "linux")]
#[test]
fn a_terminal_gets_a_dashboard_and_the_same_run() {
    let scratch = Scratch::new();
    scratch.good(&format!("{SFT} --out piped"));
    let Some(shown) = on_a_terminal(&scratch, &format!("{SFT} --out shown"), &[]) else {
        return;
    };
    says(
        &shown,
        &[
            "╭",
            " pivotal sft ",
            "6/6 · 100 %",
            "\x1b[0;36m",
            "\"steps\": 6",
        ],
    );
    // Nothing that would have to be put back: no other screen, no hidden cursor, and the last colour is none.
    for code in ["\x1b[?1049", "\x1b[?25l"] {
        assert!(!shown.contains(code), "{shown:?}");
    }
    let last = shown.rsplit('\x1b').next().unwrap();
    assert!(last.starts_with("[J"), "{last:?}");
    for file in ["metrics.jsonl", "adapter/adapter_model.safetensors"] {
        let read = |run: &str| std::fs::read(scratch.path(run).join(file)).unwrap();
        assert!(read("piped") == read("shown"), "{file}");
    }

    let plain = on_a_terminal(
        &scratch,
        &format!("{SFT} --out plain"),
        &[("NO_COLOR", "1")],
    );
    let plain = plain.unwrap();
    says(&plain, &["╭ pivotal sft "]);
    assert!(!plain.contains("\x1b[0;"), "{plain:?}");
    let dumb = on_a_terminal(&scratch, &format!("{SFT} --out dumb"), &[("TERM", "dumb")]).unwrap();
    says(&dumb, &["sft 6/6: loss "]);
    assert!(!dumb.contains('\x1b'), "{dumb:?}");
    let lines = on_a_terminal(
        &scratch,
        &format!("{SFT} --progress lines --out lines"),
        &[],
    );
    assert!(!lines.unwrap().contains('\x1b'));
}
