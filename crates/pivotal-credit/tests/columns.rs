//! Rules that read more than the signal: per-token signs, entropy and probability cuts, selections by percentage, the
//! calibrated baseline.

use pivotal_core::{ErrorKind, HasKind, Sign};
use pivotal_credit::{
    Credit, CreditConfig, CreditRule, CreditState, Diagnostics, Error, Response, ResponseCredit,
    TokenColumns, calibrate, critic, increment, top_percent,
};
use proptest::prelude::*;

fn rule(toml: &str) -> CreditRule {
    let config: CreditConfig = toml::from_str(toml).unwrap();
    config.resolve().unwrap()
}

fn assign(toml: &str, batch: &[Response<'_>]) -> Result<Vec<ResponseCredit>, Error> {
    Credit::new(rule(toml), 1).assign(batch)
}

fn kept(given: &ResponseCredit) -> String {
    let letter = |&keep: &bool| if keep { 'x' } else { '.' };
    given.keep.as_slice().iter().map(letter).collect()
}

fn pivots(given: &ResponseCredit) -> Vec<usize> {
    given.segments.iter().map(|segment| segment.start).collect()
}

/// The classic off-by-one: a value head at token t has read that token; the critic's value of t has not.
#[test]
fn detail_04_level_includes_the_token_and_critic_excludes_it() {
    // A value head's outputs at the last prompt token and at each response token; token 1 is the blunder.
    let (prompt_level, levels) = (0.5, [0.5, -1.0, -1.0]);
    let (before, after_last) = critic(prompt_level, &levels);
    assert_eq!(before, [0.5, 0.5, -1.0]);
    assert_eq!(after_last, -1.0);
    let pivot_of = |signal: &[f32]| {
        pivots(
            &assign(
                "signal = 'external'",
                &[Response::new(1, 0, signal, Sign::Positive)],
            )
            .unwrap()[0],
        )
    };
    assert_eq!(pivot_of(&levels), [0, 1]);
    assert_eq!(pivot_of(&before), [0, 2]);
    // What one token changes is the next critic value less its own: the level's increment.
    let next = [&before[1..], &[after_last]].concat();
    let change: Vec<f32> = next.iter().zip(&before).map(|(a, b)| a - b).collect();
    assert_eq!(change, increment(prompt_level, &levels));
    assert_eq!(critic(2.0, &[]), (vec![], 2.0));
}

/// The co-authors' PPO: values and advantages of the same sign are kept, token by token.
#[test]
fn detail_28_an_advantages_sign_is_compared_token_by_token() {
    let values = [0.5, 0.25, -0.5, -0.25, 0.5, -0.5];
    let advantages = [1.0, -1.0, -2.0, 2.0, 0.0, 0.0];
    let columns = TokenColumns {
        advantages: Some(&advantages),
        ..TokenColumns::default()
    };
    let response = Response {
        columns,
        ..Response::new(1, 0, &values, Sign::Positive)
    };
    let toml = |selection: &str| {
        format!(
            "signal = 'critic'\ncut = 'token'\nsequence_sign = 'advantage'\nselection = '{selection}'"
        )
    };
    let given = assign(&toml("agree"), &[response]).unwrap().remove(0);
    assert_eq!(kept(&given), "x.x...");
    use Sign::{Negative, Neutral, Positive};
    assert_eq!(
        given.token_signs.as_deref().unwrap(),
        [Positive, Negative, Negative, Positive, Neutral, Neutral]
    );
    assert_eq!(
        kept(&assign(&toml("disagree"), &[response]).unwrap()[0]),
        ".x.xxx"
    );
    // Segments of several tokens are split by the advantages' signs, too.
    let given = assign("sequence_sign = 'advantage'", &[response])
        .unwrap()
        .remove(0);
    assert_eq!(
        (pivots(&given), kept(&given)),
        (vec![0, 2, 4, 5], "x.x...".to_owned())
    );
    // Truth is compared with the token's sign, and so is the diagnostics' agreement.
    let truth = [true, true, false, false, true, true];
    let judged = Response {
        truth: Some(&truth),
        ..response
    };
    let given = assign(&toml("truth"), &[judged]).unwrap().remove(0);
    assert_eq!(kept(&given), "x.x...");
    let mut diagnostics = Diagnostics::default();
    diagnostics.observe(&given, Some(&truth), None).unwrap();
    assert_eq!(diagnostics.report().agreement.unwrap().f1, Some(1.0));
}

#[test]
fn token_signs_and_columns_follow_the_response_mask() {
    let (signal, own) = ([1.0, 9.0, -1.0, 1.0], [true, false, true, true]);
    let advantages = [1.0, f32::NAN, -1.0, -1.0];
    let columns = TokenColumns {
        advantages: Some(&advantages),
        ..TokenColumns::default()
    };
    let response = Response {
        columns,
        response_mask: Some(&own),
        ..Response::new(1, 0, &signal, Sign::Positive)
    };
    let given = assign("cut = 'token'\nsequence_sign = 'advantage'", &[response])
        .unwrap()
        .remove(0);
    assert_eq!(kept(&given), "x.x.");
    assert_eq!(given.token_signs.unwrap()[1], Sign::Neutral);
}

#[test]
fn entropy_cuts_at_the_token_drawn_from_the_open_distribution() {
    let entropies = [3.0, 0.5, 2.0, 1.75, 0.1, 1.8];
    let columns = TokenColumns {
        reference_entropies: Some(&entropies),
        ..TokenColumns::default()
    };
    let response = Response {
        columns,
        ..Response::new(1, 0, &[0.0; 6], Sign::Positive)
    };
    let given = assign("cut = 'entropy'\ncut_entropy_nats = 1.75", &[response])
        .unwrap()
        .remove(0);
    assert_eq!(pivots(&given), [0, 2, 5]);
    let none = assign("cut = 'entropy'\ncut_entropy_nats = 1000.0", &[response])
        .unwrap()
        .remove(0);
    assert_eq!(pivots(&none), [0]);
    // Entropies of tokens that are not the model's own cut nothing.
    let own = [true, true, false, true, true, true];
    let response = Response {
        response_mask: Some(&own),
        ..response
    };
    let given = assign("cut = 'entropy'\ncut_entropy_nats = 1.0", &[response])
        .unwrap()
        .remove(0);
    assert_eq!(pivots(&given), [0, 3, 5]);
}

#[test]
fn every_second_improbable_token_begins_a_segment() {
    let logps = [0.5_f32, 0.95, 0.2, 0.99, 0.1, 0.3, 0.8].map(f32::ln);
    let columns = TokenColumns {
        old_token_logps: Some(&logps),
        ..TokenColumns::default()
    };
    let response = Response {
        columns,
        ..Response::new(1, 0, &[0.0; 7], Sign::Positive)
    };
    // Improbable: 0, 2, 4, 5, 6.
    for (every, want) in [
        (1, vec![0, 2, 4, 5, 6]),
        (2, vec![0, 2, 5]),
        (5, vec![0, 6]),
        (9, vec![0]),
    ] {
        let toml = format!("cut = 'improbable'\ncut_probability = 0.9\ncut_every = {every}");
        assert_eq!(
            pivots(&assign(&toml, &[response]).unwrap()[0]),
            want,
            "{every}"
        );
    }
}

#[test]
fn a_quota_keeps_the_top_of_chosen_and_the_bottom_of_rejected() {
    let signal = [0.3, -0.2, 0.9, 0.1, -0.8, 0.5, 0.0, 0.4, 0.2, -0.1];
    let batch = [Sign::Positive, Sign::Negative, Sign::Neutral]
        .map(|sign| Response::new(1, 0, &signal, sign));
    let given = assign("selection = 'quota'", &batch).unwrap();
    assert_eq!(
        given.iter().map(kept).collect::<Vec<_>>(),
        ["..x..x.x..", ".x..x....x", ".........."]
    );
    // A part of a token is a token, of the model's own ones only.
    let own = [
        true, false, true, false, false, false, false, true, false, false,
    ];
    let given = assign(
        "selection = 'quota'",
        &[Response {
            response_mask: Some(&own),
            ..batch[1]
        }],
    )
    .unwrap();
    assert_eq!(kept(&given[0]), "x.........");
}

#[test]
fn excess_loss_and_entropy_top_are_over_the_batch() {
    let (first, second) = ([-1.0, -3.0, -2.0], [-0.5, -4.0]);
    let (reference_first, reference_second) = ([-0.9, -1.0, -2.5], [-0.5, -3.5]);
    let row = |id, signal, policy, reference| {
        let columns = TokenColumns {
            token_logps: Some(policy),
            reference_token_logps: Some(reference),
            ..TokenColumns::default()
        };
        Response {
            columns,
            ..Response::new(id, 0, signal, Sign::Positive)
        }
    };
    // Excess losses 0.1, 2, −0.5 and 0, 0.5: 40 % of five tokens are two.
    let batch = [
        row(1, &[0.0; 3], &first, &reference_first),
        row(2, &[0.0; 2], &second, &reference_second),
    ];
    let given = assign(
        "selection = 'excess_loss'\nselection_percent = 40.0",
        &batch,
    )
    .unwrap();
    assert_eq!(given.iter().map(kept).collect::<Vec<_>>(), [".x.", ".x"]);
    let (open, shut) = ([1.0, 2.0, 3.0, 0.5, 0.1], [0.2; 5]);
    let row = |id, entropies| {
        let columns = TokenColumns {
            policy_entropies: Some(entropies),
            ..TokenColumns::default()
        };
        Response {
            columns,
            ..Response::new(id, 0, &[0.0; 5], Sign::Negative)
        }
    };
    let given = assign("selection = 'entropy_top'", &[row(1, &shut), row(2, &open)]).unwrap();
    assert_eq!(
        given.iter().map(kept).collect::<Vec<_>>(),
        [".....", ".xx.."]
    );
    assert!(
        !rule("selection = 'entropy_top'").needs_signal()
            && !rule("selection = 'excess_loss'").needs_signal()
    );
    assert!(rule("selection = 'quota'").needs_signal());
}

#[test]
fn a_missing_short_or_broken_column_is_named() {
    let bare = Response::new(7, 0, &[0.0, 1.0], Sign::Positive);
    for (toml, want) in [
        (
            "selection = 'entropy_top'",
            "response 7 has no `policy_entropies`, which `selection = entropy_top` needs",
        ),
        (
            "selection = 'excess_loss'",
            "response 7 has no `reference_token_logps`, which `selection = excess_loss` needs",
        ),
        (
            "sequence_sign = 'advantage'",
            "response 7 has no `advantages`, which `sequence_sign = advantage` needs",
        ),
        (
            "cut = 'improbable'",
            "response 7 has no `old_token_logps`, which `cut = improbable` needs",
        ),
        (
            "cut = 'entropy'\ncut_entropy_nats = 1.0",
            "response 7 has no `reference_entropies`, which `cut = entropy` needs",
        ),
    ] {
        assert_eq!(assign(toml, &[bare]).unwrap_err().to_string(), want);
    }
    let with = |advantages| {
        let columns = TokenColumns {
            advantages: Some(advantages),
            ..TokenColumns::default()
        };
        assign(
            "sequence_sign = 'advantage'",
            &[Response { columns, ..bare }],
        )
        .unwrap_err()
    };
    assert_eq!(
        with(&[1.0]).to_string(),
        "`advantages` of response 7 has 1 values, expected 2, one a token"
    );
    let error = with(&[1.0, f32::NAN]);
    assert_eq!(error.kind(), ErrorKind::NotFinite);
    assert_eq!(
        error.to_string(),
        "`advantages` of response 7 is NaN at token 1, expected a finite number"
    );
}

#[test]
fn a_calibrated_baseline_is_found_once_and_resumes() {
    // Chosen tokens about 3, rejected ones about 1: a sign around 0 keeps all of one side and nothing of the other.
    let (good, bad) = ([3.0, 2.5, 0.5], [1.0, 0.75, 2.75]);
    let batch: Vec<Response<'_>> = (0..40)
        .flat_map(|id| {
            [
                Response::new(id, 0, &good, Sign::Positive),
                Response::new(id, 1, &bad, Sign::Negative),
            ]
        })
        .collect();
    let toml = "baseline = 'calibrated'\ncut = 'token'";
    let mut credit = Credit::new(rule(toml), 1);
    let given = credit.assign(&batch).unwrap();
    // Between 1 and 2.5, where two of three are right on either side.
    assert_eq!(given[0].baseline, [1.75]);
    assert_eq!(
        (kept(&given[0]), kept(&given[1])),
        ("xx.".into(), "xx.".into())
    );
    // Later batches do not move it, in this process or the next.
    let state: CreditState =
        serde_json::from_str(&serde_json::to_string(credit.state()).unwrap()).unwrap();
    assert_eq!(&state, credit.state());
    let mut resumed = Credit::resume(rule(toml), 1, state).unwrap();
    let other = [Response::new(99, 0, &[50.0], Sign::Positive)];
    assert_eq!(resumed.assign(&other).unwrap()[0].baseline, [1.75]);
    assert_eq!(credit.assign(&other).unwrap()[0].baseline, [1.75]);
    // One side only: an error that says so, and nothing learnt.
    let mut fresh = Credit::new(
        rule("baseline = 'calibrated'\nbaseline_calibration = 1.0"),
        1,
    );
    let before = fresh.state().clone();
    assert_eq!(
        fresh.assign(&other),
        Err(Error::Calibration {
            positive: 1,
            negative: 0
        })
    );
    assert_eq!(fresh.state(), &before);
}

#[test]
fn the_calibration_split_is_a_part_of_the_prompts() {
    // Each prompt separates at its own place: which ones were looked at shows in the threshold.
    let values: Vec<[f32; 1]> = (0..200_u8).map(|id| [f32::from(id)]).collect();
    let batch: Vec<Response<'_>> = (0..200_usize)
        .map(|id| {
            let sign = if id >= 100 {
                Sign::Positive
            } else {
                Sign::Negative
            };
            Response::new(id as u64, 0, &values[id], sign)
        })
        .collect();
    let threshold = |fraction: f64, seed| {
        let toml = format!("baseline = 'calibrated'\nbaseline_calibration = {fraction}");
        Credit::new(rule(&toml), seed).assign(&batch).unwrap()[0].baseline[0]
    };
    assert_eq!(threshold(1.0, 1), 99.5);
    let few: Vec<f32> = (0..6).map(|seed| threshold(0.1, seed)).collect();
    assert_eq!(few[0], threshold(0.1, 0));
    assert!(
        few.iter().any(|&found| found != few[0])
            && few.iter().all(|found| (70.0..130.0).contains(found))
    );
}

/// Every threshold there could be, tried one by one.
fn best_accuracy(chosen: &[f32], rejected: &[f32]) -> f64 {
    let candidates = chosen
        .iter()
        .chain(rejected)
        .copied()
        .chain([f32::NEG_INFINITY]);
    let accuracy = |threshold: f32| {
        let above =
            chosen.iter().filter(|&&value| value > threshold).count() as f64 / chosen.len() as f64;
        let below = rejected.iter().filter(|&&value| value <= threshold).count() as f64
            / rejected.len() as f64;
        (above + below) / 2.0
    };
    candidates.map(accuracy).fold(0.0, f64::max)
}

proptest! {
    #[test]
    fn calibration_is_the_best_there_is(
        chosen in prop::collection::vec((-6..6_i8).prop_map(f32::from), 1..20),
        rejected in prop::collection::vec((-6..6_i8).prop_map(f32::from), 1..20),
    ) {
        let found = calibrate(&chosen, &rejected).unwrap();
        let best = best_accuracy(&chosen, &rejected);
        prop_assert!((found.balanced_accuracy - best).abs() < 1e-12);
        let above = chosen.iter().filter(|&&value| value > found.threshold).count() as f64 / chosen.len() as f64;
        let not_above = rejected.iter().filter(|&&value| value <= found.threshold).count() as f64 / rejected.len() as f64;
        prop_assert!(((above + not_above) / 2.0 - best).abs() < 1e-12, "{:?}", found);
    }

    #[test]
    fn a_percentage_keeps_the_largest_and_as_many_as_it_says(
        values in prop::collection::vec((-9..9_i8).prop_map(f64::from), 0..60), percent in 1..=100_u8
    ) {
        let keep = top_percent(&values, f64::from(percent));
        let count = keep.iter().filter(|&&keep| keep).count();
        prop_assert_eq!(count, (usize::from(percent) * values.len()).div_ceil(100));
        let least = values.iter().zip(&keep).filter(|(_, keep)| **keep).map(|(&v, _)| v).fold(f64::INFINITY, f64::min);
        prop_assert!(values.iter().zip(&keep).all(|(&value, &keep)| keep || value <= least));
    }

    /// Where every advantage has the response's sign, the two readings of the sequence sign are one, soft weights included.
    #[test]
    fn advantages_of_one_sign_are_the_responses_sign(
        signal in prop::collection::vec(-1.0..1.0_f32, 0..40), positive in any::<bool>(), soft in any::<bool>(),
    ) {
        let sign = if positive { Sign::Positive } else { Sign::Negative };
        let advantages = vec![f32::from(sign.as_i8()) * 0.5; signal.len()];
        let columns = TokenColumns { advantages: Some(&advantages), ..TokenColumns::default() };
        let response = Response { columns, ..Response::new(1, 0, &signal, sign) };
        let weighting = if soft { "soft" } else { "hard" };
        let common = format!("offset = 0.2\nweighting = '{weighting}'\n");
        let one = assign(&common, &[response]).unwrap().remove(0);
        let other = assign(&format!("{common}sequence_sign = 'advantage'"), &[response]).unwrap().remove(0);
        prop_assert_eq!((&one.keep, &one.weights, &one.segments), (&other.keep, &other.weights, &other.segments));
    }
}
