//! Recipes that learn from their own samples: the whole run, its files, a run cut short, bad input.

use serde_json::Value;

use super::{Scratch, says};

/// Two prompts that random text passes now and then, and one with an answer.
const PROMPTS: &str = r#"{"prompt": "say a", "checks": [{"kind": "lower_case"}, {"kind": "regex", "pattern": "[aeiou]"}]}
{"prompt": "no z", "checks": [{"kind": "regex", "pattern": "^[^z]+$"}, {"kind": "max_words", "count": 2}]}
{"prompt": "2+2=", "answer": 4, "checks": [{"kind": "regex", "pattern": "[0-4]"}]}
"#;

const MODEL: &str = "--model MODEL --data prompts.jsonl --prompts 2 --samples 4 --max-new-tokens 6 \
                     --lora-rank 4 --lr 0.01";

const GRPO: &str = "--steps 6 --checkpoint-every 2 --minibatches 2 --update-epochs 2 \
                    --temperature 0.8 --kl-coef 0.01 --eval-data prompts.jsonl --eval-every 3 \
                    --credit-signal advantage --credit-baseline running_mean --credit-cut fixed \
                    --credit-cut-tokens 2";

fn scratch() -> Scratch {
    let scratch = Scratch::new();
    scratch.write("prompts.jsonl", PROMPTS);
    scratch
}

