//! `pivotal reject`: what is accepted and learnt from, the files, a run cut short, bad input.

// Long because the promises of one recipe are tried with the same runs and the same ways to read them.
use std::time::{Duration, Instant};

use serde_json::Value;

use super::{Scratch, says};

/// Two prompts that random text passes now and then, and one with an answer.
const PROMPTS: &str = r#"{"prompt": "say a", "checks": [{"kind": "lower_case"}, {"kind": "regex", "pattern": "[aeiou]"}]}
{"prompt": "no z", "checks": [{"kind": "regex", "pattern": "^[^z]+$"}, {"kind": "max_words", "count": 2}]}
{"prompt": "2+2=", "answer": 4, "checks": [{"kind": "regex", "pattern": "[0-4]"}]}
"#;

const MODEL: &str = "--model MODEL --data prompts.jsonl --prompts 2 --samples 4 --max-new-tokens 6 \
                     --lora-rank 4 --lr 0.01";

/// Rounds of several steps, some of which end an epoch, with a signal that learns along the run.
const RUN: &str = "--rounds 4 --best 2 --min-score 0.4 --batch 2 --epochs 2 --checkpoint-every 2 \
                   --temperature 0.8 --eval-data prompts.jsonl --eval-every 2 --warmup-steps 3 \
                   --reward-model reward --reward-weight 0.1 --credit-signal level \
                   --credit-baseline running_mean --credit-cut fixed --credit-cut-tokens 2";

fn scratch() -> Scratch {
    let scratch = Scratch::new();
    scratch.write("prompts.jsonl", PROMPTS);
    scratch
}

fn with_reward_model() -> Scratch {
    let scratch = scratch();
    scratch.good(
        "reward --model MODEL --data pairs.jsonl --steps 4 --lr 0.01 --lora-rank 4 --out reward",
    );
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
        "rounds.jsonl",
        "rollouts.jsonl",
        "accepted.jsonl",
        "evaluations.jsonl",
        "evaluation_rollouts.jsonl",
        "adapter/adapter_model.safetensors",
    ]
    .map(|file| std::fs::read(scratch.path(run).join(file)).unwrap())
    .into()
}

