//! A run cut short.

use super::{Scratch, says};

const RUN: &str = "dpo --model MODEL --data pairs.jsonl --credit-selection all --batch 1 \
                   --epochs 3 --checkpoint-every 3 --lora-rank 4";

fn files(scratch: &Scratch, run: &str) -> [Vec<u8>; 2] {
    ["metrics.jsonl", "adapter/adapter_model.safetensors"]
        .map(|file| std::fs::read(scratch.path(run).join(file)).unwrap())
}

/// What a kill between the checkpoint of step 9 and the end leaves: steps logged beyond it, and a half-written one.
fn cut(scratch: &Scratch, run: &str) {
    let run = scratch.path(run);
    std::fs::remove_dir_all(run.join("checkpoints/step-00000012")).unwrap();
    std::fs::remove_dir_all(run.join("adapter")).unwrap();
    std::fs::remove_file(run.join("summary.json")).unwrap();
    std::fs::create_dir(run.join("checkpoints/.unfinished")).unwrap();
    std::fs::write(run.join("checkpoints/.unfinished/state.json"), "{").unwrap();
}

#[test]
fn detail_31_a_resumed_run_is_the_uninterrupted_one_bit_for_bit() {
    let scratch = Scratch::new();
    scratch.good(&format!("{RUN} --out whole"));
    scratch.good(&format!("{RUN} --out cut"));
    cut(&scratch, "cut");
    scratch.good("dpo --resume cut");
    assert!(files(&scratch, "whole") == files(&scratch, "cut"));
}

#[test]
fn a_resumed_run_with_credit_remembers_how_it_drifted() {
    let scratch = Scratch::new();
    let common = "dpo --model MODEL --data pairs.jsonl --lora-rank 4";
    scratch.good(&format!("{common} --credit-selection all --out oracle"));
    scratch.good("annotate --model MODEL --data pairs.jsonl --oracle oracle --records r.jsonl");
    let run = format!(
        "{common} --signals r.jsonl --batch 1 --epochs 3 --checkpoint-every 3 --drift-steps 3 \
         --dropped-every 4 --tensorboard true"
    );
    scratch.good(&format!("{run} --out whole"));
    scratch.good(&format!("{run} --out cut"));
    cut(&scratch, "cut");
    scratch.good("dpo --resume cut");
    assert!(files(&scratch, "whole") == files(&scratch, "cut"));
    let metrics = scratch.read("whole/metrics.jsonl");
    let has = |key: &str| -> Vec<u64> {
        let lines = metrics
            .lines()
            .map(|line| serde_json::from_str(line).unwrap());
        lines
            .filter(|line: &serde_json::Value| line[key].is_number())
            .map(|line| line["step"].as_u64().unwrap())
            .collect()
    };
    assert_eq!(has("opposing_drift"), (6..=12).collect::<Vec<_>>());
    assert!(has("chosen_dropped_shift").iter().all(|step| step % 4 == 1));
    assert_eq!(has("pivots_per_response").len(), 12);
}

#[test]
fn a_damaged_checkpoint_gives_way_to_the_one_before_it() {
    let scratch = Scratch::new();
    scratch.good(&format!("{RUN} --out whole"));
    scratch.good(&format!("{RUN} --out cut"));
    let damaged = scratch.path("cut/checkpoints/step-00000012/parameters.safetensors");
    let mut bytes = std::fs::read(&damaged).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    std::fs::write(&damaged, bytes).unwrap();
    scratch.good("dpo --resume cut");
    assert!(files(&scratch, "whole") == files(&scratch, "cut"));
    assert!(scratch.path("cut/checkpoints/step-00000009").is_dir());
}

