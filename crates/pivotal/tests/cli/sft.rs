//! `sft` under a mask, and without one.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::{Scratch, says};

const RUN: &str = "--model MODEL --lora-rank 4 --lr 0.01 --batch 2 --epochs 2 --precision f32";

/// Between log-probabilities of one sequence and those of packed ones, in nats.
const TOLERANCE: f64 = 1e-5;

fn lines(scratch: &Scratch, file: &str) -> Vec<Value> {
    let text = scratch.read(file);
    let lines = text.lines();
    lines
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

fn adapter(scratch: &Scratch, run: &str) -> Vec<u8> {
    let file = "adapter/adapter_model.safetensors";
    std::fs::read(scratch.path(run).join(file)).unwrap()
}

/// A signal for so many characters and EOS, of both signs.
fn signal(tokens: usize, start: usize) -> Value {
    let value = |token: usize| match (token + start) % 3 {
        0 => -1.0,
        rest => 0.5 * rest as f64,
    };
    (0..=tokens).map(value).collect()
}

/// The pairs, as preferences with signals and as completions with them; one token a character.
fn with_signals(scratch: &Scratch) {
    let (mut pairs, mut completions) = (String::new(), String::new());
    for (index, line) in super::PAIRS.lines().enumerate() {
        let mut row: Value = serde_json::from_str(line).unwrap();
        let tokens = |row: &Value, side: &str| row[side].as_str().unwrap().len();
        let chosen = signal(tokens(&row, "chosen"), index);
        let one = json!({
            "prompt": row["prompt"], "completion": row["chosen"], "completion_signal": chosen,
        });
        completions += &format!("{one}\n");
        row["rejected_signal"] = signal(tokens(&row, "rejected"), index + 1);
        row["chosen_signal"] = chosen;
        pairs += &format!("{row}\n");
    }
    scratch.write("signals.jsonl", pairs);
    scratch.write("completions.jsonl", completions);
}

/// What `sft` wrote about each response, by row.
fn records(scratch: &Scratch, run: &str) -> BTreeMap<u64, Value> {
    let records = lines(scratch, &format!("{run}/credit.jsonl"));
    records
        .into_iter()
        .map(|record| (record["id"].as_u64().unwrap(), record))
        .collect()
}

fn kept(record: &Value) -> usize {
    let keep = record["keep"].as_array().unwrap().iter();
    keep.filter(|keep| keep.as_bool().unwrap()).count()
}

#[test]
fn keeping_everything_which_is_the_default_is_plain_sft_bit_for_bit() {
    let scratch = Scratch::new();
    with_signals(&scratch);
    scratch.good(&format!("sft {RUN} --data pairs.jsonl --out plain"));
    scratch.good(&format!("sft {RUN} --data signals.jsonl --out default"));
    let all = "--credit-selection all --credit-cut token --credit-baseline batch_mean";
    scratch.good(&format!("sft {RUN} --data signals.jsonl {all} --out all"));
    scratch.good(&format!(
        "sft {RUN} --data completions.jsonl --credit-selection all --out completions"
    ));
    assert!(!scratch.path("plain/credit.jsonl").exists());
    let plain = lines(&scratch, "plain/metrics.jsonl");
    for run in ["default", "all", "completions"] {
        assert!(
            adapter(&scratch, "plain") == adapter(&scratch, run),
            "{run}"
        );
        // A run with signals also tells of its segments; what both tell is the same.
        let metrics = lines(&scratch, &format!("{run}/metrics.jsonl"));
        assert_eq!(plain.len(), metrics.len());
        for (plain, found) in plain.iter().zip(&metrics) {
            assert!(found["segments_per_100_tokens"].is_number(), "{found}");
            for (key, value) in plain.as_object().unwrap() {
                assert_eq!(*value, found[key], "{run}: {key}");
            }
        }
    }
    assert_eq!(plain[0]["kept_fraction"], 1.0);
}

#[test]
fn the_loss_is_the_mean_over_kept_tokens_of_the_whole_step() {
    let scratch = Scratch::new();
    with_signals(&scratch);
    let run = "--model MODEL --data completions.jsonl --precision f32 --batch 4 --steps 1";
    scratch.good(&format!(
        "sft {run} --credit-selection agree --micro-batch-tokens 20 --out masked"
    ));
    let (mut sum, mut tokens) = (0.0, 0);
    for record in records(&scratch, "masked").values() {
        assert_eq!(
            (&record["side"], &record["sequence_sign"]),
            (&Value::Null, &json!("positive"))
        );
        let [prompt, response] =
            ["prompt_token_ids", "token_ids"].map(|key| record[key].as_array().unwrap().clone());
        let ids = Value::from([&prompt[..], &response[..]].concat()).to_string();
        let line = scratch.good(&format!("logps --model MODEL --precision f32 --ids {ids}"));
        let line: Value = serde_json::from_str(&line).unwrap();
        let logps = line["token_logps"].as_array().unwrap();
        let own = &logps[logps.len() - response.len()..];
        let signal = record["signal"].as_array().unwrap();
        for (token, logp) in own.iter().enumerate() {
            let keep = signal[token].as_f64().unwrap() > 0.0;
            assert_eq!(record["keep"][token], keep, "{record}");
            if keep {
                sum -= logp.as_f64().unwrap();
                tokens += 1;
            }
        }
    }
    let step = &lines(&scratch, "masked/metrics.jsonl")[0];
    assert_eq!(step["kept_tokens"], tokens);
    let (found, expected) = (step["loss"].as_f64().unwrap(), sum / f64::from(tokens));
    assert!(
        (found - expected).abs() < TOLERANCE,
        "{found}, not {expected}"
    );
    let fraction = step["kept_fraction"].as_f64().unwrap();
    assert!(fraction > 0.3 && fraction < 0.9, "{fraction}");
    assert_eq!(step["kept_fraction_positive"], step["kept_fraction"]);
    assert!(step["kept_fraction_negative"].is_null());
    assert_eq!(
        step["kept_by_position_positive"].as_array().unwrap().len(),
        10
    );
}

#[test]
fn of_a_preference_the_mask_is_the_chosen_responses_in_dpo() {
    let scratch = Scratch::new();
    with_signals(&scratch);
    let one_step = "--model MODEL --lora-rank 4 --steps 1";
    scratch.good(&format!(
        "dpo {one_step} --data pairs.jsonl --credit-selection all --out oracle"
    ));
    scratch.good("annotate --model MODEL --data pairs.jsonl --oracle oracle --records ratio.jsonl");
    // Each needs the rejected responses too: for the mean, the spread, the strata, the threshold.
    for credit in [
        "--credit-selection agree --credit-baseline batch_mean --credit-offset-std 0.25",
        "--credit-selection random_position --credit-cut jump --credit-jump-std 0.5",
        "--credit-selection agree --credit-baseline calibrated --credit-baseline-calibration 1",
    ] {
        for source in [
            "--data signals.jsonl",
            "--data pairs.jsonl --signals ratio.jsonl",
        ] {
            let run = |recipe: &str| {
                let overwrite = match scratch.path(recipe).exists() {
                    true => "--overwrite",
                    false => "",
                };
                scratch.good(&format!(
                    "{recipe} {one_step} {source} {credit} --out {recipe} {overwrite}"
                ));
            };
            run("dpo");
            run("sft");
            let ours = lines(&scratch, "sft/credit.jsonl");
            let theirs = lines(&scratch, "dpo/credit.jsonl");
            let chosen: Vec<&Value> = theirs
                .iter()
                .filter(|one| one["side"] == "chosen")
                .collect();
            assert_eq!((ours.len(), chosen.len()), (4, 4));
            for (ours, theirs) in ours.iter().zip(chosen) {
                for (key, value) in ours.as_object().unwrap() {
                    // `dpo` has the reference's from its own pass, `sft` from the records.
                    if key != "reference_token_logps" {
                        assert_eq!(*value, theirs[key], "{credit} {source}: {key}");
                    }
                }
            }
            let some: usize = ours.iter().map(kept).sum();
            assert!(some > 0, "{credit} {source}");
        }
    }
    // Without their signals the chosen responses stand alone.
    let bare = scratch
        .read("signals.jsonl")
        .replace("rejected_signal", "other");
    scratch.write("chosen.jsonl", bare);
    let alone = format!("sft {one_step} --data chosen.jsonl --credit-selection agree");
    scratch.good(&format!("{alone} --credit-baseline batch_mean --out alone"));
    let mean = |records: &BTreeMap<u64, Value>| {
        let signals = records
            .values()
            .flat_map(|one| one["signal"].as_array().unwrap());
        let signals: Vec<f64> = signals.map(|value| value.as_f64().unwrap()).collect();
        signals.iter().sum::<f64>() / signals.len() as f64
    };
    let found = records(&scratch, "alone");
    let baseline = found[&1]["baseline"][0].as_f64().unwrap();
    assert!((baseline - mean(&found)).abs() < 1e-6, "{baseline}");
    says(
        &scratch.bad(
            &format!("{alone} --credit-baseline calibrated --out no"),
            "no",
        ),
        &["calibrat"],
    );
}

#[test]
fn a_conversation_keeps_only_what_the_model_said_of_what_the_signal_keeps() {
    let scratch = Scratch::new();
    super::chat_model(&scratch);
    let talk = json!({"messages": [
        {"role": "user", "content": "hi"}, {"role": "assistant", "content": "ab"},
        {"role": "user", "content": "so"}, {"role": "assistant", "content": "cdef"},
    ]});
    scratch.write("talk.jsonl", format!("{talk}\n"));
    let run = "sft --model chat --data talk.jsonl --lora-rank 4 --steps 1";
    says(
        &scratch.bad(&format!("{run} --credit-selection agree --out no"), "no"),
        &["`agree` needs a signal", "completion_signal", "--signals"],
    );
    let plain = scratch.good(&format!("{run} --out plain"));
    // "ab" and "cdef", each with its EOS.
    says(&plain, &["\"kept_tokens\": 8"]);
    // A record as another program writes it, without a prompt, of the whole response: what the user said in it too.
    let ids = |text: &str| -> Vec<u64> {
        let line = scratch.good(&format!("logps --model chat --text {text}"));
        let line: Value = serde_json::from_str(&line).unwrap();
        let ids = line["token_ids"].as_array().unwrap();
        let own = &ids[ids.len() - text.len()..];
        own.iter().map(|id| id.as_u64().unwrap()).collect()
    };
    let blank = 32 + ids("!")[0] - u64::from(b'!');
    let words = ["user:", "so|assistant:", "cdef"].map(ids);
    let eos = [2];
    let response = [&ids("ab")[..], &eos, &words.join(&blank), &eos].concat();
    let own: Vec<bool> = (0..response.len())
        .map(|token| token < 3 || token >= response.len() - 5)
        .collect();
    let signal: Vec<f64> = (0..response.len())
        .map(|token| [1.0, -1.0, 2.0][token % 3])
        .collect();
    let record = json!({
        "schema_version": 1, "id": 1, "side": null, "prompt_token_ids": [],
        "token_ids": response, "token_texts": vec!["?"; response.len()],
        "signal_name": "external", "signal": signal, "baseline": [0.0], "offset": 0.0,
        "segments": [{"start": 0, "end": response.len(), "score": 0.0, "sign": "neutral"}],
        "sequence_sign": "positive", "keep": vec![true; response.len()],
        "truth": null, "token_logps": null, "reference_token_logps": null,
    });
    scratch.write("talk.records", format!("{record}\n"));
    let masked = format!("{run} --signals talk.records --out masked --credit-selection");
    scratch.good(&format!("{masked} agree"));
    let expected: Vec<bool> = own
        .iter()
        .zip(&signal)
        .map(|(own, signal)| *own && *signal > 0.0)
        .collect();
    let kept = expected.iter().filter(|keep| **keep).count();
    assert!(kept > 0 && kept < 8);
    assert_eq!(records(&scratch, "masked")[&1]["keep"], json!(expected));
    let step = &lines(&scratch, "masked/metrics.jsonl")[0];
    assert_eq!(step["kept_tokens"], kept);
    assert_eq!(
        step["kept_fraction"],
        kept as f64 / 8.0,
        "of its own tokens"
    );
    // Keeping all keeps no word of the user's.
    scratch.good(&format!("{masked} all --overwrite"));
    assert_eq!(records(&scratch, "masked")[&1]["keep"], json!(own));
    assert!(adapter(&scratch, "plain") == adapter(&scratch, "masked"));
}

#[test]
fn what_a_step_keeps_nothing_of_changes_nothing() {
    let scratch = Scratch::new();
    let rows = [("a", "xyz", [-1.0; 4]), ("b", "uvw", [-2.0; 4])];
    let rows = rows.map(|(prompt, completion, signal)| {
        let row = json!({
            "prompt": prompt, "completion": completion, "completion_signal": signal,
        });
        format!("{row}\n")
    });
    scratch.write("bad.jsonl", rows.concat());
    scratch.good(&format!(
        "sft {RUN} --data bad.jsonl --credit-selection agree --weight-decay 0.1 --out none"
    ));
    let metrics = lines(&scratch, "none/metrics.jsonl");
    assert_eq!(metrics.len(), 2);
    for step in &metrics {
        let numbers = ["loss", "kept_tokens", "grad_norm", "kept_fraction"];
        let found = numbers.map(|key| step[key].as_f64());
        assert_eq!(found, [Some(0.0); 4], "{step}");
        assert_eq!(step["empty_mask_fraction"], 1.0);
        let warnings = step["warnings"].to_string();
        says(&warnings, &["keep-none", "empty-masks"]);
    }
    let logps = |more: &str| scratch.good(&format!("logps --model MODEL {more} --text hello"));
    assert_eq!(logps("--adapter none"), logps(""));
}

#[test]
fn a_resumed_run_with_credit_is_the_uninterrupted_one_bit_for_bit() {
    let scratch = Scratch::new();
    with_signals(&scratch);
    let run = "sft --model MODEL --data signals.jsonl --lora-rank 4 --batch 1 --epochs 3 \
               --checkpoint-every 3 --drift-steps 3 --credit-selection agree --tensorboard true";
    scratch.good(&format!("{run} --out whole"));
    scratch.good(&format!("{run} --out cut"));
    let cut = scratch.path("cut");
    std::fs::remove_dir_all(cut.join("checkpoints/step-00000012")).unwrap();
    std::fs::remove_file(cut.join("summary.json")).unwrap();
    scratch.good("sft --resume cut");
    assert!(adapter(&scratch, "whole") == adapter(&scratch, "cut"));
    let whole = scratch.read("whole/metrics.jsonl");
    assert_eq!(whole, scratch.read("cut/metrics.jsonl"));
    let drifts = lines(&scratch, "whole/metrics.jsonl");
    let drifts = drifts
        .iter()
        .filter(|step| step["opposing_drift"].is_number());
    assert_eq!(drifts.count(), 12 - 5, "since step 6");
    scratch.good("sft --config whole/config.toml --out again");
    assert_eq!(whole, scratch.read("again/metrics.jsonl"));
    says(
        &scratch.bad("sft --resume whole --credit-selection all", ""),
        &["another configuration", "selection"],
    );
}

#[test]
fn the_credit_table_is_that_of_the_others_but_for_its_selection() {
    let scratch = Scratch::new();
    let shown =
        |recipe: &str, flags: &str| scratch.good(&format!("{recipe} {flags} --show-config"));
    let credit = |text: &str| -> String {
        let table = text.split("[credit]").nth(1).unwrap();
        table.split("\n[").next().unwrap().trim().to_owned()
    };
    let (ours, theirs) = (credit(&shown("sft", "")), credit(&shown("dpo", "")));
    assert_eq!(
        ours,
        theirs.replace("selection = \"agree\"", "selection = \"all\"")
    );
    assert_ne!(ours, theirs);
    // A table that does not say keeps everything too, and so does what a run wrote before it had one.
    scratch.write("part.toml", "[credit]\ncut = \"jump\"\njump_std = 1\n");
    says(
        &shown("sft", "--config part.toml"),
        &["selection = \"all\"", "cut = \"jump\"", "jump_std = 1.0"],
    );
    scratch.write("old.toml", "[optimizer]\nlr = 0.5\n");
    says(
        &shown("sft", "--config old.toml"),
        &["selection = \"all\"", "lr = 0.5"],
    );
    says(
        &shown(
            "sft",
            "--config part.toml --credit-cut token --credit-selection quota",
        ),
        &["selection = \"quota\"", "cut = \"token\""],
    );
    scratch.write(
        "wrong.toml",
        "[optimizer]\nlr = 0.5\n[credit]\nscissors = 1\n",
    );
    says(
        &scratch.bad("sft --config wrong.toml", ""),
        &["wrong.toml", "line 3", "scissors", "jump_std"],
    );
    let help = scratch.good("sft --help");
    let line = help
        .lines()
        .skip_while(|line| !line.contains("--credit-selection <"));
    let line: Vec<&str> = line.take(4).collect();
    assert!(line.concat().contains("[default: all]"), "{line:?}");
}

#[test]
fn what_does_not_fit_is_said_before_a_run_is_made() {
    let scratch = Scratch::new();
    with_signals(&scratch);
    let bad = |flags: &str, parts: &[&str]| {
        says(
            &scratch.bad(&format!("sft {RUN} {flags} --out no"), "no"),
            parts,
        );
    };
    bad(
        "--data pairs.jsonl --credit-selection agree",
        &[
            "`agree` needs a signal",
            "`chosen_signal`",
            "plain fine-tuning",
        ],
    );
    let text = scratch.read("completions.jsonl");
    let partial = text.replacen("completion_signal", "other", 1);
    scratch.write("partial.jsonl", partial);
    bad(
        "--data partial.jsonl --credit-selection agree",
        &["row 1", "`completion_signal`"],
    );
    bad(
        "--data completions.jsonl --credit-selection agree --credit-weighting soft",
        &["credit-weighting", "hard"],
    );
    bad(
        "--data completions.jsonl --credit-selection agree --credit-baseline calibrated",
        &["calibrat"],
    );
    scratch.good("dpo --model MODEL --data pairs.jsonl --credit-selection all --steps 1 --out dpo");
    scratch.good("annotate --model MODEL --data pairs.jsonl --oracle dpo --records r.jsonl");
    let records = "--credit-selection agree --signals r.jsonl";
    bad(
        &format!("--data completions.jsonl {records}"),
        &["r.jsonl", "line 1", "`side`", "null"],
    );
    bad(
        &format!("--data pairs.jsonl {records} --credit-signal-delay 1"),
        &["credit-signal-delay"],
    );
    scratch.write("other.jsonl", super::PAIRS.replace("blue", "grey"));
    bad(
        &format!("--data other.jsonl {records}"),
        &["chosen response of row 2", "other token ids"],
    );
    // The same records without a side, and only of the chosen responses, are those of completions.
    let completions: String = scratch
        .read("r.jsonl")
        .lines()
        .filter(|line| line.contains("\"side\":\"chosen\""))
        .map(|line| line.replace("\"side\":\"chosen\"", "\"side\":null") + "\n")
        .collect();
    scratch.write("c.jsonl", completions);
    scratch.good(&format!(
        "sft {RUN} --data completions.jsonl --credit-selection agree --signals c.jsonl --out good"
    ));
    let first = &lines(&scratch, "good/metrics.jsonl")[0];
    assert!(first["segments_per_100_tokens"].is_number());
    let record = &records_of(&scratch)[&1];
    assert_eq!(record["signal_name"], "log_ratio");
    assert!(record["reference_token_logps"].is_array());
    let manifest: Value = serde_json::from_str(&scratch.read("good/manifest.json")).unwrap();
    says(&manifest["inputs"].to_string(), &["c.jsonl"]);
}

fn records_of(scratch: &Scratch) -> BTreeMap<u64, Value> {
    records(scratch, "good")
}

#[test]
fn reward_says_why_it_has_no_credit() {
    let scratch = Scratch::new();
    let reason = &["no `[credit]` table in `reward`", "two whole responses"][..];
    scratch.write(
        "reward.toml",
        "[optimizer]\nlr = 0.5\n[credit]\nselection = \"agree\"\n",
    );
    let error = scratch.bad("reward --config reward.toml --show-config", "");
    says(&error, &[&["reward.toml", "line 3"], reason].concat());
    let run = "reward --model MODEL --data pairs.jsonl --steps 1 --lora-rank 4";
    let error = scratch.bad(&format!("{run} --credit-selection agree --out no"), "no");
    says(&error, &[&["`credit-selection`"], reason].concat());
    assert!(!scratch.good("reward --help").contains("--credit"));
    scratch.good(&format!("{run} --out run"));
    assert!(!scratch.read("run/config.toml").contains("credit"));
    scratch.good("reward --resume run");
    scratch.good("reward --config run/config.toml --out again");
}