fn lines(scratch: &Scratch, file: &str) -> Vec<Value> {
    let text = scratch.read(file);
    text.lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

/// Everything that a seed decides.
fn files(scratch: &Scratch, run: &str) -> Vec<Vec<u8>> {
    [
        "metrics.jsonl",
        "rollouts.jsonl",
        "evaluations.jsonl",
        "evaluation_rollouts.jsonl",
        "adapter/adapter_model.safetensors",
    ]
    .map(|file| std::fs::read(scratch.path(run).join(file)).unwrap())
    .into()
}

#[test]
fn grpo_writes_every_rollout_and_begins_at_ratio_one() {
    let scratch = scratch();
    // Every token of every response through the update, at a temperature, in several passes a minibatch.
    for (name, flags) in [
        ("plain", "--credit-selection all --micro-batch-tokens 24"),
        (
            "hot",
            "--credit-selection all --temperature 1.7 --minibatches 3",
        ),
        ("all", GRPO),
        (
            "again",
            "--credit-selection all --activations recompute --estimator rloo --reduction response_mean",
        ),
        (
            "long",
            "--credit-selection all --precision f32 --estimator mean_only --reduction constant_length --dual-clip 3",
        ),
    ] {
        let steps = if flags == GRPO { "" } else { "--steps 4" };
        scratch.good(&format!("grpo {MODEL} {steps} {flags} --out {name}"));
        let metrics = lines(&scratch, &format!("{name}/metrics.jsonl"));
        let mut updates = 0;
        for line in &metrics {
            assert_eq!(line["first_ratio_deviation"], 0.0, "{name}: {line}");
            updates += line["updates"].as_u64().unwrap();
        }
        assert!(updates > 0, "{name} never found scores that differ");
        let moved = |line: &Value| line["kl_max"].as_f64().is_some_and(|max| max > 0.0);
        assert!(metrics.iter().any(moved), "{name}: the policy did not move");
        let rollouts = lines(&scratch, &format!("{name}/rollouts.jsonl"));
        assert_eq!(rollouts.len() % 4, 0);
        for rollout in &rollouts {
            let tokens = rollout["token_ids"].as_array().unwrap().len();
            let sampled = rollout["sampled_logps"].as_array().unwrap();
            assert_eq!(sampled.len(), tokens);
            // What was given credit says by which numbers.
            let credited = rollout.get("segments").is_some();
            assert_eq!(credited, flags == GRPO);
            for key in ["baseline", "offset", "sequence_sign"] {
                assert_eq!(rollout.get(key).is_some(), credited, "{name}: {key}");
            }
            let Some(old) = rollout["old_logps"].as_array() else {
                assert_eq!(rollout["advantage"], 0.0);
                continue;
            };
            for (sampled, old) in sampled.iter().zip(old) {
                let gap = sampled.as_f64().unwrap() - old.as_f64().unwrap();
                // bf16 operands in other orders of sums.
                assert!(gap.abs() < 0.1, "{name}: {gap}");
            }
        }
        assert!(scratch.path(name).join("timings.jsonl").is_file());
    }
}

#[test]
fn a_resumed_grpo_run_is_the_uninterrupted_one_at_any_number_of_threads() {
    let scratch = scratch();
    let whole = format!("grpo {MODEL} {GRPO}");
    scratch.good(&format!("{whole} --threads 1 --out whole"));
    for threads in [2, 1] {
        scratch.good(&format!(
            "{whole} --threads {threads} --out cut --overwrite"
        ));
        assert!(
            files(&scratch, "whole") == files(&scratch, "cut"),
            "{threads}"
        );
        // What a kill after step 4's checkpoint leaves.
        let run = scratch.path("cut");
        std::fs::remove_dir_all(run.join("checkpoints/step-00000006")).unwrap();
        std::fs::remove_dir_all(run.join("adapter")).unwrap();
        std::fs::remove_file(run.join("summary.json")).unwrap();
        scratch.good(&format!("grpo --resume cut --threads {threads}"));
        assert!(
            files(&scratch, "whole") == files(&scratch, "cut"),
            "{threads}"
        );
    }
}

#[test]
fn a_killed_grpo_run_resumes() {
    let scratch = scratch();
    let whole = format!("grpo {MODEL} {GRPO}");
    scratch.good(&format!("{whole} --out whole"));
    let model = super::golden("llama").display().to_string();
    for attempt in 0..3 {
        let mut child = std::process::Command::new(assert_cmd::cargo::cargo_bin("pivotal"))
            .current_dir(scratch.0.path())
            .args(whole.replace("MODEL", &model).split_whitespace())
            .args(["--out", "killed", "--overwrite"])
            .stderr(std::process::Stdio::null())
            .stdout(std::process::Stdio::null())
            .spawn()
            .unwrap();
        let checkpoint = scratch.path("killed/checkpoints/step-00000002");
        while !checkpoint.is_dir() && child.try_wait().unwrap().is_none() {
            std::thread::yield_now();
        }
        std::thread::sleep(std::time::Duration::from_millis(7 * attempt));
        let _ = child.kill();
        child.wait().unwrap();
        scratch.good("grpo --resume killed");
        assert!(
            files(&scratch, "whole") == files(&scratch, "killed"),
            "{attempt}"
        );
    }
}

#[test]
fn grpo_learns_what_its_checks_reward() {
    let scratch = scratch();
    scratch.write(
        "digits.jsonl",
        "{\"prompt\": \"a\", \"checks\": [{\"kind\": \"regex\", \"pattern\": \"[0-9].*[0-9].*[0-9]\"}]}\n",
    );
    scratch.good(
        "grpo --model MODEL --data digits.jsonl --prompts 1 --samples 32 --max-new-tokens 6 \
         --lora-rank 8 --lr 0.02 --steps 30 --credit-selection all --eval-data digits.jsonl --out run",
    );
    let scores: Vec<f64> = lines(&scratch, "run/metrics.jsonl")
        .iter()
        .map(|line| line["score"].as_f64().unwrap())
        .collect();
    let mean = |scores: &[f64]| scores.iter().sum::<f64>() / scores.len() as f64;
    let (first, last) = (mean(&scores[..5]), mean(&scores[25..]));
    assert!(last > first + 0.3, "from {first} to {last}: {scores:?}");
}

#[test]
fn measuring_the_divergence_now_and_then_changes_nothing_else() {
    let scratch = scratch();
    for (name, every) in [("always", 1), ("sometimes", 2), ("never", 0)] {
        let flags = format!("--credit-selection all --steps 4 --kl-every {every}");
        scratch.good(&format!("grpo {MODEL} {flags} --out {name}"));
    }
    let adapter = |name: &str| {
        let file = scratch.path(name).join("adapter/adapter_model.safetensors");
        std::fs::read(file).unwrap()
    };
    assert!(adapter("always") == adapter("sometimes") && adapter("always") == adapter("never"));
    let measured = |name: &str| -> Vec<bool> {
        let metrics = lines(&scratch, &format!("{name}/metrics.jsonl"));
        let keys = ["kl_k1", "kl_k2", "kl_k3", "kl_max"];
        let known = |line: &Value| keys.map(|key| line.get(key).is_some());
        metrics
            .iter()
            .map(|line| {
                assert!(
                    known(line).iter().all(|&one| one == known(line)[0]),
                    "{line}"
                );
                known(line)[0]
            })
            .collect()
    };
    // No response of a step whose groups are all flat goes through the reference: there is nothing to say then, not 0.
    let metrics = lines(&scratch, "always/metrics.jsonl");
    let flat = metrics
        .iter()
        .map(|line| line["flat_group_fraction"] == 1.0);
    let live: Vec<bool> = flat.map(|flat| !flat).collect();
    assert!(live.contains(&true) && live.contains(&false));
    assert_eq!(measured("always"), live);
    // Nor are its log-probabilities computed anew, for there is no update.
    let gap = |line: &Value| line.get("sampling_gap_mean").is_some();
    assert_eq!(metrics.iter().map(gap).collect::<Vec<_>>(), live);
    assert_eq!(measured("sometimes"), [live[0], false, live[2], false]);
    assert_eq!(measured("never"), [false; 4]);
    // A KL loss needs the reference in every step.
    let flags = "--credit-selection all --steps 2 --kl-every 0 --kl-coef 0.1";
    scratch.good(&format!("grpo {MODEL} {flags} --out loss"));
    assert_eq!(measured("loss"), [true; 2]);
}

#[test]
fn what_is_wrong_is_said_before_a_run_is_made() {
    let scratch = scratch();
    scratch.write("bare.jsonl", "{\"prompt\": \"a\"}\n");
    scratch.write(
        "odd.jsonl",
        "{\"prompt\": \"a\", \"checks\": [{\"kind\": \"rhymes\"}]}\n",
    );
    let model = "grpo --model MODEL --out run";
    let data = format!("{model} --data prompts.jsonl");
    for (command, parts) in [
        (
            format!("{model} --data bare.jsonl --credit-selection all"),
            &["`bare.jsonl`, line 1", "--reward-model"][..],
        ),
        (
            format!("{model} --data odd.jsonl --credit-selection all"),
            &["odd.jsonl", "line 1", "rhymes"],
        ),
        (data.clone(), &["oracle", "--credit-selection all"]),
        (
            format!("{data} --credit-selection all --temperature 0"),
            &["temperature", "above 0"],
        ),
        (
            format!("{data} --credit-selection all --regex ("),
            &["regex", "unclosed group"],
        ),
        (
            format!("{data} --credit-selection all --batch 4"),
            &["batch", "--minibatches"],
        ),
        (
            format!("{data} --credit-signal external"),
            &["credit-signal", "external"],
        ),
        (
            format!("{data} --credit-signal level"),
            &["credit-signal", "--reward-model"],
        ),
    ] {
        says(&scratch.bad(&command, "run"), parts);
    }
}

#[test]
fn a_command_judges_and_a_missing_one_is_said() {
    let scratch = scratch();
    scratch.write(
        "bare.jsonl",
        "{\"prompt\": \"a\", \"reference\": \"abc\"}\n",
    );
    let run = "grpo --model MODEL --data bare.jsonl --prompts 1 --samples 2 --max-new-tokens 3 --steps 1 \
               --credit-selection all --lora-rank 2";
    for (command, score) in [("true", 1.0), ("false", 0.0)] {
        scratch.good(&format!("{run} --out run --overwrite --command {command}"));
        assert_eq!(lines(&scratch, "run/metrics.jsonl")[0]["score"], score);
    }
    let output = scratch.run(&format!("{run} --out gone --command no-such-program"));
    assert_ne!(output.status.code(), Some(0));
    says(
        &String::from_utf8_lossy(&output.stderr),
        &["`no-such-program` cannot be run"],
    );
}

#[test]
fn a_run_that_diverges_says_so_with_exit_code_three() {
    let scratch = scratch();
    let model = MODEL.replace("--lr 0.01", "--lr 1e30");
    let output = scratch.run(&format!(
        "grpo {model} --steps 8 --clip-norm 0 --credit-selection all --checkpoint-every 1 --out run"
    ));
    let error = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(3), "{error}");
    says(&error, &["is not finite at step", "rows"]);
    assert!(scratch.path("run/checkpoints").is_dir());
}

