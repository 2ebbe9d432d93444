//! The update of rejection sampling: the gradient of `sft` on the same ids, bit for bit, and its own laws.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use burn::tensor::Device;
use pivotal_core::{TokenMask, TokenizedResponse};
use pivotal_model::{Decoder, HostTensor, Parameters, load};
use pivotal_ops::Precision;
use pivotal_train::optimizer::NamedAdamW;
use pivotal_train::reject::{AcceptedResponse, gradients};
use pivotal_train::settings::OptimizerSettings;
use pivotal_train::sft::{self, SftMetrics};
use pivotal_train::{Error, Schedule};
use serde_json::Value;

/// PyTorch in f32 differs from the f64 tables by 2e-6 at most; ten times that, for other orders of summation.
const LOSS_TOLERANCE: f64 = 2e-5;
/// Relative: gradient norms sum over all parameters.
const NORM_TOLERANCE: f64 = 2e-4;
/// Of a gradient's largest value: the same sums in other orders, in f32.
const ORDER_TOLERANCE: f32 = 1e-5;

fn llama() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../pivotal-model/tests/golden/llama")
}

fn policy(precision: Precision) -> Decoder {
    let checkpoint = load(&llama()).unwrap();
    let decoder = Decoder::from_checkpoint(&checkpoint, &Device::flex(), precision).unwrap();
    decoder.trainable()
}

/// Ids below 64 from a fixed sequence, `count` of them.
fn ids(start: u32, count: usize) -> Vec<u32> {
    let id = |place: u32| 3 + (start * 31 + place * 17 + place * place) % 60;
    (0..count as u32).map(id).collect()
}

/// `(prompt, tokens of the response)` of each; every third token is dropped if `masked`.
fn accepted(of: &[(u32, usize)], masked: bool) -> Vec<AcceptedResponse> {
    let one = |(index, &(prompt, tokens)): (usize, &(u32, usize))| AcceptedResponse {
        id: index as u64 + 1,
        prompt: ids(prompt, 3 + prompt as usize),
        response: ids(10 + index as u32, tokens),
        keep: TokenMask::from(
            (0..tokens)
                .map(|place| !masked || place % 3 != 1)
                .collect::<Vec<_>>(),
        ),
    };
    of.iter().enumerate().map(one).collect()
}

fn as_sft(accepted: &[AcceptedResponse]) -> Vec<TokenizedResponse> {
    let one = |one: &AcceptedResponse| TokenizedResponse {
        id: one.id,
        prompt: one.prompt.clone(),
        response: one.response.clone(),
        response_mask: one.keep.as_slice().to_vec(),
    };
    accepted.iter().map(one).collect()
}

type Gradients = (BTreeMap<String, HostTensor>, SftMetrics);

fn ours(
    accepted: &[AcceptedResponse],
    settings: &OptimizerSettings,
    precision: Precision,
) -> Gradients {
    let accepted: Vec<&AcceptedResponse> = accepted.iter().collect();
    let (sum, metrics) = gradients(&mut policy(precision), &accepted, settings, 1).unwrap();
    (sum.to_host(), metrics)
}

fn sfts(
    items: &[TokenizedResponse],
    settings: &OptimizerSettings,
    precision: Precision,
) -> Gradients {
    let items: Vec<&TokenizedResponse> = items.iter().collect();
    let (sum, metrics) = sft::gradients(&mut policy(precision), &items, settings, 1).unwrap();
    (sum.to_host(), metrics)
}

fn near(what: &str, found: &Gradients, expected: &Gradients) {
    let loss = (found.1.loss - expected.1.loss).abs();
    assert!(loss <= LOSS_TOLERANCE, "{what}: {found:?}", found = found.1);
    assert_eq!(found.0.len(), expected.0.len(), "{what}");
    let values = |gradients: &Gradients| -> Vec<f32> {
        gradients
            .0
            .values()
            .flat_map(|one| one.values().to_vec())
            .collect()
    };
    let (found, expected) = (values(found), values(expected));
    let largest = expected
        .iter()
        .fold(0.0_f32, |most, value| most.max(value.abs()));
    assert!(largest > 0.0, "{what}: no gradient to compare with");
    for (found, expected) in found.iter().zip(&expected) {
        let difference = (found - expected).abs();
        assert!(
            difference <= ORDER_TOLERANCE * largest,
            "{what}: {found}, expected {expected}"
        );
    }
}

#[test]
fn the_gradient_is_that_of_sft_on_the_same_ids_bit_for_bit() {
    for precision in [Precision::F32, Precision::Bf16] {
        for masked in [false, true] {
            for micro_batch_tokens in [1024, 16] {
                let settings = OptimizerSettings {
                    micro_batch_tokens,
                    ..OptimizerSettings::default()
                };
                // Prompts in no order, one of them with two responses that lie side by side.
                let accepted = accepted(&[(4, 7), (1, 3), (1, 9), (2, 1), (0, 12)], masked);
                let found = ours(&accepted, &settings, precision);
                assert!(found.1.loss > 0.0);
                let expected = sfts(&as_sft(&accepted), &settings, precision);
                assert_eq!(
                    found, expected,
                    "masked {masked}, {micro_batch_tokens} tokens"
                );
            }
        }
    }
}

