//! What must hold of the losses on sampled responses whatever the numbers.

mod support;

use burn::tensor::{Device, Tensor, TensorData};
use pivotal_core::TokenMask;
use pivotal_loss::{
    Clip, Judgement, KlTerms, KtoWeights, LossError, PairKl, PairLogps, ResponseIndex,
    clipped_value_loss, constant_length_mean, dpo, dual_clip_ppo, kl_estimates, kl_k2, kl_k3,
    kl_straight_through, kto, kto_baseline, log_sum_exp, ppo, response_mean, responses_kept, tdpo2,
    token_forward_kl, token_mean, value_loss,
};
use proptest::prelude::*;
use support::{TOLERANCE, assert_close, constant, leaf, numbers};

fn single(values: &[f32]) -> Tensor<1> {
    let device = Device::flex().autodiff();
    Tensor::from_data(TensorData::new(values.to_vec(), [values.len()]), &device)
}

fn floats(tensor: Tensor<1>) -> Vec<f32> {
    tensor.try_into_vec_as().unwrap()
}

fn flags(seed: u64, tokens: usize) -> Vec<bool> {
    (0..tokens).map(|i| seed >> (i % 64) & 1 == 1).collect()
}

fn tokens() -> impl Strategy<Value = Vec<(f32, f32, f32)>> {
    prop::collection::vec((-12.0f32..0.0, -12.0f32..0.0, -3.0f32..3.0), 1..20)
}

fn unzip(tokens: &[(f32, f32, f32)]) -> [Vec<f32>; 3] {
    [
        tokens.iter().map(|token| token.0).collect(),
        tokens.iter().map(|token| token.1).collect(),
        tokens.iter().map(|token| token.2).collect(),
    ]
}

