//! Values and gradients from the definitions, in f64 (made by `scripts/golden/advantages.py`).

use pivotal_credit::{
    Gae, GroupAdvantage, KlEstimator, MaskedValues, Variance, WhitenMean, group_advantages, whiten,
};
use serde::Deserialize;

/// Inputs are exact in f32 and sums run in f64; only the result is rounded to f32, relative to the largest number involved.
const TOLERANCE: f64 = 1e-6;

#[derive(Deserialize)]
struct Golden<Case> {
    cases: Vec<Case>,
}

fn cases<Case: for<'de> Deserialize<'de>>(json: &str) -> Vec<Case> {
    let golden: Golden<Case> = serde_json::from_str(json).unwrap();
    assert!(!golden.cases.is_empty());
    golden.cases
}

fn close(found: impl IntoIterator<Item = f64>, expected: &[f64], tolerance: f64) {
    let found: Vec<f64> = found.into_iter().collect();
    assert_eq!(found.len(), expected.len());
    for (found, expected) in found.iter().zip(expected) {
        let error = (found - expected).abs();
        assert!(
            error <= tolerance * expected.abs().max(1.0),
            "{found} is not {expected}"
        );
    }
}

fn flags(mask: &[u8]) -> Vec<bool> {
    mask.iter().map(|&flag| flag == 1).collect()
}

#[derive(Deserialize)]
struct GaeCase {
    gamma: f64,
    gae_lambda: f64,
    final_value: f32,
    rewards: Vec<f32>,
    values: Vec<f32>,
    response_mask: Vec<u8>,
    advantages: Vec<f64>,
    returns_of_own_tokens: Vec<f64>,
}

#[test]
fn detail_18_gae_is_the_definitions_double_sum() {
    for case in cases::<GaeCase>(include_str!("golden/gae.json")) {
        let mask = flags(&case.response_mask);
        let gae = Gae::new(case.gamma, case.gae_lambda).unwrap();
        let found = gae
            .advantages(&case.rewards, &case.values, &mask, case.final_value)
            .unwrap();
        // Values up to about 8 enter each sum.
        close(
            found.advantages.iter().copied().map(f64::from),
            &case.advantages,
            TOLERANCE,
        );
        let own = found.returns.iter().zip(&mask).filter(|(_, own)| **own);
        close(
            own.map(|(&value, _)| f64::from(value)),
            &case.returns_of_own_tokens,
            TOLERANCE,
        );
    }
}

#[derive(Deserialize)]
struct WhitenCase {
    variance: Variance,
    mean: WhitenMean,
    values: Vec<Vec<f32>>,
    response_masks: Vec<Vec<u8>>,
    whitened_own: Vec<Vec<f64>>,
}

#[test]
fn whitening_is_torchs() {
    for mut case in cases::<WhitenCase>(include_str!("golden/whiten.json")) {
        let masks: Vec<Vec<bool>> = case.response_masks.iter().map(|mask| flags(mask)).collect();
        let rows = case.values.iter_mut().zip(&masks);
        let mut batch: Vec<MaskedValues<'_>> = rows
            .map(|(values, response_mask)| MaskedValues {
                values,
                response_mask,
            })
            .collect();
        whiten(&mut batch, case.mean, case.variance).unwrap();
        for ((values, mask), expected) in case.values.iter().zip(&masks).zip(&case.whitened_own) {
            let own = values.iter().zip(mask).filter(|(_, own)| **own);
            close(own.map(|(&value, _)| f64::from(value)), expected, TOLERANCE);
        }
    }
}

#[derive(Deserialize)]
struct GroupCase {
    size: usize,
    variance: Variance,
    epsilon: f64,
    scores: Vec<f32>,
    group_normalised: Vec<f64>,
    batch_normalised: Vec<f64>,
    mean_only: Vec<f64>,
    leave_one_out: Vec<f64>,
}

#[test]
fn group_advantages_are_grpos_and_rloos() {
    for case in cases::<GroupCase>(include_str!("golden/group_advantages.json")) {
        let prompts: Vec<u64> = (0..case.scores.len())
            .map(|index| (index / case.size) as u64)
            .collect();
        for (kind, expected) in [
            (GroupAdvantage::GroupNormalised, &case.group_normalised),
            (GroupAdvantage::BatchNormalised, &case.batch_normalised),
            (GroupAdvantage::MeanOnly, &case.mean_only),
            (GroupAdvantage::LeaveOneOut, &case.leave_one_out),
        ] {
            let found = group_advantages(&prompts, &case.scores, kind, case.variance, case.epsilon)
                .unwrap();
            close(
                found.advantages.into_iter().map(f64::from),
                expected,
                TOLERANCE,
            );
            assert_eq!((found.groups, found.flat_groups), (3, 1));
        }
    }
}

#[derive(Deserialize)]
struct KlCase {
    kl: f64,
    kl_gradient: Vec<f64>,
    reversed_kl_gradient: Vec<f64>,
    log_ratios: Vec<f64>,
    probabilities: Vec<f64>,
    k2: Vec<f64>,
    k3: Vec<f64>,
    k1_loss_gradient: Vec<f64>,
    k2_loss_gradient: Vec<f64>,
    k3_loss_gradient: Vec<f64>,
}

#[test]
fn kl_estimates_and_their_gradients_are_torchs() {
    /// The fixtures carry 15 digits of f64; probabilities from logits lose one or two more.
    const EXACT: f64 = 1e-13;
    for case in cases::<KlCase>(include_str!("golden/kl.json")) {
        let each = |estimator: KlEstimator| {
            case.log_ratios
                .iter()
                .map(move |&ratio| estimator.of(ratio))
        };
        close(each(KlEstimator::K2), &case.k2, EXACT);
        close(each(KlEstimator::K3), &case.k3, EXACT);
        for estimator in [KlEstimator::K1, KlEstimator::K3] {
            let expected: f64 = each(estimator)
                .zip(&case.probabilities)
                .map(|(k, p)| k * p)
                .sum();
            close([expected], &[case.kl], EXACT);
        }
        let gradient = |estimator: KlEstimator| -> Vec<f64> {
            let weights = case.log_ratios.iter().zip(&case.probabilities);
            let weights: Vec<f64> = weights
                .map(|(&ratio, p)| p * estimator.derivative(ratio))
                .collect();
            let total: f64 = weights.iter().sum();
            // Σ_y w_y (1[y = logit] − π(logit)).
            weights
                .iter()
                .zip(&case.probabilities)
                .map(|(weight, p)| weight - total * p)
                .collect()
        };
        close(gradient(KlEstimator::K1), &case.k1_loss_gradient, EXACT);
        close(gradient(KlEstimator::K2), &case.k2_loss_gradient, EXACT);
        close(gradient(KlEstimator::K3), &case.k3_loss_gradient, EXACT);
        close(gradient(KlEstimator::K1), &[0.0; 5], EXACT);
        close(gradient(KlEstimator::K2), &case.kl_gradient, EXACT);
        close(gradient(KlEstimator::K3), &case.reversed_kl_gradient, EXACT);
    }
}
