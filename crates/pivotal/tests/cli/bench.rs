//! `pivotal bench` on the tiny model: what it prints and writes, and what it refuses.

use serde_json::Value;

use super::{Scratch, says};

fn results(text: &str) -> Vec<Value> {
    let report: Value = serde_json::from_str(text).unwrap();
    assert_eq!(report["schema_version"], 1);
    report["results"].as_array().unwrap().clone()
}

fn number(value: &Value, key: &str) -> f64 {
    let found = value[key].as_f64();
    found.unwrap_or_else(|| panic!("`{key}` is {}", value[key]))
}

fn parts(result: &Value) -> &[Value] {
    result["parts"].as_array().unwrap()
}

/// What holds of every measurement.
fn check(result: &Value) {
    assert_eq!(result["tool"], "pivotal");
    let seconds = number(result, "seconds");
    assert!(seconds > 0.0);
    let speed = number(result, "tokens") / seconds;
    assert!((number(result, "tokens_per_second") / speed - 1.0).abs() < 1e-9);
    let sum: f64 = parts(result).iter().map(|part| number(part, "share")).sum();
    assert!(sum == 0.0 || (sum - 1.0).abs() < 1e-3, "{sum} in {result}");
}

#[test]
fn a_step_of_dpo_is_measured_on_a_model_and_pairs_of_ones_own() {
    let scratch = Scratch::new();
    let command = "bench dpo --model MODEL --data pairs.jsonl --steps 1 --batch 3 --keep 0.5 \
                   --lora-rank 4 --threads 2 --precision f32 --json out.json";
    let text = scratch.good(command);
    says(
        &text,
        &["model: llama", "pairs.jsonl: 4 pairs", "dpo keep 0.5"],
    );
    let results = results(&scratch.read("out.json"));
    let [result] = &results[..] else {
        panic!("one measurement: {results:?}")
    };
    check(result);
    let expected = [
        ("suite", "dpo"),
        ("variant", "keep 0.5"),
        ("model", "llama"),
        ("precision", "f32"),
    ];
    for (key, value) in expected {
        assert_eq!(result[key], value, "{key}");
    }
    assert_eq!(
        (&result["pairs"], &result["threads"]),
        (&3.into(), &2.into())
    );
    let reference = number(result, "reference_seconds");
    assert!(reference > 0.0 && reference < number(result, "seconds"));
    let without = 3.0 / (number(result, "seconds") - reference);
    assert!((number(result, "pairs_per_second_without_reference") / without - 1.0).abs() < 1e-9);
    let ceiling = number(&result["ceiling"], "f32_gflops");
    let gflops = number(result, "model_flops") / number(result, "seconds") / 1e9;
    assert!((number(result, "share_of_ceiling") * ceiling / gflops - 1.0).abs() < 1e-9);
    let kinds = result["model_flops_by_kind"].as_object().unwrap();
    let sum: u64 = kinds.values().filter_map(Value::as_u64).sum();
    assert_eq!(result["model_flops"], sum);
    assert!(kinds["lora"].as_u64().unwrap() > 0);
    if cfg!(target_os = "linux") {
        assert!(number(result, "peak_bytes") > 1e6);
    }
    assert_eq!(result["settings"]["batch"], 3);
    let parts: Vec<_> = parts(result)
        .iter()
        .map(|part| part["name"].clone())
        .collect();
    for name in ["optimizer", "pack", "rest"] {
        assert!(parts.contains(&name.into()), "{parts:?}");
    }
}

#[test]
fn one_pass_takes_every_pair_and_repetitions_give_their_median() {
    let scratch = Scratch::new();
    let command = "bench sft reward annotate --model MODEL --data pairs.jsonl --batch 3 \
                   --lora-rank 0 --activations recompute --repeat 3 --json out.json";
    scratch.good(command);
    let results = results(&scratch.read("out.json"));
    let suites: Vec<_> = results
        .iter()
        .map(|result| result["suite"].as_str())
        .collect();
    let expected = ["sft", "reward", "annotate", "annotate"].map(Some);
    assert_eq!(suites, expected);
    for result in &results {
        check(result);
        assert_eq!(result["pairs"], 4);
        let times = result["repetitions"].as_array().unwrap();
        let mut times: Vec<f64> = times.iter().filter_map(Value::as_f64).collect();
        times.sort_by(f64::total_cmp);
        assert_eq!((times.len(), times[1]), (3, number(result, "seconds")));
        assert_eq!(result["reference_seconds"], Value::Null);
    }
}

