//! Five optimizer steps of every trainer against PyTorch's AdamW and TRL's losses in f64.

use std::path::{Path, PathBuf};

use burn::tensor::Device;
use pivotal_core::{TokenMask, TokenizedPair, TokenizedResponse};
use pivotal_loss::Normalisation;
use pivotal_model::{Decoder, HostTensor, LoraAdapter, RewardModel, load};
use pivotal_ops::Precision;
use pivotal_train::Schedule;
use pivotal_train::dpo::{self, DpoItem, DpoObjective, PreferenceLoss};
use pivotal_train::optimizer::NamedAdamW;
use pivotal_train::score::{Group, token_logps};
use pivotal_train::settings::{Aggregation, LoraSettings, OptimizerSettings, RewardSettings};
use pivotal_train::{reward, sft};
use serde_json::Value;

/// PyTorch in f32 differs from the f64 tables by 2e-6 at most; ten times that, for other orders of summation.
const LOSS_TOLERANCE: f64 = 2e-5;
/// Relative: gradient norms sum over all parameters.
const NORM_TOLERANCE: f64 = 2e-4;
/// Log-probabilities after five steps, in nats.
const LOGP_TOLERANCE: f64 = 2e-3;

fn golden(name: &str) -> Value {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/golden")
        .join(name);
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn llama() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../pivotal-model/tests/golden/llama")
}

fn decoder(device: &Device) -> Decoder {
    let checkpoint = load(&llama()).unwrap();
    Decoder::from_checkpoint(&checkpoint, device, Precision::F32).unwrap()
}

fn settings(golden: &Value) -> OptimizerSettings {
    OptimizerSettings {
        lr: golden["optimizer"]["lr"].as_f64().unwrap(),
        schedule: Schedule::Constant,
        clip_norm: 0.0,
        ..OptimizerSettings::default()
    }
}

fn ids(value: &Value) -> Vec<u32> {
    value
        .as_array()
        .unwrap()
        .iter()
        .map(|id| id.as_u64().unwrap() as u32)
        .collect()
}

fn flags(value: &Value) -> Vec<bool> {
    value
        .as_array()
        .unwrap()
        .iter()
        .map(|flag| flag.as_u64().unwrap() == 1)
        .collect()
}

fn numbers(value: &Value) -> Vec<f64> {
    value
        .as_array()
        .unwrap()
        .iter()
        .map(|number| number.as_f64().unwrap())
        .collect()
}

fn pairs(golden: &Value) -> Vec<TokenizedPair> {
    let pairs = golden["pairs"].as_array().unwrap().iter().enumerate();
    pairs
        .map(|(index, pair)| TokenizedPair {
            id: index as u64 + 1,
            prompt: ids(&pair["prompt_token_ids"]),
            chosen: ids(&pair["chosen_token_ids"]),
            rejected: ids(&pair["rejected_token_ids"]),
        })
        .collect()
}

fn close(what: &str, found: f64, expected: f64, tolerance: f64) {
    assert!(
        (found - expected).abs() <= tolerance,
        "{what}: {found}, expected {expected}"
    );
}

fn check(name: &str, table: &Value, losses: &[f64], norms: &[f64]) {
    let (expected, expected_norms) = (numbers(&table["losses"]), numbers(&table["gradient_norms"]));
    assert_eq!(losses.len(), expected.len());
    for (step, (&loss, &golden)) in losses.iter().zip(&expected).enumerate() {
        close(
            &format!("{name}, loss {step}"),
            loss,
            golden,
            LOSS_TOLERANCE,
        );
    }
    for (step, (&norm, &golden)) in norms.iter().zip(&expected_norms).enumerate() {
        close(
            &format!("{name}, gradient {step}"),
            norm,
            golden,
            NORM_TOLERANCE * golden,
        );
    }
}

