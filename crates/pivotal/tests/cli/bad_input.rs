//! What bad input gets: exit code 2, a message that names the place, and nothing written.

use super::{Scratch, golden, says};

const DPO: &str = "dpo --model MODEL --credit-selection all --out run --data";

fn data_fault(text: impl AsRef<[u8]>, parts: &[&str]) {
    let scratch = Scratch::new();
    scratch.write("bad.jsonl", text);
    says(
        &scratch.bad(&format!("{DPO} bad.jsonl"), "run"),
        &[&["bad.jsonl"], parts].concat(),
    );
}

#[test]
fn rows_are_named() {
    let good = r#"{"prompt": "a", "chosen": "b", "rejected": "c"}"#;
    data_fault(format!("{good}\n{{\"prompt\": "), &["2"]);
    data_fault(
        format!("{good}\n{{\"prompt\": \"a\", \"chosen\": \"b\"}}"),
        &["2", "rejected"],
    );
    data_fault(
        r#"{"prompt": "a", "chosen": 3, "rejected": "c"}"#,
        &["1", "chosen"],
    );
    data_fault(
        r#"{"prompt": "a", "chosen": "", "rejected": "c"}"#,
        &["1", "chosen", "empty"],
    );
    data_fault("", &[]);
    data_fault([0xff, 0xfe, b'\n'], &["1"]);
}

#[test]
fn a_response_cut_away_is_dropped_and_counted_and_all_of_them_is_an_error() {
    let scratch = Scratch::new();
    let long = "x".repeat(40);
    let pairs = format!(
        "{{\"prompt\": \"{long}\", \"chosen\": \"b\", \"rejected\": \"c\"}}\n{}",
        super::PAIRS
    );
    scratch.write("long.jsonl", pairs);
    let summary = scratch.good(&format!("{DPO} long.jsonl --max-tokens 32"));
    says(&summary, &["\"dropped\": 1", "\"pairs\": 4"]);
    let error = scratch.bad(&format!("{DPO} long.jsonl --max-tokens 2 --overwrite"), "");
    says(&error, &["long.jsonl"]);
    says(&scratch.read("run/summary.json"), &["\"pairs\": 4"]);
}

#[test]
fn signals_are_checked() {
    let scratch = Scratch::new();
    let masked = "dpo --model MODEL --data pairs.jsonl --out run";
    says(
        &scratch.bad(masked, "run"),
        &["`agree` needs a signal", "--signals"],
    );
    let row = |signal: &str| {
        format!(
            "{{\"prompt\": \"a\", \"chosen\": \"b\", \"rejected\": \"c\", \
             \"chosen_signal\": {signal}, \"rejected_signal\": [0.5, -1]}}"
        )
    };
    for signal in ["[0.5, null]", "[0.5, 1e999]", "[0.5, NaN]", "[0.5]"] {
        scratch.write("signal.jsonl", row(signal));
        let error = scratch.bad("dpo --model MODEL --data signal.jsonl --out run", "run");
        says(&error, &["signal.jsonl", "1"]);
    }
    // In the second row alone; the third lacks one side.
    let bare = r#"{"prompt": "a", "chosen": "b", "rejected": "c"}"#;
    let whole = row("[0.5, -0.25]");
    let half = whole.replace("\"rejected_signal\": [0.5, -1]", "\"x\": 1");
    scratch.write("partial.jsonl", format!("{whole}\n{bare}\n{whole}"));
    let partial = "dpo --model MODEL --data partial.jsonl --out run";
    says(
        &scratch.bad(partial, "run"),
        &["row 2", "chosen_signal", "agree"],
    );
    scratch.write("partial.jsonl", format!("{whole}\n{whole}\n{half}"));
    let error = scratch.bad(partial, "run");
    says(&error, &["row 3"]);
    scratch.write("signal.jsonl", row("[0.5, -0.25]"));
    scratch.good("dpo --model MODEL --data signal.jsonl --out run");

    scratch.good(&format!("{DPO} pairs.jsonl --overwrite"));
    scratch.good("annotate --model MODEL --data pairs.jsonl --oracle run --records r.jsonl");
    let records = scratch.read("r.jsonl");
    scratch.write("torn.jsonl", &records[..records.len() - 9]);
    let command = "dpo --model MODEL --data pairs.jsonl --out other --signals";
    says(
        &scratch.bad(&format!("{command} torn.jsonl"), "other"),
        &["torn.jsonl", "line 8"],
    );
    let short: String = records
        .lines()
        .take(7)
        .flat_map(|line| [line, "\n"])
        .collect();
    scratch.write("short.jsonl", short);
    says(
        &scratch.bad(&format!("{command} short.jsonl"), "other"),
        &["rejected", "row 4"],
    );
    let error = scratch.bad(
        &format!("{command} r.jsonl --max-response-tokens 3"),
        "other",
    );
    says(&error, &["other token ids"]);
}

