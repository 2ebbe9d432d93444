//! Example tables and edges.

use pivotal_core::{ErrorKind, HasKind, Sign};
use pivotal_credit::{
    Baseline, Between, Credit, CreditConfig, CreditRule, CutRule, Error, Response, ResponseCredit,
    Selection, Signal, TokenColumns, Weighting, Width, advance, increment, log_ratio,
};

fn rule(toml: &str) -> CreditRule {
    toml::from_str::<CreditConfig>(toml)
        .unwrap()
        .resolve()
        .unwrap()
}

fn one(toml: &str, response: Response<'_>) -> ResponseCredit {
    Credit::new(rule(toml), 1)
        .assign(&[response])
        .unwrap()
        .remove(0)
}

fn pivots(given: &ResponseCredit) -> Vec<usize> {
    given.segments.iter().map(|segment| segment.start).collect()
}

fn signs(given: &ResponseCredit) -> String {
    let letter = |sign| match sign {
        Sign::Positive => '+',
        Sign::Neutral => '0',
        Sign::Negative => '-',
    };
    given
        .segments
        .iter()
        .map(|segment| letter(segment.sign))
        .collect()
}

fn kept(given: &ResponseCredit) -> String {
    given
        .keep
        .as_slice()
        .iter()
        .map(|&keep| if keep { 'x' } else { '.' })
        .collect()
}

const WAVE: [f32; 10] = [0.2, 0.8, 0.1, -0.3, 0.6, -0.7, -0.1, 0.4, -0.6, 0.9];

/// The two readings of the paper's trigger differ on the same signal, baseline and offset.
#[test]
fn detail_27_hysteresis_and_dead_zone_differ() {
    let response = Response::new(1, 0, &WAVE, Sign::Positive);
    let hold = one("offset = 0.5", response);
    assert_eq!(
        (pivots(&hold), signs(&hold)),
        (vec![0, 1, 5, 9], "0+-+".into())
    );
    assert_eq!(kept(&hold), ".xxxx....x");
    let dead = one("offset = 0.5\nbetween = 'dead_zone'", response);
    assert_eq!(
        (pivots(&dead), signs(&dead)),
        (vec![0, 1, 2, 4, 5, 6, 8, 9], "0+0+-0-+".into())
    );
    assert_eq!(kept(&dead), ".x..x....x");
    let dead_kept = one(
        "offset = 0.5\nbetween = 'dead_zone'\nneutral = 'keep'",
        response,
    );
    assert_eq!(kept(&dead_kept), "xxxxx.xx.x");
}

#[test]
fn every_cut_rule_on_one_response() {
    let texts = ["So", ",", " it", " is", " 4", ".", "\n", "Or", "?", "</s>"];
    let cuts = [3, 7];
    let response = Response {
        texts: Some(&texts),
        cuts: Some(&cuts),
        ..Response::new(1, 0, &WAVE, Sign::Negative)
    };
    for (toml, want) in [
        ("cut = 'sequence'", vec![0]),
        ("cut = 'token'", (0..10).collect()),
        ("cut = 'fixed'\ncut_tokens = 4", vec![0, 4, 8]),
        ("cut = 'punctuation'", vec![0, 2, 6, 7, 9]),
        ("cut = 'punctuation'\npunctuation = '?'", vec![0, 9]),
        // Steps .6 -.7 -.4 .9 -1.3 .6 .5 -1 1.5.
        ("cut = 'jump'\njump = 0.95", vec![0, 5, 8, 9]),
        ("cut = 'schmitt'", vec![0, 3, 4, 5, 7, 8, 9]),
        ("cut = 'external'", vec![0, 3, 7]),
        ("cut = 'punctuation'\nmin_len = 2", vec![0, 2, 7]),
    ] {
        assert_eq!(pivots(&one(toml, response)), want, "{toml}");
    }
}

#[test]
fn scores_and_signs_by_hand() {
    let signal = [1.0, -3.0, 1.5, 0.5, 0.25];
    let response = Response::new(1, 0, &signal, Sign::Positive);
    for (score, want, signs_want) in [
        ("mean", [-0.16666667, 0.375], "0+"),
        ("sum", [-0.5, 0.75], "-+"),
        ("last", [1.5, 0.25], "+0"),
        ("max_abs", [-3.0, 0.5], "-+"),
    ] {
        let toml = format!("cut = 'fixed'\ncut_tokens = 3\noffset = 0.3\nscore = '{score}'");
        let given = one(&toml, response);
        let scores: Vec<f32> = given.segments.iter().map(|segment| segment.score).collect();
        assert_eq!(
            (scores.as_slice(), signs(&given).as_str()),
            (&want[..], signs_want),
            "{score}"
        );
    }
    // Exactly b ± δ is inside the band.
    let edge = one(
        "cut = 'token'\noffset = 0.25\nbaseline_value = 0.25",
        Response::new(1, 0, &[0.5, 0.0, 0.75], Sign::Positive),
    );
    assert_eq!(signs(&edge), "00+");
}

