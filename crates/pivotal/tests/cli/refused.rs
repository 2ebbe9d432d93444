//! Settings and files that no work could go with: found before it, and named.

use std::ffi::OsStr;

use super::{Scratch, model_at, says};

const DPO: &str = "dpo --model MODEL --data pairs.jsonl --credit-selection all --out run";
const GRPO: &str = "grpo --model MODEL --data prompts.jsonl --max-new-tokens 3 --steps 1 \
                    --credit-selection all --out run";
const GENERATE: &str = "generate --model MODEL --prompt hi";

fn scratch() -> Scratch {
    let scratch = Scratch::new();
    let checks = r#"{"prompt": "say a", "checks": [{"kind": "lower_case"}]}"#;
    scratch.write("prompts.jsonl", checks);
    scratch.write("bare.jsonl", r#"{"prompt": "say a"}"#);
    scratch
}

#[test]
fn a_setting_out_of_its_domain_is_named() {
    let most = usize::MAX;
    let bins = format!("--credit-baseline position_mean --credit-baseline-bins {most}");
    let scratch = scratch();
    for (command, parts) in [
        (format!("{DPO} {bins}"), ["`baseline_bins`", "65536"]),
        (
            format!("{DPO} --lora-rank {most}"),
            ["`lora-rank`", "at most 32"],
        ),
        (
            format!("{DPO} --lora-rank 33"),
            ["`lora-rank` is 33", "at most 32"],
        ),
        (
            format!("{DPO} --lora-targets q_proj,nope"),
            ["`lora-targets` has `nope`", "q_proj"],
        ),
        (
            format!("{DPO} --lora-alpha nan"),
            ["`lora-alpha` is NaN", "finite"],
        ),
        (
            format!("{DPO} --lora-alpha inf"),
            ["`lora-alpha` is inf", "finite"],
        ),
        (
            format!("{DPO} --lora-alpha 1e39"),
            ["`lora-alpha`", "32 bits"],
        ),
        (format!("{DPO} --beta inf"), ["`beta` is inf", "finite"]),
        (format!("{DPO} --eps inf"), ["`eps` is inf", "finite"]),
        (format!("{GRPO} --samples {most}"), ["`samples`", "1048576"]),
        (format!("{GRPO} --prompts {most}"), ["`prompts`", "1048576"]),
        (
            format!("{GRPO} --temperature 7e-46"),
            ["`temperature`", "1e-45"],
        ),
        (
            format!("{GRPO} --regex ["),
            ["`regex` is `[` (", "expected a regular expression"],
        ),
        (
            format!("{GRPO} --eval-data bare.jsonl"),
            ["`bare.jsonl`, line 1", "--eval-data"],
        ),
        (
            format!("{GRPO} --data bare.jsonl").replace("--data prompts.jsonl ", ""),
            ["`bare.jsonl`, line 1", "`--data`"],
        ),
        (
            format!("{GRPO} --value-model MODEL").replace("grpo", "ppo"),
            ["`value-model` is", "score.weight"],
        ),
        (
            format!("{GENERATE} --samples {most}"),
            ["`samples`", "1048576"],
        ),
        (
            format!("{GENERATE} --max-new-tokens 0"),
            ["--max-new-tokens", "at least 1"],
        ),
        (
            format!("{GENERATE} --temperature 7e-46"),
            ["`temperature`", "1e-45"],
        ),
        (
            format!("{GENERATE} --temperature 1e39"),
            ["`temperature`", "3e38"],
        ),
        (
            format!("{GENERATE} --threads 100000"),
            ["--threads", "1024"],
        ),
    ] {
        says(&scratch.bad(&command, "run"), &parts);
    }
}

#[test]
fn a_baseline_below_zero_and_an_empty_path_are_read() {
    let scratch = scratch();
    let flags = "--show-config --credit-baseline-value -0.5";
    let told = scratch.good(&format!("dpo {flags}"));
    says(&told, &["baseline_value = -0.5"]);
    scratch.write(
        "base.toml",
        "[model]\nadapter = \"a\"\n[dpo]\nsignals = \"s\"\n",
    );
    let empty = OsStr::new("");
    let flags = ["--adapter", "--signals", "--reference-cache"];
    let more: Vec<&OsStr> = flags
        .iter()
        .flat_map(|flag| [flag.as_ref(), empty])
        .collect();
    let output = scratch.run_with("dpo --config base.toml --show-config", &more);
    let told = String::from_utf8_lossy(&output.stdout).into_owned();
    says(
        &told,
        &["adapter = \"\"", "signals = \"\"", "reference_cache = \"\""],
    );
}

#[cfg(unix)]
#[test]
fn a_path_that_no_configuration_can_hold_is_refused_by_its_flag() {
    use std::os::unix::ffi::OsStrExt;
    let scratch = scratch();
    let before = std::fs::read_dir(scratch.0.path()).unwrap().count();
    let path = OsStr::from_bytes(b"p\xff");
    let annotate = "annotate --model MODEL --data pairs.jsonl --oracle MODEL";
    for (command, flag) in [
        ("dpo --show-config", "--data"),
        ("dpo --model MODEL --data pairs.jsonl", "--out"),
        ("sft --data pairs.jsonl --out run", "--model"),
        ("grpo", "--resume"),
        (annotate, "--records"),
    ] {
        let output = scratch.run_with(command, &[flag.as_ref(), path]);
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(2), "{error}");
        says(&error, &[flag, "UTF-8"]);
    }
    let after = std::fs::read_dir(scratch.0.path()).unwrap().count();
    assert_eq!(before, after);
}

