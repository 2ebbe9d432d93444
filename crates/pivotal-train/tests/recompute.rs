//! Recomputed activations against kept ones: the same gradients, bit for bit.

use std::collections::BTreeMap;
use std::path::Path;

use burn::tensor::Device;
use pivotal_core::{TokenMask, TokenizedPair, TokenizedResponse};
use pivotal_loss::Normalisation;
use pivotal_model::{Decoder, HeadInit, HostTensor, LoraSpec, RewardModel, load};
use pivotal_ops::Precision;
use pivotal_train::dpo::{self, DpoItem, DpoObjective, PreferenceLoss};
use pivotal_train::optimizer::GradientSum;
use pivotal_train::settings::{OptimizerSettings, RewardSettings};
use pivotal_train::{Activations, reward, sft};

/// A head tied to the embedding, one of its own, and biases.
const CASES: [(&str, Precision); 5] = [
    ("llama", Precision::F32),
    ("llama", Precision::Bf16),
    ("llama3", Precision::F32),
    ("qwen2", Precision::F32),
    ("qwen2", Precision::Bf16),
];
/// One pass for everything, and one a sample.
const MICRO_BATCH_TOKENS: [usize; 2] = [4096, 1];

fn decoder(family: &str, precision: Precision) -> Decoder {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../pivotal-model/tests/golden");
    let checkpoint = load(&path.join(family)).unwrap();
    Decoder::from_checkpoint(&checkpoint, &Device::flex(), precision).unwrap()
}