#[test]
fn merging_follows_the_trigger() {
    let signal = [1.0, 1.0, -1.0, 1.0, 1.0, -1.0, -1.0];
    let given = one("min_len = 2", Response::new(1, 0, &signal, Sign::Positive));
    // The lone − joins the + before it, and the + after it then continues the same segment.
    assert_eq!((pivots(&given), signs(&given)), (vec![0, 5], "+-".into()));
    assert_eq!(kept(&given), "xxxxx..");
}

#[test]
fn signals_by_hand() {
    assert_eq!(increment(0.5, &[1.0, 0.5]), [0.5, -0.5]);
    assert!(increment(0.5, &[]).is_empty());
    assert_eq!(log_ratio(0.1, &[-1.0], &[-2.0]).unwrap(), [0.1]);
    assert!(matches!(
        log_ratio(0.1, &[-1.0], &[]),
        Err(Error::Length {
            expected: 1,
            found: 0,
            ..
        })
    ));
    for (delay, want) in [
        (0, [1.0, 2.0, 3.0]),
        (2, [3.0, 3.0, 3.0]),
        (9, [3.0, 3.0, 3.0]),
    ] {
        let mut signal = [1.0, 2.0, 3.0];
        advance(&mut signal, delay);
        assert_eq!(signal, want, "delay {delay}");
    }
    advance(&mut [], 1);
}

/// The classic bug: a reaction one token late blames the wrong token.
#[test]
fn a_late_signal_is_moved_back() {
    let signal = [0.1, 0.1, 0.1, -2.0, 0.1];
    let late = one(
        "signal = 'increment'\nsignal_delay = 1\ncut = 'token'",
        Response::new(1, 1, &signal, Sign::Negative),
    );
    assert_eq!(kept(&late), "..x..");
    assert_eq!(late.signal, [0.1, 0.1, -2.0, 0.1, 0.1]);
    let on_time = one(
        "signal = 'increment'\ncut = 'token'",
        Response::new(1, 1, &signal, Sign::Negative),
    );
    assert_eq!(kept(&on_time), "...x.");
}

#[test]
fn widths_by_hand() {
    let values = [1.0, 2.0, 3.0, 4.0, 100.0];
    assert_eq!(Width::Mad(2.0).resolve(values), 2.0);
    assert_eq!(Width::Std(1.0).resolve([5.0]), 0.0);
    assert_eq!(Width::Std(1.0).resolve([]), 0.0);
    assert_eq!(Width::Mad(1.0).resolve([]), 0.0);
    // Differences 2, -2, 2: sample variance (3 · 4 − 3 · (2/3)²) / 2 = 16/3.
    let given = one(
        "cut = 'jump'\njump_std = 1.0",
        Response::new(1, 0, &[0.0, 2.0, 0.0, 2.0], Sign::Positive),
    );
    assert!((given.jump.unwrap() - (16.0_f32 / 3.0).sqrt()).abs() < 1e-6);
    let given = one(
        "offset_std = 0.5",
        Response::new(1, 0, &[1.0, 3.0, 5.0], Sign::Positive),
    );
    assert_eq!((given.offset, given.jump), (1.0, None));
}

#[test]
fn edges() {
    let empty = one("offset_std = 0.5", Response::new(1, 0, &[], Sign::Positive));
    assert!(empty.segments.is_empty() && empty.keep.is_empty());
    let eos_only = one("", Response::new(1, 0, &[0.3], Sign::Positive));
    assert_eq!((pivots(&eos_only), kept(&eos_only)), (vec![0], "x".into()));
    let against = one("", Response::new(1, 0, &[0.3], Sign::Negative));
    assert_eq!(kept(&against), ".");
    let flat = one("", Response::new(1, 0, &[0.0; 3], Sign::Positive));
    assert_eq!((signs(&flat), kept(&flat)), ("0".into(), "...".into()));
    let undecided = one("", Response::new(1, 0, &WAVE, Sign::Neutral));
    assert_eq!(undecided.keep.kept(), 0);
    assert_eq!(Credit::new(rule(""), 1).assign(&[]).unwrap(), []);
}