fn dpo_items(decoder: &Decoder, golden: &Value, table: &Value) -> Vec<DpoItem> {
    let pairs = pairs(golden);
    let groups: Vec<_> = pairs.iter().map(Group::of_pair).collect();
    // One pass over all of them, as the policy's of a step.
    let reference = token_logps(decoder, &groups, 1024).unwrap();
    let keep = table["keep"].as_array().unwrap();
    pairs
        .iter()
        .zip(reference)
        .zip(keep)
        .map(|((pair, mut reference), keep)| {
            let rejected = reference.pop().unwrap();
            let chosen = reference.pop().unwrap();
            let mask = |side: &str| TokenMask::from(flags(&keep[side]));
            DpoItem {
                mismatched: None,
                pair: pair.clone(),
                keep: [mask("chosen"), mask("rejected")],
                reference_logps: [chosen, rejected],
            }
        })
        .collect()
}

fn dpo_table(name: &str, micro_batch_tokens: usize, device: &Device) {
    let golden = golden("dpo_steps.json");
    let table = &golden["tables"][name];
    let base = decoder(device);
    let items = dpo_items(&base, &golden, table);
    for (item, golden) in items
        .iter()
        .zip(table["reference_token_logps"].as_array().unwrap())
    {
        for (side, key) in ["chosen", "rejected"].into_iter().enumerate() {
            for (found, expected) in item.reference_logps[side].iter().zip(numbers(&golden[key])) {
                close(
                    &format!("{name}, reference"),
                    f64::from(*found),
                    expected,
                    1e-4,
                );
            }
        }
    }
    let mut policy = match name.starts_with("lora") {
        false => base.clone().trainable(),
        true => {
            let adapter = LoraAdapter::load(&llama().join("adapter")).unwrap();
            base.clone().with_adapter(&adapter).unwrap()
        }
    };
    let objective = DpoObjective {
        loss: PreferenceLoss::Dpo,
        beta: golden["beta"].as_f64().unwrap(),
        normalisation: Normalisation::Sum,
        dropped_every: 0,
        reference: None,
    };
    let mut settings = settings(&golden);
    settings.micro_batch_tokens = micro_batch_tokens;
    let mut optimizer = NamedAdamW::new(&settings);
    let (mut losses, mut norms) = (Vec::new(), Vec::new());
    let batches = std::iter::repeat((0..items.len()).collect());
    dpo::optimize(
        &mut policy,
        &items,
        objective,
        &settings,
        &mut optimizer,
        batches,
        0..5,
        &mut |_, metrics, _, _| {
            losses.push(metrics.loss);
            norms.push(metrics.grad_norm);
            Ok(())
        },
    )
    .unwrap();
    let all: Vec<_> = items.iter().collect();
    settings.micro_batch_tokens = 64;
    let (sum, metrics) = dpo::gradients(&mut policy, &all, objective, &settings, 6).unwrap();
    losses.push(metrics.loss);
    norms.push(sum.norm());
    check(name, table, &losses, &norms);

    let pairs = pairs(&golden);
    let groups: Vec<_> = pairs.iter().map(Group::of_pair).collect();
    let last = token_logps(&policy, &groups, 64).unwrap();
    for (found, golden) in last
        .iter()
        .zip(table["final_token_logps"].as_array().unwrap())
    {
        for (found, key) in found.iter().zip(["chosen", "rejected"]) {
            for (found, expected) in found.iter().zip(numbers(&golden[key])) {
                close(
                    &format!("{name}, policy"),
                    f64::from(*found),
                    expected,
                    LOGP_TOLERANCE,
                );
            }
        }
    }
}

#[test]
fn dpo_of_every_parameter_is_trls() {
    dpo_table("unmasked", 1024, &Device::flex());
}

#[test]
fn dpo_over_kept_tokens_is_trls() {
    dpo_table("masked", 1024, &Device::flex());
}

#[test]
fn dpo_of_an_adapter_is_trls() {
    dpo_table("lora_unmasked", 1024, &Device::flex());
}

#[test]
fn dpo_of_an_adapter_over_kept_tokens_is_trls() {
    dpo_table("lora_masked", 1024, &Device::flex());
}

#[test]
fn detail_08_micro_batches_change_nothing() {
    dpo_table("masked", 1, &Device::flex());
}

