//! What a study says: tables, verdicts, and what it refuses.

mod sample;

use pivotal_core::{ErrorKind, HasKind};
use pivotal_report::{Better, Colour, Comparison, Error, Estimate, Outcome, Report, Study};

#[test]
fn the_terminal_table_is_aligned_and_says_why_an_interval_is_missing() {
    let study = sample::study();
    let report = Report::new(&study).unwrap();
    insta::assert_snapshot!(report.terminal_table(), @"
                                                Exact          Exact
                                           accuracy ↑     accuracy ↑    KL to the
    Arm                                      held out  longer chains  start, nats
    ----------------------------------  -------------  -------------  -----------
    Start policy                         0.623 (same)   0.537 (same)  0.00 (same)
    Unmasked DPO                        0.752 ± 0.049  0.657 ± 0.034  0.96 ± 0.14
    Segment credit, log_ratio           0.856 ± 0.012  0.760 ± 0.007  1.86 ± 0.14
    Segment credit, reward model level  0.730 ± 0.127  0.674 ± 0.056  2.35 ± 0.11
    Random at equal kept fraction       0.636 ± 0.049              –  0.20 ± 0.05
    Truth mask                          0.878 ± 0.011  0.783 ± 0.007  2.12 ± 0.07

    3 seeds; mean ± half the width of its 95 % interval (Student's t over seeds); (same): every seed has this value, so the
    seeds give it no interval; –: not measured
    ");
}

#[test]
fn the_markdown_table_has_the_same_numbers() {
    let study = sample::study();
    let report = Report::new(&study).unwrap();
    insta::assert_snapshot!(report.markdown_table(), @r#"
    | Arm | Exact accuracy ↑ held out | Exact accuracy ↑ longer chains | KL to the start, nats |
    | --- | ---: | ---: | ---: |
    | Start policy | 0.623 (same) | 0.537 (same) | 0.00 (same) |
    | Unmasked DPO | 0.752 ± 0.049 | 0.657 ± 0.034 | 0.96 ± 0.14 |
    | Segment credit, log\_ratio | 0.856 ± 0.012 | 0.760 ± 0.007 | 1.86 ± 0.14 |
    | Segment credit, reward model level | 0.730 ± 0.127 | 0.674 ± 0.056 | 2.35 ± 0.11 |
    | Random at equal kept fraction | 0.636 ± 0.049 | – | 0.20 ± 0.05 |
    | Truth mask | 0.878 ± 0.011 | 0.783 ± 0.007 | 2.12 ± 0.07 |

    3 seeds; mean ± half the width of its 95 % interval (Student's t over seeds); (same): every seed has this value, so the seeds give it no interval; –: not measured.
    "#);
}

#[test]
fn every_sentence_has_its_interval_or_says_that_there_is_none() {
    let mut study = sample::study();
    let random = &mut study.arms[4];
    let values = [(2, 0.55)].into();
    random.values.insert("shifted".into(), values);
    study.comparisons.push(Comparison {
        arm: "start".into(),
        against: "random".into(),
        metric: "kl".into(),
    });
    study.arms[4].values.get_mut("kl").unwrap().clear();
    let mut flat = study.arms[0].clone();
    flat.key = "flat".into();
    flat.label = "Start, again".into();
    flat.values
        .get_mut("exact")
        .unwrap()
        .values_mut()
        .for_each(|value| *value += 0.1);
    study.arms.push(flat);
    study.comparisons.push(Comparison {
        arm: "flat".into(),
        against: "start".into(),
        metric: "exact".into(),
    });
    let report = Report::new(&study).unwrap();
    insta::assert_snapshot!(report.sentences().join("\n"), @"
    Exact accuracy (held out), higher is better, over 3 seeds: Start, again (best of 2 starts) 0.723 (same); Unmasked DPO (baseline) 0.752 ± 0.049; Segment credit, log_ratio (best of 2 treatments) 0.856 ± 0.012; Truth mask (ceiling) 0.878 ± 0.011.
    4 of 8 comparisons significant at 95 %, paired by seed. Each interval stands alone: none is widened for the number of comparisons.
    Segment credit, log_ratio against Unmasked DPO on Exact accuracy (held out): +0.104, 95 % interval +0.065 to +0.143; better: significant at 95 % over 3 seeds.
    Segment credit, reward model level against Unmasked DPO on Exact accuracy (held out): −0.022, 95 % interval −0.110 to +0.066; not significant at 95 % over 3 seeds.
    Random at equal kept fraction against Unmasked DPO on Exact accuracy (held out): −0.116, 95 % interval −0.130 to −0.102; worse: significant at 95 % over 3 seeds.
    Segment credit, log_ratio against Unmasked DPO on Exact accuracy (longer chains): +0.103, 95 % interval +0.075 to +0.130; better: significant at 95 % over 3 seeds.
    Segment credit, log_ratio against Unmasked DPO on KL to the start: +0.90 nats, 95 % interval +0.76 to +1.04; higher: significant at 95 % over 3 seeds.
    Random at equal kept fraction against Unmasked DPO on Exact accuracy (longer chains): −0.123; one shared seed: no interval, no verdict.
    Start policy against Random at equal kept fraction on KL to the start: not compared: no seed has both values.
    Start, again against Start policy on Exact accuracy (held out): +0.100; the same on all 3 seeds: no spread to test against.
    ");
}

#[test]
fn less_can_be_better_and_a_describing_metric_is_neither() {
    let mut study = sample::study();
    let outcome = |study: &Study, index: usize| {
        Report::new(study).unwrap().analysis().comparisons[index].outcome
    };
    assert_eq!(outcome(&study, 0), Outcome::Better);
    assert_eq!(outcome(&study, 2), Outcome::Worse);
    assert_eq!(outcome(&study, 4), Outcome::Different);
    study.metrics[0].better = Better::Lower;
    assert_eq!(outcome(&study, 0), Outcome::Worse);
    assert_eq!(outcome(&study, 2), Outcome::Better);
}

#[test]
fn the_interval_is_students_t() {
    // Differences 0.110, 0.086, 0.116: mean 0.104, standard deviation 0.015875, t(2) = 4.302653.
    let study = sample::study();
    let report = Report::new(&study).unwrap();
    let interval = report.analysis().comparisons[0]
        .difference
        .interval()
        .unwrap();
    assert!((interval.estimate - 0.104).abs() < 1e-12);
    let expected = 4.302_653 * (0.000_252_f64).sqrt() / 3f64.sqrt();
    assert!((interval.half_width() - expected).abs() < 1e-8);
    assert_eq!(Estimate::of(&[]), Estimate::Missing);
    assert_eq!(Estimate::of(&[0.1 + 0.2, 0.3]).interval(), None);
}

#[test]
fn no_line_is_wider_than_120_cells_however_many_metrics() {
    let mut study = sample::study();
    for index in 0..12 {
        let mut metric = study.metrics[0].clone();
        metric.key = format!("more-{index}");
        metric.label = format!("Another accuracy number {index}");
        study.metrics.push(metric);
    }
    study.arms[1].label =
        "An arm whose label is far longer than anyone would like to read ".repeat(2);
    let text = Report::new(&study).unwrap().terminal(Colour::Never);
    assert!(text.lines().all(|line| line.chars().count() <= 120));
    assert_eq!(text.matches("Another").count(), 12);
    assert!(!text.contains('\u{1b}'));
    let coloured = Report::new(&study).unwrap().terminal(Colour::Ansi);
    assert!(coloured.contains("\u{1b}[1m"));
}

#[test]
fn a_study_survives_json_and_unknown_fields_are_refused() {
    let study = sample::study();
    let json = study.to_json().unwrap();
    assert_eq!(Study::from_json(json.as_bytes()).unwrap(), study);
    let odd = json.replacen("\"title\"", "\"titel\": 1, \"title\"", 1);
    let error = Study::from_json(odd.as_bytes()).unwrap_err();
    assert!(
        error.to_string().contains("unknown field `titel`"),
        "{error}"
    );
    assert_eq!(error.kind(), ErrorKind::Input);
}

#[test]
fn faults_are_named() {
    let refused = |change: fn(&mut Study)| {
        let mut study = sample::study();
        change(&mut study);
        let error = Report::new(&study).unwrap_err();
        (error.kind(), error.to_string())
    };
    let (kind, text) = refused(|study| {
        study.arms[1]
            .values
            .get_mut("exact")
            .unwrap()
            .insert(2, f64::NAN);
    });
    assert_eq!(kind, ErrorKind::NotFinite);
    assert_eq!(
        text,
        "`exact` of `Unmasked DPO` is NaN at seed 2, expected a finite number"
    );
    let (kind, text) = refused(|study| study.comparisons[0].arm = "dpoo".into());
    assert_eq!(kind, ErrorKind::Input);
    assert_eq!(
        text,
        "a comparison names `dpoo`, expected one of `arms`: dpo, level, log_ratio, random, start, truth"
    );
    let (_, text) = refused(|study| study.comparisons[0].arm = "dpo".into());
    assert_eq!(
        text,
        "a comparison on `exact` sets `dpo` against itself, expected two arms"
    );
    let (_, text) = refused(|study| study.arms[1].key = "start".into());
    assert_eq!(text, "`arms` has `start` twice, expected each key once");
    let (_, text) = refused(|study| study.metrics.clear());
    assert_eq!(text, "`metrics` is empty, expected at least one entry");
    let (_, text) = refused(|study| study.seeds = vec![1, 2]);
    assert_eq!(
        text,
        "`exact` of `Start policy` names `3`, expected one of `seeds`: 1, 2"
    );
    let (kind, text) = refused(|study| study.examples[1].signals[0].chosen.signal[3] = f32::NAN);
    assert_eq!(kind, ErrorKind::NotFinite);
    let place = "example 2, signal `log_ratio of a mild oracle`, Chosen response: ";
    assert_eq!(text, format!("{place}`signal` is not finite at token 3"));
    let swapped = |study: &mut Study| {
        let signal = &mut study.examples[0].signals[0];
        std::mem::swap(&mut signal.chosen, &mut signal.rejected);
    };
    let mut study = sample::study();
    swapped(&mut study);
    assert!(matches!(
        Report::new(&study),
        Err(Error::SwappedSide { pair: 1, .. })
    ));
}
