//! What good input gets.

use serde_json::Value;

use super::{Scratch, golden};

fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap()
}

#[test]
fn logps_are_those_of_transformers() {
    let scratch = Scratch::new();
    let golden: Value =
        serde_json::from_slice(&std::fs::read(golden("llama").join("golden.json")).unwrap())
            .unwrap();
    let sequence = &golden["sequences"][0];
    let ids = sequence["token_ids"].to_string();
    let line = json(&scratch.good(&format!("logps --model MODEL --ids {ids}")));
    assert_eq!(line["token_ids"], sequence["token_ids"]);
    let found = line["token_logps"].as_array().unwrap();
    let expected = sequence["token_logps"].as_array().unwrap();
    assert_eq!(found.len(), expected.len());
    for (found, expected) in found.iter().zip(expected) {
        assert!((found.as_f64().unwrap() - expected.as_f64().unwrap()).abs() < 1e-4);
    }
}

#[test]
fn the_whole_chain_runs_from_reward_to_masked_dpo() {
    let scratch = Scratch::new();
    let common = "--model MODEL --data pairs.jsonl --precision f32 --lora-rank 4 --batch 2";
    scratch.good(&format!("sft {common} --epochs 1 --out sft"));
    let reward = json(&scratch.good(&format!("reward {common} --epochs 2 --out reward")));
    assert_eq!(reward["steps"], 4);
    let annotate = "annotate --model MODEL --data pairs.jsonl --precision f32";
    scratch.good(&format!(
        "{annotate} --signal level --reward-model reward --records level.jsonl"
    ));
    scratch.good(&format!("dpo {common} --credit-selection all --out oracle"));
    scratch.good(&format!("{annotate} --oracle oracle --records ratio.jsonl"));
    let manifest: serde_json::Value =
        serde_json::from_str(&scratch.read("ratio.jsonl.manifest.json")).unwrap();
    assert_eq!(manifest["recipe"], "annotate");
    assert_eq!(manifest["inputs"].as_array().unwrap().len(), 3);
    assert_ne!(
        manifest["inputs"][1]["blake3"],
        manifest["inputs"][2]["blake3"]
    );
    let ratio = scratch.read("ratio.jsonl");
    scratch.good("annotate --config ratio.jsonl.config.toml --overwrite");
    assert_eq!(scratch.read("ratio.jsonl"), ratio);

    let records: Vec<Value> = scratch.read("ratio.jsonl").lines().map(json).collect();
    assert_eq!(records.len(), 8);
    for record in &records {
        let tokens = record["token_ids"].as_array().unwrap().len();
        assert_eq!(record["signal"].as_array().unwrap().len(), tokens);
        let segments = record["segments"].as_array().unwrap();
        assert_eq!(segments[0]["start"], 0);
        assert_eq!(segments.last().unwrap()["end"], tokens);
    }

    let summary = json(&scratch.good(&format!("dpo {common} --signals ratio.jsonl --out masked")));
    assert_eq!(summary["pairs"], 4);
    assert!(summary["credit"]["kept_fraction"].as_f64().unwrap() < 1.0);
    for file in [
        "config.toml",
        "manifest.json",
        "metrics.jsonl",
        "credit.jsonl",
        "summary.json",
    ] {
        assert!(scratch.path("masked").join(file).is_file(), "{file}");
    }
    let first = json(scratch.read("masked/metrics.jsonl").lines().next().unwrap());
    assert!((first["loss"].as_f64().unwrap() - std::f64::consts::LN_2).abs() < 1e-6);
    let adapted = scratch.good("logps --model MODEL --adapter masked --text hello");
    assert_ne!(adapted, scratch.good("logps --model MODEL --text hello"));
}

#[test]
fn full_fine_tuning_writes_a_model_that_loads() {
    let scratch = Scratch::new();
    scratch.good(
        "dpo --model MODEL --data pairs.jsonl --precision f32 --lora-rank 0 --lr 1e-3 \
         --credit-selection all --out run",
    );
    scratch.good("logps --model run --text hello");
    scratch.good("reward --model run --data pairs.jsonl --lora-rank 0 --out reward");
    scratch.good(
        "annotate --model run --data pairs.jsonl --signal increment --reward-model reward \
         --records increment.jsonl",
    );
}