#[test]
fn settings_are_checked() {
    let scratch = Scratch::new();
    scratch.write("typo.toml", "[optimizer]\nlearning_rate = 1.0\n");
    says(
        &scratch.bad("dpo --config typo.toml", ""),
        &["typo.toml", "learning_rate", "line 2"],
    );
    scratch.write("table.toml", "[optimiser]\nlr = 1.0\n");
    says(
        &scratch.bad("dpo --config table.toml", ""),
        &["table.toml", "optimiser"],
    );
    says(
        &scratch.bad("dpo --credit-cut scissors", ""),
        &["scissors", "schmitt"],
    );
    says(
        &scratch.bad(&format!("{DPO} pairs.jsonl --beta 0"), ""),
        &["beta"],
    );
    says(&scratch.bad("dpo --no-such-flag", ""), &["--no-such-flag"]);
    says(
        &scratch.bad("dpo --data pairs.jsonl --out run", "run"),
        &["`model` is empty"],
    );
    says(
        &scratch.bad("logps --model MODEL --ids [1,99999]", ""),
        &["99999", "100"],
    );
    says(
        &scratch.bad("logps --model MODEL --ids [1,-2]", ""),
        &["--ids"],
    );
}

#[test]
fn models_are_checked() {
    let scratch = Scratch::new();
    let command = |model: &str| format!("logps --model {model} --text hello");
    says(
        &scratch.bad(&command("nobody/nothing"), ""),
        &["nobody/nothing", "hub"],
    );
    says(&scratch.bad(&command("absent.gguf"), ""), &["absent.gguf"]);
    scratch.write(
        "short.gguf",
        b"GGUF\x03\0\0\0\xff\xff\xff\xff\xff\xff\xff\xff",
    );
    says(
        &scratch.bad(&command("short.gguf"), ""),
        &["short.gguf", "byte"],
    );
    let copy = scratch.path("copy");
    std::fs::create_dir(&copy).unwrap();
    for file in [
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "model.safetensors",
    ] {
        std::fs::copy(golden("llama").join(file), copy.join(file)).unwrap();
    }
    scratch.good(&command("copy"));
    let weights = std::fs::read(copy.join("model.safetensors")).unwrap();
    scratch.write("copy/model.safetensors", &weights[..weights.len() / 2]);
    says(&scratch.bad(&command("copy"), ""), &["model.safetensors"]);
    let mut huge = weights.clone();
    huge[..8].copy_from_slice(&u64::MAX.to_le_bytes());
    scratch.write("copy/model.safetensors", huge);
    says(&scratch.bad(&command("copy"), ""), &["model.safetensors"]);
}

#[test]
fn a_place_that_cannot_be_written_is_found_before_the_work() {
    let scratch = Scratch::new();
    let generate = "generate --model MODEL --prompt hi --max-new-tokens 2";
    says(
        &scratch.bad(&format!("{generate} --out pairs.jsonl/inside"), ""),
        &["--out"],
    );
    let annotate = "annotate --model MODEL --data pairs.jsonl --oracle run --records";
    says(
        &scratch.bad(&format!("{annotate} nowhere/r.jsonl"), "nowhere"),
        &["records"],
    );
    assert_eq!(scratch.read("pairs.jsonl"), super::PAIRS);
}

