//! Implementation details of rewards, each under its own name, with published values where there are any.

use pivotal_core::{ErrorKind, HasKind, SegmentRecord, Sign};
use pivotal_credit::{
    Ending, Error, KlController, KlEstimator, KlPenalty, KlSum, MissingEos, RunningScale,
    ScoreNormalisation, ScoreRule, ScoreScaling, Spread, SpreadParts, spread_reward,
};
use proptest::prelude::*;

const PLAIN: KlPenalty = KlPenalty {
    kl_coef: 0.5,
    estimator: KlEstimator::K1,
    log_ratio_clamp: None,
    kl_clamp: None,
};

fn softmax(logits: &[f64]) -> Vec<f64> {
    let largest = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let parts: Vec<f64> = logits.iter().map(|logit| (logit - largest).exp()).collect();
    let total: f64 = parts.iter().sum();
    parts.iter().map(|part| part / total).collect()
}

/// Five tokens: their logits under the policy and under the reference.
const POLICY: [f64; 5] = [0.3, -1.2, 2.0, 0.0, -0.4];
const REFERENCE: [f64; 5] = [1.0, 0.1, 0.7, -2.0, 0.2];

fn kl(from: &[f64], to: &[f64]) -> f64 {
    let terms = from.iter().zip(to).map(|(p, q)| p * (p / q).ln());
    terms.sum()
}

#[test]
fn detail_21_k1_and_k3_are_unbiased_by_enumeration_over_five_tokens() {
    let (policy, reference) = (softmax(&POLICY), softmax(&REFERENCE));
    let expected = |estimator: KlEstimator| -> f64 {
        let pairs = policy.iter().zip(&reference);
        pairs.map(|(p, q)| p * estimator.of((p / q).ln())).sum()
    };
    let truth = kl(&policy, &reference);
    assert!((expected(KlEstimator::K1) - truth).abs() < 1e-14);
    assert!((expected(KlEstimator::K3) - truth).abs() < 1e-14);
    // k2 is biased, and by how much is no accident of rounding.
    assert!((expected(KlEstimator::K2) - truth).abs() > 1e-3);
}

/// Σ_y π(y) · dk/dΔ · ∇ log π(y): the expected gradient of an estimator taken as a loss, by the policy's logits.
fn loss_gradient(estimator: KlEstimator) -> [f64; 5] {
    let (policy, reference) = (softmax(&POLICY), softmax(&REFERENCE));
    let mut gradient = [0.0; 5];
    for (token, (p, q)) in policy.iter().zip(&reference).enumerate() {
        let weight = p * estimator.derivative((p / q).ln());
        for (logit, gradient) in gradient.iter_mut().enumerate() {
            let own = f64::from(u8::from(logit == token));
            *gradient += weight * (own - policy[logit]);
        }
    }
    gradient
}

/// Central differences by the policy's logits.
fn numeric_gradient(of: impl Fn(&[f64]) -> f64) -> [f64; 5] {
    let step = 1e-5;
    std::array::from_fn(|logit| {
        let at = |shift: f64| {
            let mut logits = POLICY;
            logits[logit] += shift;
            of(&softmax(&logits))
        };
        (at(step) - at(-step)) / (2.0 * step)
    })
}

fn assert_near(found: [f64; 5], expected: [f64; 5]) {
    for (found, expected) in found.iter().zip(expected) {
        // Central differences of step 1e-5 leave about 1e-10.
        assert!((found - expected).abs() < 1e-8, "{found} is not {expected}");
    }
}

#[test]
fn detail_21_as_a_loss_k1_has_no_gradient_k2_the_kls_and_k3_the_reversed_kls() {
    let reference = softmax(&REFERENCE);
    assert_near(loss_gradient(KlEstimator::K1), [0.0; 5]);
    let forward = numeric_gradient(|policy| kl(policy, &reference));
    assert_near(loss_gradient(KlEstimator::K2), forward);
    let reversed = numeric_gradient(|policy| kl(&reference, policy));
    assert_near(loss_gradient(KlEstimator::K3), reversed);
    assert!(forward.iter().any(|part| part.abs() > 0.1));
}

#[test]
fn the_derivatives_are_the_estimators() {
    for estimator in [KlEstimator::K1, KlEstimator::K2, KlEstimator::K3] {
        for log_ratio in [-3.0, -0.1, 0.0, 0.1, 3.0] {
            let step = 1e-6;
            let slope =
                (estimator.of(log_ratio + step) - estimator.of(log_ratio - step)) / (2.0 * step);
            assert!((estimator.derivative(log_ratio) - slope).abs() < 1e-6);
        }
    }
}

