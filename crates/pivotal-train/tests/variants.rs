//! The losses of `[dpo]` on the small model: the first step's loss against the formulas, and some steps of each.

use std::path::{Path, PathBuf};

use burn::tensor::Device;
use pivotal_core::{ErrorKind, HasKind, Pack, TokenMask, TokenizedPair};
use pivotal_model::{Decoder, LoraAdapter, load};
use pivotal_ops::Precision;
use pivotal_train::dpo::{
    self, DpoItem, DpoMetrics, DpoObjective, DpoSettings, LossName, mismatched,
};
use pivotal_train::optimizer::NamedAdamW;
use pivotal_train::score::{Group, token_logps};
use pivotal_train::settings::{KeptNormalisation, OptimizerSettings};
use pivotal_train::{Error, Schedule};

const LOSSES: [LossName; 10] = [
    LossName::Dpo,
    LossName::IpoSum,
    LossName::IpoMean,
    LossName::Cdpo,
    LossName::Robust,
    LossName::Hinge,
    LossName::Simpo,
    LossName::Kto,
    LossName::Tdpo1,
    LossName::Tdpo2,
];

fn llama() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../pivotal-model/tests/golden/llama")
}

fn base() -> Decoder {
    Decoder::from_checkpoint(&load(&llama()).unwrap(), &Device::flex(), Precision::F32).unwrap()
}

/// A policy that is far from the base.
fn policy() -> Decoder {
    let adapter = LoraAdapter::load(&llama().join("adapter")).unwrap();
    base().with_adapter(&adapter).unwrap()
}

/// Ids below 64 from a fixed sequence, `count` of them.
fn ids(start: u32, count: usize) -> Vec<u32> {
    let id = |place: u32| 3 + (start * 31 + place * 17 + place * place) % 60;
    (0..count as u32).map(id).collect()
}

fn pairs() -> Vec<TokenizedPair> {
    [(5, 7, 3), (1, 1, 12), (9, 4, 4), (3, 6, 8)]
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

/// Every third token left out, and of the third pair's rejected response all.
fn keep(pairs: &[TokenizedPair]) -> Vec<[TokenMask; 2]> {
    let mask = |tokens: usize| (0..tokens).map(|place| place % 3 != 1).collect::<Vec<_>>();
    let of = |pair: &TokenizedPair| {
        [&pair.chosen, &pair.rejected].map(|ids| TokenMask::from(mask(ids.len())))
    };
    let mut keep: Vec<_> = pairs.iter().map(of).collect();
    keep[2][1] = TokenMask::none(keep[2][1].len());
    keep
}

fn logps(decoder: &Decoder, pairs: &[TokenizedPair]) -> Vec<[Vec<f32>; 2]> {
    let groups: Vec<_> = pairs.iter().map(Group::of_pair).collect();
    let scored = token_logps(decoder, &groups, 64).unwrap();
    let sides = |mut sides: Vec<Vec<f32>>| {
        let rejected = sides.pop().unwrap();
        [sides.pop().unwrap(), rejected]
    };
    scored.into_iter().map(sides).collect()
}

fn settings(loss: LossName) -> DpoSettings {
    let default = DpoSettings {
        loss,
        beta: 0.3,
        ..DpoSettings::default()
    };
    match loss {
        LossName::Cdpo | LossName::Robust => DpoSettings {
            label_smoothing: 0.2,
            ..default
        },
        LossName::Simpo => DpoSettings {
            beta: 2.0,
            target_margin: 0.7,
            ..default
        },
        LossName::Kto => DpoSettings {
            desirable_weight: 1.25,
            undesirable_weight: 0.5,
            ..default
        },
        LossName::Tdpo2 => DpoSettings {
            tdpo_alpha: 3.0,
            ..default
        },
        _ => default,
    }
}

/// As the recipe makes it: with the reference itself where the loss wants it.
fn objective(loss: LossName, reference: &Decoder) -> DpoObjective<'_> {
    let objective = settings(loss).objective().unwrap();
    let wanted = objective.loss.uses_reference_model();
    DpoObjective {
        reference: wanted.then_some(reference),
        ..objective
    }
}

