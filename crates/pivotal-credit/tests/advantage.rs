//! Implementation details of advantages, each under its own name, with published values where there are any.

use pivotal_core::{ErrorKind, HasKind, Sign};
use pivotal_credit::{
    AfterTruncation, Credit, CreditConfig, Ending, Error, Gae, GaeTerms, GroupAdvantage,
    MaskedValues, Response, RunningBaseline, ScoreBaseline, Variance, WhitenMean,
    discounted_returns, explained_variance, group_advantages, sequence_signs, whiten,
};
use proptest::prelude::*;

/// f32 results of f64 sums: one rounding, relative to the largest number involved.
const TOLERANCE: f32 = 1e-6;

fn close(found: &[f32], expected: &[f32]) {
    assert_eq!(found.len(), expected.len());
    for (found, expected) in found.iter().zip(expected) {
        let error = (found - expected).abs();
        assert!(
            error <= TOLERANCE * expected.abs().max(1.0),
            "{found} is not {expected}"
        );
    }
}

fn gae(gamma: f64, lambda: f64, rewards: &[f32], values: &[f32], mask: &[bool]) -> GaeTerms {
    let gae = Gae::new(gamma, lambda).unwrap();
    gae.advantages(rewards, values, mask, 0.0).unwrap()
}

/// verl's test of REINFORCE++: mask [1, 0, 1], r = [0, 0, 1], γ = 0.5.
#[test]
fn detail_18_gae_passes_over_an_observation_without_discount() {
    let mask = [true, false, true];
    let returns = discounted_returns(&[0.0, 0.0, 1.0], &mask, 0.5).unwrap();
    assert_eq!(returns, [0.5, 1.0, 1.0]);
    // What the observation holds is never read.
    let wild = gae(0.5, 0.9, &[0.0, 7.0, 1.0], &[0.1, f32::NAN, 0.3], &mask);
    let calm = gae(0.5, 0.9, &[0.0, 0.0, 1.0], &[0.1, 0.0, 0.3], &mask);
    assert_eq!(wild, calm);
    // And it is as if the observation were not there.
    let joined = gae(0.5, 0.9, &[0.0, 1.0], &[0.1, 0.3], &[true, true]);
    assert_eq!(
        [wild.advantages[0], wild.advantages[2]],
        joined.advantages[..]
    );
    assert_eq!(wild.advantages[1], 0.0);
}

/// ROLL's fault: mask [1, 1, 0], values [0, 0, 100], rewards [0, 1, 0]; with the 100 let in, advantages are near 6.
#[test]
fn detail_18_gae_reads_no_value_after_the_last_token() {
    let (rewards, mask) = ([0.0, 1.0, 0.0], [true, true, false]);
    for (gamma, lambda) in [(1.0, 0.95), (0.99, 0.95), (1.0, 1.0), (0.05, 0.95)] {
        let found = gae(gamma, lambda, &rewards, &[0.0, 0.0, 100.0], &mask);
        close(&found.advantages, &[(gamma * lambda) as f32, 1.0, 0.0]);
        assert_eq!(found, gae(gamma, lambda, &rewards, &[0.0; 3], &mask));
    }
}

#[test]
fn detail_18_gae_of_a_plain_response_by_hand() {
    // δ = [0 + 0.5·0.4 − 0.2, 1 + 0.5·0.8 − 0.4, 2 − 0.8] = [0, 1, 1.2]; γλ = 0.25.
    let found = gae(0.5, 0.5, &[0.0, 1.0, 2.0], &[0.2, 0.4, 0.8], &[true; 3]);
    close(&found.advantages, &[0.325, 1.3, 1.2]);
    close(&found.returns, &[0.525, 1.7, 2.0]);
}

#[test]
fn detail_18_gae_of_leading_padding_is_zero() {
    let found = gae(
        1.0,
        0.95,
        &[9.0, 0.0, 1.0],
        &[9.0, 0.0, 0.0],
        &[false, true, true],
    );
    close(&found.advantages, &[0.0, 0.95, 1.0]);
    let none = gae(1.0, 0.95, &[9.0, 9.0], &[9.0, 9.0], &[false; 2]);
    assert_eq!(
        (none.advantages, none.returns),
        (vec![0.0; 2], vec![0.0; 2])
    );
    let empty = gae(1.0, 0.95, &[], &[], &[]);
    assert!(empty.advantages.is_empty() && empty.returns.is_empty());
}