#[test]
fn sampling_is_measured_token_by_token() {
    let scratch = Scratch::new();
    let results = {
        scratch.good("bench generate --model MODEL --data pairs.jsonl --json out.json");
        results(&scratch.read("out.json"))
    };
    let tokens: Vec<_> = results
        .iter()
        .map(|result| number(result, "tokens"))
        .collect();
    assert_eq!(tokens, [16.0 * 64.0, 64.0 * 64.0]);
    for result in &results {
        check(result);
        let figures = &result["figures"];
        let prefill = number(figures, "prefill_seconds");
        let decoding = number(result, "tokens") / (number(result, "seconds") - prefill);
        let found = number(figures, "decoding_tokens_per_second");
        assert!((found / decoding - 1.0).abs() < 1e-9);
    }
}

#[test]
fn credit_is_measured_at_every_length_and_as_a_part_of_a_step() {
    let scratch = Scratch::new();
    scratch.good("bench credit --model MODEL --steps 1 --json out.json");
    let results = results(&scratch.read("out.json"));
    results.iter().for_each(check);
    let speed = |variant: &str, tokens: usize| {
        let name = format!("{variant}, {tokens} tokens");
        let found = results.iter().find(|result| result["variant"] == name);
        found.unwrap_or_else(|| panic!("`{name}` was measured"))
    };
    for way in ["schmitt", "schmitt, dead zone", "jump", "schmitt, recorded"] {
        for pivots in ["few", "many"] {
            let longest = speed(&format!("{way}, {pivots} pivots"), 1_048_576);
            assert_eq!(longest["threads"], 1);
            let turns = number(&longest["settings"], "pivots");
            let expected = if pivots == "few" {
                1_000.0..4_000.0
            } else {
                500_000.0..550_000.0
            };
            assert!(expected.contains(&turns), "{turns} in {way}");
        }
    }
    let shares = results
        .iter()
        .filter_map(|r| r["figures"]["percent_of_step"].as_f64());
    let shares: Vec<f64> = shares.collect();
    assert_eq!(shares.len(), 6);
    assert!(
        shares.iter().all(|&share| share > 0.0 && share < 100.0),
        "{shares:?}"
    );
}

#[test]
fn scaling_takes_the_lengths_that_the_model_has_positions_for() {
    let scratch = Scratch::new();
    scratch.good("bench scaling --model MODEL --lora-rank 2 --json out.json");
    let results = results(&scratch.read("out.json"));
    let variants: Vec<_> = results
        .iter()
        .filter_map(|r| r["variant"].as_str())
        .collect();
    assert_eq!(
        variants,
        ["score, 64", "score, 128", "train, 64", "train, 128"]
    );
    results.iter().for_each(check);
    let share = |index: usize| number(&results[index]["figures"], "attention_flop_percent");
    assert!(share(1) > share(0) && share(3) > share(2));
    assert_eq!(number(&results[1]["figures"], "pair_tokens"), 384.0);
    assert_eq!(
        (&results[0]["tokens"], &results[0]["pairs"]),
        (&2304.into(), &9.into())
    );
}

#[test]
fn bad_flags_are_refused_before_the_work() {
    let scratch = Scratch::new();
    let refused = [
        ("bench", "<SUITES>"),
        ("bench everything", "everything"),
        ("bench dpo --keep 0", "--keep"),
        ("bench dpo --keep 1.5", "above 0"),
        ("bench dpo --keep some", "`all`"),
        ("bench dpo --batch 0", "--batch"),
        ("bench dpo --repeat 0", "--repeat"),
        ("bench dpo --max-tokens 1", "--max-tokens"),
        ("bench dpo --precision f64", "--precision"),
        ("bench dpo --data pairs.jsonl", "--model"),
        ("bench dpo --activations some", "--activations"),
        ("bench dpo --model absent.gguf", "absent.gguf"),
        (
            "bench dpo --model MODEL --data absent.jsonl",
            "absent.jsonl",
        ),
        ("bench dpo --model MODEL --json absent/out.json", "--json"),
        ("bench dpo --model MODEL --json pairs.jsonl", "--overwrite"),
    ];
    for (command, part) in refused {
        says(&scratch.bad(command, "out.json"), &[part]);
    }
    assert_eq!(scratch.read("pairs.jsonl"), super::PAIRS);
}
