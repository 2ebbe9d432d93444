//! What must hold of the losses whatever the numbers.

use burn::tensor::{Device, Tensor, TensorData};
use pivotal_core::{ErrorKind, HasKind, TokenMask};
use pivotal_loss::{
    LossError, Normalisation, PairLogps, ResponseIndex, ScoreAggregation, ScorePair, bradley_terry,
    cdpo, center_penalty, dpo, ipo, kept_sums, robust_dpo, sequence_scores, sft, token_supervised,
};
use proptest::prelude::*;

fn leaf(values: &[f32]) -> Tensor<1> {
    let device = Device::flex().autodiff();
    Tensor::from_data(TensorData::new(values.to_vec(), [values.len()]), &device).require_grad()
}

fn floats(tensor: Tensor<1>) -> Vec<f32> {
    tensor.try_into_vec_as().unwrap()
}

fn pair(chosen: &[f32], rejected: &[f32]) -> PairLogps {
    PairLogps {
        chosen: leaf(chosen),
        rejected: leaf(rejected),
    }
}

const NORMALISATIONS: [Normalisation; 3] = [
    Normalisation::Sum,
    Normalisation::KeptMean,
    Normalisation::RescaledSum,
];

/// Token log-probabilities of some responses, ragged; a response may be empty.
fn responses() -> impl Strategy<Value = Vec<Vec<f32>>> {
    let response = prop::collection::vec(-12.0f32..0.0, 0..9);
    prop::collection::vec(response, 1..6)
        .prop_filter("some token", |all| all.iter().any(|r| !r.is_empty()))
}

fn lens(responses: &[Vec<f32>]) -> Vec<usize> {
    responses.iter().map(Vec::len).collect()
}

