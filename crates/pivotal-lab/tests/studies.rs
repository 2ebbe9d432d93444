//! The start policy, its evaluation and the studies, as a user calls them.

use pivotal_core::TokenizedResponse;
use pivotal_lab::evaluate::EvaluationSet;
use pivotal_lab::start_policy::{self, StartPolicySettings};
use pivotal_lab::world::splits::{Split, evaluation_samples};
use pivotal_lab::{
    ArmKind, BETAS, Error, GridResult, GridRow, GridSettings, LEARNING_RATES, QuickstartSettings,
    quickstart, tuned_arms,
};
use pivotal_model::Decoder;
use pivotal_report::Study;
use pivotal_train::score::{Group, token_logps};

fn with_threads<T: Send>(threads: usize, work: impl FnOnce() -> T + Send) -> T {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
    pool.build().unwrap().install(work)
}

/// The policy after `steps` steps of the embedded one's schedule, and the losses on the way.
fn begun(steps: u64) -> (Vec<u8>, Vec<f64>) {
    let mut losses = Vec::new();
    let policy = start_policy::train(
        &StartPolicySettings::EMBEDDED,
        Some(steps),
        &mut |_, metrics| losses.push(metrics.loss),
    );
    (start_policy::to_bytes(&policy.unwrap()).unwrap(), losses)
}

#[test]
fn training_the_start_policy_gives_the_same_bytes_at_any_number_of_threads() {
    let (bytes, losses) = with_threads(1, || begun(20));
    let (others, _) = with_threads(2, || begun(20));
    assert!(bytes == others, "the bytes differ between 1 and 2 threads");
    // Recorded with AVX-512; other kernels add in other orders, and AdamW enlarges that a little each step.
    for (step, recorded, tolerance) in [(1, 4.165_066, 1e-5), (20, 2.337_210, 5e-3)] {
        let found = losses[step - 1];
        let distance = (found - recorded).abs();
        assert!(distance < tolerance, "loss of step {step}: {found}");
    }
}

/// Minutes; and only where the kernels are those of the recording (AVX-512).
#[test]
#[ignore = "retrains the start policy: minutes, and an AVX-512 processor"]
fn the_embedded_policy_is_made_again_from_nothing() {
    let (bytes, _) = begun(StartPolicySettings::EMBEDDED.steps);
    assert_eq!(start_policy::hash(&bytes), start_policy::EMBEDDED_BLAKE3);
}

#[test]
fn the_embedded_policy_is_the_recorded_one_and_survives_its_own_format() {
    assert_eq!(
        start_policy::hash(start_policy::EMBEDDED),
        start_policy::EMBEDDED_BLAKE3
    );
    assert!(start_policy::EMBEDDED.len() <= 2_000_000);
    let policy = start_policy::embedded().unwrap();
    assert!(start_policy::to_bytes(&policy).unwrap() == start_policy::EMBEDDED);
}

#[test]
fn bytes_that_are_no_policy_are_refused() {
    let cut = &start_policy::EMBEDDED[..1000];
    assert!(matches!(
        start_policy::from_bytes(cut),
        Err(Error::StartPolicy { .. })
    ));
    let mut renamed = start_policy::EMBEDDED.to_vec();
    let name = b"model.norm.weight";
    let at = renamed.windows(name.len()).position(|w| w == name).unwrap();
    renamed[at] = b'M';
    let error = start_policy::from_bytes(&renamed).unwrap_err().to_string();
    assert!(error.contains("model.norm.weight"), "{error}");
}

/// The probability of each token of the vocabulary after `prefix`, one forward pass of one token each.
fn next_probabilities(policy: &Decoder, prefix: &[u32]) -> Vec<f64> {
    let ids: Vec<u32> = (0..policy.config().vocab_size as u32).collect();
    let groups = [Group {
        prompt: prefix,
        responses: ids.chunks(1).collect(),
    }];
    let logps = token_logps(policy, &groups, 4096).unwrap();
    logps[0]
        .iter()
        .map(|logp| f64::from(logp[0]).exp())
        .collect()
}