#[test]
fn tokens_of_others_neither_cut_nor_count() {
    // A tool's output (the two −9) stands between the model's own tokens.
    let signal = [0.5, 0.7, -9.0, -9.0, 0.6, -0.4];
    let own = [true, true, false, false, true, true];
    let response = Response {
        response_mask: Some(&own),
        ..Response::new(1, 0, &signal, Sign::Positive)
    };
    let given = one("baseline = 'batch_mean'", response);
    assert!((given.baseline[0] - 0.35).abs() < 1e-6);
    assert_eq!(
        (pivots(&given), signs(&given), kept(&given)),
        (vec![0, 5], "+-".into(), "xx..x.".into())
    );
    let cuts = [2, 5];
    let external = Response {
        cuts: Some(&cuts),
        ..response
    };
    assert_eq!(pivots(&one("cut = 'external'", external)), [0, 4, 5]);
    let all = one("selection = 'all'", response);
    assert_eq!(kept(&all), "xx..xx");

    let none = [false; 6];
    let foreign = Response {
        response_mask: Some(&none),
        ..Response::new(1, 0, &signal, Sign::Positive)
    };
    for &cut in CutRule::ALL {
        let toml = match cut {
            CutRule::Fixed => "cut = 'fixed'\ncut_tokens = 2".to_owned(),
            CutRule::Jump => "cut = 'jump'\njump = 1.0".to_owned(),
            CutRule::Entropy => "cut = 'entropy'\ncut_entropy_nats = 1.0".to_owned(),
            _ => format!("cut = '{cut}'"),
        };
        let given = one(
            &toml,
            Response {
                cuts: Some(&[]),
                texts: Some(&["a"; 6]),
                columns: TokenColumns {
                    reference_entropies: Some(&signal),
                    old_token_logps: Some(&signal),
                    ..TokenColumns::default()
                },
                ..foreign
            },
        );
        assert_eq!(
            (pivots(&given), signs(&given), given.keep.kept()),
            (vec![0], "0".into(), 0),
            "{cut}"
        );
    }
}

#[test]
fn soft_weights_fade_within_the_offset() {
    let signal = [2.0, 0.5, -0.5, -2.0];
    let response = Response::new(1, 0, &signal, Sign::Positive);
    let given = one("cut = 'token'\noffset = 1.0\nweighting = 'soft'", response);
    assert_eq!(given.weights.as_deref(), Some(&[1.0, 0.75, 0.25, 0.0][..]));
    assert_eq!(kept(&given), "xxx.");
    let hard = one("cut = 'token'\noffset = 1.0", response);
    assert_eq!(
        (hard.weights.as_deref(), kept(&hard)),
        (None, "x...".into())
    );
}

#[test]
fn faults_name_response_and_token() {
    fn assign(toml: &str, response: Response<'_>) -> Error {
        Credit::new(rule(toml), 1).assign(&[response]).unwrap_err()
    }
    for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let signal = [0.0, value];
        let computed = assign("", Response::new(7, 0, &signal, Sign::Positive));
        assert_eq!(
            computed.to_string(),
            format!(
                "signal `log_ratio` of response 7 is {value} at token 1, expected a finite number"
            )
        );
        assert_eq!(computed.kind(), ErrorKind::NotFinite);
        let read = assign(
            "signal = 'external'",
            Response::new(7, 0, &signal, Sign::Positive),
        );
        assert_eq!(read.kind(), ErrorKind::Input);
    }
    let response = Response::new(7, 0, &[0.0, 1.0], Sign::Positive);
    let short = Response {
        truth: Some(&[true]),
        ..response
    };
    assert_eq!(
        assign("", short).to_string(),
        "`truth` of response 7 has 1 values, expected 2, one a token"
    );
    for (toml, want) in [
        (
            "cut = 'punctuation'",
            "response 7 has no `texts`, which `cut = punctuation` needs",
        ),
        (
            "cut = 'external'",
            "response 7 has no `cuts`, which `cut = external` needs",
        ),
        (
            "selection = 'truth'",
            "response 7 has no `truth`, which `selection = truth` needs",
        ),
    ] {
        assert_eq!(assign(toml, response).to_string(), want);
    }
    for cuts in [&[1, 1][..], &[0, 2], &[1, 0]] {
        let error = assign(
            "cut = 'external'",
            Response {
                cuts: Some(cuts),
                ..response
            },
        );
        assert!(
            matches!(
                error,
                Error::Offset {
                    index: 1,
                    tokens: 2,
                    ..
                }
            ),
            "{cuts:?}: {error}"
        );
    }
}