#[test]
fn k3_keeps_its_digits_near_zero_and_is_never_negative() {
    // Δ²/2 − Δ³/6 to first order; the textbook form is 0 or noise here.
    let tiny = 1e-7;
    assert!((KlEstimator::K3.of(tiny) - tiny * tiny / 2.0).abs() < 1e-3 * tiny * tiny);
    for exponent in -300..2 {
        for sign in [-1.0, 1.0] {
            assert!(KlEstimator::K3.of(sign * 10.0_f64.powi(exponent)) >= 0.0);
        }
    }
}

#[test]
fn detail_17_the_score_is_paid_at_the_last_response_token_and_not_at_a_pad() {
    let mask = [true, true, true, false, false];
    let parts = SpreadParts {
        score: 3.0,
        segments: &[],
        signal: &[],
    };
    let task = spread_reward(Spread::Last, parts, &mask).unwrap();
    let shaped = PLAIN
        .rewards(
            &[-1.0, -2.0, -0.5, 0.0, f32::NAN],
            &[-2.0, -1.0, -0.5, -9.0, 0.0],
            &task,
            &mask,
        )
        .unwrap();
    // −0.5 · [1, −1, 0], the score at index 2.
    assert_eq!(shaped.rewards, [-0.5, 0.5, 3.0, 0.0, 0.0]);
    assert_eq!(
        (shaped.kl.tokens, shaped.kl.k1, shaped.kl.k2),
        (3, 0.0, 1.0)
    );
    assert_eq!(shaped.kl.max_abs_log_ratio, 1.0);
}

#[test]
fn detail_24_clamps_are_counted_and_the_logged_kl_is_before_them() {
    let penalty = KlPenalty {
        kl_coef: 1.0,
        log_ratio_clamp: Some(20.0),
        kl_clamp: Some(10.0),
        ..PLAIN
    };
    let shaped = penalty
        .rewards(
            &[0.0, 0.0, 0.0, -5.0],
            &[-30.0, -15.0, -10.0, 0.0],
            &[0.0; 4],
            &[true; 4],
        )
        .unwrap();
    assert_eq!(shaped.rewards, [-10.0, -10.0, -10.0, 5.0]);
    assert_eq!((shaped.clamped_log_ratios, shaped.clamped_kls), (1, 2));
    assert_eq!((shaped.kl.k1, shaped.kl.max_abs_log_ratio), (50.0, 30.0));
    let rule = ScoreRule {
        clamp: Some(10.0),
        ..ScoreRule::default()
    };
    for (score, want, clamped) in [
        (10.0, 10.0, false),
        (10.5, 10.0, true),
        (-99.0, -10.0, true),
    ] {
        let shaped = rule.shape(score, Ending::Eos).unwrap();
        assert_eq!((shaped.score, shaped.clamped), (want, clamped));
    }
}

#[test]
fn detail_17_a_missing_eos_is_penalised_replaced_or_ignored() {
    for (missing_eos, truncated) in [
        (MissingEos::Ignore, 0.75),
        (MissingEos::Penalty(1.0), -0.25),
        (MissingEos::Score(-1.0), -1.0),
    ] {
        let rule = ScoreRule {
            clamp: None,
            missing_eos,
        };
        let cut = rule.shape(0.75, Ending::Truncated).unwrap();
        assert_eq!((cut.score, cut.missing_eos), (truncated, true));
        let whole = rule.shape(0.75, Ending::Eos).unwrap();
        assert_eq!((whole.score, whole.missing_eos), (0.75, false));
    }
}

#[test]
fn faults_name_the_number() {
    let error = PLAIN
        .rewards(&[f32::NAN], &[0.0], &[0.0], &[true])
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFinite);
    assert_eq!(
        error.to_string(),
        "`token_logps` is NaN at index 0, expected a finite number"
    );
    let far = KlPenalty {
        estimator: KlEstimator::K3,
        ..PLAIN
    };
    let error = far.rewards(&[-200.0], &[0.0], &[0.0], &[true]).unwrap_err();
    assert!(matches!(
        error,
        Error::NotFiniteColumn {
            column: "rewards",
            ..
        }
    ));
    let negative = KlPenalty {
        kl_coef: -0.1,
        ..PLAIN
    };
    assert!(matches!(
        negative.rewards(&[], &[], &[], &[]),
        Err(Error::Value { key: "kl_coef", .. })
    ));
    let shut = KlPenalty {
        kl_clamp: Some(0.0),
        ..PLAIN
    };
    let error = shut.rewards(&[0.0], &[0.0], &[0.0], &[true]).unwrap_err();
    assert_eq!(
        error.to_string(),
        "`kl_clamp` is 0, expected a finite number above 0"
    );
    assert!(ScoreRule::default().shape(f32::NAN, Ending::Eos).is_err());
    assert!(matches!(
        ScoreNormalisation::fit(&[1.0, 1.0]),
        Err(Error::Value { .. })
    ));
}