#[test]
fn generation_depends_on_the_seed_alone() {
    let scratch = Scratch::new();
    scratch.write(
        "prompts.jsonl",
        "{\"prompt\": \"one\"}\n{\"prompt\": \"two more\"}\n",
    );
    let command = "generate --model MODEL --data prompts.jsonl --temperature 1 --samples 3 \
                   --max-new-tokens 8 --precision f32";
    let first = scratch.good(&format!("{command} --batch 1 --threads 1"));
    assert_eq!(first.lines().count(), 6);
    assert_eq!(
        first,
        scratch.good(&format!("{command} --batch 4 --threads 2"))
    );
    assert_ne!(first, scratch.good(&format!("{command} --seed 2")));
}

#[test]
fn a_stop_string_cuts_the_text_and_keeps_the_tokens() {
    let scratch = Scratch::new();
    let command = "generate --model MODEL --prompt one --temperature 1 --max-new-tokens 12";
    let line = |command: &str| -> serde_json::Value {
        serde_json::from_str(&scratch.good(command)).unwrap()
    };
    let whole = line(command);
    assert_eq!(whole["finish"], "length");
    let text = whole["response"].as_str().unwrap();
    let mut letters = text.char_indices().skip(3);
    let (at, letter) = letters.find(|(_, c)| c.is_ascii_alphanumeric()).unwrap();
    let at = text[..at].find(letter).unwrap_or(at);
    let cut = line(&format!("{command} --stop {letter}"));
    assert_eq!(cut["finish"], "stop");
    assert_eq!(cut["response"], text[..at]);
    let ids = |line: &serde_json::Value| line["token_ids"].as_array().unwrap().clone();
    let (whole, cut) = (ids(&whole), ids(&cut));
    assert!(cut.len() < whole.len() && whole.starts_with(&cut));
}

#[test]
fn the_configuration_is_default_then_file_then_flag() {
    let scratch = Scratch::new();
    scratch.write(
        "dpo.toml",
        "[dpo]\nbeta = 0.3\n[optimizer]\nlr = 0.5\n[credit]\noffset_std = 1.0\n",
    );
    let shown = scratch.good("dpo --config dpo.toml --lr 0.25 --credit-offset 2 --show-config");
    for line in ["beta = 0.3", "lr = 0.25", "offset = 2.0", "batch = 8"] {
        assert!(
            shown.lines().any(|shown| shown == line),
            "`{line}` in {shown}"
        );
    }
    assert!(!shown.contains("offset_std"), "{shown}");
}

#[test]
fn detail_32_a_run_repeats_from_its_own_configuration_at_any_number_of_threads() {
    let scratch = Scratch::new();
    scratch.good(
        "dpo --model MODEL --data pairs.jsonl --credit-selection all --batch 2 --epochs 2 \
         --out first --threads 1",
    );
    scratch.good("dpo --config first/config.toml --out second --threads 2");
    for file in ["metrics.jsonl", "adapter/adapter_model.safetensors"] {
        let read = |run: &str| std::fs::read(scratch.path(run).join(file)).unwrap();
        assert!(read("first") == read("second"), "{file}");
    }
}

#[test]
fn detail_07_keeping_everything_is_plain_dpo_bit_for_bit() {
    let scratch = Scratch::new();
    let common = "dpo --model MODEL --data pairs.jsonl --batch 2 --epochs 2";
    scratch.good(&format!("{common} --credit-selection all --out plain"));
    scratch.good("annotate --model MODEL --data pairs.jsonl --oracle plain --records r.jsonl");
    scratch.good(&format!(
        "{common} --signals r.jsonl --credit-selection all --out masked"
    ));
    let adapter = |run: &str| {
        std::fs::read(scratch.path(run).join("adapter/adapter_model.safetensors")).unwrap()
    };
    assert!(adapter("plain") == adapter("masked"));
    assert!(
        scratch.path("masked/credit.jsonl").is_file(),
        "the signal was segmented"
    );
    // The masked run also tells of its segments; what both tell is the same.
    let metrics = |run: &str| scratch.read(&format!("{run}/metrics.jsonl"));
    let (plain, masked) = (metrics("plain"), metrics("masked"));
    assert_eq!(plain.lines().count(), masked.lines().count());
    for (plain, masked) in plain.lines().map(json).zip(masked.lines().map(json)) {
        assert!(masked["segments_per_100_tokens"].is_number(), "{masked}");
        for (key, value) in plain.as_object().unwrap() {
            assert_eq!(*value, masked[key], "{key}");
        }
    }
}