#[test]
fn exact_is_the_product_of_next_token_probabilities_and_kl_their_divergence() {
    let policy = start_policy::embedded().unwrap();
    let reference = start_policy::initial(3).unwrap();
    let samples: Vec<TokenizedResponse> = [Split::Retention, Split::Adversarial]
        .into_iter()
        .flat_map(|split| evaluation_samples(split, 5, 2).unwrap())
        .map(|sample| sample.sample)
        .collect();
    let (mut exact, mut greedy, mut kl) = (0.0, 0.0, 0.0);
    for sample in &samples {
        let (mut product, mut all_greedy) = (1.0, true);
        for (place, &token) in sample.response.iter().enumerate() {
            let prefix = [&sample.prompt[..], &sample.response[..place]].concat();
            let p = next_probabilities(&policy, &prefix);
            let q = next_probabilities(&reference, &prefix);
            assert!((p.iter().sum::<f64>() - 1.0).abs() < 1e-5);
            product *= p[token as usize];
            all_greedy &= p.iter().all(|&other| other <= p[token as usize]);
            kl += p.iter().zip(&q).map(|(p, q)| p * (p / q).ln()).sum::<f64>() / 4.0;
        }
        exact += product / 4.0;
        greedy += f64::from(u8::from(all_greedy)) / 4.0;
    }
    let set = EvaluationSet::of_samples(samples, &reference).unwrap();
    let scores = set.score(&policy).unwrap();
    assert!((scores.exact - exact).abs() < 1e-5, "{scores:?}, {exact}");
    assert_eq!(scores.greedy_exact, greedy);
    assert!((scores.kl - kl).abs() < 1e-3, "{scores:?}, {kl}");
    // The untrained policy gets nothing right, and is at no distance from itself.
    let untrained = set.score(&reference).unwrap();
    assert_eq!((untrained.kl, untrained.greedy_exact), (0.0, 0.0));
    assert!(untrained.exact < 1e-6);
}

fn value(study: &Study, arm: &str, metric: &str) -> Option<f64> {
    study.arm(arm).unwrap().values.get(metric)?.get(&1).copied()
}

#[test]
fn a_smoke_study_has_every_arm_and_does_not_depend_on_the_number_of_threads() {
    let mut lines = 0;
    let mut run = |threads| {
        let settings = QuickstartSettings {
            threads,
            ..QuickstartSettings::smoke()
        };
        quickstart(&settings, &mut |_| lines += 1).unwrap()
    };
    let study = run(2);
    assert!(study == run(1), "1 and 2 threads differ");
    assert!(lines > 20, "{lines} lines of progress");

    assert!(study.title.contains("Smoke") && study.notes[0].contains("smoke test"));
    let keys: Vec<&str> = study.arms.iter().map(|arm| arm.key.as_str()).collect();
    let all = ArmKind::ALL.map(ArmKind::key);
    assert_eq!(keys, [&["start"][..], &all].concat());
    for key in all {
        for metric in &study.metrics {
            let found = value(&study, key, &metric.key);
            assert!(
                found.is_some_and(f64::is_finite),
                "{key}, {}: {found:?}",
                metric.key
            );
        }
    }
    for row in &study.signals {
        assert_eq!(row.values.len(), study.signal_metrics.len());
    }
    // The controls are what they are called.
    for side in ["kept_chosen", "kept_rejected"] {
        let kept = |arm| value(&study, arm, side).unwrap();
        assert_eq!(kept("random"), kept("log_ratio"));
        assert!((kept("disagree") + kept("log_ratio") - 1.0).abs() < 1e-9);
        assert_eq!((kept("unmasked"), kept("unmasked_longer")), (1.0, 1.0));
    }
    assert_eq!(value(&study, "truth", "decisive_recall"), Some(1.0));
    assert_eq!(value(&study, "truth", "weighted_precision"), Some(1.0));
    assert_eq!(value(&study, "start", "kl"), Some(0.0));
    assert_ne!(
        value(&study, "unmasked", "held_out"),
        value(&study, "start", "held_out")
    );

    assert_eq!(study.examples.len(), 4);
    let flipped = study
        .examples
        .iter()
        .filter(|pair| pair.note.contains("flipped"));
    assert_eq!(flipped.count(), 2);
    for pair in &study.examples {
        assert_eq!(pair.signals.len(), 2);
        let wrong = |record: &pivotal_core::CreditRecord| {
            record.truth.as_ref().unwrap().iter().any(|right| !right)
        };
        assert!(wrong(&pair.signals[0].chosen) && wrong(&pair.signals[0].rejected));
    }
}