proptest! {
    #[test]
    fn detail_09_the_first_step_of_dpo_costs_ln_2(
        logps in prop::collection::vec((-900.0f32..0.0, -900.0f32..0.0), 1..8),
        beta in 0.01f64..5.0,
    ) {
        let (chosen, rejected): (Vec<_>, Vec<_>) = logps.into_iter().unzip();
        let policy = pair(&chosen, &rejected);
        let terms = dpo(policy.clone(), pair(&chosen, &rejected), beta).unwrap();
        let grads = terms.loss.clone().sum().backward();
        prop_assert!(floats(terms.loss).iter().all(|&loss| loss == 2f32.ln()));
        let slope = 0.5 * beta as f32;
        prop_assert!(floats(policy.chosen.grad(&grads).unwrap()).iter().all(|&g| g == -slope));
        prop_assert!(floats(policy.rejected.grad(&grads).unwrap()).iter().all(|&g| g == slope));
    }

    #[test]
    fn detail_07_keeping_all_is_the_plain_sum_bit_for_bit(responses in responses()) {
        let token_logps = leaf(&responses.concat());
        let index = ResponseIndex::of_whole_responses(&lens(&responses));
        let keep = TokenMask::all(index.entries());
        let sums = kept_sums(token_logps, &index, &keep, Normalisation::Sum).unwrap();
        let plain: Vec<u32> = responses
            .iter()
            .map(|r| r.iter().fold(0.0f32, |sum, logp| sum + logp).to_bits())
            .collect();
        let sums: Vec<u32> = floats(sums).into_iter().map(f32::to_bits).collect();
        prop_assert_eq!(sums, plain);
    }

    #[test]
    fn what_is_dropped_has_no_part(
        responses in responses(),
        seed in any::<u64>(),
        poison in prop::sample::select(vec![f32::NAN, f32::NEG_INFINITY, -1e30]),
    ) {
        let flat = responses.concat();
        let keep: Vec<bool> = (0..flat.len()).map(|i| seed >> (i % 64) & 1 == 1).collect();
        let poisoned: Vec<f32> = flat
            .iter()
            .zip(&keep)
            .map(|(&logp, &keep)| if keep { logp } else { poison })
            .collect();
        let index = ResponseIndex::of_whole_responses(&lens(&responses));
        let kept = TokenMask::from(keep.clone());
        for normalisation in NORMALISATIONS {
            let token_logps = leaf(&poisoned);
            let sums = kept_sums(token_logps.clone(), &index, &kept, normalisation).unwrap();
            let grads = sums.clone().sum().backward();
            let gradient = floats(token_logps.grad(&grads).unwrap());
            let clean = kept_sums(leaf(&flat), &index, &kept, normalisation).unwrap();
            prop_assert_eq!(floats(sums), floats(clean));
            for (gradient, keep) in gradient.into_iter().zip(&keep) {
                prop_assert_eq!(gradient != 0.0, *keep);
            }
        }
    }

    #[test]
    fn leaving_dropped_tokens_out_is_masking_them(responses in responses(), seed in any::<u64>()) {
        let flat = responses.concat();
        let keep: Vec<bool> = (0..flat.len()).map(|i| seed >> (i % 64) & 1 == 1).collect();
        let whole = ResponseIndex::of_whole_responses(&lens(&responses));
        let chosen: Vec<usize> = (0..flat.len()).filter(|&i| keep[i]).collect();
        let owners = chosen.iter().map(|&i| whole.response_of()[i]).collect();
        let entries = ResponseIndex::of_entries(owners, lens(&responses)).unwrap();
        let gathered: Vec<f32> = chosen.iter().map(|&i| flat[i]).collect();
        let all = TokenMask::all(chosen.len());
        for normalisation in NORMALISATIONS {
            let masked = kept_sums(leaf(&flat), &whole, &TokenMask::from(keep.clone()), normalisation);
            let gathered = kept_sums(leaf(&gathered), &entries, &all, normalisation);
            prop_assert_eq!(floats(gathered.unwrap()), floats(masked.unwrap()));
        }
    }

    #[test]
    fn detail_15_a_shift_of_all_scores_changes_no_ranking_loss(
        scores in prop::collection::vec((-64i16..64, -64i16..64), 1..8),
        shift in -64i16..64,
    ) {
        // Quarters: sums and differences are exact, so the law holds bit for bit.
        let quarters = |score: i16| f32::from(score) / 4.0;
        let loss = |shift: i16| {
            let (chosen, rejected): (Vec<_>, Vec<_>) = scores
                .iter()
                .map(|&(w, l)| (quarters(w + shift), quarters(l + shift)))
                .unzip();
            let pair = ScorePair { chosen: leaf(&chosen), rejected: leaf(&rejected) };
            floats(bradley_terry(pair).unwrap().loss)
        };
        prop_assert_eq!(loss(shift), loss(0));
    }

    #[test]
    fn detail_08_sft_does_not_depend_on_how_a_step_is_cut(
        token_logps in prop::collection::vec(-12.0f32..0.0, 2..20),
        cut in any::<prop::sample::Index>(),
    ) {
        let cut = cut.index(token_logps.len());
        let denominator = token_logps.len() as f64;
        let gradient = |part: &[f32]| {
            if part.is_empty() {
                return vec![];
            }
            let leaf = leaf(part);
            let terms = sft(leaf.clone(), &TokenMask::all(part.len()), denominator).unwrap();
            floats(leaf.grad(&terms.loss.sum().backward()).unwrap())
        };
        let (first, second) = token_logps.split_at(cut);
        prop_assert_eq!([gradient(first), gradient(second)].concat(), gradient(&token_logps));
    }

    #[test]
    fn token_labels_pull_values_their_way(
        values in prop::collection::vec(-200.0f32..200.0, 1..12),
        seed in any::<u64>(),
    ) {
        let flags = |shift: u32| -> Vec<bool> {
            (0..values.len()).map(|i| seed.rotate_right(shift) >> i & 1 == 1).collect()
        };
        let (right, labelled) = (flags(0), flags(31));
        let leaf = leaf(&values);
        let terms = token_supervised(
            leaf.clone(),
            &TokenMask::from(right.clone()),
            &TokenMask::from(labelled.clone()),
        )
        .unwrap();
        let gradient = floats(leaf.grad(&terms.loss.clone().sum().backward()).unwrap());
        let loss = floats(terms.loss);
        for i in 0..values.len() {
            let (v, z) = (f64::from(values[i]), f64::from(u8::from(right[i])));
            let (expected, slope) = match labelled[i] {
                true => (
                    v.max(0.0) - z * v + (-v.abs()).exp().ln_1p(),
                    1.0 / (1.0 + (-v).exp()) - z,
                ),
                false => (0.0, 0.0),
            };
            prop_assert!((f64::from(loss[i]) - expected).abs() <= 1e-5 * expected.max(1.0));
            prop_assert!((f64::from(gradient[i]) - slope).abs() <= 1e-6);
        }
    }
}

