//! Values and gradients of the losses on sampled responses, and of KTO and TDPO, in f64 (made by `scripts/golden/onpolicy.py`).

#[path = "support/fixture.rs"]
mod fixture;
mod support;

use burn::tensor::{DType, Device, Tensor, TensorData};
use fixture::{cases, mask};
use pivotal_core::TokenMask;
use pivotal_loss::{
    Clip, Judgement, KtoWeights, Normalisation, PairKl, PairLogps, ResponseIndex,
    clipped_value_loss, constant_length_mean, dual_clip_ppo, kept_sums, kl_k2, kl_k3,
    kl_straight_through, kto, kto_baseline, ppo, response_mean, tdpo1, tdpo2, token_forward_kl,
    token_mean, value_loss,
};
use serde::Deserialize;
use support::{assert_close, constant, leaf, numbers};

/// One number a token, `[responses][tokens]`.
type Ragged = Vec<Vec<f64>>;

fn index(rows: &Ragged) -> ResponseIndex {
    ResponseIndex::of_whole_responses(&rows.iter().map(Vec::len).collect::<Vec<_>>())
}

/// The mean over kept tokens of a batch that is the whole step.
fn mean(values: Tensor<1>, keep: &TokenMask) -> Tensor<1> {
    token_mean(values, keep, keep.kept()).unwrap()
}

fn count(flags: Tensor<1>, keep: &TokenMask) -> usize {
    numbers(token_mean(flags, keep, 1.max(keep.kept())).unwrap())
        .iter()
        .map(|share| (share * keep.kept() as f64).round() as usize)
        .sum()
}

#[derive(Deserialize)]
struct PpoCase {
    reduction: String,
    low: f64,
    high: f64,
    dual: Option<f64>,
    kl_coef: f64,
    max_tokens: usize,
    token_logps: Ragged,
    old_token_logps: Ragged,
    reference_token_logps: Ragged,
    advantages: Ragged,
    keep: Vec<Vec<u8>>,
    loss: f64,
    gradient: Ragged,
    clipped_low: usize,
    clipped_high: usize,
    kl_from_old: KlMeans,
}

#[derive(Deserialize)]
struct KlMeans {
    k1: f64,
    k2: f64,
    k3: f64,
}

#[test]
fn ppo_and_grpo_are_trls() {
    let (mut low, mut high, mut dual) = (0, 0, 0);
    let cases = cases::<PpoCase>(include_str!("golden/ppo.json"));
    for (at, case) in cases.iter().enumerate() {
        let what = |name: &str| format!("case {at} ({}), {name}", case.reduction);
        let policy = leaf(&case.token_logps.concat());
        let old = constant(&case.old_token_logps.concat());
        let advantages = constant(&case.advantages.concat());
        let keep = mask(&case.keep.concat());
        let clip = Clip {
            low: case.low,
            high: case.high,
        };
        let terms = match case.dual {
            None => ppo(policy.clone(), old, advantages, &keep, clip).unwrap(),
            Some(bound) => {
                let bounded =
                    dual_clip_ppo(policy.clone(), old, advantages, &keep, clip, bound).unwrap();
                dual += count(bounded.clipped_dual, &keep);
                bounded.terms
            }
        };
        let reference = constant(&case.reference_token_logps.concat());
        let kl = kl_k3(policy.clone(), reference, &keep).unwrap();
        let values = terms.loss + kl.loss.mul_scalar(case.kl_coef);
        let index = index(&case.token_logps);
        let responses = index.responses();
        let loss = match case.reduction.as_str() {
            "token_mean" => token_mean(values, &keep, keep.kept()),
            "response_mean" => response_mean(values, &index, &keep, responses),
            "constant_length" => {
                constant_length_mean(values, &index, &keep, responses, case.max_tokens)
            }
            other => panic!("`{other}` is no reduction"),
        };
        let loss = loss.unwrap();
        let grads = loss.backward();
        assert_close(&what("loss"), &numbers(loss), &[case.loss]);
        let gradient = numbers(policy.grad(&grads).unwrap());
        assert_close(&what("gradient"), &gradient, &case.gradient.concat());

        assert_eq!(count(terms.clipped_low, &keep), case.clipped_low, "{at}");
        assert_eq!(count(terms.clipped_high, &keep), case.clipped_high, "{at}");
        low += case.clipped_low;
        high += case.clipped_high;
        let (ours, theirs) = (terms.kl_from_old, &case.kl_from_old);
        for (ours, theirs) in [
            (ours.k1, theirs.k1),
            (ours.k2, theirs.k2),
            (ours.k3, theirs.k3),
        ] {
            assert_close(&what("KL from old"), &numbers(mean(ours, &keep)), &[theirs]);
        }
    }
    assert!(low > 0 && high > 0 && dual > 0, "{low} {high} {dual}");
}