#[test]
fn the_best_of_each_prompt_are_accepted_and_every_sample_is_written_down() {
    let scratch = with_reward_model();
    scratch.good(&format!("reject {MODEL} {RUN} --out run"));
    let rollouts = lines(&scratch, "run/rollouts.jsonl");
    let accepted = lines(&scratch, "run/accepted.jsonl");
    let rounds = lines(&scratch, "run/rounds.jsonl");
    assert_eq!(rounds.len(), 4);
    let (mut steps, mut all) = (0, 0);
    for round in &rounds {
        let number = round["round"].as_u64().unwrap();
        let here: Vec<&Value> = rollouts
            .iter()
            .filter(|one| one["step"] == number)
            .collect();
        assert_eq!(here.len() as u64, round["sampled"].as_u64().unwrap());
        let verdicts = |name: &str| here.iter().filter(|one| one["verdict"] == name).count() as u64;
        for (key, name) in [
            ("accepted", "accepted"),
            ("duplicates", "duplicate"),
            ("below_minimum", "below_minimum"),
            ("empty", "empty"),
        ] {
            assert_eq!(round[key], verdicts(name), "{name} of round {number}");
        }
        for one in &here {
            let is_accepted = one["verdict"] == "accepted";
            assert_eq!(one["accepted"], is_accepted);
            for key in ["keep", "baseline", "offset", "sequence_sign"] {
                let given = one.get(key).is_some();
                assert_eq!(
                    given, is_accepted,
                    "{key}: credit is for the accepted alone"
                );
            }
            // No sample of the prompt that was not accepted scores more than one that was.
            let rivals = here.iter().filter(|other| other["id"] == one["id"]);
            let outranked = rivals.filter(|other| {
                other["verdict"] == "outranked"
                    && other["score"].as_f64().unwrap() > one["score"].as_f64().unwrap()
            });
            assert!(!is_accepted || outranked.count() == 0, "{one}");
        }
        for one in &accepted {
            assert_eq!(one["baseline"].as_array().unwrap().len(), 1);
            assert!(one["offset"].is_number() && one.get("jump").is_none());
            assert_eq!(one["sequence_sign"], "positive");
        }
        let of_round: Vec<&Value> = accepted
            .iter()
            .filter(|one| one["round"] == number)
            .collect();
        let count = of_round.len() as u64;
        assert_eq!(round["accepted"], count);
        assert_eq!(round["steps"], 2 * count.div_ceil(2));
        steps += round["steps"].as_u64().unwrap();
        all += count;
        for one in of_round {
            assert!(one["score"].as_f64().unwrap() >= 0.4, "{one}");
            assert!(one["rank"].as_u64().unwrap() <= 2);
            let sampled = here
                .iter()
                .find(|other| other["id"] == one["id"] && other["sample"] == one["sample"]);
            for key in ["token_ids", "keep", "segments", "signal", "score", "finish"] {
                assert_eq!(one[key], sampled.unwrap()[key], "{key}");
            }
            assert_eq!(one["completion"], sampled.unwrap()["text"]);
            assert!(PROMPTS.contains(one["prompt"].as_str().unwrap()));
        }
    }
    assert!(all > 4, "too few accepted to tell");
    let metrics = lines(&scratch, "run/metrics.jsonl");
    assert_eq!(metrics.len() as u64, steps);
    let mut dropped = false;
    for line in &metrics {
        assert!(line["loss"].as_f64().unwrap().is_finite());
        dropped |= line["kept_fraction"].as_f64().unwrap() < 1.0;
        let round = &rounds[line["round"].as_u64().unwrap() as usize - 1];
        for key in ["score", "best_score", "accepted_fraction"] {
            assert_eq!(line[key], round[key]);
        }
    }
    assert!(dropped, "no mask ever dropped a token");
    let evaluated: Vec<Value> = lines(&scratch, "run/evaluations.jsonl")
        .iter()
        .map(|line| line["step"].clone())
        .collect();
    assert_eq!(evaluated, [0, 2, 4]);
    let summary: Value = serde_json::from_str(&scratch.read("run/summary.json")).unwrap();
    assert_eq!(
        (&summary["steps"], &summary["accepted"]),
        (&steps.into(), &all.into())
    );
    // Round 1 is dealt two of the three prompts; a pass over them is two rounds.
    scratch.good(&format!("reject {MODEL} --credit-selection all --out pass"));
    assert_eq!(lines(&scratch, "pass/rounds.jsonl").len(), 2);
}

/// What `reject` accepted in one round, if text gives every token of it back: a special token shows in no text.
fn accepted_as_text(scratch: &Scratch, flags: &str) -> Option<Vec<Value>> {
    let overwrite = match scratch.path("ours").exists() {
        true => "--overwrite",
        false => "",
    };
    scratch.good(&format!(
        "reject {flags} --data bare.jsonl --prompts 99 --samples 64 --max-new-tokens 24 \
         --temperature 0.7 --regex ^[!-;=?-~]+$ --missing-eos-penalty 1 --min-score 1 \
         --credit-selection all --out ours {overwrite}"
    ));
    let accepted = lines(scratch, "ours/accepted.jsonl");
    // One token a character, and the end.
    let round_trip = accepted.iter().all(|one| {
        let tokens = one["token_ids"].as_array().unwrap().len();
        tokens == one["completion"].as_str().unwrap().len() + 1
    });
    for one in &accepted {
        assert_eq!(one["finish"], "eos");
        let keep = one["keep"].as_array().unwrap();
        assert!(keep.iter().all(|kept| *kept == true));
    }
    (round_trip && accepted.len() > 4).then_some(accepted)
}

