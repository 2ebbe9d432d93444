//! Diagnostics and warnings (METHOD, section 9).

use pivotal_core::Sign;
use pivotal_credit::{
    Credit, CreditConfig, CreditRule, Diagnostics, DiagnosticsReport, Drift, Error, Response,
    Thresholds, Warning,
};

fn rule(toml: &str) -> CreditRule {
    toml::from_str::<CreditConfig>(toml)
        .unwrap()
        .resolve()
        .unwrap()
}

fn close(got: f64, want: f64) {
    assert!((got - want).abs() < 1e-12, "{got}, expected {want}");
}

#[test]
fn a_pair_by_hand() {
    // Chosen: + + - - - 0-crossing back to +; rejected: all +, so nothing is kept.
    let chosen = [1.0, 1.0, -1.0, -1.0, -1.0, 1.0];
    let rejected = [1.0; 4];
    let batch = [
        Response::new(1, 0, &chosen, Sign::Positive),
        Response::new(1, 1, &rejected, Sign::Negative),
    ];
    let given = Credit::new(rule(""), 1).assign(&batch).unwrap();
    let mut diagnostics = Diagnostics::default();
    // The chosen's third token is wrongly dropped, its last wrongly kept; a wrong token of the rejected is missed.
    let chosen_truth = [true, true, true, false, false, false];
    let chosen_logps = [0.5_f32, 0.95, 0.2, 0.5, 0.5, 0.98].map(f32::ln);
    diagnostics
        .observe(&given[0], Some(&chosen_truth), Some(&chosen_logps))
        .unwrap();
    let rejected_truth = [true, false, true, true];
    let rejected_logps = [0.5_f32; 4].map(f32::ln);
    diagnostics
        .observe(&given[1], Some(&rejected_truth), Some(&rejected_logps))
        .unwrap();

    let report = diagnostics.report();
    assert_eq!(
        (
            report.responses,
            report.tokens,
            report.segments,
            report.flips
        ),
        (2, 10, 4, 2)
    );
    close(report.segments_per_100_tokens, 40.0);
    // Lengths 1, 2, 3, 4.
    close(report.segment_tokens_median, 2.5);
    close(report.segment_tokens_p10, 1.3);
    close(report.segment_tokens_p90, 3.7);
    close(report.kept_fraction, 0.3);
    close(report.empty_mask_fraction, 0.5);
    close(report.single_segment_fraction, 0.5);
    // The chosen's − and the rejected's +, of four.
    close(report.opposing_fraction, 0.5);

    let positive = report.positive.unwrap();
    close(positive.kept_fraction, 0.5);
    assert_eq!(
        positive.kept_fraction_by_position[..4],
        [Some(1.0), Some(1.0), None, Some(0.0)]
    );
    let agreement = positive.agreement.unwrap();
    close(agreement.precision.unwrap(), 2.0 / 3.0);
    close(agreement.recall.unwrap(), 2.0 / 3.0);
    close(agreement.f1.unwrap(), 2.0 / 3.0);
    // Of the right tokens, those at 0.5 and 0.2 are decisive; the first is kept.
    close(agreement.decisive_recall.unwrap(), 0.5);
    // Kept weights 0.5, 0.05 and 0.02, the last wrongly; the f32 logarithms cost seven digits.
    assert!((agreement.weighted_precision.unwrap() - 0.55 / 0.57).abs() < 1e-6);

    let negative = report.negative.unwrap().agreement.unwrap();
    assert_eq!((negative.precision, negative.recall), (None, Some(0.0)));
    close(report.agreement.unwrap().recall.unwrap(), 0.5);

    let json = serde_json::to_string(&report).unwrap();
    assert_eq!(
        serde_json::from_str::<DiagnosticsReport>(&json).unwrap(),
        report
    );
}

#[test]
fn nothing_observed_divides_by_nothing() {
    let report = Diagnostics::default().report();
    assert_eq!(report, DiagnosticsReport::default());
    assert_eq!(Thresholds::default().warnings(&report, &rule("")), []);
}