#[derive(Deserialize)]
struct KlCase {
    name: String,
    token_logps: Ragged,
    reference_token_logps: Ragged,
    keep: Vec<Vec<u8>>,
    loss: f64,
    gradient: Ragged,
}

#[test]
fn kl_losses_are_schulmans() {
    let cases = cases::<KlCase>(include_str!("golden/kl.json"));
    for (at, case) in cases.iter().enumerate() {
        let policy = leaf(&case.token_logps.concat());
        let reference = constant(&case.reference_token_logps.concat());
        let keep = mask(&case.keep.concat());
        let terms = match case.name.as_str() {
            "k2" => kl_k2(policy.clone(), reference, &keep),
            "k3" => kl_k3(policy.clone(), reference, &keep),
            "straight_through" => kl_straight_through(policy.clone(), reference, &keep),
            other => panic!("`{other}` is no KL loss"),
        };
        let loss = mean(terms.unwrap().loss, &keep);
        let grads = loss.backward();
        let what = |name: &str| format!("case {at} ({}), {name}", case.name);
        assert_close(&what("loss"), &numbers(loss), &[case.loss]);
        let gradient = numbers(policy.grad(&grads).unwrap());
        assert_close(&what("gradient"), &gradient, &case.gradient.concat());
    }
}

#[derive(Deserialize)]
struct ValueCase {
    clip: Option<f64>,
    values: Ragged,
    old_values: Ragged,
    returns: Ragged,
    keep: Vec<Vec<u8>>,
    loss: f64,
    gradient: Ragged,
    clipped: usize,
}

#[test]
fn detail_20_value_losses_are_the_former_ppo_trainers() {
    let mut clipped = 0;
    let cases = cases::<ValueCase>(include_str!("golden/value.json"));
    for (at, case) in cases.iter().enumerate() {
        let values = leaf(&case.values.concat());
        let (old, returns) = (
            constant(&case.old_values.concat()),
            constant(&case.returns.concat()),
        );
        let keep = mask(&case.keep.concat());
        let losses = match case.clip {
            None => value_loss(values.clone(), returns, &keep).unwrap().loss,
            Some(clip) => {
                let terms = clipped_value_loss(values.clone(), old, returns, &keep, clip).unwrap();
                assert_eq!(count(terms.clipped, &keep), case.clipped, "{at}");
                clipped += case.clipped;
                terms.loss
            }
        };
        let loss = mean(losses, &keep);
        let grads = loss.backward();
        assert_close(&format!("case {at}, loss"), &numbers(loss), &[case.loss]);
        let gradient = numbers(values.grad(&grads).unwrap());
        assert_close(
            &format!("case {at}, gradient"),
            &gradient,
            &case.gradient.concat(),
        );
    }
    assert!(clipped > 0);
}

#[derive(Deserialize)]
struct KtoCase {
    beta: f64,
    desirable_weight: f64,
    undesirable_weight: f64,
    token_logps: Ragged,
    reference_token_logps: Ragged,
    keep: Vec<Vec<u8>>,
    desirable: Vec<bool>,
    mismatched_logps: Vec<f64>,
    reference_mismatched_logps: Vec<f64>,
    baseline: f64,
    loss: f64,
    gradient: Ragged,
}

#[test]
fn kto_is_trls() {
    let cases = cases::<KtoCase>(include_str!("golden/kto.json"));
    for (at, case) in cases.iter().enumerate() {
        let policy = leaf(&case.token_logps.concat());
        let reference = constant(&case.reference_token_logps.concat());
        let (keep, index) = (mask(&case.keep.concat()), index(&case.token_logps));
        let sums = |logps: Tensor<1>| kept_sums(logps, &index, &keep, Normalisation::Sum).unwrap();
        let judgements: Vec<_> = case
            .desirable
            .iter()
            .map(|desirable| match desirable {
                true => Judgement::Desirable,
                false => Judgement::Undesirable,
            })
            .collect();
        let weights = KtoWeights {
            desirable: case.desirable_weight,
            undesirable: case.undesirable_weight,
        };
        let baseline = kto_baseline(
            constant(&case.mismatched_logps),
            constant(&case.reference_mismatched_logps),
        )
        .unwrap();
        let what = |name: &str| format!("case {at}, {name}");
        assert_close(
            &what("baseline"),
            &numbers(baseline.clone()),
            &[case.baseline],
        );
        let (sums, reference) = (sums(policy.clone()), sums(reference));
        let terms = kto(sums, reference, &judgements, baseline, case.beta, weights).unwrap();
        let loss = terms.loss.mean();
        let grads = loss.backward();
        assert_close(&what("loss"), &numbers(loss), &[case.loss]);
        let gradient = numbers(policy.grad(&grads).unwrap());
        assert_close(&what("gradient"), &gradient, &case.gradient.concat());
    }
}

#[derive(Deserialize)]
struct TdpoCase {
    beta: f64,
    alpha: Option<f64>,
    loss: f64,
    chosen: TdpoSide,
    rejected: TdpoSide,
}