#[test]
fn one_round_that_keeps_every_token_is_sft_on_what_it_accepted_bit_for_bit() {
    let scratch = scratch();
    let prompts = [
        "a b", "q: 1+1", "hm", "sky", "say", "2+3=", "it is", "why", "so", "c d", "who?", "x y z",
    ];
    let prompts = prompts.map(|prompt| format!("{{\"prompt\": \"{prompt}\"}}\n"));
    scratch.write("bare.jsonl", prompts.concat());
    // A start that ends its responses, for `sft` puts an end to each, and seldom says what no text shows.
    scratch.good(
        "sft --model MODEL --data pairs.jsonl --lora-rank 0 --lr 0.01 --steps 60 \
         --schedule constant --out warm",
    );
    let sft = |flags: &str| {
        let overwrite = match scratch.path("sft").exists() {
            true => "--overwrite",
            false => "",
        };
        scratch.good(&format!(
            "sft {flags} --data ours/accepted.jsonl --out sft {overwrite}"
        ));
    };
    let numbers = |run: &str, key: &str| -> Vec<f64> {
        let metrics = lines(&scratch, &format!("{run}/metrics.jsonl"));
        metrics
            .iter()
            .map(|line| line[key].as_f64().unwrap())
            .collect()
    };
    let adapter = |run: &str| {
        std::fs::read(scratch.path(run).join("adapter/adapter_model.safetensors")).unwrap()
    };
    let flags = |precision: &str, seed: u32| {
        format!(
            "--model warm --lora-rank 4 --lr 0.01 --batch 4 --epochs 2 --seed {seed} \
             --precision {precision}"
        )
    };
    for precision in ["f32", "bf16"] {
        let found = (1..9)
            .map(|seed| flags(precision, seed))
            .find(|flags| accepted_as_text(&scratch, flags).is_some());
        let flags = found.expect("a seed whose responses text gives back");
        sft(&flags);
        for key in ["loss", "grad_norm", "lr", "kept_tokens"] {
            assert_eq!(numbers("ours", key), numbers("sft", key), "{key}");
        }
        assert!(adapter("ours") == adapter("sft"), "{precision}");
    }
    // Of a prompt with several responses in one step there is one copy: the same sums in another order.
    let found = (1..9)
        .map(|seed| format!("{} --best 6", flags("f32", seed)))
        .find(|flags| accepted_as_text(&scratch, flags).is_some());
    sft(&found
        .expect("a seed whose responses text gives back")
        .replace(" --best 6", ""));
    for key in ["loss", "grad_norm"] {
        let (ours, sfts) = (numbers("ours", key), numbers("sft", key));
        assert_eq!(ours.len(), sfts.len());
        for (ours, sfts) in ours.iter().zip(&sfts).take(4) {
            assert!(
                (ours - sfts).abs() < 1e-3 * sfts,
                "{key}: {ours}, not {sfts}"
            );
        }
    }
    assert_eq!(numbers("ours", "lr"), numbers("sft", "lr"));
}

#[test]
fn reject_learns_what_its_checks_reward() {
    let scratch = scratch();
    scratch.write(
        "digits.jsonl",
        "{\"prompt\": \"a\", \"checks\": [{\"kind\": \"regex\", \"pattern\": \"[0-9].*[0-9].*[0-9]\"}]}\n",
    );
    scratch.good(
        "reject --model MODEL --data digits.jsonl --prompts 1 --samples 64 --best 64 --min-score 1 \
         --max-new-tokens 6 --lora-rank 8 --lr 0.02 --rounds 12 --batch 8 --schedule constant \
         --credit-selection all --eval-data digits.jsonl --out run",
    );
    let rounds = lines(&scratch, "run/rounds.jsonl");
    let score = |round: usize| rounds[round]["score"].as_f64().unwrap();
    let first = (score(0) + score(1)) / 2.0;
    let last = (score(10) + score(11)) / 2.0;
    assert!(last > first + 0.3, "from {first} to {last}");
}