#[test]
fn a_row_that_the_model_has_no_place_for_is_named() {
    let scratch = scratch();
    let long = "c".repeat(300);
    let pair = |rejected: &str| {
        format!("{{\"prompt\": \"a\", \"chosen\": \"{rejected}\", \"rejected\": \"b\"}}\n")
    };
    scratch.write("long.jsonl", pair("d") + &pair(&long));
    let row = ["`long.jsonl`, line 2", "302 tokens", "--max-tokens"];
    for recipe in ["dpo --credit-selection all", "sft", "reward"] {
        let command = format!("{recipe} --model MODEL --data long.jsonl --max-tokens 0 --out run");
        says(&scratch.bad(&command, "run"), &row);
    }
    let annotate = "annotate --model MODEL --oracle MODEL --data long.jsonl --max-tokens 0";
    says(
        &scratch.bad(&format!("{annotate} --records r.jsonl"), "r.jsonl"),
        &row,
    );
    scratch.write("prompt.jsonl", format!("{{\"prompt\": \"{long}\"}}"));
    let error = scratch.bad("generate --model MODEL --data prompt.jsonl", "");
    says(&error, &["`prompt.jsonl`, line 1", "301 tokens"]);
}

#[test]
fn a_file_that_holds_nothing_of_use_is_named_with_what_it_lacks() {
    let scratch = scratch();
    scratch.write("one.jsonl", r#"{"text": "a"}"#);
    let error = scratch.bad("sft --model MODEL --data one.jsonl --out run", "run");
    says(&error, &["`one.jsonl`, row 1", "one token"]);
    scratch.write("empty.jsonl", "");
    for recipe in ["dpo", "sft"] {
        let command = format!("{recipe} --model MODEL --data pairs.jsonl --out run");
        let error = scratch.bad(&format!("{command} --signals empty.jsonl"), "run");
        says(&error, &["`empty.jsonl` has no records"]);
    }
    let error = scratch.bad("logps --model absent --text a", "");
    says(&error, &["`absent`", "no such file"]);
    let broken = model_at(&scratch, "broken");
    std::fs::write(broken.join("tokenizer.json"), "{").unwrap();
    let error = scratch.bad("logps --model broken --text a", "");
    says(&error, &["broken/tokenizer.json", "line 1"]);
}

#[test]
fn a_weight_that_is_no_number_ends_both_commands_that_read_it_alike() {
    let scratch = scratch();
    let weights = model_at(&scratch, "nan").join("model.safetensors");
    let mut bytes = std::fs::read(&weights).unwrap();
    let last = bytes.len() - 4;
    bytes[last..].copy_from_slice(&f32::NAN.to_le_bytes());
    std::fs::write(&weights, bytes).unwrap();
    for command in [
        "generate --model nan --prompt hi",
        "logps --model nan --text hi",
    ] {
        let output = scratch.run(command);
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(3), "`{command}` said {error}");
        says(&error, &["is not finite"]);
        assert!(output.stdout.is_empty());
    }
}

