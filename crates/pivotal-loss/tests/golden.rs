//! Values and gradients of the reference implementations, in f64 (made by `scripts/golden/losses.py`).

#[path = "support/fixture.rs"]
mod fixture;
mod support;

use burn::tensor::Tensor;
use fixture::{cases, mask};
use pivotal_loss::{
    Normalisation, PairLogps, ResponseIndex, ScoreAggregation, ScorePair, bradley_terry, cdpo,
    center_penalty, dpo, hinge, ipo, kept_sums, robust_dpo, sequence_scores, sft, simpo,
    token_l2_penalty,
};
use serde::Deserialize;
use support::{assert_close, constant, leaf, numbers};

#[derive(Deserialize)]
struct DpoCase {
    beta: f64,
    chosen_logps: f64,
    rejected_logps: f64,
    reference_chosen_logps: f64,
    reference_rejected_logps: f64,
    loss: f64,
    chosen_reward: f64,
    rejected_reward: f64,
    chosen_gradient: f64,
    rejected_gradient: f64,
}

#[test]
fn dpo_is_trls() {
    for (at, case) in cases::<DpoCase>(include_str!("golden/dpo.json"))
        .iter()
        .enumerate()
    {
        let (chosen, rejected) = (leaf(&[case.chosen_logps]), leaf(&[case.rejected_logps]));
        let policy = PairLogps {
            chosen: chosen.clone(),
            rejected: rejected.clone(),
        };
        let reference = PairLogps {
            chosen: constant(&[case.reference_chosen_logps]),
            rejected: constant(&[case.reference_rejected_logps]),
        };
        let terms = dpo(policy, reference, case.beta).unwrap();
        let grads = terms.loss.backward();
        let gradient = |side: &Tensor<1>| numbers(side.grad(&grads).unwrap());
        let what = |name: &str| format!("case {at}, {name}");
        assert_close(&what("loss"), &numbers(terms.loss), &[case.loss]);
        let (chosen_reward, rejected_reward) = (terms.chosen_reward, terms.rejected_reward);
        assert_close(
            &what("reward"),
            &numbers(chosen_reward),
            &[case.chosen_reward],
        );
        assert_close(
            &what("reward"),
            &numbers(rejected_reward),
            &[case.rejected_reward],
        );
        assert_close(
            &what("gradient"),
            &gradient(&chosen),
            &[case.chosen_gradient],
        );
        assert_close(
            &what("gradient"),
            &gradient(&rejected),
            &[case.rejected_gradient],
        );
    }
}

#[derive(Deserialize)]
struct MaskedDpoCase {
    normalisation: String,
    beta: f64,
    chosen_token_logps: Vec<f64>,
    reference_chosen_token_logps: Vec<f64>,
    chosen_keep: Vec<u8>,
    rejected_token_logps: Vec<f64>,
    reference_rejected_token_logps: Vec<f64>,
    rejected_keep: Vec<u8>,
    loss: f64,
    chosen_log_ratio: f64,
    rejected_log_ratio: f64,
    chosen_gradient: Vec<f64>,
    rejected_gradient: Vec<f64>,
}