#[test]
fn responses_to_one_prompt_that_lie_apart_have_the_same_gradient_behind_one_copy_of_it() {
    let settings = OptimizerSettings::default();
    let accepted = accepted(&[(4, 7), (1, 3), (4, 9), (1, 4), (4, 2)], true);
    let found = ours(&accepted, &settings, Precision::F32);
    near(
        "apart",
        &found,
        &sfts(&as_sft(&accepted), &settings, Precision::F32),
    );
    let together = [0, 2, 4, 1, 3].map(|index: usize| accepted[index].clone());
    let together = sfts(&as_sft(&together), &settings, Precision::F32);
    assert_eq!(found, together);
}

#[test]
fn a_dropped_token_counts_neither_above_nor_below() {
    let settings = OptimizerSettings {
        micro_batch_tokens: 12,
        ..OptimizerSettings::default()
    };
    let mut all = accepted(&[(4, 7), (1, 3), (2, 5)], true);
    all[1].keep = TokenMask::none(3);
    let found = ours(&all, &settings, Precision::F32);
    // 7 and 5 tokens, of which 2 are dropped each; the response of which nothing is kept might as well not be there.
    assert_eq!(found.1.kept_tokens, 8);
    let mut without = all.clone();
    without.remove(1);
    near(
        "without",
        &found,
        &ours(&without, &settings, Precision::F32),
    );
    // The mean over kept tokens of the responses alone: by hand.
    let alone = |index: usize| ours(&all[index..=index], &settings, Precision::F32).1;
    let (first, last) = (alone(0), alone(2));
    let kept = |metrics: SftMetrics| metrics.kept_tokens as f64;
    let mean = (first.loss * kept(first) + last.loss * kept(last)) / 8.0;
    assert!((found.1.loss - mean).abs() <= LOSS_TOLERANCE, "{mean}");
}

#[test]
fn nothing_accepted_or_nothing_kept_is_a_loss_of_zero_without_a_gradient() {
    let settings = OptimizerSettings::default();
    let mut all = accepted(&[(4, 7), (1, 3)], false);
    for one in &mut all {
        one.keep = TokenMask::none(one.response.len());
    }
    for nothing in [&all[..0], &all] {
        let (gradients, metrics) = ours(nothing, &settings, Precision::F32);
        assert!(gradients.is_empty());
        assert_eq!((metrics.loss, metrics.kept_tokens), (0.0, 0));
    }
}

#[test]
fn five_steps_are_pytorchs() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/sft_steps.json");
    let golden: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    let list = |value: &Value| -> Vec<u64> {
        let list = value.as_array().unwrap().iter();
        list.map(|id| id.as_u64().unwrap()).collect()
    };
    let ids = |value: &Value| list(value).into_iter().map(|id| id as u32).collect();
    for name in ["unmasked", "masked"] {
        let table = &golden["tables"][name];
        let pairs = golden["pairs"].as_array().unwrap().iter();
        let accepted: Vec<AcceptedResponse> = pairs
            .zip(table["keep"].as_array().unwrap())
            .map(|(pair, keep)| AcceptedResponse {
                id: 1,
                prompt: ids(&pair["prompt_token_ids"]),
                response: ids(&pair["chosen_token_ids"]),
                keep: TokenMask::from(
                    list(&keep["chosen"])
                        .iter()
                        .map(|&flag| flag == 1)
                        .collect::<Vec<_>>(),
                ),
            })
            .collect();
        let accepted: Vec<&AcceptedResponse> = accepted.iter().collect();
        let settings = OptimizerSettings {
            lr: golden["optimizer"]["lr"].as_f64().unwrap(),
            schedule: Schedule::Constant,
            clip_norm: 0.0,
            ..OptimizerSettings::default()
        };
        let mut policy = policy(Precision::F32);
        let mut optimizer = NamedAdamW::new(&settings);
        for (step, loss) in table["losses"].as_array().unwrap().iter().enumerate() {
            let (sum, metrics) = gradients(&mut policy, &accepted, &settings, 1).unwrap();
            let norm = optimizer.step(&mut policy, sum, settings.lr, 1).unwrap();
            let expected = loss.as_f64().unwrap();
            assert!(
                (metrics.loss - expected).abs() <= LOSS_TOLERANCE,
                "{name}, step {step}"
            );
            let expected = table["gradient_norms"][step].as_f64().unwrap();
            assert!(
                (norm - expected).abs() <= NORM_TOLERANCE * expected,
                "{name}, step {step}"
            );
        }
    }
}

#[test]
fn a_loss_that_is_not_finite_names_step_and_rows() {
    let settings = OptimizerSettings::default();
    let accepted = accepted(&[(4, 7), (1, 3)], false);
    let accepted: Vec<&AcceptedResponse> = accepted.iter().collect();
    let mut policy = policy(Precision::F32);
    policy.visit_parameters(&mut |name, parameter| {
        let old = parameter.to_host();
        let values = vec![f32::NAN; old.values().len()];
        let value = HostTensor::new(old.shape().to_vec(), values).unwrap();
        parameter.assign(name, &value).unwrap();
    });
    let error = gradients(&mut policy, &accepted, &settings, 2).err();
    let Some(Error::NotFinite {
        step,
        metric,
        samples,
    }) = error
    else {
        panic!("{error:?}");
    };
    assert_eq!((step, metric), (2, "loss"));
    assert_eq!(samples, [1, 2]);
}