#[test]
fn only_own_tokens_count() {
    let own = [true, false, true];
    let response = Response {
        response_mask: Some(&own),
        ..Response::new(1, 0, &[1.0, 1.0, 1.0], Sign::Positive)
    };
    let given = Credit::new(rule(""), 1).assign(&[response]).unwrap();
    let mut diagnostics = Diagnostics::default();
    diagnostics.observe(&given[0], None, None).unwrap();
    let report = diagnostics.report();
    assert_eq!((report.tokens, report.kept_fraction), (2, 1.0));
    assert_eq!(report.agreement, None);
}

#[test]
fn columns_of_another_length_are_refused() {
    let given = Credit::new(rule(""), 1)
        .assign(&[Response::new(1, 0, &[1.0, 1.0], Sign::Positive)])
        .unwrap();
    let mut diagnostics = Diagnostics::default();
    for (truth, logps) in [(Some(&[true][..]), None), (None, Some(&[-1.0_f32][..]))] {
        let error = diagnostics.observe(&given[0], truth, logps).unwrap_err();
        assert!(matches!(
            error,
            Error::Length {
                expected: 2,
                found: 1,
                ..
            }
        ));
    }
    assert_eq!(diagnostics.report().responses, 0);
}

fn warned(toml: &str, signal: &[f32], sign: Sign) -> Vec<Warning> {
    let rule = rule(toml);
    let given = Credit::new(rule.clone(), 1)
        .assign(&[Response::new(1, 0, signal, sign)])
        .unwrap();
    let mut diagnostics = Diagnostics::default();
    diagnostics.observe(&given[0], None, None).unwrap();
    Thresholds::default().warnings(&diagnostics.report(), &rule)
}

#[test]
fn each_failure_has_its_warning() {
    let noise: Vec<f32> = (0..20)
        .map(|t| if t % 2 == 0 { 1.0 } else { -1.0 })
        .collect();
    assert_eq!(
        warned("", &noise, Sign::Positive),
        [Warning::OverSegmentation { median_tokens: 1.0 }]
    );
    assert_eq!(warned("cut = 'token'", &noise, Sign::Positive), []);
    assert_eq!(
        warned("", &[1.0; 20], Sign::Positive),
        [
            Warning::UnderSegmentation { fraction: 1.0 },
            Warning::KeepAll { fraction: 1.0 }
        ]
    );
    assert_eq!(
        warned(
            "cut = 'sequence'\nselection = 'all'",
            &[1.0; 20],
            Sign::Positive
        ),
        []
    );
    assert_eq!(
        warned("", &[1.0; 20], Sign::Negative),
        [
            Warning::UnderSegmentation { fraction: 1.0 },
            Warning::KeepNone { fraction: 0.0 },
            Warning::EmptyMasks { fraction: 1.0 }
        ]
    );
    let healthy: Vec<f32> = (0..20)
        .map(|t| if (t / 5) % 2 == 0 { 1.0 } else { -1.0 })
        .collect();
    assert_eq!(warned("", &healthy, Sign::Positive), []);
}

#[test]
fn drift_needs_two_windows_and_survives_a_checkpoint() {
    let mut drift = Drift::new(3);
    let thresholds = Thresholds::default();
    for value in [0.1, 0.1, 0.1, 0.4, 0.4] {
        drift.push(value);
        assert_eq!(thresholds.drift_warning(&drift), None);
    }
    let mut drift: Drift = serde_json::from_str(&serde_json::to_string(&drift).unwrap()).unwrap();
    drift.push(0.4);
    match thresholds.drift_warning(&drift) {
        Some(Warning::OpposingDrift { change }) => close(change, 0.3),
        other => panic!("{other:?}"),
    }
    let text = thresholds.drift_warning(&drift).unwrap().to_string();
    assert_eq!(
        text,
        "opposing-drift: the fraction of segments against their response's sign moved by +0.30 over the run"
    );
}

#[test]
fn neutral_segments_neither_flip_nor_oppose() {
    let signal = [1.0, 0.0, -1.0, 0.0, -1.0];
    let rule = rule("between = 'dead_zone'\noffset = 0.5");
    let given = Credit::new(rule, 1)
        .assign(&[Response::new(1, 0, &signal, Sign::Positive)])
        .unwrap();
    let mut diagnostics = Diagnostics::default();
    diagnostics.observe(&given[0], None, None).unwrap();
    let report = diagnostics.report();
    // + 0 − 0 −
    assert_eq!((report.segments, report.flips), (5, 1));
    close(report.opposing_fraction, 0.4);
}

