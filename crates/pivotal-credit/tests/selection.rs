//! Selection rules and their controls (METHOD, section 7).

use pivotal_core::Sign;
use pivotal_credit::{Credit, CreditConfig, Response, ResponseCredit, Selection, relative_bin};
use proptest::prelude::*;

fn credit(selection: Selection, seed: u64) -> Credit {
    let config = CreditConfig {
        selection,
        offset: Some(0.2),
        ..CreditConfig::default()
    };
    Credit::new(config.resolve().unwrap(), seed)
}

/// Responses, their signs, and which of their tokens are right and which are the model's own.
type Batch = Vec<(Vec<f32>, bool, Vec<bool>, Vec<bool>)>;

fn batch() -> impl Strategy<Value = Batch> {
    let response = (0..30_usize).prop_flat_map(|tokens| {
        (
            prop::collection::vec(-1.0..1.0_f32, tokens),
            any::<bool>(),
            prop::collection::vec(any::<bool>(), tokens),
            prop::collection::vec(prop::bool::weighted(0.8), tokens),
        )
    });
    prop::collection::vec(response, 0..6)
}

fn sign(chosen: bool) -> Sign {
    if chosen {
        Sign::Positive
    } else {
        Sign::Negative
    }
}

fn assign(batch: &Batch, selection: Selection, seed: u64) -> Vec<ResponseCredit> {
    let responses: Vec<Response<'_>> = batch
        .iter()
        .enumerate()
        .map(|(row, (signal, chosen, truth, own))| Response {
            truth: Some(truth),
            response_mask: Some(own),
            ..Response::new(row as u64, u32::from(!chosen), signal, sign(*chosen))
        })
        .collect();
    credit(selection, seed).assign(&responses).unwrap()
}

proptest! {
    #[test]
    fn detail_29_disagree_is_the_inverse_of_agree(batch in batch()) {
        let (agree, disagree, all) = (
            assign(&batch, Selection::Agree, 1),
            assign(&batch, Selection::Disagree, 1),
            assign(&batch, Selection::All, 1),
        );
        for (((one, other), all), (_, _, _, own)) in agree.iter().zip(&disagree).zip(&all).zip(&batch) {
            prop_assert_eq!(all.keep.as_slice(), &own[..]);
            for (index, &own) in own.iter().enumerate() {
                let (a, b) = (one.keep.as_slice()[index], other.keep.as_slice()[index]);
                prop_assert_eq!(a ^ b, own);
            }
        }
    }

    #[test]
    fn detail_29_random_keeps_exactly_as_many(batch in batch(), seed in any::<u64>()) {
        let agree = assign(&batch, Selection::Agree, seed);
        let random = assign(&batch, Selection::Random, seed);
        prop_assert_eq!(&random, &assign(&batch, Selection::Random, seed));
        for ((one, drawn), (_, _, _, own)) in agree.iter().zip(&random).zip(&batch) {
            prop_assert_eq!(one.keep.kept(), drawn.keep.kept());
            prop_assert!(drawn.keep.as_slice().iter().zip(own).all(|(&keep, &own)| own || !keep));
        }
    }

    #[test]
    fn random_does_not_depend_on_the_rest_of_the_batch(batch in batch(), seed in any::<u64>()) {
        prop_assume!(batch.len() > 1);
        let whole = assign(&batch, Selection::Random, seed);
        let first = assign(&batch[..1].to_vec(), Selection::Random, seed);
        prop_assert_eq!(&whole[0].keep, &first[0].keep);
    }

    #[test]
    fn random_position_keeps_as_many_of_each_sign_and_tenth(batch in batch(), seed in any::<u64>()) {
        let counts = |given: &[ResponseCredit]| {
            let mut counts = [[0_usize; 10]; 2];
            for (one, (_, chosen, _, own)) in given.iter().zip(&batch) {
                let kept: Vec<bool> =
                    one.keep.as_slice().iter().zip(own).filter(|(_, own)| **own).map(|(&keep, _)| keep).collect();
                for (index, _) in kept.iter().enumerate().filter(|(_, keep)| **keep) {
                    counts[usize::from(*chosen)][relative_bin(index, kept.len(), 10)] += 1;
                }
            }
            counts
        };
        prop_assert_eq!(
            counts(&assign(&batch, Selection::Agree, seed)),
            counts(&assign(&batch, Selection::RandomPosition, seed))
        );
    }

    #[test]
    fn truth_keeps_right_tokens_of_chosen_and_wrong_ones_of_rejected(batch in batch()) {
        for (one, (_, chosen, truth, own)) in assign(&batch, Selection::Truth, 1).iter().zip(&batch) {
            for index in 0..truth.len() {
                prop_assert_eq!(one.keep.as_slice()[index], own[index] && truth[index] == *chosen);
            }
        }
    }
}

#[test]
fn seeds_and_responses_draw_differently() {
    let signal: Vec<f32> = (0..64)
        .map(|t| if t % 2 == 0 { 1.0 } else { -1.0 })
        .collect();
    let draw = |seed, id, sample| {
        let response = Response::new(id, sample, &signal, Sign::Positive);
        credit(Selection::Random, seed)
            .assign(&[response])
            .unwrap()
            .remove(0)
            .keep
    };
    let base = draw(1, 1, 0);
    assert_eq!(base.kept(), 32);
    assert_eq!(base, draw(1, 1, 0));
    for other in [draw(2, 1, 0), draw(1, 2, 0), draw(1, 1, 1)] {
        assert_ne!(base, other);
    }
}

#[test]
fn a_given_fraction_replaces_agrees() {
    let config = CreditConfig {
        selection: Selection::Random,
        random_fraction: Some(0.25),
        ..CreditConfig::default()
    };
    let rule = config.resolve().unwrap();
    assert!(!rule.needs_signal());
    let given = Credit::new(rule, 1)
        .assign(&[Response::new(1, 0, &[1.0; 40], Sign::Positive)])
        .unwrap();
    assert_eq!(given[0].keep.kept(), 10);
}

#[test]
fn position_draws_change_from_batch_to_batch() {
    let signal: Vec<f32> = (0..200)
        .map(|t| if t % 2 == 0 { 1.0 } else { -1.0 })
        .collect();
    let mut credit = credit(Selection::RandomPosition, 1);
    let mut draw = || {
        credit
            .assign(&[Response::new(1, 0, &signal, Sign::Positive)])
            .unwrap()
            .remove(0)
            .keep
    };
    assert_ne!(draw(), draw());
}