#[test]
fn a_killed_process_leaves_a_run_that_resumes() {
    let scratch = Scratch::new();
    scratch.good(&format!("{RUN} --out whole"));
    let model = super::golden("llama").display().to_string();
    for attempt in 0..4 {
        let arguments = RUN.replace("MODEL", &model);
        let mut child = std::process::Command::new(assert_cmd::cargo::cargo_bin("pivotal"))
            .current_dir(scratch.0.path())
            .args(arguments.split_whitespace())
            .args(["--out", "killed", "--overwrite"])
            .stderr(std::process::Stdio::null())
            .stdout(std::process::Stdio::null())
            .spawn()
            .unwrap();
        // After the first checkpoint, at a moment that differs from attempt to attempt.
        let checkpoint = scratch.path("killed/checkpoints/step-00000003");
        while !checkpoint.is_dir() && child.try_wait().unwrap().is_none() {
            std::thread::yield_now();
        }
        std::thread::sleep(std::time::Duration::from_micros(700 * attempt));
        let _ = child.kill();
        child.wait().unwrap();
        scratch.good("dpo --resume killed");
        assert!(
            files(&scratch, "whole") == files(&scratch, "killed"),
            "attempt {attempt}"
        );
    }
}

#[test]
fn a_run_cut_short_before_its_first_checkpoint_begins_again() {
    let scratch = Scratch::new();
    scratch.good(&format!("{RUN} --out whole"));
    scratch.good(&format!("{RUN} --out cut"));
    cut(&scratch, "cut");
    std::fs::remove_dir_all(scratch.path("cut/checkpoints")).unwrap();
    scratch.good("dpo --resume cut");
    assert!(files(&scratch, "whole") == files(&scratch, "cut"));
}

#[test]
fn a_run_on_another_base_model_is_not_resumed() {
    let scratch = Scratch::new();
    let base = scratch.path("base");
    std::fs::create_dir(&base).unwrap();
    for file in std::fs::read_dir(super::golden("llama")).unwrap() {
        let file = file.unwrap();
        if file.file_type().unwrap().is_file() {
            std::fs::copy(file.path(), base.join(file.file_name())).unwrap();
        }
    }
    for recipe in ["dpo --credit-selection all", "sft", "reward"] {
        let name = recipe.split_whitespace().next().unwrap();
        scratch.good(&format!(
            "{recipe} --model base --data pairs.jsonl --steps 1 --out {name}"
        ));
        scratch.good(&format!("{name} --resume {name}"));
    }
    // One weight of the embedding, in the file itself.
    let weights = base.join("model.safetensors");
    let mut bytes = std::fs::read(&weights).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 0x01;
    std::fs::write(&weights, bytes).unwrap();
    let _ = std::fs::remove_file(base.join("model.safetensors.blake3"));
    for name in ["dpo", "sft", "reward"] {
        says(
            &scratch.bad(&format!("{name} --resume {name}"), ""),
            &["`base` changed"],
        );
    }
}

#[test]
fn a_run_with_recomputed_activations_is_the_same_run() {
    let scratch = Scratch::new();
    scratch.good(&format!("{RUN} --out kept"));
    for (name, activations) in [("all", "recompute"), ("some", "1MiB"), ("none", "0MiB")] {
        scratch.good(&format!("{RUN} --out {name} --activations {activations}"));
        assert!(files(&scratch, "kept") == files(&scratch, name), "{name}");
    }
}

#[test]
fn a_finished_or_moved_run_resumes_to_the_same_summary() {
    let scratch = Scratch::new();
    scratch.good(&format!("{RUN} --out run"));
    let before = (scratch.read("run/summary.json"), files(&scratch, "run"));
    scratch.good("dpo --resume ./run");
    let last = |summary: &str| {
        let summary: serde_json::Value = serde_json::from_str(summary).unwrap();
        (summary["last"].clone(), summary["steps"].clone())
    };
    assert_eq!(last(&scratch.read("run/summary.json")), last(&before.0));
    assert!(files(&scratch, "run") == before.1);
    std::fs::rename(scratch.path("run"), scratch.path("moved")).unwrap();
    scratch.good("dpo --resume moved");
    assert!(files(&scratch, "moved") == before.1);
    scratch.write("pairs.jsonl", super::PAIRS.replace("blue", "grey"));
    says(
        &scratch.bad("dpo --resume moved", ""),
        &["pairs.jsonl", "changed"],
    );
    says(&scratch.bad("sft --resume moved", ""), &["moved"]);
}