/// OpenAI's 0.15, 6, 10,000, with batches of 512 responses.
#[test]
fn detail_22_the_adaptive_kl_controller_moves_by_at_most_a_fifth_a_horizon() {
    let start = KlController::adaptive(0.15, 6.0, 10_000).unwrap();
    for (kl, error) in [
        (6.0, 0.0),
        (6.6, 0.1),
        (60.0, 0.2),
        (5.4, -0.1),
        (0.0, -0.2),
        (-3.0, -0.2),
    ] {
        let mut controller = start;
        controller.update(kl, 512).unwrap();
        let want = 0.15 * (1.0 + error * 0.0512);
        assert!((controller.kl_coef() - want).abs() < 1e-15, "{kl}");
    }
    let mut fixed = KlController::fixed(0.05).unwrap();
    fixed.update(600.0, 512).unwrap();
    assert_eq!(fixed.kl_coef(), 0.05);
}

#[test]
fn the_kl_controller_survives_a_checkpoint_bit_for_bit() {
    let measured = [7.3, 1.9, 0.4, 11.0, 6.1];
    let mut through = KlController::adaptive(0.15, 6.0, 100).unwrap();
    let mut resumed = through;
    for kl in measured {
        through.update(kl, 32).unwrap();
        let saved = serde_json::to_string(&resumed).unwrap();
        resumed = serde_json::from_str(&saved).unwrap();
        resumed.update(kl, 32).unwrap();
        assert_eq!(resumed.kl_coef().to_bits(), through.kl_coef().to_bits());
    }
}

#[test]
fn the_kl_controller_refuses_what_has_no_meaning() {
    let mut controller = KlController::adaptive(0.15, 6.0, 100).unwrap();
    let before = controller;
    assert_eq!(
        controller.update(f64::NAN, 1).unwrap_err().kind(),
        ErrorKind::NotFinite
    );
    let error = controller.update(0.0, 500).unwrap_err().to_string();
    assert_eq!(
        error,
        "`kl_horizon` is 100, expected more than a fifth of the responses of a batch"
    );
    assert_eq!(controller, before);
    assert!(KlController::adaptive(0.0, 6.0, 100).is_err());
    assert!(KlController::adaptive(0.1, f64::NAN, 100).is_err());
    assert!(KlController::adaptive(0.1, 6.0, 0).is_err());
    assert!(KlController::fixed(-1.0).is_err());
}

/// The reward model's zero is free: pairwise accuracy cannot see it, the sign around a baseline can.
#[test]
fn detail_15_a_constant_added_to_rewards_changes_no_order_but_every_sign() {
    let scores = [0.5_f32, -0.25, 1.0];
    let moved: Vec<f32> = scores.iter().map(|score| score - 2.0).collect();
    assert!(
        moved
            .iter()
            .all(|&score| Sign::of(score, 0.0, 0.0) == Sign::Negative)
    );
    let (fitted, refitted) = (
        ScoreNormalisation::fit(&scores).unwrap(),
        ScoreNormalisation::fit(&moved).unwrap(),
    );
    for (score, moved) in scores.iter().zip(&moved) {
        assert!((fitted.apply(*score) - refitted.apply(*moved)).abs() < 1e-6);
    }
    assert_eq!(ScoreNormalisation::IDENTITY.apply(0.3), 0.3);
}

#[test]
fn a_reward_needs_a_token_to_be_paid_at() {
    let segment = |start, end, score| SegmentRecord {
        start,
        end,
        score,
        sign: Sign::Neutral,
    };
    let paid = |segments: &[SegmentRecord], mask: &[bool]| {
        spread_reward(
            Spread::SegmentEven,
            SpreadParts {
                score: 0.0,
                segments,
                signal: &[],
            },
            mask,
        )
    };
    let two = [segment(0, 1, 1.0), segment(1, 2, 1.0)];
    assert_eq!(
        paid(&two, &[true, false]),
        Err(Error::NoPlace { segment: 1 })
    );
    assert_eq!(paid(&two, &[false, false]), Ok(vec![0.0; 2]));
    let silent = [segment(0, 1, 1.0), segment(1, 2, 0.0)];
    assert_eq!(paid(&silent, &[true, false]), Ok(vec![1.0, 0.0]));
    for gap in [
        &[segment(0, 1, 1.0)][..],
        &[segment(0, 1, 1.0), segment(2, 3, 1.0)],
        &[segment(0, 4, 1.0)],
    ] {
        assert!(matches!(
            paid(gap, &[true; 3]),
            Err(Error::Unequal {
                column: "segments",
                ..
            })
        ));
    }
}