/// Losses, gradient norms and divergences of one table of TDPO.
fn tdpo_table(name: &str, micro_batch_tokens: usize) {
    let golden = golden("tdpo_steps.json");
    let table = &golden["tables"][name];
    let base = decoder(&Device::flex());
    let items = dpo_items(&base, &golden, table);
    let mut policy = match name.contains("lora") {
        false => base.clone().trainable(),
        true => {
            let adapter = LoraAdapter::load(&llama().join("adapter")).unwrap();
            base.clone().with_adapter(&adapter).unwrap()
        }
    };
    let objective = DpoObjective {
        loss: match table["alpha"].as_f64() {
            None => PreferenceLoss::Tdpo1,
            Some(alpha) => PreferenceLoss::Tdpo2 { alpha },
        },
        beta: golden["beta"].as_f64().unwrap(),
        normalisation: Normalisation::Sum,
        dropped_every: 0,
        reference: Some(&base),
    };
    let mut settings = settings(&golden);
    settings.micro_batch_tokens = micro_batch_tokens;
    let mut optimizer = NamedAdamW::new(&settings);
    let mut rows = Vec::new();
    let batches = std::iter::repeat((0..items.len()).collect());
    dpo::optimize(
        &mut policy,
        &items,
        objective,
        &settings,
        &mut optimizer,
        batches,
        0..5,
        &mut |_, metrics, _, _| {
            rows.push(metrics);
            Ok(())
        },
    )
    .unwrap();
    let all: Vec<_> = items.iter().collect();
    let (sum, mut last) = dpo::gradients(&mut policy, &all, objective, &settings, 6).unwrap();
    last.grad_norm = sum.norm();
    rows.push(last);
    let losses: Vec<_> = rows.iter().map(|row| row.loss).collect();
    let norms: Vec<_> = rows.iter().map(|row| row.grad_norm).collect();
    check(name, table, &losses, &norms);
    for (row, golden) in rows.iter().zip(table["mean_kls"].as_array().unwrap()) {
        let expected = numbers(golden);
        let kls = [row.chosen_kl, row.rejected_kl].map(Option::unwrap);
        for (found, expected) in kls.into_iter().zip(expected) {
            let what = format!("{name}, divergence");
            close(&what, found, expected, LOGP_TOLERANCE);
        }
    }
}

#[test]
fn tdpo1_is_the_authors() {
    tdpo_table("tdpo1_unmasked", 1024);
    tdpo_table("tdpo1_masked", 1024);
}

#[test]
fn tdpo2_over_kept_tokens_is_the_authors() {
    tdpo_table("tdpo2_masked", 1024);
}

#[test]
fn tdpo_of_an_adapter_is_the_authors_whatever_the_micro_batches() {
    tdpo_table("tdpo1_lora_masked", 1);
    tdpo_table("tdpo2_lora_masked", 1);
}

#[test]
fn detail_09_the_first_step_of_dpo_has_loss_ln_2() {
    let golden = golden("dpo_steps.json");
    let base = decoder(&Device::flex());
    for table in ["unmasked", "masked"] {
        let items = dpo_items(&base, &golden, &golden["tables"][table]);
        let items: Vec<_> = items.iter().collect();
        let objective = DpoObjective {
            loss: PreferenceLoss::Dpo,
            beta: 0.1,
            normalisation: Normalisation::Sum,
            dropped_every: 0,
            reference: None,
        };
        let settings = OptimizerSettings::default();
        let adapter = LoraSettings::default().spec().unwrap();
        for (adapted, mut policy) in [
            (false, base.clone().trainable()),
            (true, base.clone().with_lora(&adapter, 1).unwrap()),
        ] {
            let (_, metrics) =
                dpo::gradients(&mut policy, &items, objective, &settings, 1).unwrap();
            close("loss", metrics.loss, std::f64::consts::LN_2, 1e-6);
            let rewards = [metrics.chosen_reward, metrics.rejected_reward];
            // Trained weights, and fewer rows, go through other products: their sums run in another order.
            for reward in rewards {
                close("reward", reward, 0.0, 1e-6);
            }
            if adapted && table == "unmasked" {
                // An adapter that changes nothing yet changes no bit: every margin is 0, and a tie counts half.
                assert_eq!((rewards, metrics.accuracy), ([0.0; 2], 0.5));
            }
        }
    }
}