#[test]
fn an_existing_run_is_left_alone_unless_asked() {
    let scratch = Scratch::new();
    scratch.good(&format!("{RUN} --out run"));
    let before = files(&scratch, "run");
    says(
        &scratch.bad(&format!("{RUN} --out run"), ""),
        &["`run` exists", "--resume", "--overwrite"],
    );
    assert!(files(&scratch, "run") == before);
    says(
        &scratch.bad("dpo --resume run --beta 0.7", ""),
        &["another configuration", "beta"],
    );
    scratch.good(&format!("{RUN} --out run --overwrite"));
    std::fs::create_dir(scratch.path("mine")).unwrap();
    scratch.write("mine/thesis.txt", "x");
    says(
        &scratch.bad(&format!("{RUN} --out mine --overwrite"), ""),
        &["not a run directory"],
    );
    assert_eq!(scratch.read("mine/thesis.txt"), "x");
}

/// Steps of the events, by their place in each record: a length, its checksum, a time, then the step.
fn event_steps(scratch: &Scratch, run: &str) -> Vec<u8> {
    let path = scratch
        .path(run)
        .join("tensorboard/events.out.tfevents.pivotal");
    let bytes = std::fs::read(path).unwrap();
    let (mut rest, mut steps) = (&bytes[..], Vec::new());
    while let Some((len, _)) = rest.split_first_chunk::<8>() {
        let len = u64::from_le_bytes(*len) as usize;
        let event = &rest[12..12 + len];
        // Field 2 after the time's nine bytes; the version's event has none.
        steps.extend((event[9] == 2 << 3).then_some(event[10]));
        rest = &rest[12 + len + 4..];
    }
    steps
}

#[test]
fn a_resumed_run_writes_no_event_twice() {
    let scratch = Scratch::new();
    for recipe in ["dpo --credit-selection all --loss kto", "sft", "reward"] {
        let name = recipe.split_whitespace().next().unwrap();
        let run = format!(
            "{recipe} --model MODEL --data pairs.jsonl --batch 1 --epochs 3 --checkpoint-every 3 \
             --lora-rank 4 --tensorboard true"
        );
        scratch.good(&format!("{run} --out {name}"));
        let whole = scratch.read(&format!("{name}/metrics.jsonl"));
        let steps = event_steps(&scratch, name);
        assert_eq!(steps.len(), whole.lines().count(), "{name}");
        assert!(
            steps.windows(2).all(|two| two[1] == two[0] + 1),
            "{name}: {steps:?}"
        );
        let last = std::fs::read_dir(scratch.path(name).join("checkpoints")).unwrap();
        let last = last.map(|entry| entry.unwrap().path()).max().unwrap();
        std::fs::remove_dir_all(last).unwrap();
        std::fs::remove_file(scratch.path(name).join("summary.json")).unwrap();
        scratch.good(&format!("{name} --resume {name}"));
        assert_eq!(
            scratch.read(&format!("{name}/metrics.jsonl")),
            whole,
            "{name}"
        );
        assert_eq!(event_steps(&scratch, name), steps, "{name}");
    }
}