#[test]
fn detail_06_an_empty_mask_is_zero_without_gradient() {
    for normalisation in NORMALISATIONS {
        let token_logps = leaf(&[-1.0, -2.0, -3.0]);
        let index = ResponseIndex::of_whole_responses(&[1, 2]);
        let keep = TokenMask::from(vec![false, true, true]);
        let sums = kept_sums(token_logps.clone(), &index, &keep, normalisation).unwrap();
        let policy = PairLogps {
            chosen: sums.clone().narrow(0, 0, 1),
            rejected: sums.narrow(0, 1, 1),
        };
        let terms = dpo(policy, pair(&[0.0], &[-4.0]), 0.1).unwrap();
        assert_eq!(floats(terms.chosen_reward.clone()), [0.0]);
        let gradient = floats(token_logps.grad(&terms.loss.backward()).unwrap());
        assert_eq!(gradient[0], 0.0);
        assert!(gradient[1] > 0.0 && gradient[2] == gradient[1]);
    }
}

#[test]
fn detail_06_a_pair_of_which_nothing_is_kept_costs_ln_2_without_gradient() {
    for normalisation in NORMALISATIONS {
        let token_logps = leaf(&[-1.0, -2.0, f32::NAN]);
        let index = ResponseIndex::of_whole_responses(&[1, 2]);
        let nothing = TokenMask::none(3);
        let sums = kept_sums(token_logps.clone(), &index, &nothing, normalisation).unwrap();
        let policy = PairLogps {
            chosen: sums.clone().narrow(0, 0, 1),
            rejected: sums.narrow(0, 1, 1),
        };
        let terms = dpo(policy, pair(&[0.0], &[0.0]), 0.1).unwrap();
        let grads = terms.loss.backward();
        assert_eq!(floats(terms.loss), [2f32.ln()]);
        assert_eq!(floats(token_logps.grad(&grads).unwrap()), [0.0; 3]);
    }
}

#[test]
fn detail_10_ipo_aims_at_one_over_two_beta_of_sums_or_of_means_by_name() {
    // Six tokens against two: log-ratios of 3 and -1 a response, of 0.5 and -0.5 a token.
    let index = ResponseIndex::of_whole_responses(&[6, 2]);
    let keep = TokenMask::all(8);
    let loss = |normalisation, beta: f64| {
        let sums = |logps: &[f32]| {
            let sums = kept_sums(leaf(logps), &index, &keep, normalisation).unwrap();
            PairLogps {
                chosen: sums.clone().narrow(0, 0, 1),
                rejected: sums.narrow(0, 1, 1),
            }
        };
        let policy = [-1.0, -1.0, -1.0, -1.0, -1.0, -1.0, -2.5, -2.5];
        let reference = [-1.5, -1.5, -1.5, -1.5, -1.5, -1.5, -2.0, -2.0];
        floats(ipo(sums(&policy), sums(&reference), beta).unwrap().loss)[0]
    };
    // The margin of the sums is 4, and so the target of β = 1/8; that of the means is 1, of β = 1/2.
    assert_eq!(loss(Normalisation::Sum, 0.125), 0.0);
    assert_eq!(loss(Normalisation::KeptMean, 0.5), 0.0);
    assert_eq!(loss(Normalisation::Sum, 0.5), 9.0);
    assert_eq!(loss(Normalisation::KeptMean, 0.125), 9.0);
}

