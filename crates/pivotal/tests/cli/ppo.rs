//! `pivotal ppo`: ratio 1 before the first update, a run cut short, threads, an easy reward.

use serde_json::Value;

use super::{Scratch, says};

const PROMPTS: &str = r#"{"prompt": "say a", "checks": [{"kind": "regex", "pattern": "[aeiou]"}]}
{"prompt": "no z", "checks": [{"kind": "regex", "pattern": "^[^z]+$"}, {"kind": "regex", "pattern": "[a-m]"}]}
{"prompt": "2+2=", "checks": [{"kind": "regex", "pattern": "[0-4]"}]}
"#;

const RUN: &str = "ppo --model MODEL --data prompts.jsonl --prompts 2 --samples 4 --max-new-tokens 6 \
                   --lora-rank 4 --lr 0.01 --value-lr 0.01 --steps 6 --checkpoint-every 2 \
                   --kl-target 0.5 --kl-horizon 100 --score-scaling normal \
                   --missing-eos-penalty 0.1 --temperature 0.8";

const CREDIT: &str = "--credit-baseline running_mean --credit-cut fixed --credit-cut-tokens 2";

fn scratch() -> Scratch {
    let scratch = Scratch::new();
    scratch.write("prompts.jsonl", PROMPTS);
    scratch
}

fn metrics(scratch: &Scratch, run: &str) -> Vec<Value> {
    let text = scratch.read(&format!("{run}/metrics.jsonl"));
    text.lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

fn files(scratch: &Scratch, run: &str) -> Vec<Vec<u8>> {
    [
        "metrics.jsonl",
        "rollouts.jsonl",
        "adapter/adapter_model.safetensors",
        "value/adapter/adapter_model.safetensors",
    ]
    .map(|file| std::fs::read(scratch.path(run).join(file)).unwrap())
    .into()
}

#[test]
fn detail_16_the_ratio_is_exactly_one_in_the_first_minibatch() {
    let scratch = scratch();
    for (name, flags) in [
        ("all", "--credit-selection all --micro-batch-tokens 24"),
        ("masked", "--credit-signal critic"),
        (
            "f32",
            "--credit-selection all --precision f32 --reduction response_mean",
        ),
    ] {
        scratch.good(&format!("{RUN} {flags} --out {name}"));
        let metrics = metrics(&scratch, name);
        for line in &metrics {
            assert_eq!(line["first_ratio_error"], 0.0, "{name}: {line}");
        }
        // A ratio that is 1 because nothing ever moves would say nothing.
        let moved = |line: &Value| line["max_abs_log_ratio"].as_f64().unwrap() > 0.0;
        assert!(
            !moved(&metrics[0]),
            "{name}: the first policy is the reference"
        );
        assert!(metrics[1..].iter().any(moved), "{name} did not move");
        let updated = |line: &Value| line["kl_from_old"].as_f64().unwrap() > 0.0;
        assert!(metrics.iter().any(updated), "{name}");
    }
}

#[test]
fn a_resumed_ppo_run_is_the_uninterrupted_one_at_any_number_of_threads() {
    let scratch = scratch();
    let whole = format!("{RUN} --credit-signal advantage {CREDIT}");
    scratch.good(&format!("{whole} --threads 1 --out whole"));
    let coefs: Vec<f64> = metrics(&scratch, "whole")
        .iter()
        .map(|line| line["kl_coef"].as_f64().unwrap())
        .collect();
    assert_ne!(coefs[0], coefs[5], "the controller has a state to lose");
    for threads in [2, 1] {
        scratch.good(&format!(
            "{whole} --threads {threads} --out cut --overwrite"
        ));
        assert!(
            files(&scratch, "whole") == files(&scratch, "cut"),
            "{threads}"
        );
        let run = scratch.path("cut");
        std::fs::remove_dir_all(run.join("checkpoints/step-00000006")).unwrap();
        std::fs::remove_dir_all(run.join("adapter")).unwrap();
        std::fs::remove_dir_all(run.join("value")).unwrap();
        std::fs::remove_file(run.join("summary.json")).unwrap();
        scratch.good(&format!("ppo --resume cut --threads {threads}"));
        assert!(
            files(&scratch, "whole") == files(&scratch, "cut"),
            "{threads}"
        );
    }
}

#[test]
fn ppo_learns_an_easy_reward() {
    let scratch = scratch();
    scratch.good(
        "ppo --model MODEL --data prompts.jsonl --prompts 3 --samples 16 --max-new-tokens 4 \
         --lora-rank 8 --lr 0.01 --value-lr 0.01 --steps 30 --kl-coef 0 --schedule linear \
         --regex [aeiou] --credit-selection all --out run",
    );
    let scores: Vec<f64> = metrics(&scratch, "run")
        .iter()
        .map(|line| line["score"].as_f64().unwrap())
        .collect();
    let mean = |scores: &[f64]| scores.iter().sum::<f64>() / scores.len() as f64;
    let (first, last) = (mean(&scores[..5]), mean(&scores[25..]));
    assert!(last > first + 0.15, "{scores:?}");
}

#[test]
fn a_spread_without_a_reward_model_is_refused_before_anything_is_written() {
    let scratch = scratch();
    let error = scratch.bad(
        &format!("{RUN} --credit-signal level --spread segment_even --out run"),
        "run",
    );
    says(&error, &["spread", "--reward-model"]);
}

#[test]
fn a_horizon_that_could_take_the_coefficient_to_zero_is_refused_before_anything_is_written() {
    let scratch = scratch();
    // A step has 2 · 5 responses and an error moves the coefficient by a fifth of them at most: a horizon of 2 is all of it.
    let run = "ppo --model MODEL --data prompts.jsonl --prompts 2 --samples 5 --max-new-tokens 2 \
               --lora-rank 2 --steps 1 --credit-selection all";
    for horizon in [1, 2] {
        let error = scratch.bad(
            &format!("{run} --kl-target 0.5 --kl-horizon {horizon} --out no"),
            "no",
        );
        let found = format!("`kl-horizon` is {horizon}, expected more than a fifth");
        says(&error, &[&found, "`--prompts` times `--samples`"]);
    }
    scratch.good(&format!("{run} --kl-target 0.5 --kl-horizon 3 --out near"));
    let coefficient = metrics(&scratch, "near")[0]["kl_coef"].as_f64().unwrap();
    assert!(coefficient > 0.0, "{coefficient}");
    // Without a target nothing is moved, and the horizon says nothing.
    scratch.good(&format!("{run} --kl-horizon 1 --out fixed"));
}