#[test]
fn a_refused_batch_teaches_the_baseline_nothing() {
    let mut credit = Credit::new(rule("baseline = 'running_mean'"), 1);
    let good = Response::new(1, 0, &[1.0, 3.0], Sign::Positive);
    credit.assign(&[good]).unwrap();
    let state = credit.state().clone();
    let bad = Response::new(2, 0, &[f32::NAN], Sign::Positive);
    credit.assign(&[good, bad]).unwrap_err();
    assert_eq!(credit.state(), &state);
}

#[test]
fn a_resumed_run_is_the_uninterrupted_one() {
    for baseline in ["running_mean", "quantile", "position_mean"] {
        let toml = format!("baseline = '{baseline}'\nselection = 'random_position'");
        let batches = [
            [0.3, -0.2, 0.7, 0.1],
            [-0.4, 0.9, -0.3, 0.2],
            [0.6, 0.5, -0.8, -0.1],
        ];
        let responses = |batch: &'static [f32; 4]| [Response::new(1, 0, batch, Sign::Positive)];
        let mut whole = Credit::new(rule(&toml), 5);
        let batches: &'static [[f32; 4]; 3] = Box::leak(Box::new(batches));
        let expected: Vec<_> = batches
            .iter()
            .map(|batch| whole.assign(&responses(batch)).unwrap())
            .collect();

        let mut before = Credit::new(rule(&toml), 5);
        before.assign(&responses(&batches[0])).unwrap();
        let saved = serde_json::to_string(before.state()).unwrap();
        let mut after =
            Credit::resume(rule(&toml), 5, serde_json::from_str(&saved).unwrap()).unwrap();
        for (batch, want) in batches.iter().zip(&expected).skip(1) {
            assert_eq!(
                &after.assign(&responses(batch)).unwrap(),
                want,
                "{baseline}"
            );
        }
        let other = Credit::resume(rule("baseline = 'batch_mean'"), 5, after.state().clone());
        assert!(matches!(other, Err(Error::State { .. })));
    }
}

#[test]
fn defaults_are_the_documented_ones() {
    let rule = rule("");
    assert_eq!(
        (rule.signal, rule.baseline, rule.offset),
        (Signal::LogRatio, Baseline::Fixed(0.0), Width::Absolute(0.0))
    );
    assert_eq!(rule.cut, pivotal_credit::Cut::Schmitt(Between::Hold));
    assert_eq!(
        (rule.selection, rule.weighting, rule.min_len),
        (Selection::Agree, Weighting::Hard, 1)
    );
}

#[test]
fn finite_signals_whose_numbers_are_not_are_refused_by_the_response() {
    let small = [0.5, -0.5];
    let refused = |toml: &str, large: &[f32]| {
        let mut credit = Credit::new(rule(toml), 1);
        let before = credit.state().clone();
        let response = |id, signal| Response::new(id, 0, signal, Sign::Positive);
        let batch = [response(7, &small[..]), response(8, large)];
        let error = credit.assign(&batch).unwrap_err();
        assert_eq!(*credit.state(), before, "{toml}");
        assert_eq!(error.kind(), ErrorKind::NotFinite, "{toml}");
        error.to_string()
    };
    let up = [3e38, 3e38, 0.5, 0.5];
    let apart = [3e38, -3e38, 0.5, 0.5];
    let running = "baseline = 'running_mean'";
    for (toml, signal, said) in [
        (
            format!("signal = 'level'\ncut = 'sequence'\nscore = 'sum'\n{running}"),
            up,
            "`segments.score` comes to inf with signal `level` of response 8",
        ),
        (
            format!("signal = 'level'\noffset_std = 2.0\n{running}"),
            apart,
            "`offset` comes to inf with signal `level` of response 8",
        ),
        (
            "signal = 'level'\ncut = 'jump'\njump_std = 1.0".to_owned(),
            apart,
            "with signal `level` of response 8",
        ),
    ] {
        let error = refused(&toml, &signal);
        assert!(error.contains(said), "{toml}: {error}");
    }
    // A column of the data is the input's fault.
    let mut credit = Credit::new(rule("signal = 'external'\noffset_std = 2.0"), 1);
    let error = credit.assign(&[Response::new(1, 0, &apart, Sign::Positive)]);
    assert_eq!(error.unwrap_err().kind(), ErrorKind::Input);
}