proptest! {
    /// The law of spreading: whatever the place, the sum is the sum of what was given.
    #[test]
    fn spreading_conserves_the_reward(
        rows in prop::collection::vec((-4.0..4.0_f32, prop::collection::vec(any::<bool>(), 0..6)), 1..12), score in -4.0..4.0_f32
    ) {
        // Each segment has one token of its own at least.
        let (mut segments, mut mask) = (vec![], vec![]);
        for (reward, others) in &rows {
            let start = mask.len();
            mask.extend(others);
            mask.push(true);
            segments.push(SegmentRecord { start, end: mask.len(), score: *reward, sign: Sign::Neutral });
        }
        let signal: Vec<f32> = (0..mask.len()).map(|t| (t as f32).sin()).collect();
        let parts = SpreadParts { score, segments: &segments, signal: &signal };
        let sum = |values: &mut dyn Iterator<Item = f32>| values.map(f64::from).sum::<f64>();
        for &spread in Spread::ALL {
            let paid = spread_reward(spread, parts, &mask).unwrap();
            let given = match spread {
                Spread::Last => f64::from(score),
                Spread::SegmentEven | Spread::SegmentLast => sum(&mut segments.iter().map(|segment| segment.score)),
                Spread::Token => sum(&mut signal.iter().zip(&mask).filter(|(_, own)| **own).map(|(&r, _)| r)),
            };
            prop_assert!((sum(&mut paid.iter().copied()) - given).abs() < 1e-5, "{}", spread);
            prop_assert!(paid.iter().zip(&mask).all(|(&reward, &own)| own || reward == 0.0));
        }
    }

    #[test]
    fn kl_sums_add_up_over_responses(ratios in prop::collection::vec(-3.0..3.0_f32, 0..30), cut in 0..30_usize) {
        let zeros = vec![0.0; ratios.len()];
        let mask = vec![true; ratios.len()];
        let cut = cut.min(ratios.len());
        let of = |range: std::ops::Range<usize>| KlSum::of(&ratios[range.clone()], &zeros[range.clone()], &mask[range]).unwrap();
        let (whole, mut parts) = (of(0..ratios.len()), of(0..cut));
        parts.merge(&of(cut..ratios.len()));
        prop_assert_eq!(parts.tokens, whole.tokens);
        prop_assert_eq!(parts.max_abs_log_ratio, whole.max_abs_log_ratio);
        for estimator in [KlEstimator::K1, KlEstimator::K2, KlEstimator::K3] {
            match (parts.token_mean(estimator), whole.token_mean(estimator)) {
                (Some(a), Some(b)) => prop_assert!((a - b).abs() < 1e-12),
                (a, b) => prop_assert_eq!(a, b),
            }
        }
    }
}

#[test]
fn running_statistics_are_those_of_all_scores_and_survive_a_checkpoint_bit_for_bit() {
    let mut rng = pivotal_core::random_stream(3, "running scale");
    let scores: Vec<f32> = (0..60)
        .map(|_| (rand::Rng::next_u32(&mut rng) as f32 / 2.0_f32.powi(32)).ln())
        .collect();
    let mut scale = RunningScale::default();
    for batch in scores.chunks(7) {
        let kept = scale.scale(batch, ScoreScaling::None).unwrap();
        assert_eq!(kept, batch);
        let text = serde_json::to_string(&scale).unwrap();
        assert_eq!(serde_json::from_str::<RunningScale>(&text).unwrap(), scale);
    }
    let count = scores.len() as f64;
    let mean = scores.iter().map(|&score| f64::from(score)).sum::<f64>() / count;
    let squares = scores
        .iter()
        .map(|&score| (f64::from(score) - mean).powi(2));
    let std = (squares.sum::<f64>() / (count - 1.0)).sqrt();
    assert!(
        (scale.mean() - mean).abs() < 1e-12,
        "{} {mean}",
        scale.mean()
    );
    assert!((scale.std() - std).abs() < 1e-12, "{} {std}", scale.std());
    assert_eq!(scale.count(), 60);
}

#[test]
fn scores_that_never_varied_are_not_divided() {
    let mut scale = RunningScale::default();
    assert!(scale.scale(&[], ScoreScaling::Normal).unwrap().is_empty());
    assert_eq!(scale.scale(&[2.0], ScoreScaling::Std).unwrap(), [2.0]);
    assert_eq!(
        scale.scale(&[2.0, 2.0], ScoreScaling::Normal).unwrap(),
        [0.0, 0.0]
    );
    let before = scale;
    assert!(scale.scale(&[f32::NAN], ScoreScaling::Std).is_err());
    assert_eq!(scale, before);
}