#[test]
fn gae_bootstraps_a_truncated_response_only_if_asked() {
    let gae = Gae::new(0.5, 1.0).unwrap();
    let advantage = |rule: AfterTruncation, ending| {
        let after = rule.final_value(ending, 4.0);
        gae.advantages(&[1.0], &[0.5], &[true], after)
            .unwrap()
            .advantages[0]
    };
    assert_eq!(advantage(AfterTruncation::Zero, Ending::Truncated), 0.5);
    assert_eq!(advantage(AfterTruncation::Value, Ending::Truncated), 2.5);
    assert_eq!(advantage(AfterTruncation::Value, Ending::Eos), 0.5);
}

/// The keep mask is Credit's output and no input of GAE: whatever is kept, the advantages are those of every token.
#[test]
fn detail_18_the_keep_mask_never_enters_gae() {
    let (rewards, values) = ([0.1, -0.2, 1.0, 0.5], [0.3, 0.1, -0.4, 0.2]);
    let all = gae(1.0, 0.95, &rewards, &values, &[true; 4]);
    let config: CreditConfig = toml::from_str("cut = 'token'").unwrap();
    let given = Credit::new(config.resolve().unwrap(), 1)
        .assign(&[Response::new(1, 0, &rewards, Sign::Positive)])
        .unwrap();
    let keep = given[0].keep.as_slice();
    assert_eq!(keep, [true, false, true, true]);
    // What one would get by mistake is something else.
    assert_ne!(
        gae(1.0, 0.95, &rewards, &values, keep).advantages[0],
        all.advantages[0]
    );
    let own = gae(1.0, 0.95, &rewards, &values, &[true; 4]);
    assert_eq!(own, all);
}

/// Huang et al. 2024: 1.2 to 2.0 in a 3 × 3 batch, mean 1.6, variance 0.0667 biased and 0.0750 unbiased.
#[test]
fn detail_19_whitening_with_the_mean_kept_is_0508_biased_and_1394_with_bessel() {
    let first = |mean, variance| {
        let mut rows: Vec<Vec<f32>> = (0..3_u8)
            .map(|row| {
                (0..3_u8)
                    .map(|t| 1.2 + 0.1 * f32::from(3 * row + t))
                    .collect()
            })
            .collect();
        let mask = [true; 3];
        let mut batch: Vec<MaskedValues<'_>> = rows
            .iter_mut()
            .map(|values| MaskedValues {
                values,
                response_mask: &mask,
            })
            .collect();
        let found = whiten(&mut batch, mean, variance).unwrap();
        assert_eq!(found.tokens, 9);
        assert!((found.mean - 1.6).abs() < 1e-6);
        (rows[0][0], found.variance)
    };
    let near = |(value, variance): (f32, f64), want: (f32, f64)| {
        assert!((value - want.0).abs() < 5e-5, "{value}");
        assert!((variance - want.1).abs() < 5e-5, "{variance}");
    };
    near(first(WhitenMean::Kept, Variance::Biased), (0.0508, 0.0667));
    near(first(WhitenMean::Kept, Variance::Bessel), (0.1394, 0.0750));
    near(
        first(WhitenMean::Removed, Variance::Biased),
        (-1.5492, 0.0667),
    );
    near(
        first(WhitenMean::Removed, Variance::Bessel),
        (-1.4606, 0.0750),
    );
}

#[test]
fn detail_19_whitening_of_at_most_one_token_is_defined() {
    for variance in [Variance::Biased, Variance::Bessel] {
        for (mean, want) in [
            (WhitenMean::Removed, [0.0, 9.0]),
            (WhitenMean::Kept, [3.0, 9.0]),
        ] {
            let mut values = [3.0, 9.0];
            let mut batch = [MaskedValues {
                values: &mut values,
                response_mask: &[true, false],
            }];
            let found = whiten(&mut batch, mean, variance).unwrap();
            assert_eq!((found.tokens, found.variance), (1, 0.0));
            assert_eq!(values, want);
        }
        let mut values = [3.0];
        let mut batch = [MaskedValues {
            values: &mut values,
            response_mask: &[false],
        }];
        assert_eq!(
            whiten(&mut batch, WhitenMean::Removed, variance)
                .unwrap()
                .tokens,
            0
        );
        assert_eq!(values, [3.0]);
        whiten(&mut [], WhitenMean::Removed, variance).unwrap();
    }
}

