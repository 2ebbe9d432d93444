//! Where results are written to: nothing is destroyed, and what cannot be written is found before the work.

use super::{Scratch, says};

const GENERATE: &str = "generate --model MODEL --max-new-tokens 2";
const ANNOTATE: &str = "annotate --model MODEL --oracle MODEL --data pairs.jsonl --records";

#[cfg(unix)]
#[test]
fn an_input_is_never_written_over() {
    let scratch = Scratch::new();
    std::os::unix::fs::symlink("pairs.jsonl", scratch.path("link")).unwrap();
    std::fs::hard_link(scratch.path("pairs.jsonl"), scratch.path("twin")).unwrap();
    for out in ["pairs.jsonl", "./pairs.jsonl", "link", "twin"] {
        for command in [
            format!("{GENERATE} --data pairs.jsonl --out {out} --overwrite"),
            format!("{ANNOTATE} {out} --overwrite"),
            format!("bench generate --model MODEL --data pairs.jsonl --json {out} --overwrite"),
        ] {
            says(
                &scratch.bad(&command, ""),
                &[out, "which this command reads"],
            );
        }
    }
    scratch.write("c.toml", "[annotate]\nrecords = \"c.toml\"\n");
    let annotate = ANNOTATE.replace("--records", "--config c.toml --overwrite");
    says(
        &scratch.bad(&annotate, ""),
        &["c.toml", "which this command reads"],
    );
    assert_eq!(scratch.read("pairs.jsonl"), super::PAIRS);
    assert!(scratch.path("link").is_symlink());
}

#[cfg(unix)]
#[test]
fn a_links_target_is_replaced_and_a_pipe_is_written_to() {
    let scratch = Scratch::new();
    scratch.write("target", "old");
    std::os::unix::fs::symlink("target", scratch.path("link")).unwrap();
    let told = scratch.good(&format!("{GENERATE} --prompt hi"));
    scratch.good(&format!("{GENERATE} --prompt hi --out link --overwrite"));
    assert!(scratch.path("link").is_symlink());
    assert_eq!(scratch.read("target"), told);

    let made = std::process::Command::new("mkfifo")
        .arg(scratch.path("pipe"))
        .status();
    assert!(made.unwrap().success());
    let pipe = scratch.path("pipe");
    let reader = std::thread::spawn(move || std::fs::read_to_string(pipe).unwrap());
    scratch.good(&format!("{GENERATE} --prompt hi --out pipe"));
    assert_eq!(reader.join().unwrap(), told);
    // It has files beside it.
    let error = scratch.bad(&format!("{ANNOTATE} pipe --overwrite"), "pipe.config.toml");
    says(&error, &["`records` is pipe", "regular file"]);
}

#[test]
fn an_output_that_cannot_be_is_found_before_the_work() {
    let scratch = Scratch::new();
    std::fs::create_dir(scratch.path("directory")).unwrap();
    for (command, says_what) in [
        (format!("{GENERATE} --prompt hi --out"), "is a directory"),
        (
            "bench generate --model MODEL --json".to_owned(),
            "is a directory",
        ),
        (ANNOTATE.to_owned(), "regular file"),
    ] {
        let output = scratch.run(&format!("{command} directory"));
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(2), "{error}");
        says(&error, &["directory", says_what]);
        assert!(output.stdout.is_empty(), "it worked first: `{command}`");
    }
    for study in ["quickstart --smoke", "lab trainers --smoke"] {
        let error = scratch.bad(&format!("{study} --out pairs.jsonl --overwrite"), "");
        says(&error, &["`pairs.jsonl` is no directory"]);
        // Not a line of progress.
        assert_eq!(error.lines().count(), 1, "{error}");
    }
    assert_eq!(scratch.read("pairs.jsonl"), super::PAIRS);
}

/// Nobody can make a file in `/proc`, whatever the rights.
#[cfg(target_os = "linux")]
#[test]
fn a_place_where_nothing_can_be_made_is_the_systems_fault_before_the_work() {
    let scratch = Scratch::new();
    for (command, out) in [
        (
            format!("{GENERATE} --prompt hi --out"),
            "/proc/pivotal.jsonl",
        ),
        (
            "bench generate --model MODEL --json".to_owned(),
            "/proc/pivotal.json",
        ),
        (ANNOTATE.to_owned(), "/proc/pivotal.jsonl"),
        ("quickstart --smoke --out".to_owned(), "/proc/pivotal/study"),
        (
            "lab start-policy --out".to_owned(),
            "/proc/pivotal.safetensors",
        ),
    ] {
        let output = scratch.run(&format!("{command} {out}"));
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(1), "{error}");
        says(&error, &["could not write `/proc/pivotal"]);
        assert_eq!(error.lines().count(), 1, "{error}");
        assert!(output.stdout.is_empty(), "it worked first: `{command}`");
    }
}