#[test]
fn seeds_and_threads_are_checked() {
    let refused = |settings: QuickstartSettings| {
        let error = quickstart(&settings, &mut |_| {}).unwrap_err();
        error.to_string()
    };
    let smoke = QuickstartSettings::smoke;
    let seeds = |seeds: Vec<u64>| QuickstartSettings { seeds, ..smoke() };
    assert!(refused(seeds(vec![])).starts_with("`seeds` is []"));
    assert!(refused(seeds(vec![2, 1, 2])).contains("each once"));
    let no_thread = QuickstartSettings {
        threads: 0,
        ..smoke()
    };
    assert_eq!(refused(no_thread), "`threads` is 0, expected at least 1");
}

/// The recorded grid, and the settings that the code uses.
#[test]
fn every_arm_has_the_best_setting_of_the_recorded_grid() {
    let path = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../../docs/bench/quickstart-grid.md"
    );
    let text = std::fs::read_to_string(path).unwrap();
    for arm in tuned_arms() {
        let mut best = None;
        for line in text.lines() {
            let cells: Vec<&str> = line.split('|').map(str::trim).collect();
            if cells.len() != BETAS.len() + 4 || cells[1] != arm.key() {
                continue;
            }
            let lr: f64 = cells[2].parse().unwrap();
            for (beta, cell) in BETAS.iter().zip(&cells[3..]) {
                let exact: f64 = cell.trim_matches('*').parse().unwrap();
                let bold = cell.starts_with("**");
                assert!(best.is_none_or(|(_, _, most)| !bold || exact >= most));
                if bold {
                    best = Some((lr, *beta, exact));
                }
            }
        }
        let (lr, beta, _) = best.unwrap_or_else(|| panic!("no bold entry for {}", arm.key()));
        let tuned = arm.tuned();
        assert_eq!((tuned.lr, tuned.beta), (lr, beta), "{}", arm.key());
    }
    assert_eq!(ArmKind::Disagree.tuned(), ArmKind::LogRatio.tuned());
}

#[test]
fn a_grid_shows_the_best_of_each_arm_in_bold() {
    let row = |arm, lr, beta, exact: [f64; 2]| GridRow {
        arm,
        settings: pivotal_lab::ArmSettings { lr, beta },
        exact: exact.to_vec(),
    };
    let grid = GridResult {
        settings: GridSettings::default(),
        start: 0.6,
        rows: vec![
            row(ArmKind::Truth, LEARNING_RATES[0], BETAS[0], [0.5, 0.8]),
            row(ArmKind::Truth, LEARNING_RATES[0], BETAS[1], [0.7, 0.7]),
            row(ArmKind::Level, LEARNING_RATES[1], BETAS[2], [0.1, 0.2]),
        ],
    };
    assert_eq!(grid.best(ArmKind::Truth).unwrap().settings.beta, BETAS[1]);
    assert!(grid.best(ArmKind::Random).is_none());
    let text = grid.to_markdown();
    assert!(
        text.contains("| truth | 5e-5 | 0.650 | **0.700** | – | – |"),
        "{text}"
    );
    assert!(
        text.contains("| level | 1e-4 | – | – | **0.150** | – |"),
        "{text}"
    );
}