/// Every parameter; an adapter on all linear layers, whose `B` is not zero; an adapter on some of them.
fn policies(base: &Decoder) -> [(&'static str, Decoder); 3] {
    let lora = |targets: &[&str]| {
        let spec = LoraSpec {
            rank: 4,
            alpha: 8.0,
            targets: targets.iter().map(ToString::to_string).collect(),
        };
        let mut policy = base.clone().with_lora(&spec, 7).unwrap();
        let mut adapter = policy.adapter(None).unwrap();
        for (index, module) in adapter.modules.values_mut().enumerate() {
            for (place, value) in module.b.values_mut().iter_mut().enumerate() {
                *value = ((3 * index + place) % 11) as f32 / 400.0 - 0.0125;
            }
        }
        base.clone().with_adapter(&adapter).unwrap()
    };
    [
        ("full", base.clone().trainable()),
        ("lora", lora(&[])),
        ("lora on two", lora(&["v_proj", "down_proj"])),
    ]
}

/// Ids below 64 from a fixed sequence, `count` of them.
fn ids(start: u32, count: usize) -> Vec<u32> {
    let id = |place: u32| 3 + (start * 31 + place * 17 + place * place) % 60;
    (0..count as u32).map(id).collect()
}

fn pairs() -> Vec<TokenizedPair> {
    [(5, 7, 3), (1, 1, 12), (9, 4, 4)]
        .into_iter()
        .enumerate()
        .map(|(id, (prompt, chosen, rejected))| TokenizedPair {
            id: id as u64 + 1,
            prompt: ids(id as u32, prompt),
            chosen: ids(id as u32 + 10, chosen),
            rejected: ids(id as u32 + 20, rejected),
        })
        .collect()
}

/// Every third token left out.
fn masked(tokens: usize) -> Vec<bool> {
    (0..tokens).map(|place| place % 3 != 1).collect()
}

fn bits(sum: &GradientSum) -> BTreeMap<String, Vec<u32>> {
    let bits = |tensor: &HostTensor| {
        tensor
            .values()
            .iter()
            .map(|value| value.to_bits())
            .collect()
    };
    let host = sum.to_host();
    host.iter()
        .map(|(name, tensor)| (name.clone(), bits(tensor)))
        .collect()
}

/// Runs `gradients` with kept activations, then with every other way, over all cases.
fn compare<M>(
    model: impl Fn(Decoder) -> M,
    gradients: impl Fn(&mut M, &OptimizerSettings) -> (GradientSum, f64),
) {
    for (family, precision) in CASES {
        let base = decoder(family, precision);
        for (name, policy) in policies(&base) {
            for micro_batch_tokens in MICRO_BATCH_TOKENS {
                let mut settings = OptimizerSettings {
                    micro_batch_tokens,
                    ..OptimizerSettings::default()
                };
                let (kept, kept_loss) = gradients(&mut model(policy.clone()), &settings);
                let kept = bits(&kept);
                let any = |values: &Vec<u32>| values.iter().any(|&value| value << 1 != 0);
                assert!(
                    kept.values().any(any),
                    "{family} {name}: nothing to compare"
                );
                for activations in [Activations::Recompute, Activations::Within(0)] {
                    settings.activations = activations;
                    let (sum, loss) = gradients(&mut model(policy.clone()), &settings);
                    let what = format!("{family} {precision:?} {name} {micro_batch_tokens}");
                    assert_eq!(loss.to_bits(), kept_loss.to_bits(), "{what}");
                    let found = bits(&sum);
                    assert!(found.keys().eq(kept.keys()), "{what}");
                    for (parameter, values) in &found {
                        assert!(*values == kept[parameter], "{what}: {parameter}");
                    }
                }
            }
        }
    }
}

#[test]
fn of_dpo() {
    let items: Vec<DpoItem> = pairs()
        .into_iter()
        .map(|pair| DpoItem {
            mismatched: None,
            keep: [&pair.chosen, &pair.rejected].map(|ids| TokenMask::from(masked(ids.len()))),
            reference_logps: [&pair.chosen, &pair.rejected].map(|ids| vec![-4.0; ids.len()]),
            pair,
        })
        .collect();
    let items: Vec<&DpoItem> = items.iter().collect();
    let objective = DpoObjective {
        loss: PreferenceLoss::Dpo,
        beta: 0.1,
        normalisation: Normalisation::Sum,
        dropped_every: 0,
        reference: None,
    };
    compare(
        |policy| policy,
        |policy, settings| {
            let (sum, metrics) = dpo::gradients(policy, &items, objective, settings, 1).unwrap();
            (sum, metrics.loss)
        },
    );
}

#[test]
fn of_sft() {
    let items: Vec<TokenizedResponse> = pairs()
        .into_iter()
        .map(|pair| TokenizedResponse {
            id: pair.id,
            prompt: pair.prompt,
            response_mask: masked(pair.chosen.len()),
            response: pair.chosen,
        })
        .collect();
    let items: Vec<&TokenizedResponse> = items.iter().collect();
    compare(
        |policy| policy,
        |policy, settings| {
            let (sum, metrics) = sft::gradients(policy, &items, settings, 1).unwrap();
            (sum, metrics.loss)
        },
    );
}

#[test]
fn of_reward_training() {
    let pairs = pairs();
    let pairs: Vec<&TokenizedPair> = pairs.iter().collect();
    compare(
        |policy| RewardModel::new(policy, HeadInit::Normal, 3).unwrap(),
        |model, settings| {
            let rewards = RewardSettings::default();
            let (sum, metrics) = reward::gradients(model, &pairs, &rewards, settings, 1).unwrap();
            (sum, metrics.loss)
        },
    );
}

/// Each split of the layers into recomputed and kept, and not only the two ends.
#[test]
fn of_every_split_of_the_layers() {
    for (family, precision) in CASES {
        let base = decoder(family, precision);
        let pair = &pairs()[0];
        let mut pack = pivotal_core::Pack::default();
        pack.push(&pair.prompt, &[&pair.chosen, &pair.rejected])
            .unwrap();
        let gathers = pack.gather(|_, _| true);
        for (name, mut policy) in policies(&base) {
            let mut of = |recomputed: usize| {
                let pass = policy.forward(&pack, recomputed).unwrap();
                let loss = policy.token_logps(&pass.hidden, &gathers).sum();
                let mut sum = GradientSum::default();
                sum.add_pass(&mut policy, pass, loss);
                bits(&sum)
            };
            let kept = of(0);
            for recomputed in 1..=base.config().layers {
                assert!(
                    of(recomputed) == kept,
                    "{family} {precision:?} {name} {recomputed}"
                );
            }
        }
    }
}

/// Rows that no log-probability reads are not computed in the last layer: no gradient may miss them.
#[test]
fn what_is_not_read_has_no_part_in_a_gradient() {
    for (family, precision) in CASES {
        let base = decoder(family, precision);
        let pair = &pairs()[0];
        let mut whole = pivotal_core::Pack::default();
        whole
            .push(&pair.prompt, &[&pair.chosen, &pair.rejected])
            .unwrap();
        let all = whole.gather(|response, position| (response + position) % 2 == 1);
        let (needed, some) = whole.needed_by(&all);
        assert_eq!(needed.read.as_ref().unwrap().len(), some.len());
        for (name, mut policy) in policies(&base) {
            let mut of = |pack, gathers| {
                let pass = policy.forward(pack, 0).unwrap();
                let logps = policy.token_logps(&pass.hidden, gathers);
                let values = logps.to_data().try_to_vec::<f32>().unwrap();
                let mut sum = GradientSum::default();
                sum.add_pass(&mut policy, pass, logps.sum());
                (values, sum.to_host())
            };
            let (logps, gradients) = of(&whole, &all);
            let (found_logps, found) = of(&needed, &some);
            let what = format!("{family} {precision:?} {name}");
            close(&found_logps, &logps, &what);
            assert!(found.keys().eq(gradients.keys()), "{what}");
            for (parameter, tensor) in &found {
                let expected = gradients[parameter].values();
                close(tensor.values(), expected, &format!("{what}: {parameter}"));
            }
        }
    }
}

/// Sums in another order, and no more.
fn close(found: &[f32], expected: &[f32], what: &str) {
    let largest = expected.iter().fold(0.0_f32, |most, x| most.max(x.abs()));
    for (found, expected) in found.iter().zip(expected) {
        assert!((found - expected).abs() <= 1e-4 * largest, "{what}");
    }
    assert_eq!(found.len(), expected.len(), "{what}");
}
