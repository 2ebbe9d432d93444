//! What a run promises besides its result: where it stops and with which exit code, what it leaves, what a mask that keeps
//! everything is.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use super::{Scratch, says};

const PROMPTS: &str = r#"{"prompt": "say a", "checks": [{"kind": "lower_case"}, {"kind": "regex", "pattern": "[aeiou]"}]}
{"prompt": "no z", "checks": [{"kind": "regex", "pattern": "^[^z]+$"}, {"kind": "max_words", "count": 2}]}
"#;

/// Recipes, each with a learning rate that no model survives, and what is wrong a few steps later.
const DIVERGING: [&str; 5] = [
    "dpo --data pairs.jsonl --credit-selection all --batch 2 --epochs 8",
    "sft --data pairs.jsonl --batch 2 --epochs 8",
    "reward --data pairs.jsonl --batch 2 --epochs 8",
    "grpo --data prompts.jsonl --prompts 2 --samples 4 --max-new-tokens 6 --steps 12 --credit-selection all",
    "ppo --data prompts.jsonl --prompts 2 --samples 4 --max-new-tokens 6 --steps 12 --value-lr 1e30 --minibatches 1 --update-epochs 1 --credit-selection all",
];

fn scratch() -> Scratch {
    let scratch = Scratch::new();
    scratch.write("prompts.jsonl", PROMPTS);
    scratch
}

fn error_of(output: &Output, code: i32) -> String {
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(code), "{error}");
    assert!(!error.contains("panicked"), "{error}");
    error
}

fn files_below(directory: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut found = BTreeMap::new();
    for entry in std::fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        match path.is_dir() {
            true => found.extend(files_below(&path)),
            false => {
                found.insert(path.clone(), std::fs::read(path).unwrap());
            }
        }
    }
    found
}

#[test]
fn a_run_that_diverges_names_step_number_and_rows_and_keeps_its_last_good_checkpoint() {
    for recipe in DIVERGING {
        let scratch = scratch();
        let name = recipe.split_whitespace().next().unwrap();
        let output = scratch.run(&format!(
            "{recipe} --model MODEL --lora-rank 4 --lr 1e30 --clip-norm 0 --schedule constant \
             --checkpoint-every 1 --progress off --out run"
        ));
        let error = error_of(&output, 3);
        says(
            &error,
            &["the run diverged: `", "` is not finite at step ", "(rows ["],
        );
        assert!(!scratch.path("run/summary.json").exists(), "{name}");
        let checkpoints = files_below(&scratch.path("run/checkpoints"));
        assert!(!checkpoints.is_empty(), "{name}: {error}");
        // It loads: the run comes to the same end again, in the same step, and touches it no more.
        let again = error_of(&scratch.run(&format!("{name} --resume run")), 3);
        assert_eq!(again, error, "{name}");
        assert!(
            files_below(&scratch.path("run/checkpoints")) == checkpoints,
            "{name}"
        );
    }
}

#[test]
fn a_last_step_that_breaks_the_weights_writes_no_result() {
    let more = "reject --data prompts.jsonl --prompts 2 --samples 4 --max-new-tokens 6 --rounds 1 \
                --credit-selection all --batch 64";
    for recipe in DIVERGING.iter().chain([&more]) {
        let scratch = scratch();
        let name = recipe.split_whitespace().next().unwrap();
        let recipe = recipe
            .replace("--steps 12", "")
            .replace("--value-lr 1e30", "")
            .replace("--epochs 8", "");
        let one = if name == "reject" { "" } else { "--steps 1" };
        // A gradient of any size moves each weight by about `lr`; that times the decay is more than f32 holds.
        let output = scratch.run(&format!(
            "{recipe} --model MODEL --lora-rank 4 --lr 1e30 --weight-decay 1e30 {one} \
             --seed 3 --progress off --out run"
        ));
        let error = error_of(&output, 3);
        says(&error, &["the optimizer left `", "lora_", "at step 1"]);
        for result in ["summary.json", "adapter", "checkpoints/step-00000001"] {
            assert!(
                !scratch.path("run").join(result).exists(),
                "{name}: {result}"
            );
        }
    }
}