#[test]
fn a_warning_begins_with_its_name() {
    let (fraction, change) = (0.5, -0.3);
    let warnings = [
        Warning::OverSegmentation { median_tokens: 1.0 },
        Warning::UnderSegmentation { fraction },
        Warning::KeepAll { fraction },
        Warning::KeepNone { fraction },
        Warning::EmptyMasks { fraction },
        Warning::OpposingDrift { change },
        Warning::ChosenFalling {
            kept: change,
            dropped: None,
        },
    ];
    for warning in warnings {
        let text = warning.to_string();
        assert!(text.starts_with(&format!("{}: ", warning.name())), "{text}");
    }
}

#[test]
fn a_fall_of_the_chosen_tokens_is_told_apart_from_a_rise() {
    let thresholds = Thresholds::default();
    assert_eq!(thresholds.chosen_warning(0.5, Some(-2.0)), None);
    assert_eq!(thresholds.chosen_warning(-0.09, None), None);
    let warning = thresholds.chosen_warning(-0.1, Some(-0.25)).unwrap();
    assert_eq!(
        warning.to_string(),
        "chosen-falling: a kept token of the chosen responses has changed by -0.10 nats, a dropped one by -0.25; \
         lower the learning rate or raise `beta`"
    );
}

#[test]
fn the_latest_mean_is_that_of_the_last_window() {
    let mut drift = Drift::new(2);
    assert!(drift.is_empty());
    drift.push(1.0);
    assert_eq!(drift.latest(), None);
    drift.push(3.0);
    drift.push(5.0);
    assert_eq!(drift.latest(), Some(4.0));
}

#[test]
fn merged_diagnostics_are_those_of_all_responses() {
    let signals: Vec<Vec<f32>> = (0..7)
        .map(|response| {
            let value = |t| ((t * 5 + response) % 7) as f32 - 3.0;
            (0..3 + response * 3).map(value).collect()
        })
        .collect();
    let responses: Vec<Response<'_>> = signals
        .iter()
        .enumerate()
        .map(|(index, signal)| {
            let sign = [Sign::Positive, Sign::Negative][index % 2];
            Response::new(index as u64, 0, signal, sign)
        })
        .collect();
    let given = Credit::new(rule(""), 1).assign(&responses).unwrap();
    // Truth of some responses, probabilities of fewer.
    let observe = |diagnostics: &mut Diagnostics, index: usize| {
        let tokens = signals[index].len();
        let truth: Vec<bool> = (0..tokens).map(|t| t % 3 == 0).collect();
        let logps: Vec<f32> = (0..tokens).map(|t| -0.125 * t as f32).collect();
        let (truth, logps) = match index % 3 {
            0 => (None, None),
            1 => (Some(&truth[..]), None),
            _ => (Some(&truth[..]), Some(&logps[..])),
        };
        diagnostics.observe(&given[index], truth, logps).unwrap();
    };
    let mut whole = Diagnostics::default();
    let mut halves = [Diagnostics::default(), Diagnostics::default()];
    for index in 0..given.len() {
        observe(&mut whole, index);
        observe(&mut halves[usize::from(index > 3)], index);
    }
    let mut merged = Diagnostics::default();
    halves.iter().for_each(|half| merged.merge(half));
    let (whole, merged) = (whole.report(), merged.report());
    assert!(whole.agreement.is_some() && whole.flips > 0, "{whole:?}");
    let weighted = |report: &DiagnosticsReport| report.agreement.unwrap().weighted_precision;
    // A sum of weights, in another order.
    close(weighted(&merged).unwrap(), weighted(&whole).unwrap());
    let plain = |mut report: DiagnosticsReport| {
        let sides = [&mut report.positive, &mut report.negative].map(|side| side.as_mut().unwrap());
        let all = sides
            .into_iter()
            .map(|side| &mut side.agreement)
            .chain([&mut report.agreement]);
        all.for_each(|agreement| agreement.as_mut().unwrap().weighted_precision = None);
        report
    };
    assert_eq!(plain(merged), plain(whole));
}