#[test]
fn a_value_that_is_not_finite_is_refused_before_anything_is_changed() {
    let (mut good, mut bad) = ([1.0, 2.0], [0.0, f32::NAN]);
    let mut batch = [
        MaskedValues {
            values: &mut good,
            response_mask: &[true; 2],
        },
        MaskedValues {
            values: &mut bad,
            response_mask: &[true; 2],
        },
    ];
    let error = whiten(&mut batch, WhitenMean::Removed, Variance::Biased).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFinite);
    assert_eq!(
        error.to_string(),
        "`values` is NaN at index 1, expected a finite number"
    );
    assert_eq!(good, [1.0, 2.0]);
    let gae = Gae::new(1.0, 0.95).unwrap();
    let error = gae
        .advantages(&[f32::INFINITY], &[0.0], &[true], 0.0)
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFinite);
    let error = gae.advantages(&[0.0], &[], &[true], 0.0).unwrap_err();
    assert_eq!(error.to_string(), "`values` has 0 values, expected 1");
    assert!(matches!(
        Gae::new(1.5, 0.95),
        Err(Error::Value { key: "gamma", .. })
    ));
    assert!(matches!(
        Gae::new(1.0, f64::NAN),
        Err(Error::Value {
            key: "gae_lambda",
            ..
        })
    ));
}

#[test]
fn detail_25_group_advantages_by_hand() {
    let (prompts, scores) = ([5, 9, 5, 9, 5], [1.0, 0.0, 2.0, 4.0, 3.0]);
    let of = |kind, variance| {
        group_advantages(&prompts, &scores, kind, variance, 0.0)
            .unwrap()
            .advantages
    };
    // Group 5: mean 2, std 1 by Bessel; group 9: mean 2, std √8.
    let two = 2.0 / 8.0_f32.sqrt();
    close(
        &of(GroupAdvantage::GroupNormalised, Variance::Bessel),
        &[-1.0, -two, 0.0, two, 1.0],
    );
    let biased = (2.0_f32 / 3.0).sqrt();
    close(
        &of(GroupAdvantage::GroupNormalised, Variance::Biased),
        &[-1.0 / biased, -1.0, 0.0, 1.0, 1.0 / biased],
    );
    close(
        &of(GroupAdvantage::MeanOnly, Variance::Bessel),
        &[-1.0, -2.0, 0.0, 2.0, 1.0],
    );
    close(
        &of(GroupAdvantage::LeaveOneOut, Variance::Bessel),
        &[-1.5, -4.0, 0.0, 4.0, 1.5],
    );
    // The whole batch has mean 2 and squares 1 + 4 + 0 + 4 + 1 over 4.
    let std = 2.5_f32.sqrt();
    close(
        &of(GroupAdvantage::BatchNormalised, Variance::Bessel),
        &[-1.0 / std, -2.0 / std, 0.0, 2.0 / std, 1.0 / std],
    );
}

#[test]
fn detail_25_a_group_of_one_or_of_equal_scores_has_advantage_zero() {
    for &kind in GroupAdvantage::ALL {
        for variance in [Variance::Biased, Variance::Bessel] {
            for epsilon in [0.0, 1e-4] {
                // 0.1 is no dyadic number: a mean with a rounding error would show over ε = 0.
                let found = group_advantages(
                    &[1, 2, 2, 2, 2, 2, 2, 2],
                    &[0.1; 8],
                    kind,
                    variance,
                    epsilon,
                );
                let found = found.unwrap();
                assert_eq!(found.advantages, [0.0; 8], "{kind}");
                assert_eq!((found.groups, found.flat_groups), (2, 2));
            }
        }
    }
    let none = group_advantages(
        &[],
        &[],
        GroupAdvantage::LeaveOneOut,
        Variance::Bessel,
        1e-4,
    )
    .unwrap();
    assert_eq!((none.advantages.len(), none.groups), (0, 0));
}

