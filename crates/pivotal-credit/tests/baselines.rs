//! Baselines by hand.

use pivotal_core::Sign;
use pivotal_credit::{
    Baseline, BaselineState, Credit, CreditConfig, Positions, RecordSample, ResolvedBaseline,
    Response, ResponseCredit,
};

fn assign(toml: &str, batch: &[Response<'_>]) -> Vec<ResponseCredit> {
    let config: CreditConfig = toml::from_str(toml).unwrap();
    let mut credit = Credit::new(config.resolve().unwrap(), 1);
    credit.assign(batch).unwrap()
}

#[test]
fn baselines_by_hand() {
    let batch: [(u64, &[f32]); 3] = [(1, &[1.0, 2.0]), (1, &[6.0]), (2, &[7.0, 9.0])];
    let constants = |rule| match &BaselineState::new(rule).resolve(&batch)[..] {
        [
            ResolvedBaseline::Constant(a),
            ResolvedBaseline::Constant(b),
            ResolvedBaseline::Constant(c),
        ] => [*a, *b, *c],
        other => panic!("{other:?}"),
    };
    assert_eq!(constants(Baseline::Fixed(0.5)), [0.5; 3]);
    assert_eq!(constants(Baseline::BatchMean), [5.0; 3]);
    assert_eq!(constants(Baseline::PromptMean), [3.0, 3.0, 8.0]);
    assert_eq!(constants(Baseline::RunningMean { decay: 0.9 }), [5.0; 3]);
    assert_eq!(
        constants(Baseline::Quantile {
            q: 0.5,
            window: 100
        }),
        [6.0; 3]
    );
    assert_eq!(
        constants(Baseline::Quantile { q: 0.5, window: 2 }),
        [8.0; 3]
    );

    let absolute = Baseline::PositionMean {
        positions: Positions::Absolute,
        bins: 10,
        decay: 1.0,
    };
    let mut state = BaselineState::new(absolute);
    let per_token = |values: &[f32]| ResolvedBaseline::PerToken(values.to_vec());
    let first = (1.0 + 6.0 + 7.0) / 3.0;
    assert_eq!(
        state.resolve(&batch),
        [
            per_token(&[first, 5.5]),
            per_token(&[first]),
            per_token(&[first, 5.5])
        ]
    );
    assert_eq!(
        state.resolve(&[(3, &[0.0, 0.0, 4.0])]),
        [per_token(&[3.5, 11.0 / 3.0, 4.0])]
    );

    let halves = Baseline::PositionMean {
        positions: Positions::Relative,
        bins: 2,
        decay: 0.0,
    };
    let relative =
        BaselineState::new(halves).resolve(&[(1, &[1.0, 3.0, 5.0, 7.0]), (2, &[4.0, 0.0])]);
    let (early, late) = (8.0 / 3.0, 4.0);
    assert_eq!(
        relative,
        [
            per_token(&[early, early, late, late]),
            per_token(&[early, late])
        ]
    );
}

#[test]
fn a_fading_mean_has_the_batch_mean_at_one_end() {
    let mut forgetful = BaselineState::new(Baseline::RunningMean { decay: 0.0 });
    let mut faithful = BaselineState::new(Baseline::RunningMean { decay: 1.0 });
    for batch in [[1.0, 3.0], [5.0, 7.0]] {
        let mean = BaselineState::new(Baseline::BatchMean).resolve(&[(1, &batch)]);
        assert_eq!(forgetful.resolve(&[(1, &batch)]), mean);
        faithful.resolve(&[(1, &batch)]);
    }
    assert_eq!(
        faithful.resolve(&[(1, &[])]),
        [ResolvedBaseline::Constant(4.0)]
    );
}

#[test]
fn a_position_baseline_is_recorded_as_used() {
    let toml = "baseline = 'position_mean'\nbaseline_positions = 'absolute'\ncut = 'token'";
    // Late tokens score high in both: only the difference at a position counts.
    let batch = [
        Response::new(1, 0, &[0.0, 10.0], Sign::Positive),
        Response::new(1, 1, &[1.0, 9.0], Sign::Negative),
    ];
    let given = assign(toml, &batch);
    assert_eq!(given[0].baseline, [0.5, 9.5]);
    for given in &given {
        assert_eq!(given.keep.as_slice(), [false, true]);
    }
    let record = given[0].clone().into_record(RecordSample {
        id: 1,
        token_ids: vec![4, 5],
        token_texts: vec!["a".into(), "b".into()],
        ..RecordSample::default()
    });
    record.validate().unwrap();
    assert_eq!(
        (record.signal_name.as_str(), record.baseline.len()),
        ("log_ratio", 2)
    );
}

#[test]
fn a_position_baseline_changes_signs_and_not_what_is_measured() {
    let toml = |rest: &str| format!("baseline = 'position_mean'\n{rest}");
    let given = |toml: &str, chosen: &[f32], rejected: &[f32]| {
        let batch = [
            Response::new(1, 0, chosen, Sign::Positive),
            Response::new(1, 1, rejected, Sign::Negative),
        ];
        assign(toml, &batch)
    };
    // A jump is one of the signal, whether or not the baseline jumps with it.
    let jumps = toml("baseline_positions = 'absolute'\ncut = 'jump'\njump = 1.0");
    let lengths = |given: &ResponseCredit| -> Vec<usize> {
        let segments = given.segments.iter();
        segments
            .map(|segment| segment.end - segment.start)
            .collect()
    };
    let alike = given(&jumps, &[0.0, 2.0, 0.0, 2.0], &[0.0, 2.0, 0.0, 2.0]);
    assert_eq!(lengths(&alike[0]), [1; 4]);
    let flat = given(&jumps, &[1.0; 4], &[0.0, 4.0, 0.0, 4.0]);
    assert_eq!(lengths(&flat[0]), [4]);
    // Where the baseline is the same at every position, it is as if it were one number, whatever the score.
    for score in ["mean", "sum", "last", "max_abs"] {
        let sequence = format!("score = '{score}'\ncut = 'sequence'\noffset = 0.25");
        let (chosen, rejected) = ([1.0, 1.0, 0.5, 0.5], [1.0, 1.0, 2.0, 1.0]);
        let one_bin = toml(&format!("baseline_bins = 1\n{sequence}"));
        let by_position = given(&one_bin, &chosen, &rejected);
        let by_batch = given(
            &format!("baseline = 'batch_mean'\n{sequence}"),
            &chosen,
            &rejected,
        );
        for (one, other) in by_position.iter().zip(&by_batch) {
            assert_eq!(one.segments, other.segments, "{score}");
        }
    }
}

#[test]
fn a_prompts_mean_of_whole_numbers_is_exact() {
    let batch: [(u64, &[f32]); 2] = [(1, &[-1.0, -1.0, 0.0]), (1, &[1.0, 1.0])];
    let mut state = BaselineState::new(Baseline::PromptMean);
    assert_eq!(
        state.resolve(&batch),
        [
            ResolvedBaseline::Constant(0.0),
            ResolvedBaseline::Constant(0.0)
        ]
    );
}