fn items(loss: LossName) -> Vec<DpoItem> {
    let (pairs, base) = (pairs(), base());
    let keep = keep(&pairs);
    let reference = match loss {
        LossName::Simpo => vec![Default::default(); pairs.len()],
        _ => logps(&base, &pairs),
    };
    let item = |((pair, keep), reference_logps)| DpoItem {
        pair,
        keep,
        reference_logps,
        mismatched: None,
    };
    let rows = mismatched(&pairs, &keep, 16).unwrap();
    let of_rows: Vec<_> = rows.iter().map(|row| row.pair.clone()).collect();
    let row_logps = logps(&base, &of_rows);
    let all = pairs.into_iter().zip(keep).zip(reference).map(item);
    let mut items: Vec<DpoItem> = all.collect();
    if loss == LossName::Kto {
        for ((own, row), mut logps) in items.iter_mut().zip(rows).zip(row_logps) {
            // The policy lies above this reference on these rows: a baseline that is cut to 0 would show nothing.
            logps.iter_mut().flatten().for_each(|logp| *logp -= 1.5);
            own.mismatched = Some(Box::new(item(((row.pair, row.keep), logps))));
        }
    }
    items
}

fn first_step(loss: LossName, items: &[DpoItem], micro_batch_tokens: usize) -> DpoMetrics {
    let settings_of_step = OptimizerSettings {
        micro_batch_tokens,
        ..OptimizerSettings::default()
    };
    let items: Vec<_> = items.iter().collect();
    let base = base();
    let objective = objective(loss, &base);
    let step = dpo::gradients(&mut policy(), &items, objective, &settings_of_step, 1);
    step.unwrap().1
}

/// Kept log-ratios (or, without a reference, log-probabilities) summed, and how many tokens are kept.
fn kept_sum(policy: &[f32], reference: Option<&[f32]>, keep: &TokenMask) -> (f64, usize) {
    let kept = (0..policy.len()).filter(|&at| keep.as_slice()[at]);
    let ratio = |at: usize| {
        f64::from(policy[at]) - reference.map_or(0.0, |reference| f64::from(reference[at]))
    };
    (kept.map(ratio).sum(), keep.kept())
}

fn sums(policy: &[[Vec<f32>; 2]], items: &[&DpoItem], reference: bool) -> Vec<[(f64, usize); 2]> {
    let of = |(policy, item): (&[Vec<f32>; 2], &&DpoItem)| {
        [0, 1].map(|side| {
            let reference = reference.then(|| &item.reference_logps[side][..]);
            kept_sum(&policy[side], reference, &item.keep[side])
        })
    };
    policy.iter().zip(items).map(of).collect()
}

/// ln of the softmax of each row of logits.
fn log_softmax(logits: &[f32], vocab: usize) -> Vec<Vec<f64>> {
    let of_row = |row: &[f32]| {
        let lse = row.iter().map(|&z| f64::from(z).exp()).sum::<f64>().ln();
        row.iter().map(|&z| f64::from(z) - lse).collect()
    };
    logits.chunks(vocab).map(of_row).collect()
}

/// Σ over kept tokens of KL(reference‖policy), chosen then rejected, from whole logits.
fn divergences(reference: &Decoder, policy: &Decoder, item: &DpoItem) -> [f64; 2] {
    let pair = &item.pair;
    [0, 1].map(|side| {
        let response = [&pair.chosen, &pair.rejected][side];
        let mut pack = Pack::default();
        pack.push(&pair.prompt, &[response]).unwrap();
        let first = pair.prompt.len() - 1;
        let sources: Vec<usize> = (first..first + response.len()).collect();
        let [reference, policy] = [reference, policy].map(|decoder| {
            let decoder = decoder.detached();
            let logits = decoder.logits(&decoder.hidden(&pack).unwrap(), &sources);
            let vocab = decoder.config().vocab_size;
            log_softmax(&logits.try_into_vec_as::<f32>().unwrap(), vocab)
        });
        let kl = |at: usize| {
            let terms = reference[at].iter().zip(&policy[at]);
            terms.map(|(q, p)| q.exp() * (q - p)).sum::<f64>()
        };
        let kept = (0..response.len()).filter(|&at| item.keep[side].as_slice()[at]);
        kept.map(kl).sum()
    })
}

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