#[test]
fn what_would_be_ignored_is_refused() {
    let scratch = Scratch::new();
    scratch.good(&format!("{DPO} pairs.jsonl"));
    says(
        &scratch.bad("logps --model run --text hi", ""),
        &["--adapter"],
    );
    scratch.good("annotate --model MODEL --data pairs.jsonl --oracle run --records r.jsonl");
    let masked = "dpo --model MODEL --data pairs.jsonl --signals r.jsonl --out other";
    says(
        &scratch.bad(&format!("{masked} --credit-weighting soft"), "other"),
        &["soft"],
    );
    says(
        &scratch.bad(&format!("{masked} --credit-signal-delay 1"), "other"),
        &["signal-delay"],
    );
    let twice = scratch.read("r.jsonl").repeat(2);
    scratch.write("twice.jsonl", twice);
    let masked = masked.replace("r.jsonl", "twice.jsonl");
    says(&scratch.bad(&masked, "other"), &["twice.jsonl", "line 9"]);
    std::fs::copy(scratch.path("pairs.jsonl"), scratch.path("run/pairs.jsonl")).unwrap();
    let inside = scratch.bad(&format!("{DPO} run/pairs.jsonl --overwrite"), "");
    says(&inside, &["run/pairs.jsonl", "--overwrite"]);
    assert!(scratch.path("run/pairs.jsonl").is_file());
}

#[test]
fn numbers_that_f32_does_not_hold_are_refused() {
    let scratch = Scratch::new();
    for (flag, value) in [
        ("lr", "1e308"),
        ("beta1", "0.99999999999"),
        ("beta2", "0.99999999"),
        ("eps", "1e-50"),
        ("weight-decay", "1e300"),
        ("epochs", "9223372036854775808"),
    ] {
        for recipe in ["dpo --credit-selection all", "sft", "reward"] {
            let run = format!("{recipe} --model MODEL --data pairs.jsonl --out run");
            let error = scratch.bad(&format!("{run} --{flag} {value}"), "run");
            says(&error, &[&format!("`{flag}` is ")]);
        }
    }
}

#[test]
fn records_of_another_prompt_are_refused() {
    let scratch = Scratch::new();
    scratch.good(&format!("{DPO} pairs.jsonl"));
    scratch.good("annotate --model MODEL --data pairs.jsonl --oracle run --records r.jsonl");
    // The responses are the same.
    scratch.write("other.jsonl", super::PAIRS.replace("say hi", "say ho"));
    for recipe in ["dpo", "sft --credit-selection agree"] {
        let masked = format!("{recipe} --model MODEL --signals r.jsonl --out masked --data");
        for data in ["other.jsonl", "pairs.jsonl --max-prompt-tokens 4"] {
            let error = scratch.bad(&format!("{masked} {data}"), "masked");
            says(&error, &["has other token ids than the data"]);
        }
        scratch.good(&format!("{masked} pairs.jsonl"));
        std::fs::remove_dir_all(scratch.path("masked")).unwrap();
        let asked = format!("{masked} pairs.jsonl --credit-signal");
        let error = scratch.bad(&format!("{asked} critic"), "masked");
        says(
            &error,
            &["`credit-signal` is critic with records of log_ratio"],
        );
        scratch.good(&format!("{asked} log_ratio"));
        std::fs::remove_dir_all(scratch.path("masked")).unwrap();
    }
}

#[test]
fn a_reward_model_is_no_policy() {
    let scratch = Scratch::new();
    let reward = "reward --model MODEL --data pairs.jsonl --steps 2 --lr 0.01";
    scratch.good(&format!("{reward} --lora-rank 4 --out lora"));
    scratch.good(&format!("{reward} --lora-rank 0 --out full"));
    let annotate = "annotate --data pairs.jsonl --records r.jsonl";
    let refused = [
        (format!("{annotate} --model MODEL --oracle lora"), "oracle"),
        (format!("{annotate} --model MODEL --oracle full"), "oracle"),
        (format!("{annotate} --model full --oracle MODEL"), "model"),
        (format!("{DPO} pairs.jsonl --adapter lora"), "adapter"),
        (
            "generate --model MODEL --prompt hi --adapter lora".into(),
            "adapter",
        ),
        (
            "logps --model MODEL --text hi --adapter lora".into(),
            "adapter",
        ),
        ("logps --model full --text hi".into(), "model"),
    ];
    for (command, key) in refused {
        let error = scratch.bad(&command, "r.jsonl");
        says(
            &error,
            &[&format!("`{key}` is "), "a policy: this is a reward model"],
        );
    }
    for (name, model) in [("lora", "MODEL"), ("full", "full")] {
        scratch.good(&format!(
            "{annotate} --model {model} --signal level --reward-model {name} --overwrite"
        ));
    }
}