#[test]
fn a_resumed_reject_run_is_the_uninterrupted_one_at_any_number_of_threads() {
    let scratch = with_reward_model();
    let run = RUN.replace("--checkpoint-every 2", "--checkpoint-every 1");
    let whole = format!("reject {MODEL} {run}");
    scratch.good(&format!("{whole} --threads 1 --out whole"));
    let rounds = lines(&scratch, "whole/rounds.jsonl");
    assert!(
        rounds[3]["steps"].as_u64() > Some(1),
        "no checkpoint lies within the last round"
    );
    for threads in [2, 1] {
        scratch.good(&format!(
            "{whole} --threads {threads} --out cut --overwrite"
        ));
        assert!(
            files(&scratch, "whole") == files(&scratch, "cut"),
            "{threads}"
        );
        // The last checkpoint is damaged: the one before lies within the last round.
        let run = scratch.path("cut");
        let mut checkpoints: Vec<_> = std::fs::read_dir(run.join("checkpoints"))
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .collect();
        checkpoints.sort();
        std::fs::write(checkpoints.last().unwrap().join("state.json"), "{").unwrap();
        std::fs::remove_dir_all(run.join("adapter")).unwrap();
        std::fs::remove_file(run.join("summary.json")).unwrap();
        scratch.good(&format!("reject --resume cut --threads {threads}"));
        assert!(
            files(&scratch, "whole") == files(&scratch, "cut"),
            "{threads}"
        );
        // And a run that is done resumes to itself.
        scratch.good("reject --resume cut");
        assert!(
            files(&scratch, "whole") == files(&scratch, "cut"),
            "{threads}"
        );
    }
    let summary = |run: &str| -> Value {
        let text = scratch.read(&format!("{run}/summary.json"));
        serde_json::from_str(&text).unwrap()
    };
    for key in ["accepted", "steps", "empty_steps", "held_out", "rounds"] {
        assert_eq!(summary("whole")[key], summary("cut")[key], "{key}");
    }
}

#[test]
fn a_reject_run_killed_anywhere_resumes() {
    let scratch = with_reward_model();
    for (name, flags) in [
        ("signal", RUN),
        (
            "none",
            "--rounds 3 --credit-selection all --checkpoint-every 1",
        ),
    ] {
        let whole = format!("reject {MODEL} {flags} --eval-data prompts.jsonl");
        let whole = whole.replacen(
            " --eval-data prompts.jsonl",
            "",
            usize::from(name == "signal"),
        );
        let begin = Instant::now();
        scratch.good(&format!("{whole} --out whole --overwrite").replace(
            "--overwrite",
            if scratch.path("whole").exists() {
                "--overwrite"
            } else {
                ""
            },
        ));
        let took = begin.elapsed();
        let model = super::golden("llama").display().to_string();
        let mut resumed = 0;
        for attempt in 0..9_u32 {
            if scratch.path("killed").exists() {
                std::fs::remove_dir_all(scratch.path("killed")).unwrap();
            }
            let mut child = std::process::Command::new(assert_cmd::cargo::cargo_bin("pivotal"))
                .current_dir(scratch.0.path())
                .args(whole.replace("MODEL", &model).split_whitespace())
                .args(["--out", "killed"])
                .stderr(std::process::Stdio::null())
                .stdout(std::process::Stdio::null())
                .spawn()
                .unwrap();
            // From the moment that the run is there, at moments spread over it.
            let config = scratch.path("killed/config.toml");
            while !config.is_file() && child.try_wait().unwrap().is_none() {
                std::thread::sleep(Duration::from_micros(200));
            }
            std::thread::sleep(took * attempt / 10);
            resumed += u32::from(child.try_wait().unwrap().is_none());
            let _ = child.kill();
            child.wait().unwrap();
            scratch.good("reject --resume killed");
            assert!(
                files(&scratch, "whole") == files(&scratch, "killed"),
                "{name}, attempt {attempt}"
            );
        }
        assert!(resumed > 2, "{name}: the kills came too late");
    }
}

#[test]
fn a_round_that_accepts_nothing_takes_no_step() {
    let scratch = scratch();
    let run = format!(
        "reject {MODEL} --credit-selection all --min-score 2 --rounds 3 --eval-data prompts.jsonl"
    );
    let output = scratch.run(&format!("{run} --out run"));
    assert_eq!(output.status.code(), Some(0));
    says(
        &String::from_utf8_lossy(&output.stderr),
        &["warning: no response was accepted"],
    );
    for (file, count) in [
        ("metrics.jsonl", 0),
        ("accepted.jsonl", 0),
        ("rounds.jsonl", 3),
    ] {
        assert_eq!(
            lines(&scratch, &format!("run/{file}")).len(),
            count,
            "{file}"
        );
    }
    let text = scratch.read("run/rounds.jsonl");
    assert!(!text.contains("null") && !text.contains("NaN"), "{text}");
    for round in lines(&scratch, "run/rounds.jsonl") {
        assert_eq!(
            (&round["accepted"], &round["steps"]),
            (&0.into(), &0.into())
        );
        assert_eq!(round["prompts_without_accepted"], round["prompts"]);
    }
    let summary: Value = serde_json::from_str(&scratch.read("run/summary.json")).unwrap();
    let [first, last] = [0, 1].map(|end| summary["held_out"][end]["score"].clone());
    assert_eq!(first, last, "the policy is as it was");
    let before = files(&scratch, "run");
    scratch.good("reject --resume run");
    assert!(before == files(&scratch, "run"));
}