/// The mean loss of the step from log-probabilities, in f64, straight from the papers.
fn expected(loss: LossName, items: &[DpoItem]) -> f64 {
    let (settings, policy) = (settings(loss), policy());
    let own: Vec<&DpoItem> = items.iter().collect();
    let ours = logps(&policy, &pairs());
    let sums_of_pairs = sums(&ours, &own, loss != LossName::Simpo);
    let baseline = match loss {
        LossName::Kto => {
            let rows: Vec<&DpoItem> = items
                .iter()
                .map(|item| item.mismatched.as_deref().unwrap())
                .collect();
            let of_rows: Vec<_> = rows.iter().map(|row| row.pair.clone()).collect();
            let sums = sums(&logps(&policy, &of_rows), &rows, true);
            let all: Vec<f64> = sums.iter().flatten().map(|(sum, _)| *sum).collect();
            (all.iter().sum::<f64>() / all.len() as f64).max(0.0)
        }
        _ => 0.0,
    };
    let (beta, smooth) = (settings.beta, settings.label_smoothing);
    let base = base();
    let of_pair = |(pair, item): (&[(f64, usize); 2], &DpoItem)| {
        let [(chosen, kept), (rejected, kept_rejected)] = pair;
        let margin = beta * (chosen - rejected);
        let mean = chosen / (*kept).max(1) as f64 - rejected / (*kept_rejected).max(1) as f64;
        match loss {
            LossName::Dpo => -sigmoid(margin).ln(),
            LossName::IpoSum => (chosen - rejected - 0.5 / beta).powi(2),
            LossName::IpoMean => (mean - 0.5 / beta).powi(2),
            LossName::Cdpo => {
                -(1.0 - smooth) * sigmoid(margin).ln() - smooth * sigmoid(-margin).ln()
            }
            LossName::Robust => {
                (-(1.0 - smooth) * sigmoid(margin).ln() + smooth * sigmoid(-margin).ln())
                    / (1.0 - 2.0 * smooth)
            }
            LossName::Hinge => (1.0 - margin).max(0.0),
            LossName::Simpo => -sigmoid(beta * mean - settings.target_margin).ln(),
            LossName::Kto => {
                let good = 1.0 - sigmoid(beta * (chosen - baseline));
                let bad = 1.0 - sigmoid(beta * (baseline - rejected));
                0.5 * (settings.desirable_weight * good + settings.undesirable_weight * bad)
            }
            LossName::Tdpo1 | LossName::Tdpo2 => {
                let [of_chosen, of_rejected] = divergences(&base, &policy, item);
                let alpha = match loss {
                    LossName::Tdpo1 => 1.0,
                    _ => settings.tdpo_alpha,
                };
                -sigmoid(margin - beta * alpha * (of_rejected - of_chosen)).ln()
            }
        }
    };
    let all = sums_of_pairs.iter().zip(items);
    all.map(of_pair).sum::<f64>() / sums_of_pairs.len() as f64
}

#[test]
fn the_first_loss_is_the_formulas() {
    let mut found = Vec::new();
    for loss in LOSSES {
        let items = items(loss);
        let expected = expected(loss, &items);
        for micro_batch_tokens in [1024, 1] {
            let metrics = first_step(loss, &items, micro_batch_tokens);
            assert!(
                (metrics.loss - expected).abs() <= 2e-5 * expected.abs().max(1.0),
                "{loss:?}: {}, expected {expected}",
                metrics.loss
            );
        }
        found.push(expected);
    }
    // Ten losses, ten numbers: a name that stood for another's loss would show.
    found.sort_by(f64::total_cmp);
    assert!(
        found.windows(2).all(|two| two[1] - two[0] > 1e-3),
        "{found:?}"
    );
}

#[test]
fn ktos_baseline_is_above_0_where_it_was_tested() {
    let metrics = first_step(LossName::Kto, &items(LossName::Kto), 1024);
    assert!(metrics.kto_baseline.unwrap() > 0.01, "{metrics:?}");
    assert_eq!(
        first_step(LossName::Dpo, &items(LossName::Dpo), 64).kto_baseline,
        None
    );
}