#[test]
fn a_run_is_continued_as_it_began_or_not_at_all() {
    let scratch = Scratch::new();
    scratch.good(&format!("{RUN} --out run"));
    // Of another recipe: that is said before its configuration is read as this one's.
    for recipe in ["sft", "reward", "ppo"] {
        says(
            &scratch.bad(&format!("{recipe} --resume run"), ""),
            &["it is a run of `dpo`"],
        );
    }
    says(
        &scratch.bad("dpo --resume run --out elsewhere", "elsewhere"),
        &["--resume", "--out"],
    );
    let config = scratch.read("run/config.toml");
    for (from, to) in [
        ("lr = 0.0001", "lr = 0.001"),
        ("beta2 = 0.999", "beta2 = 0.99"),
    ] {
        assert!(config.contains(from), "{config}");
        scratch.write("run/config.toml", config.replace(from, to));
        says(
            &scratch.bad("dpo --resume run", ""),
            &["`config.toml` was edited since it began"],
        );
    }
    // How it is watched is no part of what it is.
    let watched = config.replace("progress = \"auto\"", "progress = \"off\"");
    assert_ne!(watched, config);
    scratch.write("run/config.toml", watched);
    scratch.good("dpo --resume run");
    // A run of before the hash was written down.
    let mut manifest: serde_json::Value =
        serde_json::from_str(&scratch.read("run/manifest.json")).unwrap();
    assert!(
        manifest
            .as_object_mut()
            .unwrap()
            .remove("config_blake3")
            .is_some()
    );
    scratch.write("run/manifest.json", manifest.to_string());
    scratch.good("dpo --resume run");
}

#[test]
fn what_cannot_be_read_is_not_taken_for_absent() {
    let scratch = Scratch::new();
    scratch.good(&format!("{RUN} --out run"));
    let metrics = scratch.read("run/metrics.jsonl");
    let manifest = scratch.read("run/manifest.json");
    // Neither a file where a directory belongs nor the other way round can be read, by whoever it is.
    std::fs::remove_file(scratch.path("run/manifest.json")).unwrap();
    std::fs::create_dir(scratch.path("run/manifest.json")).unwrap();
    let output = scratch.run("dpo --resume run");
    let error = String::from_utf8_lossy(&output.stderr);
    says(&error, &["`run/manifest.json`: Is a directory"]);
    std::fs::remove_dir(scratch.path("run/manifest.json")).unwrap();
    scratch.write("run/manifest.json", manifest);
    std::fs::rename(scratch.path("run/checkpoints"), scratch.path("aside")).unwrap();
    scratch.write("run/checkpoints", "");
    let output = scratch.run("dpo --resume run");
    let error = String::from_utf8_lossy(&output.stderr);
    assert_ne!(output.status.code(), Some(0));
    says(&error, &["`run/checkpoints`: Not a directory"]);
    assert_eq!(scratch.read("run/metrics.jsonl"), metrics);
}

#[test]
fn a_run_in_use_is_neither_resumed_nor_overwritten() {
    let scratch = Scratch::new();
    scratch.good(&format!("{RUN} --out run"));
    let before = files(&scratch, "run");
    let held = std::fs::File::open(scratch.path("run/manifest.json")).unwrap();
    held.lock().unwrap();
    for command in [
        "dpo --resume run".to_owned(),
        format!("{RUN} --out run --overwrite"),
    ] {
        let output = scratch.run(&command);
        let error = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{error}");
        says(&error, &["`run` is in use by another run"]);
    }
    assert!(files(&scratch, "run") == before);
    drop(held);
    scratch.good("dpo --resume run");
}

#[test]
fn a_summary_without_a_step_says_no_number_of_one() {
    let scratch = Scratch::new();
    for recipe in ["dpo --credit-selection all", "sft", "reward"] {
        let name = recipe.split_whitespace().next().unwrap();
        scratch.good(&format!(
            "{recipe} --model MODEL --data pairs.jsonl --steps 1 --lora-rank 2 --out {name}"
        ));
        let last = |summary: &str| -> bool {
            let summary: serde_json::Value = serde_json::from_str(summary).unwrap();
            summary.get("last").is_some()
        };
        assert!(last(&scratch.read(&format!("{name}/summary.json"))));
        scratch.write(&format!("{name}/metrics.jsonl"), "");
        assert!(
            !last(&scratch.good(&format!("{name} --resume {name}"))),
            "{name}"
        );
    }
}