/// Runs a command under a limit on the size of files that it writes, in blocks of 512 bytes: what a full disk does to it.
#[cfg(target_os = "linux")]
fn run_limited(scratch: &Scratch, blocks: u32, command: &str) -> Output {
    let model = super::golden("llama").display().to_string();
    let program = assert_cmd::cargo::cargo_bin("pivotal");
    Command::new("sh")
        .current_dir(scratch.0.path())
        // Without the trap the signal would kill; with it the write fails.
        .arg("-c")
        .arg(format!(
            "trap '' XFSZ; ulimit -f {blocks}; exec \"$0\" \"$@\""
        ))
        .arg(program)
        .args(command.replace("MODEL", &model).split_whitespace())
        .output()
        .unwrap()
}

#[cfg(target_os = "linux")]
#[test]
fn a_file_that_cannot_grow_is_the_systems_fault_and_the_run_goes_on_once_it_can() {
    let recipes = [
        "dpo --data pairs.jsonl --credit-selection all --batch 2 --epochs 3",
        "grpo --data prompts.jsonl --prompts 2 --samples 4 --max-new-tokens 6 --steps 4 --credit-selection all",
    ];
    for recipe in recipes {
        let scratch = scratch();
        let name = recipe.split_whitespace().next().unwrap();
        let run = format!("{recipe} --model MODEL --lora-rank 4 --checkpoint-every 1 --threads 1");
        scratch.good(&format!("{run} --out whole"));
        let whole = scratch.read("whole/metrics.jsonl");
        let mut failed = 0;
        // From nothing at all over the metrics to a checkpoint that is too long.
        for blocks in [0, 1, 2, 4, 8, 16, 32] {
            let output = run_limited(&scratch, blocks, &format!("{run} --out run --overwrite"));
            if output.status.success() {
                continue;
            }
            failed += 1;
            let error = error_of(&output, 1);
            says(&error, &["could not write `", "File too large"]);
            let command = match scratch.path("run").exists() {
                true => format!("{name} --resume run --threads 1"),
                false => format!("{run} --out run"),
            };
            scratch.good(&command);
            assert_eq!(
                scratch.read("run/metrics.jsonl"),
                whole,
                "{name}, {blocks} blocks"
            );
        }
        assert!(failed >= 4, "{name}: {failed}");
    }
}

/// A small file system in memory; only where the system lets the test mount one.
#[cfg(target_os = "linux")]
struct Mount(PathBuf);

#[cfg(target_os = "linux")]
impl Mount {
    fn new(path: PathBuf, kilobytes: usize) -> Option<Self> {
        std::fs::create_dir(&path).unwrap();
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", &format!("size={kilobytes}k"), "tmpfs"])
            .arg(&path)
            .output();
        mounted
            .is_ok_and(|output| output.status.success())
            .then_some(Self(path))
    }
}

#[cfg(target_os = "linux")]
impl Drop for Mount {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.0).output();
    }
}

#[cfg(target_os = "linux")]
#[test]
#[expect(clippy::print_stdout, reason = "a skipped test says so")]
fn a_full_disk_is_the_systems_fault() {
    let scratch = scratch();
    let run = "dpo --model MODEL --data pairs.jsonl --credit-selection all --batch 2 --epochs 3 \
               --lora-rank 4 --checkpoint-every 1 --reference-cache cache";
    let mut failed = 0;
    for kilobytes in [4, 16, 64, 128, 192] {
        let Some(disk) = Mount::new(scratch.path(&format!("disk{kilobytes}")), kilobytes) else {
            println!("skipped: no file system can be mounted here");
            return;
        };
        let output = scratch.run(&format!("{run} --out disk{kilobytes}/run"));
        if output.status.success() {
            continue;
        }
        failed += 1;
        let error = error_of(&output, 1);
        says(&error, &["could not write `", "No space left on device"]);
        drop(disk);
    }
    assert!(failed >= 3, "{failed}");
}