#[test]
fn tdpos_divergences_are_those_of_kept_positions() {
    let (base, policy) = (base(), policy());
    for loss in [LossName::Tdpo1, LossName::Tdpo2] {
        let items = items(loss);
        let metrics = first_step(loss, &items, 16);
        let all: Vec<_> = items
            .iter()
            .map(|item| divergences(&base, &policy, item))
            .collect();
        // Nothing is kept of the third pair's rejected response.
        assert_eq!(all[2][1], 0.0);
        for (side, found) in [metrics.chosen_kl, metrics.rejected_kl]
            .into_iter()
            .enumerate()
        {
            let expected = all.iter().map(|kl| kl[side]).sum::<f64>() / all.len() as f64;
            let found = found.unwrap();
            assert!(expected > 1e-2, "{expected}");
            assert!(
                (found - expected).abs() < 1e-5,
                "{loss:?}: {found}, expected {expected}"
            );
        }
    }
    let of_dpo = first_step(LossName::Dpo, &items(LossName::Dpo), 16);
    assert_eq!((of_dpo.chosen_kl, of_dpo.rejected_kl), (None, None));
}

#[test]
fn tdpo2_without_divergences_is_dpo() {
    let (base, items) = (base(), items(LossName::Dpo));
    let items: Vec<_> = items.iter().collect();
    let settings_of_step = OptimizerSettings::default();
    let step = |objective| {
        let step = dpo::gradients(&mut policy(), &items, objective, &settings_of_step, 1);
        let (sum, metrics) = step.unwrap();
        (metrics.loss, sum.to_host())
    };
    let dpo = step(objective(LossName::Dpo, &base));
    let without = DpoSettings {
        tdpo_alpha: 0.0,
        ..settings(LossName::Tdpo2)
    };
    let without = step(DpoObjective {
        reference: Some(&base),
        ..without.objective().unwrap()
    });
    assert_eq!(without.0, dpo.0);
    assert_eq!(without.1, dpo.1);
}

#[test]
fn divergence_from_the_reference_is_that_of_the_kept_tokens() {
    let items = items(LossName::Dpo);
    let metrics = first_step(LossName::Dpo, &items, 16);
    let ours = logps(&policy(), &pairs());
    let mut deltas = Vec::new();
    for (ours, item) in ours.iter().zip(&items) {
        for ((ours, reference), keep) in ours.iter().zip(&item.reference_logps).zip(&item.keep) {
            for at in (0..ours.len()).filter(|&at| keep.as_slice()[at]) {
                deltas.push(f64::from(ours[at] - reference[at]));
            }
        }
    }
    let mean =
        |of: &dyn Fn(f64) -> f64| deltas.iter().map(|&d| of(d)).sum::<f64>() / deltas.len() as f64;
    let close = |found: Option<f64>, expected: f64| {
        let found = found.unwrap();
        assert!(
            (found - expected).abs() < 1e-5,
            "{found}, expected {expected}"
        );
    };
    close(metrics.kl_k1, mean(&|d| d));
    close(metrics.kl_k2, mean(&|d| d * d / 2.0));
    close(metrics.kl_k3, mean(&|d| (-d).exp() - 1.0 + d));
    assert!(metrics.kl_k2.unwrap() > 1e-3);

    let simpo = first_step(LossName::Simpo, &self::items(LossName::Simpo), 16);
    assert_eq!((simpo.kl_k1, simpo.chosen_kept_shift), (None, None));
}

#[test]
fn steps_bring_every_loss_down_and_repeat() {
    let base = base();
    for loss in LOSSES {
        let items = items(loss);
        let run = || {
            let optimizer_settings = OptimizerSettings {
                lr: 2e-3,
                schedule: Schedule::Constant,
                ..OptimizerSettings::default()
            };
            let mut losses = Vec::new();
            dpo::optimize(
                &mut policy(),
                &items,
                objective(loss, &base),
                &optimizer_settings,
                &mut NamedAdamW::new(&optimizer_settings),
                std::iter::repeat((0..items.len()).collect()),
                0..6,
                &mut |_, metrics, _, _| {
                    losses.push(metrics.loss);
                    Ok(())
                },
            )
            .unwrap();
            losses
        };
        let losses = run();
        assert!(losses[5] < losses[0] - 1e-3, "{loss:?}: {losses:?}");
        assert_eq!(losses, run(), "{loss:?}");
    }
}