#[test]
fn masked_dpo_is_trls() {
    let cases = cases::<MaskedDpoCase>(include_str!("golden/masked_dpo.json"));
    for (at, case) in cases.iter().enumerate() {
        let normalisation = match case.normalisation.as_str() {
            "sum" => Normalisation::Sum,
            "kept_mean" => Normalisation::KeptMean,
            "rescaled_sum" => Normalisation::RescaledSum,
            other => panic!("`{other}` is no normalisation"),
        };
        // Both sides in one flat batch: chosen, then rejected.
        let flat = |chosen: &[f64], rejected: &[f64]| [chosen, rejected].concat();
        let (chosen, rejected) = (&case.chosen_token_logps, &case.rejected_token_logps);
        let policy = leaf(&flat(chosen, rejected));
        let reference = constant(&flat(
            &case.reference_chosen_token_logps,
            &case.reference_rejected_token_logps,
        ));
        let keep = mask(&[case.chosen_keep.as_slice(), &case.rejected_keep].concat());
        let index = ResponseIndex::of_whole_responses(&[chosen.len(), rejected.len()]);
        let pair = |token_logps: Tensor<1>| {
            let sums = kept_sums(token_logps, &index, &keep, normalisation).unwrap();
            PairLogps {
                chosen: sums.clone().narrow(0, 0, 1),
                rejected: sums.narrow(0, 1, 1),
            }
        };
        let terms = dpo(pair(policy.clone()), pair(reference), case.beta).unwrap();
        let grads = terms.loss.backward();
        let what = |name: &str| format!("case {at} ({}), {name}", case.normalisation);
        assert_close(&what("loss"), &numbers(terms.loss), &[case.loss]);
        let rewards = [
            (terms.chosen_reward, case.chosen_log_ratio),
            (terms.rejected_reward, case.rejected_log_ratio),
        ];
        for (reward, log_ratio) in rewards {
            assert_close(
                &what("log-ratio"),
                &numbers(reward),
                &[case.beta * log_ratio],
            );
        }
        let expected = flat(&case.chosen_gradient, &case.rejected_gradient);
        let gradient = numbers(policy.grad(&grads).unwrap());
        assert_close(&what("gradient"), &gradient, &expected);
    }
}

#[derive(Deserialize)]
struct VariantCase {
    name: String,
    beta: f64,
    #[serde(default)]
    label_smoothing: f64,
    #[serde(default)]
    simpo_gamma: f64,
    chosen_token_logps: Vec<f64>,
    reference_chosen_token_logps: Vec<f64>,
    chosen_keep: Vec<u8>,
    rejected_token_logps: Vec<f64>,
    reference_rejected_token_logps: Vec<f64>,
    rejected_keep: Vec<u8>,
    loss: f64,
    chosen_gradient: Vec<f64>,
    rejected_gradient: Vec<f64>,
}

#[test]
fn the_variants_of_dpo_are_trls() {
    let cases = cases::<VariantCase>(include_str!("golden/dpo_variants.json"));
    for (at, case) in cases.iter().enumerate() {
        let (chosen, rejected) = (&case.chosen_token_logps, &case.rejected_token_logps);
        let policy = leaf(&[chosen.as_slice(), rejected].concat());
        let reference = [
            case.reference_chosen_token_logps.as_slice(),
            &case.reference_rejected_token_logps,
        ];
        let reference = constant(&reference.concat());
        let keep = mask(&[case.chosen_keep.as_slice(), &case.rejected_keep].concat());
        let index = ResponseIndex::of_whole_responses(&[chosen.len(), rejected.len()]);
        let pair = |token_logps: &Tensor<1>, normalisation| {
            let sums = kept_sums(token_logps.clone(), &index, &keep, normalisation).unwrap();
            PairLogps {
                chosen: sums.clone().narrow(0, 0, 1),
                rejected: sums.narrow(0, 1, 1),
            }
        };
        let both = |normalisation| {
            (
                pair(&policy, normalisation),
                pair(&reference, normalisation),
            )
        };
        let (sums, means) = (both(Normalisation::Sum), both(Normalisation::KeptMean));
        let (beta, smoothing) = (case.beta, case.label_smoothing);
        let terms = match case.name.as_str() {
            "hinge" => hinge(sums.0, sums.1, beta),
            "ipo_summed" => ipo(sums.0, sums.1, beta),
            "ipo_length_normalised" => ipo(means.0, means.1, beta),
            "cdpo" => cdpo(sums.0, sums.1, beta, smoothing),
            "robust" => robust_dpo(sums.0, sums.1, beta, smoothing),
            "simpo" => simpo(means.0, beta, case.simpo_gamma),
            other => panic!("`{other}` is no variant"),
        };
        let loss = terms.unwrap().loss;
        let grads = loss.backward();
        let what = |name: &str| format!("case {at} ({}), {name}", case.name);
        assert_close(&what("loss"), &numbers(loss), &[case.loss]);
        let expected = [case.chosen_gradient.as_slice(), &case.rejected_gradient].concat();
        let gradient = numbers(policy.grad(&grads).unwrap());
        assert_close(&what("gradient"), &gradient, &expected);
    }
}