#[test]
fn a_step_of_which_nothing_is_kept_is_counted_and_learns_nothing() {
    let scratch = with_reward_model();
    scratch.good(&format!(
        "reject {MODEL} --rounds 2 --batch 1 --reward-model reward --credit-signal level \
         --credit-baseline-value 1e6 --out run"
    ));
    let metrics = lines(&scratch, "run/metrics.jsonl");
    assert!(!metrics.is_empty());
    for line in &metrics {
        for key in ["loss", "kept_tokens", "grad_norm", "kept_fraction"] {
            assert_eq!(line[key].as_f64(), Some(0.0), "{key}");
        }
    }
    let summary: Value = serde_json::from_str(&scratch.read("run/summary.json")).unwrap();
    assert_eq!(summary["empty_steps"], metrics.len());
    assert_eq!(summary["last_round"]["empty_mask_fraction"], 1.0);
}

#[test]
fn conversations_are_accepted_as_conversations() {
    let scratch = scratch();
    super::chat_model(&scratch);
    scratch.write(
        "chat.jsonl",
        "{\"prompt\": [{\"role\": \"user\", \"content\": \"hi\"}], \"checks\": [{\"kind\": \"regex\", \"pattern\": \"^[!-;=?-~]+$\"}]}\n",
    );
    scratch.good(
        "reject --model chat --data chat.jsonl --prompts 1 --samples 8 --best 3 --max-new-tokens 4 \
         --lora-rank 2 --min-score 1 --credit-selection all --out run",
    );
    let accepted = lines(&scratch, "run/accepted.jsonl");
    assert!(!accepted.is_empty());
    for one in &accepted {
        assert_eq!(one["prompt"][0]["content"], "hi");
        assert_eq!(one["completion"][0]["role"], "assistant");
    }
    scratch.good(
        "sft --model chat --data run/accepted.jsonl --prefix parts --steps 1 --lora-rank 2 --out sft",
    );
}