#[test]
fn sft_is_pytorchs() {
    sft_tables(&Device::flex());
}

fn sft_tables(device: &Device) {
    let golden = golden("sft_steps.json");
    for name in ["unmasked", "masked"] {
        let table = &golden["tables"][name];
        let keep = table["keep"].as_array().unwrap();
        let items: Vec<TokenizedResponse> = pairs(&golden)
            .into_iter()
            .zip(keep)
            .map(|(pair, keep)| TokenizedResponse {
                id: pair.id,
                prompt: pair.prompt,
                response: pair.chosen,
                response_mask: flags(&keep["chosen"]),
            })
            .collect();
        for micro_batch_tokens in [1024, 16] {
            let mut settings = settings(&golden);
            settings.micro_batch_tokens = micro_batch_tokens;
            let mut policy = decoder(device).trainable();
            let mut optimizer = NamedAdamW::new(&settings);
            let (mut losses, mut norms) = (Vec::new(), Vec::new());
            let batches = std::iter::repeat(items.clone());
            sft::optimize(
                &mut policy,
                &settings,
                &mut optimizer,
                batches,
                0..6,
                &mut |_, metrics, _, _| {
                    losses.push(metrics.loss);
                    norms.push(metrics.grad_norm);
                    Ok(())
                },
            )
            .unwrap();
            check(name, table, &losses, &norms);
        }
    }
}

#[test]
fn reward_training_is_trls() {
    reward_tables(&Device::flex());
}

fn reward_tables(device: &Device) {
    let golden = golden("reward_steps.json");
    let head: Vec<f32> = numbers(&golden["score.weight"][0])
        .iter()
        .map(|&weight| weight as f32)
        .collect();
    let pairs = pairs(&golden);
    for (name, aggregation) in [
        ("mean", Aggregation::Mean),
        ("sum", Aggregation::Sum),
        ("last", Aggregation::Last),
    ] {
        let table = &golden["tables"][name];
        let head = HostTensor::new(vec![1, head.len()], head.clone()).unwrap();
        let mut model = RewardModel::with_head(decoder(device).trainable(), &head).unwrap();
        let reward_settings = RewardSettings {
            aggregation,
            center: golden["center"].as_f64().unwrap(),
            token_l2: 0.0,
            ..RewardSettings::default()
        };
        let settings = settings(&golden);
        let mut optimizer = NamedAdamW::new(&settings);
        let (mut losses, mut norms) = (Vec::new(), Vec::new());
        reward::optimize(
            &mut model,
            &pairs,
            &reward_settings,
            &settings,
            &mut optimizer,
            std::iter::repeat((0..pairs.len()).collect()),
            0..6,
            &mut |_, metrics, _, _| {
                losses.push(metrics.loss);
                norms.push(metrics.grad_norm);
                Ok(())
            },
        )
        .unwrap();
        check(name, table, &losses, &norms);
    }
}

/// The same tables, at the same tolerances, on every card that this was built for. A card that is not there is a failure.
#[cfg(any(feature = "cuda", feature = "vulkan", feature = "metal"))]
mod cards {
    use pivotal_ops::{DeviceError, DeviceName};

    use super::*;

    fn cards() -> Vec<Device> {
        let cards = [DeviceName::Cuda, DeviceName::Vulkan, DeviceName::Metal].into_iter();
        cards
            .map(DeviceName::open)
            .filter(|card| !matches!(card, Err(DeviceError::NotBuilt(_))))
            .map(Result::unwrap)
            .collect()
    }

    #[test]
    fn dpo_is_trls() {
        for card in &cards() {
            for table in ["unmasked", "masked", "lora_unmasked", "lora_masked"] {
                dpo_table(table, 1024, card);
            }
            dpo_table("masked", 1, card);
        }
    }

    #[test]
    fn sft_is_pytorchs() {
        cards().iter().for_each(sft_tables);
    }

    #[test]
    fn reward_training_is_trls() {
        cards().iter().for_each(reward_tables);
    }
}
