//! `--device`: what is said where there is no such device, and, built with a card's feature, the recipes on that card.

use super::{Scratch, says};

const RUN: &str = "--model MODEL --data pairs.jsonl --precision f32 --lora-rank 4 --batch 2";

#[cfg(not(feature = "cuda"))]
#[test]
fn a_device_that_was_not_built_says_how_to_build_it() {
    let scratch = Scratch::new();
    let output = scratch.run(&format!("sft {RUN} --device cuda --out run"));
    assert_eq!(output.status.code(), Some(1));
    let error = String::from_utf8_lossy(&output.stderr);
    says(&error, &["`device`", "`cuda`", "--features cuda"]);
    assert!(!scratch.path("run").exists());
}

#[test]
fn a_device_that_does_not_exist_is_refused() {
    let scratch = Scratch::new();
    let error = scratch.bad(&format!("sft {RUN} --device abacus --out run"), "run");
    says(&error, &["abacus", "cpu, cuda, vulkan, metal"]);
    scratch.write("bad.toml", "[model]\ndevice = \"abacus\"\n");
    let error = scratch.bad("sft --config bad.toml --out run", "run");
    says(&error, &["bad.toml", "abacus", "vulkan"]);
}

#[test]
fn the_processor_is_the_default_and_the_manifest_says_so() {
    let scratch = Scratch::new();
    scratch.good(&format!("sft {RUN} --out run"));
    says(&scratch.read("run/manifest.json"), &["\"device\": \"cpu "]);
    says(&scratch.read("run/config.toml"), &["device = \"cpu\""]);
}

/// On lavapipe this runs without a card: a Vulkan device on the processor.
#[cfg(feature = "vulkan")]
mod vulkan {
    use assert_cmd::Command;
    use serde_json::Value;

    use super::super::golden;
    use super::*;

    /// Of a loss near 1, after up to eight steps of Adam, whose first steps amplify the last bits of small gradients.
    const TOLERANCE: f64 = 1e-4;

    fn lines(text: &str) -> Vec<Value> {
        text.lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect()
    }

    /// Every number of two values of the same shape.
    fn numbers<'a>(a: &'a Value, b: &'a Value, at: &str, pairs: &mut Vec<(String, f64, f64)>) {
        match (a, b) {
            (Value::Number(a), Value::Number(b)) => {
                pairs.push((at.into(), a.as_f64().unwrap(), b.as_f64().unwrap()));
            }
            (Value::Array(a), Value::Array(b)) => {
                assert_eq!(a.len(), b.len(), "{at}");
                for (a, b) in a.iter().zip(b) {
                    numbers(a, b, at, pairs);
                }
            }
            (Value::Object(a), Value::Object(b)) => {
                assert!(a.keys().eq(b.keys()), "{at}");
                for (key, a) in a {
                    numbers(a, &b[key], &format!("{at}.{key}"), pairs);
                }
            }
            (a, b) => assert_eq!(a, b, "{at}"),
        }
    }

    fn assert_close(what: &str, card: &str, processor: &str) {
        let (card, processor) = (lines(card), lines(processor));
        assert_eq!(card.len(), processor.len(), "{what}");
        let mut pairs = Vec::new();
        for (a, b) in card.iter().zip(&processor) {
            numbers(a, b, what, &mut pairs);
        }
        assert!(!pairs.is_empty());
        let mut worst = 0f64;
        // A step of the sign of a difference, which begins at zero: its last bit decides.
        pairs.retain(|(at, ..)| !at.ends_with(".accuracy"));
        for (at, a, b) in pairs {
            let off = (a - b).abs() / b.abs().max(1.0);
            worst = worst.max(off);
            assert!(
                off <= TOLERANCE,
                "{at}: {a} on the card, {b} on the processor"
            );
        }
        println!("{what}: {worst:.1e}");
    }

    #[test]
    fn every_recipe_computes_what_the_processor_does() {
        let scratch = Scratch::new();
        for device in ["cpu", "vulkan"] {
            let here = format!("{RUN} --device {device}");
            scratch.good(&format!("sft {here} --epochs 3 --out sft-{device}"));
            scratch.good(&format!("reward {here} --epochs 4 --out reward-{device}"));
            scratch.good(&format!(
                "dpo {here} --epochs 4 --credit-selection all --out dpo-{device}"
            ));
            // Both score with what the processor trained: records then differ by the scoring alone.
            let annotate = format!(
                "annotate --model MODEL --data pairs.jsonl --precision f32 --device {device}"
            );
            scratch.good(&format!(
                "{annotate} --signal level --reward-model reward-cpu --records level-{device}"
            ));
            scratch.good(&format!(
                "{annotate} --oracle dpo-cpu --records ratio-{device}"
            ));
            let full = here.replace("--lora-rank 4", "--lora-rank 0 --lr 1e-3");
            scratch.good(&format!(
                "dpo {full} --signals ratio-cpu --out full-{device}"
            ));
        }
        for run in ["sft", "reward", "dpo", "full"] {
            let metrics = |device: &str| scratch.read(&format!("{run}-{device}/metrics.jsonl"));
            assert_close(run, &metrics("vulkan"), &metrics("cpu"));
            says(
                &scratch.read(&format!("{run}-vulkan/config.toml")),
                &["device = \"vulkan\""],
            );
            let manifest: Value =
                serde_json::from_str(&scratch.read(&format!("{run}-vulkan/manifest.json")))
                    .unwrap();
            let device = manifest["device"].as_str().unwrap();
            assert!(!device.starts_with("cpu"), "{device}");
        }
        for signal in ["level", "ratio"] {
            let records = |device: &str| scratch.read(&format!("{signal}-{device}"));
            assert_close(signal, &records("vulkan"), &records("cpu"));
        }
        let logps = |device: &str| {
            scratch.good(&format!(
                "logps --model MODEL --text hello --device {device}"
            ))
        };
        assert_close("logps", &logps("vulkan"), &logps("cpu"));
        // What the card trained is an adapter and a model like any other.
        scratch.good("logps --model MODEL --adapter dpo-vulkan --text hello");
        scratch.good("logps --model full-vulkan --text hello");
    }

    #[test]
    fn a_run_goes_on_on_the_card() {
        let scratch = Scratch::new();
        let run = format!(
            "dpo {RUN} --credit-selection all --epochs 4 --checkpoint-every 3 --device vulkan"
        );
        scratch.good(&format!("{run} --out whole"));
        scratch.good(&format!("{run} --out cut"));
        let cut = scratch.path("cut");
        std::fs::remove_dir_all(cut.join("checkpoints/step-00000008")).unwrap();
        std::fs::remove_file(cut.join("summary.json")).unwrap();
        scratch.good("dpo --resume cut");
        assert_close(
            "resumed",
            &scratch.read("cut/metrics.jsonl"),
            &scratch.read("whole/metrics.jsonl"),
        );
        let moved = scratch.bad("dpo --resume cut --device cpu", "");
        says(&moved, &["device = \"vulkan\"", "device = \"cpu\""]);
    }

    #[test]
    fn a_machine_without_a_driver_says_so() {
        let scratch = Scratch::new();
        let output = Command::cargo_bin("pivotal")
            .unwrap()
            .env("VK_ICD_FILENAMES", scratch.path("none.json"))
            .env("VK_DRIVER_FILES", scratch.path("none.json"))
            .args(["logps", "--text", "a", "--device", "vulkan", "--model"])
            .arg(golden("llama"))
            .output()
            .unwrap();
        let error = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{error}");
        says(&error, &["this machine has no `vulkan` device"]);
    }
}