#[derive(Deserialize)]
struct TdpoSide {
    logits: Ragged,
    reference_logits: Ragged,
    tokens: Vec<i64>,
    token_logps: Vec<f64>,
    reference_token_logps: Vec<f64>,
    token_kl: Vec<f64>,
    keep: Vec<u8>,
    token_logps_gradient: Vec<f64>,
    token_kl_gradient: Vec<f64>,
    logits_gradient: Ragged,
    reward: f64,
}

fn matrix(rows: &Ragged) -> Tensor<2> {
    let device = Device::flex().autodiff();
    let data = TensorData::new(rows.concat(), [rows.len(), rows[0].len()]);
    Tensor::from_data(data, (&device, DType::F64))
}

#[test]
fn tdpo_is_its_authors() {
    let cases = cases::<TdpoCase>(include_str!("golden/tdpo.json"));
    for (at, case) in cases.iter().enumerate() {
        let sides = [&case.chosen, &case.rejected];
        let logps = sides.map(|side| leaf(&side.token_logps));
        let kl = sides.map(|side| leaf(&side.token_kl));
        let terms = tdpo_terms(case, &logps, &kl);
        let grads = terms.loss.backward();
        let what = |name: &str| format!("case {at}, {name}");
        assert_close(&what("loss"), &numbers(terms.loss), &[case.loss]);
        let rewards = [terms.chosen_reward, terms.rejected_reward].map(numbers);
        let gradient =
            |leaf: &Tensor<1>| leaf.grad(&grads).map_or(vec![0.0; leaf.dims()[0]], numbers);
        for (i, side) in sides.into_iter().enumerate() {
            assert_close(&what("reward"), &rewards[i], &[side.reward]);
            let (by_logps, by_kl) = (gradient(&logps[i]), gradient(&kl[i]));
            assert_close(
                &what("by log-probabilities"),
                &by_logps,
                &side.token_logps_gradient,
            );
            assert_close(&what("by divergences"), &by_kl, &side.token_kl_gradient);
        }
    }
}

#[test]
fn tdpo_from_logits_is_its_authors() {
    let cases = cases::<TdpoCase>(include_str!("golden/tdpo.json"));
    for (at, case) in cases.iter().enumerate() {
        let sides = [&case.chosen, &case.rejected];
        let logits = sides.map(|side| matrix(&side.logits).require_grad());
        let kl = [0, 1].map(|i| {
            let reference = matrix(&sides[i].reference_logits);
            token_forward_kl(logits[i].clone(), reference).unwrap()
        });
        let logps = [0, 1].map(|i| {
            let chosen = TensorData::new(sides[i].tokens.clone(), [sides[i].tokens.len(), 1]);
            let chosen = Tensor::<2, burn::tensor::Int>::from_data(chosen, &logits[i].device());
            let lse = pivotal_loss::log_sum_exp(logits[i].clone());
            logits[i].clone().gather(1, chosen).squeeze_dim::<1>(1) - lse
        });
        for (kl, side) in kl.iter().zip(sides) {
            assert_close(
                &format!("case {at}, KL"),
                &numbers(kl.clone()),
                &side.token_kl,
            );
        }
        let loss = tdpo_terms(case, &logps, &kl).loss;
        let grads = loss.backward();
        assert_close(&format!("case {at}, loss"), &numbers(loss), &[case.loss]);
        for (logits, side) in logits.iter().zip(sides) {
            let gradient: Vec<f64> = logits.grad(&grads).unwrap().try_into_vec_as().unwrap();
            assert_close(
                &format!("case {at}, gradient by logits"),
                &gradient,
                &side.logits_gradient.concat(),
            );
        }
    }
}

fn tdpo_terms(
    case: &TdpoCase,
    logps: &[Tensor<1>; 2],
    kl: &[Tensor<1>; 2],
) -> pivotal_loss::TdpoTerms {
    let sides = [&case.chosen, &case.rejected];
    let sum = |i: usize, values: Tensor<1>| {
        let index = ResponseIndex::of_whole_responses(&[sides[i].keep.len()]);
        kept_sums(values, &index, &mask(&sides[i].keep), Normalisation::Sum).unwrap()
    };
    let pair = |of: &dyn Fn(usize) -> Tensor<1>| PairLogps {
        chosen: sum(0, of(0)),
        rejected: sum(1, of(1)),
    };
    let policy = pair(&|i| logps[i].clone());
    let reference = pair(&|i| constant(&sides[i].reference_token_logps));
    let kl = PairKl {
        chosen: sum(0, kl[0].clone()),
        rejected: sum(1, kl[1].clone()),
    };
    match case.alpha {
        None => tdpo1(policy, kl, reference, case.beta),
        Some(alpha) => tdpo2(policy, kl, reference, case.beta, alpha),
    }
    .unwrap()
}