#[test]
fn the_epsilon_of_the_group_std_is_added_outside_the_root() {
    let found = group_advantages(
        &[1, 1],
        &[0.0, 2.0],
        GroupAdvantage::GroupNormalised,
        Variance::Biased,
        1.0,
    );
    close(&found.unwrap().advantages, &[-0.5, 0.5]);
    for epsilon in [-1.0, f64::NAN] {
        let refused = group_advantages(
            &[1],
            &[0.0],
            GroupAdvantage::MeanOnly,
            Variance::Biased,
            epsilon,
        );
        assert!(matches!(refused, Err(Error::Value { key: "epsilon", .. })));
    }
}

#[test]
fn a_running_baseline_survives_a_checkpoint_bit_for_bit() {
    let batches = [[0.1_f32, 0.7, 0.3], [0.9, -0.4, 0.2], [1.7, 0.6, 0.1]];
    let mut through = RunningBaseline::new(0.9).unwrap();
    let expected: Vec<Vec<f32>> = batches
        .iter()
        .map(|batch| through.advantages(batch).unwrap())
        .collect();
    let mut resumed = RunningBaseline::new(0.9).unwrap();
    for (batch, expected) in batches.iter().zip(expected) {
        let saved = serde_json::to_string(&resumed).unwrap();
        resumed = serde_json::from_str(&saved).unwrap();
        assert_eq!(resumed.advantages(batch).unwrap(), expected);
    }
    assert_eq!(resumed, through);
    // A bad batch teaches nothing.
    resumed.advantages(&[f32::NAN]).unwrap_err();
    assert_eq!(resumed, through);
}

#[test]
fn detail_28_the_sign_of_a_score_at_its_baseline_is_neutral() {
    let signs = sequence_signs(&[1, 1, 1], &[0.1; 3], ScoreBaseline::Group).unwrap();
    assert_eq!(signs, [Sign::Neutral; 3]);
}

#[test]
fn detail_20_explained_variance_is_one_of_the_truth_and_negative_of_worse_than_a_constant() {
    let (returns, mask) = ([1.0, 2.0, 3.0], [true; 3]);
    assert_eq!(
        explained_variance(&returns, &returns, &mask).unwrap(),
        Some(1.0)
    );
    assert_eq!(
        explained_variance(&[5.0; 3], &returns, &mask).unwrap(),
        Some(0.0)
    );
    assert_eq!(
        explained_variance(&[3.0, 2.0, 1.0], &returns, &mask).unwrap(),
        Some(-3.0)
    );
}

fn response() -> impl Strategy<Value = (Vec<f32>, Vec<f32>, Vec<bool>)> {
    (0..40_usize).prop_flat_map(|tokens| {
        (
            prop::collection::vec(-2.0..2.0_f32, tokens),
            prop::collection::vec(-2.0..2.0_f32, tokens),
            prop::collection::vec(prop::bool::weighted(0.7), tokens),
        )
    })
}