#[test]
fn a_reward_model_is_trained_on_with_its_head() {
    let scratch = Scratch::new();
    let reward = "reward --data pairs.jsonl --steps 2";
    scratch.good(&format!(
        "{reward} --model MODEL --lr 0.01 --lora-rank 4 --out lora"
    ));
    scratch.good(&format!(
        "{reward} --model MODEL --lr 0.01 --lora-rank 0 --out full"
    ));
    let weights = |file: &str| std::fs::read(scratch.path(file)).unwrap();
    for (from, flags, file) in [
        (
            "lora",
            "--model MODEL --adapter lora",
            "adapter/adapter_model.safetensors",
        ),
        (
            "full",
            "--model full --lora-rank 0",
            "model/model.safetensors",
        ),
    ] {
        // A learning rate of 0 leaves what it began with.
        let again = format!("{reward} {flags} --lr 0 --out again");
        let error = scratch.bad(&format!("{again} --head-init normal"), "again");
        says(&error, &["head-init"]);
        scratch.good(&again);
        assert!(weights(&format!("again/{file}")) == weights(&format!("{from}/{file}")));
        scratch.good("reward --resume again");
        std::fs::remove_dir_all(scratch.path("again")).unwrap();
    }
}

#[test]
fn a_models_directory_is_the_model_whatever_lies_beside_its_weights() {
    let scratch = Scratch::new();
    let lora = "sft --model MODEL --data pairs.jsonl --lora-rank 4 --lr 0.1 --steps 2 --out lora";
    scratch.good(lora);
    scratch
        .good("sft --model MODEL --data pairs.jsonl --lora-rank 0 --lr 0.01 --steps 2 --out full");
    let annotate = "annotate --model MODEL --data pairs.jsonl --overwrite --records";
    scratch.good(&format!("{annotate} r.jsonl --oracle full/model"));
    let before = scratch.read("r.jsonl");
    let (from, to) = (
        scratch.path("lora/adapter"),
        scratch.path("full/model/adapter"),
    );
    std::fs::create_dir(&to).unwrap();
    for file in std::fs::read_dir(from).unwrap() {
        let file = file.unwrap();
        std::fs::copy(file.path(), to.join(file.file_name())).unwrap();
    }
    scratch.good(&format!("{annotate} r.jsonl --oracle full/model"));
    assert!(scratch.read("r.jsonl") == before);
    scratch.good(&format!("{annotate} r.jsonl --oracle lora"));
    assert!(scratch.read("r.jsonl") != before);
}

#[cfg(unix)]
#[test]
fn a_pipe_is_refused_where_its_hash_is_written_down() {
    let scratch = Scratch::new();
    for command in [
        "dpo --credit-selection all --data /dev/stdin --out made",
        "sft --data /dev/stdin --out made",
        "annotate --data /dev/stdin --oracle x --records made",
    ] {
        let output = assert_cmd::Command::cargo_bin("pivotal")
            .unwrap()
            .current_dir(scratch.0.path())
            .args(command.split_whitespace())
            .args(["--model".as_ref(), golden("llama").as_os_str()])
            .write_stdin(super::PAIRS)
            .output()
            .unwrap();
        let error = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{error}");
        says(
            &error,
            &["`/dev/stdin` is a pipe or a device", "a file first"],
        );
        assert!(!scratch.path("made").exists());
    }
}

#[test]
fn signals_too_large_for_their_sums_are_named_and_not_written_as_null() {
    let scratch = Scratch::new();
    let row = |signal: &str| {
        format!(
            "{{\"prompt\": \"a\", \"chosen\": \"bcd\", \"rejected\": \"e\", \
             \"chosen_signal\": {signal}, \"rejected_signal\": [0.5, -1]}}"
        )
    };
    let run = "dpo --model MODEL --data big.jsonl --out run";
    scratch.write("big.jsonl", row("[3e38, 3e38, 0.5, 0.5]"));
    let error = scratch.bad(&format!("{run} --credit-score sum"), "run");
    says(&error, &["`segments.score` comes to inf", "response 1"]);
    scratch.write("big.jsonl", row("[3e38, -3e38, 0.5, 0.5]"));
    let error = scratch.bad(&format!("{run} --credit-offset-std 2"), "run");
    says(&error, &["`offset` comes to inf", "response 1"]);
}
