//! Log-probabilities of kept and dropped tokens in dpo's metrics: against scoring, which knows of no mask.

use std::path::Path;

use burn::tensor::Device;
use pivotal_core::{TokenMask, TokenizedPair};
use pivotal_loss::Normalisation;
use pivotal_model::{Decoder, LoraSpec, load};
use pivotal_ops::Precision;
use pivotal_train::dpo::{self, DpoItem, DpoMetrics, DpoObjective, PreferenceLoss};
use pivotal_train::score::{Group, token_logps};
use pivotal_train::settings::OptimizerSettings;

/// Two orders of f32 sums over a vocabulary.
const TOLERANCE: f64 = 1e-5;

fn base() -> Decoder {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../pivotal-model/tests/golden/llama");
    let checkpoint = load(&path).unwrap();
    Decoder::from_checkpoint(&checkpoint, &Device::flex(), Precision::F32).unwrap()
}

fn policies() -> [(&'static str, Decoder); 2] {
    let spec = LoraSpec {
        rank: 4,
        alpha: 8.0,
        targets: vec![],
    };
    [
        ("full", base().trainable()),
        ("lora", base().with_lora(&spec, 7).unwrap()),
    ]
}

/// The masks differ in size, and a response of each side keeps or drops all.
fn items() -> Vec<DpoItem> {
    let ids = |start: u32, count: u32| -> Vec<u32> {
        (0..count)
            .map(|place| 3 + (start * 31 + place * 17) % 60)
            .collect()
    };
    let keep = |count: usize, pattern: u32| {
        TokenMask::from(
            (0..count)
                .map(|t| pattern >> t & 1 == 1)
                .collect::<Vec<_>>(),
        )
    };
    let sizes = [
        (5, 0b10110, 4, 0b0001),
        (3, 0b111, 6, 0),
        (6, 0b000011, 2, 0b11),
    ];
    let pairs = sizes.into_iter().zip(0..);
    pairs
        .map(
            |((chosen, kept_chosen, rejected, kept_rejected), id)| DpoItem {
                pair: TokenizedPair {
                    id: u64::from(id),
                    prompt: ids(id, 3),
                    chosen: ids(id + 5, chosen),
                    rejected: ids(id + 9, rejected),
                },
                keep: [
                    keep(chosen as usize, kept_chosen),
                    keep(rejected as usize, kept_rejected),
                ],
                reference_logps: [chosen, rejected]
                    .map(|count| (0..count).map(|t| -3.0 - 0.25 * t as f32).collect()),
                mismatched: None,
            },
        )
        .collect()
}

fn step(
    policy: &mut Decoder,
    loss: PreferenceLoss,
    budget: usize,
    every: u64,
    step: u64,
) -> DpoMetrics {
    let items = items();
    let items: Vec<&DpoItem> = items.iter().collect();
    let objective = DpoObjective {
        loss,
        beta: 0.1,
        normalisation: Normalisation::KeptMean,
        dropped_every: every,
        reference: None,
    };
    let settings = OptimizerSettings {
        micro_batch_tokens: budget,
        ..OptimizerSettings::default()
    };
    dpo::gradients(policy, &items, objective, &settings, step)
        .unwrap()
        .1
}

/// Means of log-probability and of its change over the tokens of `side` whose mask says `kept`.
fn expected(policy: &Decoder, side: usize, kept: bool) -> (f64, f64) {
    let items = items();
    let groups: Vec<Group<'_>> = items
        .iter()
        .map(|item| Group::of_pair(&item.pair))
        .collect();
    let logps = token_logps(policy, &groups, 4096).unwrap();
    let (mut sums, mut count) = ((0.0, 0.0), 0.0);
    for (item, logps) in items.iter().zip(&logps) {
        for (token, &logp) in logps[side].iter().enumerate() {
            if item.keep[side].as_slice()[token] == kept {
                sums.0 += f64::from(logp);
                sums.1 += f64::from(logp - item.reference_logps[side][token]);
                count += 1.0;
            }
        }
    }
    (sums.0 / count, sums.1 / count)
}

#[test]
fn kept_and_dropped_tokens_of_both_sides_are_those_that_scoring_finds() {
    for (name, mut policy) in policies() {
        for budget in [4096, 1] {
            let found = step(&mut policy, PreferenceLoss::Dpo, budget, 10, 1);
            for (what, (logp, shift), (side, kept)) in [
                (
                    "chosen kept",
                    (found.chosen_kept_logp, found.chosen_kept_shift),
                    (0, true),
                ),
                (
                    "chosen dropped",
                    (found.chosen_dropped_logp, found.chosen_dropped_shift),
                    (0, false),
                ),
                (
                    "rejected kept",
                    (found.rejected_kept_logp, found.rejected_kept_shift),
                    (1, true),
                ),
                (
                    "rejected dropped",
                    (found.rejected_dropped_logp, found.rejected_dropped_shift),
                    (1, false),
                ),
            ] {
                let expected = expected(&policy, side, kept);
                let close = |found: Option<f64>, expected: f64| {
                    let found = found.unwrap();
                    assert!(
                        (found - expected).abs() < TOLERANCE,
                        "{name}, {budget}, {what}: {found}, expected {expected}"
                    );
                };
                close(logp, expected.0);
                close(shift, expected.1);
            }
        }
    }
}

#[test]
fn measuring_changes_nothing_else_and_keeps_to_its_steps() {
    let strip = |metrics: DpoMetrics| DpoMetrics {
        chosen_dropped_logp: None,
        rejected_dropped_logp: None,
        chosen_dropped_shift: None,
        rejected_dropped_shift: None,
        ..metrics
    };
    for (_, mut policy) in policies() {
        let mut at = |every, number| step(&mut policy, PreferenceLoss::Dpo, 4096, every, number);
        let without = at(0, 1);
        assert_eq!(without, strip(without));
        for (every, number, measured) in [
            (1, 7, true),
            (3, 1, true),
            (3, 2, false),
            (3, 4, true),
            (10, 11, true),
        ] {
            let with = at(every, number);
            assert_eq!(strip(with), without, "{every} {number}");
            assert_eq!(
                with.chosen_dropped_logp.is_some(),
                measured,
                "{every} {number}"
            );
        }
    }
}

/// The step without a measurement leaves out the tokens after the last kept one of each response; the other takes them along.
#[test]
fn tokens_after_the_last_kept_one_have_no_part_in_the_gradient() {
    let items = items();
    let items: Vec<&DpoItem> = items.iter().collect();
    for (name, policy) in policies() {
        let gradients = |every| {
            let objective = DpoObjective {
                loss: PreferenceLoss::Dpo,
                beta: 0.1,
                normalisation: Normalisation::Sum,
                dropped_every: every,
                reference: None,
            };
            let settings = OptimizerSettings::default();
            let (sum, _) =
                dpo::gradients(&mut policy.clone(), &items, objective, &settings, 1).unwrap();
            sum.to_host()
        };
        let (without, with) = (gradients(0), gradients(1));
        let mut norm = 0.0;
        assert_eq!(without.len(), with.len());
        for ((tensor, without), (same, with)) in without.iter().zip(&with) {
            assert_eq!(tensor, same);
            for (a, b) in without.values().iter().zip(with.values()) {
                // Sums over other numbers of rows, of which the added ones are zero: f32 in another order.
                assert!((a - b).abs() < 1e-6, "{name}, {tensor}: {a}, not {b}");
                norm += f64::from(b * b);
            }
        }
        assert!(norm.sqrt() > 1e-2, "{name}: {norm}");
    }
}

#[test]
fn without_a_reference_there_is_no_change_to_tell() {
    let loss = PreferenceLoss::Simpo { target_margin: 0.5 };
    let found = step(&mut base().trainable(), loss, 4096, 1, 1);
    assert!(found.chosen_kept_logp.is_some() && found.rejected_dropped_logp.is_some());
    assert_eq!(
        (found.chosen_kept_shift, found.chosen_dropped_shift),
        (None, None)
    );
}