#[derive(Deserialize)]
struct SftCase {
    token_logps: Vec<Vec<f64>>,
    keep: Vec<Vec<u8>>,
    kept_tokens: usize,
    loss: f64,
    gradient: Vec<Vec<f64>>,
}

#[test]
fn sft_is_pytorchs_cross_entropy() {
    for (at, case) in cases::<SftCase>(include_str!("golden/sft.json"))
        .iter()
        .enumerate()
    {
        let token_logps = leaf(&case.token_logps.concat());
        let keep = mask(&case.keep.concat());
        assert_eq!(keep.kept(), case.kept_tokens);
        // With nothing kept a step is skipped; the fixture defines its loss as 0, which any denominator gives.
        let denominator = case.kept_tokens.max(1) as f64;
        let terms = sft(token_logps.clone(), &keep, denominator).unwrap();
        let loss = terms.loss.sum();
        let grads = loss.backward();
        assert_close(&format!("case {at}, loss"), &numbers(loss), &[case.loss]);
        let gradient = numbers(token_logps.grad(&grads).unwrap());
        assert_close(
            &format!("case {at}, gradient"),
            &gradient,
            &case.gradient.concat(),
        );
    }
}

#[derive(Deserialize)]
struct BradleyTerryCase {
    aggregation: String,
    center: f64,
    token_l2: f64,
    chosen_values: Vec<f64>,
    rejected_values: Vec<f64>,
    chosen_score: f64,
    rejected_score: f64,
    ranking_loss: f64,
    squared_score_sum: f64,
    mean_squared_value: f64,
    loss: f64,
    chosen_gradient: Vec<f64>,
    rejected_gradient: Vec<f64>,
}

#[test]
fn bradley_terry_is_trls() {
    let cases = cases::<BradleyTerryCase>(include_str!("golden/bradley_terry.json"));
    for (at, case) in cases.iter().enumerate() {
        let aggregation = match case.aggregation.as_str() {
            "mean" => ScoreAggregation::Mean,
            "sum" => ScoreAggregation::Sum,
            "last" => ScoreAggregation::Last,
            other => panic!("`{other}` is no aggregation"),
        };
        let (chosen, rejected) = (&case.chosen_values, &case.rejected_values);
        let values = leaf(&[chosen.as_slice(), rejected].concat());
        let index = ResponseIndex::of_whole_responses(&[chosen.len(), rejected.len()]);
        let scores = sequence_scores(values.clone(), &index, aggregation).unwrap();
        let pair = ScorePair {
            chosen: scores.clone().narrow(0, 0, 1),
            rejected: scores.clone().narrow(0, 1, 1),
        };
        let ranking = bradley_terry(pair.clone()).unwrap();
        let center = center_penalty(pair, case.center).unwrap();
        let token_l2 = token_l2_penalty(values.clone(), case.token_l2)
            .unwrap()
            .mean();
        let loss = ranking.loss.clone() + center.clone() + token_l2.clone();
        let grads = loss.backward();

        let what = |name: &str| format!("case {at} ({}), {name}", case.aggregation);
        let expected = [case.chosen_score, case.rejected_score];
        assert_close(&what("scores"), &numbers(scores), &expected);
        assert_close(
            &what("ranking"),
            &numbers(ranking.loss),
            &[case.ranking_loss],
        );
        let margin = case.chosen_score - case.rejected_score;
        assert_close(&what("margin"), &numbers(ranking.margin), &[margin]);
        let expected = case.center * case.squared_score_sum;
        assert_close(&what("center"), &numbers(center), &[expected]);
        let expected = case.token_l2 * case.mean_squared_value;
        assert_close(&what("token_l2"), &numbers(token_l2), &[expected]);
        assert_close(&what("loss"), &numbers(loss), &[case.loss]);
        let expected = [case.chosen_gradient.as_slice(), &case.rejected_gradient].concat();
        let gradient = numbers(values.grad(&grads).unwrap());
        assert_close(&what("gradient"), &gradient, &expected);
    }
}