proptest! {
    #[test]
    fn detail_16_the_first_minibatch_has_ratio_one_and_the_plain_policy_gradient(tokens in tokens()) {
        let [logps, _, advantages] = unzip(&tokens);
        let policy = single(&logps).require_grad();
        let keep = TokenMask::all(logps.len());
        let terms = ppo(policy.clone(), single(&logps), single(&advantages), &keep, Clip::default());
        let terms = terms.unwrap();
        let grads = terms.loss.clone().sum().backward();
        let gradient = floats(policy.grad(&grads).unwrap());
        prop_assert!(floats(terms.ratio).iter().all(|&ratio| ratio == 1.0));
        for flags in [terms.clipped_low, terms.clipped_high] {
            prop_assert!(floats(flags).iter().all(|&flag| flag == 0.0));
        }
        for kl in [terms.kl_from_old.k1, terms.kl_from_old.k2, terms.kl_from_old.k3] {
            prop_assert!(floats(kl).iter().all(|&kl| kl == 0.0));
        }
        let plain: Vec<f32> = advantages.iter().map(|advantage| -advantage).collect();
        prop_assert_eq!(floats(terms.loss), plain.clone());
        prop_assert_eq!(gradient, plain);
    }

    #[test]
    fn a_clipped_token_has_no_gradient_and_every_other_has_its_ratios(tokens in tokens()) {
        let [new, old, advantages] = unzip(&tokens);
        let policy = single(&new).require_grad();
        let clip = Clip { low: 0.2, high: 0.28 };
        let keep = TokenMask::all(new.len());
        let terms = ppo(policy.clone(), single(&old), single(&advantages), &keep, clip).unwrap();
        let grads = terms.loss.clone().sum().backward();
        let gradient = floats(policy.grad(&grads).unwrap());
        let clipped = floats(terms.clipped_low.clone() + terms.clipped_high);
        let (loss, ratio) = (floats(terms.loss), floats(terms.ratio));
        for i in 0..new.len() {
            let product = -advantages[i] * ratio[i];
            // The minimum of two objectives: never a smaller loss than the unclipped one.
            prop_assert!(loss[i] >= product - 1e-6 * product.abs());
            let expected = if clipped[i] == 1.0 { 0.0 } else { product };
            prop_assert!((gradient[i] - expected).abs() <= 1e-5 * expected.abs().max(1.0));
        }
    }

    #[test]
    fn what_is_dropped_has_no_part_in_any_loss(
        tokens in tokens(),
        seed in any::<u64>(),
        poison in prop::sample::select(vec![f32::NAN, f32::NEG_INFINITY, f32::INFINITY, 1e30]),
    ) {
        let keep = flags(seed, tokens.len());
        let kept = TokenMask::from(keep.clone());
        let poisoned: Vec<_> = tokens
            .iter()
            .zip(&keep)
            .map(|(&token, &keep)| if keep { token } else { (poison, -poison, poison) })
            .collect();
        let losses = |tokens: &[(f32, f32, f32)]| -> Vec<(Vec<f32>, Vec<f32>)> {
            let [a, b, c] = unzip(tokens);
            let (b, c) = (single(&b), single(&c));
            let clip = Clip::default();
            let all: [&dyn Fn(Tensor<1>) -> Tensor<1>; 7] = [
                &|a| ppo(a, b.clone(), c.clone(), &kept, clip).unwrap().loss,
                &|a| dual_clip_ppo(a, b.clone(), c.clone(), &kept, clip, 3.0).unwrap().terms.loss,
                &|a| kl_k2(a, b.clone(), &kept).unwrap().loss,
                &|a| kl_k3(a, b.clone(), &kept).unwrap().loss,
                &|a| kl_straight_through(a, b.clone(), &kept).unwrap().loss,
                &|a| value_loss(a, c.clone(), &kept).unwrap().loss,
                &|a| clipped_value_loss(a, b.clone(), c.clone(), &kept, 0.2).unwrap().loss,
            ];
            all.iter()
                .map(|loss| {
                    let a = single(&a).require_grad();
                    let loss = loss(a.clone());
                    let grads = loss.clone().sum().backward();
                    (floats(loss), floats(a.grad(&grads).unwrap()))
                })
                .collect()
        };
        let (poisoned, clean) = (losses(&poisoned), losses(&tokens));
        for ((loss, gradient), clean) in poisoned.iter().zip(&clean) {
            prop_assert_eq!(loss, &clean.0);
            prop_assert_eq!(gradient, &clean.1);
            for i in (0..keep.len()).filter(|&i| !keep[i]) {
                prop_assert_eq!((loss[i], gradient[i]), (0.0, 0.0));
            }
        }
    }

    #[test]
    fn detail_08_reductions_do_not_depend_on_how_a_step_is_cut(
        responses in prop::collection::vec(prop::collection::vec((-64i16..64, any::<bool>()), 0..7), 1..8),
        cut in any::<prop::sample::Index>(),
    ) {
        let cut = cut.index(responses.len() + 1);
        let lens = |part: &[Vec<(i16, bool)>]| part.iter().map(Vec::len).collect::<Vec<_>>();
        let all: Vec<(i16, bool)> = responses.concat();
        let keep = TokenMask::from(all.iter().map(|token| token.1).collect::<Vec<_>>());
        let index = ResponseIndex::of_whole_responses(&lens(&responses));
        let kept_responses = responses_kept(&index, &keep).unwrap();
        let share = |part: &[Vec<(i16, bool)>]| {
            let tokens = part.concat();
            let values: Vec<f64> = tokens.iter().map(|token| f64::from(token.0) / 4.0).collect();
            let values = leaf(&values);
            let here = TokenMask::from(tokens.iter().map(|token| token.1).collect::<Vec<_>>());
            let index = ResponseIndex::of_whole_responses(&lens(part));
            let (v, i) = (|| values.clone(), &index);
            [
                token_mean(v(), &here, keep.kept()),
                response_mean(v(), i, &here, kept_responses),
                response_mean(v(), i, &here, responses.len()),
                constant_length_mean(v(), i, &here, responses.len(), 7),
            ]
            .map(|share| {
                let share = share.unwrap();
                let gradient = match tokens.is_empty() {
                    true => vec![],
                    false => numbers(values.grad(&share.backward()).unwrap()),
                };
                (numbers(share)[0], gradient)
            })
        };
        let (first, second) = responses.split_at(cut);
        let (first, second, whole) = (share(first), share(second), share(&responses));
        for ((first, second), whole) in first.into_iter().zip(second).zip(whole) {
            prop_assert!((first.0 + second.0 - whole.0).abs() <= TOLERANCE * whole.0.abs().max(1.0));
            prop_assert_eq!([first.1, second.1].concat(), whole.1);
        }
    }

    #[test]
    fn k2_and_k3_are_never_negative(tokens in tokens(), scale in prop::sample::select(vec![1.0f32, 1e-4])) {
        let [p, q, _] = unzip(&tokens);
        let q: Vec<f32> = p.iter().zip(q).map(|(p, q)| p + scale * (q + 6.0)).collect();
        let kl = kl_estimates(single(&p), single(&q), &TokenMask::all(p.len())).unwrap();
        prop_assert!(floats(kl.k2).iter().all(|&k2| k2 >= 0.0));
        prop_assert!(floats(kl.k3).iter().all(|&k3| k3 >= 0.0));
    }
}

