//! The study of every trainer, as a user calls it.

use pivotal_lab::{
    TokenRule, Trainer, TrainerArm, TrainerSettings, TrainersGrid, TrainersGridRow,
    TrainersStudySettings, trainers,
};
use pivotal_report::Study;

fn arm(trainer: Trainer, rule: TokenRule) -> TrainerArm {
    TrainerArm { trainer, rule }
}

fn value(study: &Study, arm: TrainerArm, metric: &str) -> Option<f64> {
    let values = &study.arm(&arm.key()).unwrap().values;
    values.get(metric)?.get(&1).copied()
}

#[test]
fn a_smoke_study_has_every_arm_and_does_not_depend_on_the_number_of_threads() {
    let mut lines = 0;
    let mut run = |threads| {
        let settings = TrainersStudySettings {
            threads,
            ..TrainersStudySettings::smoke()
        };
        trainers(&settings, &mut |_| lines += 1).unwrap()
    };
    let study = run(2);
    assert!(study == run(1), "1 and 2 threads differ");
    assert!(lines > 50, "{lines} lines of progress");
    assert!(study.title.contains("Smoke") && study.notes[0].contains("smoke test"));

    let all: Vec<TrainerArm> = TrainerArm::all().collect();
    let keys: Vec<&str> = study.arms.iter().map(|arm| arm.key.as_str()).collect();
    let expected: Vec<String> = all.iter().map(|arm| arm.key()).collect();
    assert_eq!(keys[0], "start");
    assert_eq!(keys[1..], expected);
    for trainer in Trainer::ALL {
        use TokenRule::{All, AllLonger, LogRatio, Random, Truth};
        for rule in [All, AllLonger, LogRatio, Random, Truth] {
            assert!(all.contains(&arm(trainer, rule)), "{trainer:?} {rule:?}");
        }
    }

    for &one in &all {
        for metric in &study.metrics {
            let found = value(&study, one, &metric.key);
            // Rejection sampling learns from what was accepted alone.
            let absent = one.trainer == Trainer::Reject && metric.key == "kept_negative";
            let sound = found.is_some_and(f64::is_finite) || absent && found.is_none();
            // A mask may keep nothing, or nothing decisive, in so short a run.
            let of_masks = metric.key == "decisive_recall" || metric.key == "weighted_precision";
            assert!(sound || of_masks, "{one:?}, {}: {found:?}", metric.key);
        }
        if one.rule == TokenRule::All || one.rule == TokenRule::AllFromOracle {
            assert_eq!(value(&study, one, "kept_positive"), Some(1.0), "{one:?}");
        }
        if one.rule == TokenRule::Truth {
            let precision = value(&study, one, "weighted_precision");
            assert!(precision.is_none_or(|share| share == 1.0), "{one:?}");
        }
    }
    assert_eq!(study.signals.len(), 6);
    assert!(study.signals.iter().all(|row| row.values.len() == 1));
    assert!(study.comparisons.iter().all(|comparison| {
        comparison.arm.split('_').next() == comparison.against.split('_').next()
    }));
}

#[test]
fn seeds_are_checked() {
    let settings = TrainersStudySettings {
        seeds: vec![2, 1, 2],
        ..TrainersStudySettings::smoke()
    };
    let error = trainers(&settings, &mut |_| {}).unwrap_err();
    assert!(error.to_string().contains("each once"), "{error}");
}

/// The recorded grid, and the settings that the code uses. DPO's are the quickstart's.
#[test]
fn every_arm_has_the_best_setting_of_the_recorded_grid() {
    let path = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../../docs/bench/trainers/grid.md"
    );
    let text = std::fs::read_to_string(path).unwrap();
    for arm in TrainerArm::all().filter(|arm| arm.trainer != Trainer::Dpo) {
        let (mut best, mut most) = (None, f64::NEG_INFINITY);
        for line in text.lines() {
            let cells: Vec<&str> = line.split('|').map(str::trim).collect();
            if cells.len() != 8 || cells[1] != arm.key() {
                continue;
            }
            let anchor = cells[2].parse().unwrap();
            for (lr, cell) in arm.trainer.learning_rates().into_iter().zip(&cells[3..]) {
                most = most.max(cell.trim_matches('*').parse().unwrap());
                if cell.starts_with("**") {
                    let exact: f64 = cell.trim_matches('*').parse().unwrap();
                    best = Some((TrainerSettings { lr, anchor }, exact));
                }
            }
        }
        let (settings, exact) = best.unwrap_or_else(|| panic!("no bold entry for {arm:?}"));
        assert_eq!(exact, most, "{arm:?}");
        assert_eq!(arm.tuned(), settings, "{arm:?}");
    }
}

#[test]
fn a_grid_shows_the_best_of_each_arm_in_bold() {
    let truth = arm(Trainer::Reject, TokenRule::Truth);
    let rates = Trainer::Reject.learning_rates();
    let row = |lr, exact: [f64; 2]| TrainersGridRow {
        arm: truth,
        settings: TrainerSettings { lr, anchor: 0.0 },
        exact: exact.to_vec(),
    };
    let grid = TrainersGrid {
        start: 0.6,
        rows: vec![row(rates[0], [0.5, 0.8]), row(rates[1], [0.7, 0.7])],
    };
    let best = grid.best(truth).unwrap();
    assert_eq!(best.settings.lr, rates[1]);
    assert!(grid.best(arm(Trainer::Ppo, TokenRule::All)).is_none());
    let text = grid.to_markdown();
    assert!(
        text.contains("| reject_truth | 0 | 0.650 | **0.700** | – | – |"),
        "{text}"
    );
    assert!(
        !text.contains("ppo_all") && !text.contains("lr 5e-5"),
        "{text}"
    );
}

/// What the report says of costs, in the report that is recorded.
#[test]
fn of_the_recorded_study_the_longer_rivals_cost_no_less_than_credit() {
    let path = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../../docs/bench/trainers/study.json"
    );
    let study = Study::from_json(&std::fs::read(path).unwrap()).unwrap();
    for trainer in [Trainer::Reject, Trainer::Grpo, Trainer::Ppo] {
        let costs = |rule| study.arm(&arm(trainer, rule).key()).unwrap().values["cost"].clone();
        let credit = costs(TokenRule::LogRatio);
        assert_eq!(credit.len(), study.seeds.len());
        for (seed, longer) in costs(TokenRule::AllLonger) {
            assert!(
                longer >= credit[&seed],
                "{trainer:?}, seed {seed}: {longer}"
            );
        }
    }
}