#[test]
fn detail_12_smoothed_labels_cost_ln_2_at_margin_0_and_the_robust_loss_is_unbiased() {
    let none = || pair(&[-3.0], &[-3.0]);
    for smoothing in [0.01, 0.1, 0.25, 0.49] {
        for loss in [cdpo, robust_dpo] {
            let terms = loss(none(), none(), 0.7, smoothing).unwrap();
            assert!(
                (floats(terms.loss)[0] - 2f32.ln()).abs() < 1e-6,
                "{smoothing}"
            );
        }
        // Labels flipped with this chance: the expected robust loss is DPO's under the right ones.
        for margin in [-2.0f32, -0.3, 1.0, 4.0] {
            let policy = |margin: f32| pair(&[margin - 1.0], &[-1.0]);
            let zero = || pair(&[-1.0], &[-1.0]);
            let robust = |margin| {
                let terms = robust_dpo(policy(margin), zero(), 1.0, smoothing).unwrap();
                f64::from(floats(terms.loss)[0])
            };
            let expected = (1.0 - smoothing) * robust(margin) + smoothing * robust(-margin);
            let plain = f64::from(floats(dpo(policy(margin), zero(), 1.0).unwrap().loss)[0]);
            let scale = 1.0 / (1.0 - 2.0 * smoothing);
            assert!(
                (expected - plain).abs() < 2e-6 * scale,
                "{smoothing}, {margin}: {expected}, expected {plain}"
            );
        }
    }
}

#[test]
fn a_batch_of_which_nothing_is_kept_is_finite() {
    let token_logps = leaf(&[-1.0, f32::NEG_INFINITY]);
    let index = ResponseIndex::of_whole_responses(&[1, 1]);
    let sums = kept_sums(
        token_logps.clone(),
        &index,
        &TokenMask::none(2),
        Normalisation::KeptMean,
    )
    .unwrap();
    let grads = sums.clone().sum().backward();
    assert_eq!(floats(sums), [0.0, 0.0]);
    assert_eq!(floats(token_logps.grad(&grads).unwrap()), [0.0, 0.0]);
}

#[test]
fn no_entry_at_all_gives_zeros() {
    let index = ResponseIndex::of_entries(vec![], vec![3, 2]).unwrap();
    let none = Tensor::<1>::zeros([0], &Device::flex());
    let sums = kept_sums(none, &index, &TokenMask::all(0), Normalisation::RescaledSum).unwrap();
    assert_eq!(floats(sums), [0.0, 0.0]);
}

#[test]
fn the_reference_gets_no_gradient() {
    let (policy, reference) = (pair(&[-1.0], &[-2.0]), pair(&[-1.5], &[-1.0]));
    let terms = dpo(policy, reference.clone(), 0.1).unwrap();
    assert!(!terms.chosen_reward.is_tracked() && !terms.rejected_reward.is_tracked());
    let grads = terms.loss.backward();
    assert!(reference.chosen.grad(&grads).is_none());
    assert!(reference.rejected.grad(&grads).is_none());
}

#[test]
fn errors_name_the_input() {
    let same = || pair(&[-1.0], &[-2.0]);
    let beta = dpo(same(), same(), 0.0).unwrap_err();
    assert_eq!(
        beta.to_string(),
        "`beta` is 0, expected a finite number above 0"
    );
    assert_eq!(beta.kind(), ErrorKind::Input);
    let length = dpo(same(), pair(&[-1.0], &[-2.0, -3.0]), 0.1).unwrap_err();
    assert_eq!(
        length.to_string(),
        "`reference.rejected` has 2 entries, expected 1"
    );
    let outside = ResponseIndex::of_entries(vec![0, 2], vec![1, 1]).unwrap_err();
    assert_eq!(
        outside,
        LossError::NoSuchResponse {
            token: 1,
            found: 2,
            responses: 2
        }
    );
    let index = ResponseIndex::of_whole_responses(&[1, 0]);
    let empty = sequence_scores(leaf(&[1.0]), &index, ScoreAggregation::Last).unwrap_err();
    assert_eq!(empty, LossError::NoToken { response: 1 });
    let scores = ScorePair {
        chosen: leaf(&[1.0]),
        rejected: leaf(&[0.0]),
    };
    assert!(center_penalty(scores, f64::NAN).is_err());
    assert!(sft(leaf(&[-1.0]), &TokenMask::all(1), 0.0).is_err());
    let short = kept_sums(
        leaf(&[-1.0]),
        &index,
        &TokenMask::all(2),
        Normalisation::Sum,
    );
    assert_eq!(
        short.unwrap_err().to_string(),
        "`keep` has 2 entries, expected 1"
    );
}