#[test]
fn prompts_that_a_chat_template_is_not_applied_to_are_warned_of_once() {
    let scratch = scratch();
    super::chat_model(&scratch);
    // The same without a template: neither in a file of its own nor in the tokenizer's configuration.
    super::chat_model_at(&scratch, "bare");
    std::fs::remove_file(scratch.path("bare/chat_template.jinja")).unwrap();
    let mut tokenizer: Value =
        serde_json::from_str(&scratch.read("bare/tokenizer_config.json")).unwrap();
    tokenizer.as_object_mut().unwrap().remove("chat_template");
    scratch.write("bare/tokenizer_config.json", tokenizer.to_string());
    let messages: String = PROMPTS
        .lines()
        .map(|line| {
            let mut row: Value = serde_json::from_str(line).unwrap();
            row["prompt"] = serde_json::json!([{"role": "user", "content": row["prompt"]}]);
            format!("{row}\n")
        })
        .collect();
    scratch.write("messages.jsonl", messages);
    for (recipe, file, steps) in [
        ("grpo", "metrics.jsonl", "--steps 3"),
        ("ppo", "metrics.jsonl", "--steps 3"),
        ("reject", "rounds.jsonl", "--rounds 3"),
    ] {
        let run = |model: &str, data: &str| {
            let out = format!("{recipe}-{model}-{data}");
            let output = scratch.run(&format!(
                "{recipe} --model {model} --data {data}.jsonl --prompts 2 --samples 4 \
                 --max-new-tokens 4 --lora-rank 2 --credit-selection all {steps} --progress lines \
                 --out {out}"
            ));
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            assert!(output.status.success(), "{said}");
            let warned: Vec<bool> = lines(&scratch, &format!("{out}/{file}"))
                .iter()
                .map(|line| line["warnings"].to_string().contains("no-chat-template: "))
                .collect();
            (said.matches("no-chat-template: ").count(), warned)
        };
        assert_eq!(
            run("chat", "prompts"),
            (1, vec![true, false, false]),
            "{recipe}"
        );
        assert_eq!(run("chat", "messages"), (0, vec![false; 3]), "{recipe}");
        assert_eq!(run("bare", "prompts"), (0, vec![false; 3]), "{recipe}");
    }
}