proptest! {
    /// λ = 1: the advantage is the discounted return less the value.
    #[test]
    fn gae_at_lambda_one_is_return_less_value((rewards, values, mask) in response(), gamma in 0.0..=1.0_f64, last in -1.0..1.0_f32) {
        let found = Gae::new(gamma, 1.0).unwrap().advantages(&rewards, &values, &mask, last).unwrap();
        let own: Vec<usize> = (0..rewards.len()).filter(|&t| mask[t]).collect();
        for (place, &start) in own.iter().enumerate() {
            // Forwards and from the definition: Σ γ^l r.
            let rest = &own[place..];
            let paid: f64 = rest.iter().zip(0_i32..).map(|(&t, l)| gamma.powi(l) * f64::from(rewards[t])).sum();
            let total = paid + gamma.powi(rest.len() as i32) * f64::from(last);
            prop_assert!((f64::from(found.returns[start]) - total).abs() < 1e-5);
            prop_assert!((f64::from(found.advantages[start]) - (total - f64::from(values[start]))).abs() < 1e-5);
        }
    }

    /// λ = 0: the advantage is the TD error.
    #[test]
    fn gae_at_lambda_zero_is_the_td_error((rewards, values, mask) in response(), gamma in 0.0..=1.0_f64, last in -1.0..1.0_f32) {
        let found = Gae::new(gamma, 0.0).unwrap().advantages(&rewards, &values, &mask, last).unwrap();
        let own: Vec<usize> = (0..rewards.len()).filter(|&t| mask[t]).collect();
        for (place, &t) in own.iter().enumerate() {
            let next = own.get(place + 1).map_or(last, |&next| values[next]);
            let error = f64::from(rewards[t]) + gamma * f64::from(next) - f64::from(values[t]);
            prop_assert!((f64::from(found.advantages[t]) - error).abs() < 1e-5);
        }
    }

    #[test]
    fn padding_never_changes_gae((rewards, values, mask) in response(), left in 0..4_usize, right in 0..4_usize) {
        let pad = |row: &[f32]| [vec![f32::NAN; left], row.to_vec(), vec![50.0; right]].concat();
        let wide_mask = [vec![false; left], mask.clone(), vec![false; right]].concat();
        let wide = gae(0.9, 0.95, &pad(&rewards), &pad(&values), &wide_mask);
        let bare = gae(0.9, 0.95, &rewards, &values, &mask);
        prop_assert_eq!(&wide.advantages[left..left + rewards.len()], &bare.advantages[..]);
    }

    #[test]
    fn whitening_gives_mean_zero_and_variance_one(rows in prop::collection::vec(response(), 1..5)) {
        let mut values: Vec<Vec<f32>> = rows.iter().map(|row| row.0.clone()).collect();
        let mut batch: Vec<MaskedValues<'_>> = values.iter_mut().zip(&rows)
            .map(|(values, row)| MaskedValues { values, response_mask: &row.2 }).collect();
        let found = whiten(&mut batch, WhitenMean::Removed, Variance::Biased).unwrap();
        prop_assume!(found.tokens > 1 && found.variance > 1e-3);
        let again = whiten(&mut batch, WhitenMean::Kept, Variance::Biased).unwrap();
        prop_assert!(again.mean.abs() < 1e-6 && (again.variance - 1.0).abs() < 1e-4, "{:?}", again);
    }

    /// The advantages of a group sum to 0, whatever the kind, so that a constant added to the scores changes nothing.
    #[test]
    fn group_advantages_sum_to_zero_and_ignore_a_constant(
        scores in prop::collection::vec((-8..8_i8).prop_map(f32::from), 2..9), kind in prop::sample::select(GroupAdvantage::ALL)
    ) {
        let prompts = vec![3; scores.len()];
        let of = |scores: &[f32]| group_advantages(&prompts, scores, kind, Variance::Bessel, 1e-4).unwrap().advantages;
        let found = of(&scores);
        prop_assert!(found.iter().map(|&a| f64::from(a)).sum::<f64>().abs() < 1e-4);
        let moved: Vec<f32> = scores.iter().map(|score| score + 16.0).collect();
        for (moved, found) in of(&moved).iter().zip(&found) {
            prop_assert!((moved - found).abs() < 1e-5);
        }
    }
}

/// A JSON reader may lose an f64's last bit; states that must resume bit for bit do not depend on it.
#[test]
fn states_survive_json_whatever_their_last_bit() {
    let mut rng = pivotal_core::random_stream(5, "states");
    for _ in 0..500 {
        let mut baseline = RunningBaseline::new(0.99).unwrap();
        let mut credit =
            pivotal_credit::BaselineState::new(pivotal_credit::Baseline::RunningMean {
                decay: 0.97,
            });
        for _ in 0..4 {
            let score = (rand::Rng::next_u32(&mut rng) as f32 / 2.0_f32.powi(32)).ln();
            baseline.advantages(&[score]).unwrap();
            credit.resolve(&[(1, &[score])]);
        }
        let back: RunningBaseline =
            serde_json::from_str(&serde_json::to_string(&baseline).unwrap()).unwrap();
        assert_eq!(back, baseline);
        let back: pivotal_credit::BaselineState =
            serde_json::from_str(&serde_json::to_string(&credit).unwrap()).unwrap();
        assert_eq!(back, credit);
    }
}