#[test]
fn every_loss_of_preferences_trains_under_a_mask() {
    let scratch = Scratch::new();
    let common = "dpo --model MODEL --data pairs.jsonl --lora-rank 4 --batch 2";
    scratch.good(&format!("{common} --credit-selection all --out oracle"));
    scratch.good("annotate --model MODEL --data pairs.jsonl --oracle oracle --records r.jsonl");
    for (loss, more) in [
        ("ipo_sum", ""),
        ("ipo_mean", ""),
        ("cdpo", "--label-smoothing 0.1"),
        ("robust", "--label-smoothing 0.1"),
        ("hinge", ""),
        ("simpo", "--beta 2 --target-margin 0.5"),
        ("kto", "--undesirable-weight 0.5"),
        ("tdpo1", ""),
        ("tdpo2", "--tdpo-alpha 0.25"),
    ] {
        let out = format!("{loss}/run");
        std::fs::create_dir(scratch.path(loss)).unwrap();
        let command = format!("{common} --signals r.jsonl --loss {loss} {more} --out {out}");
        let summary = json(&scratch.good(&command));
        let last = &summary["last"];
        assert!(last["grad_norm"].as_f64().unwrap() > 0.0, "{loss}: {last}");
        let reference = loss != "simpo";
        assert_eq!(last["kl_k3"].is_number(), reference, "{loss}: {last}");
        assert_eq!(
            last["kto_baseline"].is_number(),
            loss == "kto",
            "{loss}: {last}"
        );
        let divergence = loss.starts_with("tdpo");
        assert_eq!(last["chosen_kl"].is_number(), divergence, "{loss}: {last}");
        assert_eq!(
            scratch.path(loss).join(".pivotal-cache").exists(),
            reference
        );
        scratch.good(&format!(
            "dpo --config {out}/config.toml --threads 1 --out {loss}/again"
        ));
        let read = |run: &str| scratch.read(&format!("{loss}/{run}/metrics.jsonl"));
        assert_eq!(read("run"), read("again"), "{loss}");
    }
    let error = scratch.bad(
        &format!("{common} --loss hinge --label-smoothing 0.1 --out x"),
        "x",
    );
    super::says(&error, &["`label-smoothing`", "`hinge`"]);
}

#[test]
fn what_no_token_was_measured_for_is_absent() {
    let scratch = Scratch::new();
    let rows: String = ["bc", "de"]
        .map(|chosen| {
            format!(
                "{{\"prompt\": \"a\", \"chosen\": \"{chosen}\", \"rejected\": \"f\", \
                 \"chosen_signal\": [1, -1, 1], \"rejected_signal\": [0.5, -1]}}\n"
            )
        })
        .concat();
    scratch.write("signal.jsonl", rows);
    let run = "dpo --model MODEL --data signal.jsonl --lora-rank 2 --steps 1 --out";
    scratch.good(&format!("{run} kept"));
    scratch.good(&format!("{run} none --credit-offset 100"));
    let keys = ["kl_k1", "kl_k2", "kl_k3", "chosen_kept_logp"];
    for (name, known) in [("kept", true), ("none", false)] {
        let line = scratch.read(&format!("{name}/metrics.jsonl"));
        let line: serde_json::Value = serde_json::from_str(&line).unwrap();
        assert!(
            keys.iter().all(|key| line.get(key).is_some() == known),
            "{line}"
        );
    }
}

#[test]
fn a_jump_is_in_the_record_that_it_cut() {
    let scratch = Scratch::new();
    let row = "{\"prompt\": \"a\", \"chosen\": \"bc\", \"rejected\": \"f\", \
               \"chosen_signal\": [1, -1, 1], \"rejected_signal\": [0.5, -1]}";
    scratch.write("signal.jsonl", row);
    let run = "dpo --model MODEL --data signal.jsonl --lora-rank 2 --steps 1 --out";
    scratch.good(&format!("{run} jump --credit-cut jump --credit-jump 0.5"));
    scratch.good(&format!("{run} schmitt"));
    let jump = |name: &str| -> serde_json::Value {
        let line = scratch.read(&format!("{name}/credit.jsonl"));
        let line: serde_json::Value = serde_json::from_str(line.lines().next().unwrap()).unwrap();
        line["jump"].clone()
    };
    assert_eq!(jump("jump"), 0.5);
    assert!(jump("schmitt").is_null());
    // It is read as it was written.
    scratch.good(
        "sft --model MODEL --data signal.jsonl --signals jump/credit.jsonl --steps 1 --out sft",
    );
}