/// A policy and a reference over five tokens.
const LOGITS: [f64; 5] = [0.3, -1.1, 0.9, 0.0, -0.4];
const REFERENCE_LOGITS: [f64; 5] = [-0.2, 0.7, 0.1, -1.3, 0.5];

fn softmax(logits: [f64; 5]) -> [f64; 5] {
    let sum: f64 = logits.iter().map(|logit| logit.exp()).sum();
    logits.map(|logit| logit.exp() / sum)
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// The expectation, over tokens drawn from the policy, of a loss of the tokens' log-probabilities: value and gradient by logits.
fn expected(loss: impl Fn(Tensor<1>, Tensor<1>) -> Tensor<1>) -> (f64, Vec<f64>) {
    let logits = leaf(&LOGITS);
    let logps = |logits: Tensor<1>| logits.clone() - log_sum_exp(logits.unsqueeze_dim(0));
    let policy = logps(logits.clone());
    let reference = logps(constant(&REFERENCE_LOGITS));
    // Drawn tokens carry no gradient: the probabilities are constants.
    let drawn = constant(&softmax(LOGITS));
    let loss = (loss(policy, reference) * drawn).sum();
    let grads = loss.backward();
    (numbers(loss)[0], numbers(logits.grad(&grads).unwrap()))
}

#[test]
fn detail_21_what_the_kl_losses_are_in_expectation() {
    let (p, q) = (softmax(LOGITS), softmax(REFERENCE_LOGITS));
    let delta: Vec<f64> = p.iter().zip(&q).map(|(p, q)| (p / q).ln()).collect();
    let kl = dot(&p, &delta);
    let true_gradient: Vec<f64> = p
        .iter()
        .zip(&delta)
        .map(|(p, delta)| p * (delta - kl))
        .collect();
    let forward_gradient: Vec<f64> = p.iter().zip(&q).map(|(p, q)| p - q).collect();
    let all = TokenMask::all(5);
    let loss = |terms: Result<KlTerms, LossError>| terms.unwrap().loss;

    let (value, gradient) = expected(|policy, reference| policy - reference);
    assert_close("k1", &[value], &[kl]);
    assert_close("∇k1", &gradient, &[0.0; 5]);

    let squares: Vec<f64> = delta.iter().map(|delta| delta * delta / 2.0).collect();
    let (value, gradient) = expected(|policy, reference| loss(kl_k2(policy, reference, &all)));
    assert_close("k2", &[value], &[dot(&p, &squares)]);
    assert_close("∇k2", &gradient, &true_gradient);

    let (value, gradient) = expected(|policy, reference| loss(kl_k3(policy, reference, &all)));
    assert_close("k3", &[value], &[kl]);
    assert_close("∇k3", &gradient, &forward_gradient);
    assert!((gradient[0] - true_gradient[0]).abs() > 1e-2);

    let (value, gradient) =
        expected(|policy, reference| loss(kl_straight_through(policy, reference, &all)));
    assert_close("straight-through", &[value], &[kl]);
    assert_close("∇straight-through", &gradient, &true_gradient);

    let estimate = |name: fn(pivotal_loss::KlEstimates) -> Tensor<1>| {
        let logps = |p: &[f64]| constant(&p.iter().map(|p| p.ln()).collect::<Vec<_>>());
        dot(
            &p,
            &numbers(name(kl_estimates(logps(&p), logps(&q), &all).unwrap())),
        )
    };
    assert_close(
        "k1 and k3",
        &[estimate(|kl| kl.k1), estimate(|kl| kl.k3)],
        &[kl, kl],
    );
    assert_close("k2", &[estimate(|kl| kl.k2)], &[dot(&p, &squares)]);
}

#[test]
fn the_forward_kl_of_a_token_is_the_sum_over_the_vocabulary() {
    let matrix = |logits: [f64; 5]| constant(&logits).unsqueeze_dim::<2>(0);
    let logits = matrix(LOGITS).require_grad();
    let kl = token_forward_kl(logits.clone(), matrix(REFERENCE_LOGITS)).unwrap();
    let grads = kl.backward();
    let (p, q) = (softmax(LOGITS), softmax(REFERENCE_LOGITS));
    let by_hand: f64 = p.iter().zip(&q).map(|(p, q)| q * (q / p).ln()).sum();
    assert_close("forward KL", &numbers(kl), &[by_hand]);
    let gradient: Vec<f64> = logits.grad(&grads).unwrap().try_into_vec_as().unwrap();
    let expected: Vec<f64> = p.iter().zip(&q).map(|(p, q)| p - q).collect();
    assert_close("its gradient", &gradient, &expected);
}

#[test]
fn a_policy_gradient_over_the_vocabulary_is_that_of_the_expected_advantage() {
    // ∇ Σ π·A by the logits is π·(A - Σ π·A): what PPO at ratio 1 must give in expectation, with the sign of a loss.
    let advantages = [1.0, -2.0, 0.5, 0.0, 3.0];
    let p = softmax(LOGITS);
    let (_, gradient) = expected(|policy, _| {
        let (old, keep) = (policy.clone().detach(), TokenMask::all(5));
        ppo(policy, old, constant(&advantages), &keep, Clip::default())
            .unwrap()
            .loss
    });
    let mean = dot(&p, &advantages);
    let wanted: Vec<f64> = p
        .iter()
        .zip(advantages)
        .map(|(p, a)| -p * (a - mean))
        .collect();
    assert_close("policy gradient", &gradient, &wanted);
}

#[test]
fn a_ratio_out_of_range_ends_in_its_bound() {
    // e^200 is infinite in f32. Advantages: up, down, none; and up from far below, which is never clipped.
    let new = single(&[0.0, 0.0, 0.0, -300.0]).require_grad();
    let (old, advantages) = (
        single(&[-200.0, -200.0, -200.0, -1.0]),
        single(&[2.0, -1.0, 0.0, 1.0]),
    );
    let keep = TokenMask::all(4);
    let bounded = dual_clip_ppo(new.clone(), old, advantages, &keep, Clip::default(), 3.0).unwrap();
    let grads = bounded.terms.loss.clone().sum().backward();
    assert_eq!(floats(bounded.terms.loss), [-2.4, 3.0, 0.0, 0.0]);
    assert_eq!(floats(new.grad(&grads).unwrap()), [0.0; 4]);
    assert_eq!(floats(bounded.clipped_dual), [0.0, 1.0, 0.0, 0.0]);
    assert_eq!(floats(bounded.terms.clipped_high), [1.0, 0.0, 0.0, 0.0]);
}

#[test]
fn detail_06_nothing_kept_is_zero_without_gradient() {
    let none = TokenMask::none(3);
    let index = ResponseIndex::of_whole_responses(&[2, 1]);
    let values = || single(&[f32::NAN, f32::INFINITY, 1.0]).require_grad();
    type Reduce<'a> = &'a dyn Fn(Tensor<1>) -> Tensor<1>;
    let reductions: [Reduce; 4] = [
        &|values| token_mean(values, &none, 0).unwrap(),
        &|values| token_mean(values, &none, 5).unwrap(),
        &|values| response_mean(values, &index, &none, 0).unwrap(),
        &|values| constant_length_mean(values, &index, &none, 2, 8).unwrap(),
    ];
    for reduce in reductions {
        let values = values();
        let share = reduce(values.clone());
        let grads = share.backward();
        assert_eq!(floats(share), [0.0]);
        assert_eq!(floats(values.grad(&grads).unwrap()), [0.0; 3]);
    }
    let empty = Tensor::<1>::zeros([0], &Device::flex());
    assert_eq!(
        floats(token_mean(empty, &TokenMask::all(0), 3).unwrap()),
        [0.0]
    );
    assert_eq!(responses_kept(&index, &none).unwrap(), 0);
}

#[test]
fn what_is_frozen_gets_no_gradient() {
    let tensor = || leaf(&[-1.0, -2.0]);
    let (old, advantages, returns, baseline) = (tensor(), tensor(), tensor(), leaf(&[0.5]));
    let keep = TokenMask::all(2);
    let terms = ppo(
        tensor(),
        old.clone(),
        advantages.clone(),
        &keep,
        Clip::default(),
    )
    .unwrap();
    let tracked = [
        &terms.ratio,
        &terms.clipped_low,
        &terms.clipped_high,
        &terms.kl_from_old.k3,
    ];
    assert!(!tracked.iter().any(|tensor| tensor.is_tracked()));
    let kl = kl_k2(tensor(), old.clone(), &keep).unwrap();
    assert!(!kl.estimates.k1.is_tracked());
    let value = clipped_value_loss(tensor(), old.clone(), returns.clone(), &keep, 0.1).unwrap();
    let judgements = [Judgement::Desirable, Judgement::Undesirable];
    let weights = KtoWeights::default();
    let kto = kto(
        tensor(),
        old.clone(),
        &judgements,
        baseline.clone(),
        0.1,
        weights,
    )
    .unwrap();
    let sum = terms.loss + kl.loss + value.loss + kto.loss;
    let grads = sum.sum().backward();
    for frozen in [old, advantages, returns, baseline] {
        assert!(frozen.grad(&grads).is_none());
    }
    let mismatched = kto_baseline(tensor(), tensor()).unwrap();
    assert!(!mismatched.is_tracked());
}

#[test]
fn the_chosen_divergence_of_tdpo2_has_no_gradient_and_without_alpha_it_is_dpo() {
    let logps = |chosen: f64, rejected: f64| PairLogps {
        chosen: leaf(&[chosen]),
        rejected: leaf(&[rejected]),
    };
    let kl = PairKl {
        chosen: leaf(&[0.7]),
        rejected: leaf(&[0.2]),
    };
    let (policy, reference) = (logps(-3.0, -4.0), logps(-3.5, -2.0));
    let terms = tdpo2(policy.clone(), kl.clone(), reference.clone(), 0.3, 0.5).unwrap();
    let grads = terms.loss.backward();
    assert!(kl.chosen.grad(&grads).is_none());
    assert!(numbers(kl.rejected.grad(&grads).unwrap())[0] > 0.0);
    let without = tdpo2(policy.clone(), kl, reference.clone(), 0.3, 0.0).unwrap();
    let plain = dpo(policy, reference, 0.3).unwrap();
    assert_eq!(numbers(without.loss), numbers(plain.loss));
}

#[test]
fn errors_name_the_input() {
    let (one, keep) = (|| single(&[-1.0]), TokenMask::all(1));
    let message = |error: LossError| error.to_string();
    let clip = |low: f64, high: f64| Clip { low, high };
    let bad = |clip| message(ppo(one(), one(), one(), &keep, clip).unwrap_err());
    assert_eq!(
        bad(clip(1.5, 0.2)),
        "`clip.low` is 1.5, expected a number from 0 to 1"
    );
    assert!(bad(clip(0.2, f64::NAN)).starts_with("`clip.high` is NaN"));
    let dual = dual_clip_ppo(one(), one(), one(), &keep, clip(0.2, 0.2), 1.2).unwrap_err();
    assert!(message(dual).starts_with("`dual` is 1.2"));
    let two = single(&[0.0, 0.0]);
    let short = ppo(one(), one(), two.clone(), &keep, Clip::default()).unwrap_err();
    assert_eq!(message(short), "`advantages` has 2 entries, expected 1");
    assert_eq!(
        message(token_mean(two.clone(), &TokenMask::all(2), 1).unwrap_err()),
        "`step_tokens` is 1, expected at least the 2 of this batch: it counts the whole optimizer step"
    );
    let none = Tensor::<1>::zeros([0], &Device::flex());
    assert_eq!(
        message(kto_baseline(none.clone(), none).unwrap_err()),
        "`policy` is empty, expected at least one entry"
    );
    let weights = KtoWeights::default();
    let baseline = kto(one(), one(), &[Judgement::Desirable], two, 0.1, weights).unwrap_err();
    assert_eq!(message(baseline), "`baseline` has 2 entries, expected 1");
}