#[test]
fn a_processor_that_is_none_is_refused_and_a_lesser_one_agrees() {
    let scratch = scratch();
    let logps = |processor: &str| {
        let output = assert_cmd::Command::cargo_bin("pivotal")
            .unwrap()
            .env("PIVOTAL_PROCESSOR", processor)
            .args(["logps", "--text", "hello", "--model"])
            .arg(model_at(&scratch, processor))
            .output()
            .unwrap();
        let said = [output.stdout, output.stderr].concat();
        (output.status.code(), String::from_utf8(said).unwrap())
    };
    let (code, error) = logps("sse2");
    assert_eq!(code, Some(2), "{error}");
    says(&error, &["`PIVOTAL_PROCESSOR` is `sse2`", "`avx512`"]);
    let [portable, most] = ["portable", "amx"].map(|processor| {
        let (code, line) = logps(processor);
        assert_eq!(code, Some(0), "{line}");
        let line: serde_json::Value = serde_json::from_str(&line).unwrap();
        let logps = line["token_logps"].as_array().unwrap().clone();
        logps
            .iter()
            .map(|logp| logp.as_f64().unwrap())
            .collect::<Vec<_>>()
    });
    assert!(portable.len() > 1 && portable.len() == most.len());
    let close = |(one, other): (&f64, &f64)| (one - other).abs() < 0.05;
    assert!(
        portable.iter().zip(&most).all(close),
        "{portable:?} {most:?}"
    );
    // A run says what it used, not what there is.
    assert_cmd::Command::cargo_bin("pivotal")
        .unwrap()
        .env("PIVOTAL_PROCESSOR", "portable")
        .current_dir(scratch.path(""))
        .args("sft --model amx --data pairs.jsonl --lora-rank 2 --steps 1 --out run".split(' '))
        .assert()
        .success();
    let manifest = scratch.read("run/manifest.json");
    let manifest: serde_json::Value = serde_json::from_str(&manifest).unwrap();
    let device = manifest["device"].as_str().unwrap();
    assert!(
        device.starts_with("cpu") && !device.contains("bf16"),
        "{device}"
    );
}

#[test]
fn ids_of_a_padded_vocabulary_show_nothing() {
    let scratch = scratch();
    let path = model_at(&scratch, "padded").join("tokenizer.json");
    let text = std::fs::read_to_string(&path).unwrap();
    let mut tokenizer: serde_json::Value = serde_json::from_str(&text).unwrap();
    let vocabulary = tokenizer["model"]["vocab"].as_object_mut().unwrap();
    vocabulary.retain(|_, id| id.as_u64().unwrap() < 80);
    std::fs::write(&path, tokenizer.to_string()).unwrap();
    let generate = "generate --model padded --prompt hi --max-new-tokens 24 --temperature 2";
    let told = scratch.good(generate);
    let line: serde_json::Value = serde_json::from_str(&told).unwrap();
    let ids = line["token_ids"].as_array().unwrap();
    let known = ids
        .iter()
        .filter(|id| (4..80).contains(&id.as_u64().unwrap()));
    let known = known.count();
    assert!(known > 0 && known + 1 < ids.len(), "{told}");
    let response = line["response"].as_str().unwrap();
    assert_eq!(response.chars().count(), known, "{told}");
}