#[test]
fn what_is_wrong_is_said_before_a_run_is_made() {
    let scratch = scratch();
    scratch.write("bare.jsonl", "{\"prompt\": \"a\"}\n");
    scratch.write("none.jsonl", "");
    scratch.write(
        "long.jsonl",
        format!("{{\"prompt\": \"{}\"}}\n", "a".repeat(300)),
    );
    let model = "reject --model MODEL --out run";
    let data = format!("{model} --data prompts.jsonl");
    let all = format!("{data} --credit-selection all");
    for (command, parts) in [
        (
            format!("{model} --data bare.jsonl --credit-selection all"),
            &["`bare.jsonl`, line 1", "--reward-model"][..],
        ),
        (
            format!("{model} --data none.jsonl --credit-selection all"),
            &["none.jsonl"],
        ),
        (
            format!("{model} --data long.jsonl --regex . --credit-selection all"),
            &["long.jsonl", "line 1", "256", "--max-prompt-tokens"],
        ),
        (
            format!("{all} --eval-data long.jsonl --regex ."),
            &["long.jsonl", "line 1"],
        ),
        (
            format!("{model} --credit-selection all"),
            &["data", "prompts"],
        ),
        (data.clone(), &["oracle", "--credit-selection all"]),
        (format!("{all} --best 0"), &["best", "at least 1"]),
        (format!("{all} --best 9"), &["best", "--samples"]),
        (
            format!("{all} --min-score some"),
            &["min-score", "number or none"],
        ),
        (format!("{all} --min-score nan"), &["min-score", "finite"]),
        (format!("{all} --min-score inf"), &["min-score", "finite"]),
        (format!("{all} --dedupe fuzzy"), &["dedupe", "tokens"]),
        (format!("{all} --rounds -1"), &["rounds"]),
        (format!("{all} --samples 0"), &["samples", "at least 1"]),
        (format!("{all} --batch 0"), &["batch", "at least 1"]),
        (format!("{all} --epochs 0"), &["epochs", "at least 1"]),
        (format!("{all} --steps 5"), &["steps", "--rounds"]),
        (
            format!("{all} --temperature 0"),
            &["temperature", "above 0"],
        ),
        (format!("{all} --regex ("), &["regex", "unclosed group"]),
        (format!("{all} --oracle x"), &["oracle", "log_ratio"]),
        (
            format!("{all} --signal-beta 2"),
            &["signal-beta", "log_ratio"],
        ),
        (
            format!("{all} --reward-weight 2"),
            &["reward-weight", "--reward-model"],
        ),
        (
            format!("{all} --command-seconds 2"),
            &["command-seconds", "--command"],
        ),
        (
            format!("{all} --eval-every 2"),
            &["eval-every", "--eval-data"],
        ),
        (
            format!("{all} --credit-cut fixed --credit-cut-tokens 0"),
            &["cut"],
        ),
        (
            format!("{data} --credit-signal external"),
            &["credit-signal", "external"],
        ),
        (
            format!("{data} --credit-signal level"),
            &["credit-signal", "--reward-model"],
        ),
        (
            format!("{data} --credit-signal critic"),
            &["credit-signal", "ppo"],
        ),
        (
            format!("{data} --credit-signal advantage"),
            &["credit-signal", "no advantages"],
        ),
        (
            format!("{data} --oracle x --credit-sequence-sign advantage"),
            &["credit-sequence-sign", "no advantages"],
        ),
        (
            format!("{data} --oracle x --credit-baseline calibrated"),
            &["credit-baseline", "positive"],
        ),
        (format!("{data} --oracle x"), &["x"]),
    ] {
        says(&scratch.bad(&command, "run"), parts);
    }
    scratch.write("odd.toml", "[reject]\nworst = 1\n");
    says(
        &scratch.bad(&format!("{all} --config odd.toml"), "run"),
        &["odd.toml", "worst", "best"],
    );
    let shown = scratch.good(&format!("{all} --best 3 --min-score -1.5 --show-config"));
    says(
        &shown,
        &[
            "[reject]",
            "best = 3",
            "min_score = -1.5",
            "dedupe = \"tokens\"",
        ],
    );
    assert!(!scratch.path("run").exists());
    scratch.write("shown.toml", &shown);
    assert_eq!(
        scratch.good("reject --config shown.toml --show-config"),
        shown
    );
}

#[test]
fn a_command_judges_and_a_missing_one_is_said() {
    let scratch = scratch();
    scratch.write("bare.jsonl", "{\"prompt\": \"a\"}\n");
    let run = "reject --model MODEL --data bare.jsonl --prompts 1 --samples 3 --max-new-tokens 3 \
               --credit-selection all --lora-rank 2 --min-score 1 --dedupe none";
    for (command, accepted) in [("true", 1), ("false", 0)] {
        let overwrite = if scratch.path("run").exists() {
            "--overwrite"
        } else {
            ""
        };
        scratch.good(&format!("{run} --out run {overwrite} --command {command}"));
        assert_eq!(lines(&scratch, "run/rounds.jsonl")[0]["accepted"], accepted);
    }
    let output = scratch.run(&format!("{run} --out gone --command no-such-program"));
    assert_eq!(output.status.code(), Some(2));
    says(
        &String::from_utf8_lossy(&output.stderr),
        &["`no-such-program` cannot be run"],
    );
}

#[test]
fn a_reject_run_that_diverges_says_so_with_exit_code_three() {
    let scratch = scratch();
    let model = MODEL.replace("--lr 0.01", "--lr 1e30");
    let output = scratch.run(&format!(
        "reject {model} --rounds 8 --epochs 4 --batch 1 --clip-norm 0 --credit-selection all \
         --checkpoint-every 1 --out run"
    ));
    let error = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(3), "{error}");
    says(&error, &["is not finite at step 2", "rows"]);
    assert!(scratch.path("run/checkpoints").is_dir());
    assert_eq!(lines(&scratch, "run/metrics.jsonl").len(), 1);
}