#[test]
fn what_is_not_finite_names_its_rows() {
    let base = base();
    let settings_of_step = OptimizerSettings::default();
    for loss in LOSSES {
        if loss == LossName::Simpo {
            continue;
        }
        let mut items = items(loss);
        items[1].reference_logps[0][0] = f32::NAN;
        let items: Vec<_> = items.iter().collect();
        let objective = objective(loss, &base);
        let error = dpo::gradients(&mut policy(), &items, objective, &settings_of_step, 3)
            .map(|_| ())
            .unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NotFinite);
        let text = error.to_string();
        assert!(
            text.contains("step 3") && text.contains("rows [2]"),
            "{loss:?}: {text}"
        );
    }
    let mut items = items(LossName::Kto);
    items[3].mismatched.as_mut().unwrap().reference_logps[0][0] = f32::NEG_INFINITY;
    let items: Vec<_> = items.iter().collect();
    let objective = settings(LossName::Kto).objective().unwrap();
    let error = dpo::gradients(&mut policy(), &items, objective, &settings_of_step, 1);
    let text = error.map(|_| ()).unwrap_err().to_string();
    assert!(
        text.contains("kto_baseline") && text.contains("rows [4]"),
        "{text}"
    );
}

#[test]
fn mismatched_rows_have_another_prompt_and_fit() {
    let mut pairs = pairs();
    pairs[1].prompt = pairs[0].prompt.clone();
    let keep = keep(&pairs);
    let rows = mismatched(&pairs, &keep, 12).unwrap();
    // The second row's prompt is the first's, so the first takes the third's responses.
    let from = [2, 2, 3, 0];
    for (at, (row, from)) in rows.iter().zip(from).enumerate() {
        assert_eq!(
            (row.pair.id, &row.pair.prompt),
            (pairs[at].id, &pairs[at].prompt)
        );
        let room = 12 - pairs[at].prompt.len();
        for (side, (found, whole)) in [
            (&row.pair.chosen, &pairs[from].chosen),
            (&row.pair.rejected, &pairs[from].rejected),
        ]
        .into_iter()
        .enumerate()
        {
            let tokens = whole.len().min(room);
            assert_eq!(found[..], whole[..tokens]);
            assert_eq!(
                row.keep[side].as_slice(),
                &keep[from][side].as_slice()[..tokens]
            );
        }
    }
    for pair in &mut pairs {
        pair.prompt = vec![5];
    }
    assert!(matches!(
        mismatched(&pairs, &keep, 12),
        Err(Error::OnePrompt)
    ));
}

type Change = fn(&mut DpoSettings);

#[test]
fn a_key_that_the_loss_does_not_use_is_refused() {
    let uses: [(&str, Change, &[LossName]); 6] = [
        (
            "normalisation",
            |settings| settings.normalisation = KeptNormalisation::KeptMean,
            &[
                LossName::Dpo,
                LossName::Cdpo,
                LossName::Robust,
                LossName::Hinge,
                LossName::Tdpo1,
                LossName::Tdpo2,
            ],
        ),
        (
            "label-smoothing",
            |settings| settings.label_smoothing = 0.25,
            &[LossName::Cdpo, LossName::Robust],
        ),
        (
            "target-margin",
            |settings| settings.target_margin = 0.5,
            &[LossName::Simpo],
        ),
        (
            "desirable-weight",
            |settings| settings.desirable_weight = 2.0,
            &[LossName::Kto],
        ),
        (
            "undesirable-weight",
            |settings| settings.undesirable_weight = 2.0,
            &[LossName::Kto],
        ),
        (
            "tdpo-alpha",
            |settings| settings.tdpo_alpha = 0.25,
            &[LossName::Tdpo2],
        ),
    ];
    for (key, set, losses) in uses {
        for loss in LOSSES {
            let mut settings = settings(loss);
            if loss == LossName::Simpo && key != "target-margin" {
                settings.target_margin = 0.0;
            }
            if loss == LossName::Tdpo2 && key != "tdpo-alpha" {
                settings.tdpo_alpha = DpoSettings::default().tdpo_alpha;
            }
            set(&mut settings);
            match (settings.check(), losses.contains(&loss)) {
                (Ok(()), true) => {}
                (
                    Err(Error::UnusedSetting {
                        key: found,
                        loss: name,
                    }),
                    false,
                ) => {
                    assert_eq!(found, key);
                    let text = format!("{loss:?}").to_lowercase();
                    assert_eq!(name.replace('_', ""), text);
                }
                (found, _) => panic!("{key} with {loss:?}: {found:?}"),
            }
        }
    }
    for smoothing in [0.0, 0.5, -0.1, f64::NAN] {
        let settings = DpoSettings {
            label_smoothing: smoothing,
            ..settings(LossName::Robust)
        };
        let error = settings.check().unwrap_err().to_string();
        assert!(error.contains("label-smoothing"), "{error}");
    }
}