#[test]
fn a_directory_that_cannot_be_made_is_the_systems_fault() {
    let scratch = scratch();
    for recipe in DIVERGING {
        let output = scratch.run(&format!("{recipe} --model MODEL --out pairs.jsonl/run"));
        says(
            &error_of(&output, 1),
            &["could not write `pairs.jsonl/", "Not a directory"],
        );
    }
    assert_eq!(scratch.read("pairs.jsonl"), super::PAIRS);
}

#[test]
fn detail_07_a_mask_that_keeps_everything_is_the_unmasked_trainer_bit_for_bit() {
    let scratch = scratch();
    // Within an offset that no advantage leaves every segment is neutral, and neutral ones are kept.
    let all_kept = "--credit-signal advantage --credit-cut fixed --credit-cut-tokens 2 \
                    --credit-offset 1000 --credit-neutral keep";
    for (recipe, results) in [
        (
            "grpo --kl-coef 0.01",
            &["adapter/adapter_model.safetensors"][..],
        ),
        (
            "ppo",
            &[
                "adapter/adapter_model.safetensors",
                "value/adapter/adapter_model.safetensors",
            ],
        ),
    ] {
        let name = recipe.split_whitespace().next().unwrap();
        let run = format!(
            "{recipe} --model MODEL --data prompts.jsonl --prompts 2 --samples 4 --max-new-tokens 6 \
             --lora-rank 4 --lr 0.01 --steps 4"
        );
        scratch.good(&format!("{run} --credit-selection all --out {name}-plain"));
        scratch.good(&format!("{run} {all_kept} --out {name}-masked"));
        for file in results {
            let read =
                |run: &str| std::fs::read(scratch.path(&format!("{name}-{run}/{file}"))).unwrap();
            assert!(read("plain") == read("masked"), "{name}: {file}");
        }
        let rollouts = scratch.read(&format!("{name}-masked/rollouts.jsonl"));
        assert!(
            rollouts.contains("\"keep\":[true") && !rollouts.contains("false"),
            "{name}"
        );
    }
}

#[test]
fn detail_30_a_model_of_another_tokenizer_gives_no_signal_and_no_score() {
    let scratch = scratch();
    let other = scratch.path("other");
    std::fs::create_dir(&other).unwrap();
    for file in ["config.json", "tokenizer_config.json", "model.safetensors"] {
        std::fs::copy(super::golden("llama").join(file), other.join(file)).unwrap();
    }
    // Two letters change places: as many tokens, other meanings.
    let text = std::fs::read_to_string(super::golden("llama").join("tokenizer.json")).unwrap();
    let mut tokenizer: serde_json::Value = serde_json::from_str(&text).unwrap();
    let vocabulary = tokenizer["model"]["vocab"].as_object_mut().unwrap();
    let (a, b) = (vocabulary["a"].clone(), vocabulary["b"].clone());
    vocabulary["a"] = b;
    vocabulary["b"] = a;
    scratch.write("other/tokenizer.json", tokenizer.to_string());

    let annotate = "annotate --model MODEL --data pairs.jsonl --records r.jsonl";
    scratch.good(&format!("{annotate} --oracle MODEL"));
    std::fs::remove_file(scratch.path("r.jsonl")).unwrap();
    says(
        &scratch.bad(&format!("{annotate} --oracle other"), ""),
        &["`oracle` is other", "tokenizer of `--model`"],
    );
    let grpo = "grpo --model MODEL --data prompts.jsonl --credit-selection all --out run";
    says(
        &scratch.bad(&format!("{grpo} --reward-model other"), "run"),
        &["`reward-model` is other", "tokenizer of `--model`"],
    );
}
