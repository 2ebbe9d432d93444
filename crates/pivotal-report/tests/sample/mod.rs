//! A made-up study for the tests: its numbers were measured on nothing.

use std::collections::BTreeMap;

use pivotal_core::{CreditRecord, SCHEMA_VERSION, SegmentRecord, Side, Sign};
use pivotal_report::{
    Arm, Better, Comparison, Metric, PairView, Role, SignalPair, SignalRow, Study,
};

fn values(metrics: &[(&str, [f64; 3])]) -> BTreeMap<String, BTreeMap<u64, f64>> {
    let by_seed = |values: [f64; 3]| (1..).zip(values).collect();
    let entry = |&(key, values): &(&str, [f64; 3])| (key.to_owned(), by_seed(values));
    metrics.iter().map(entry).collect()
}

fn arm(key: &str, label: &str, role: Role, lr: &str, metrics: &[(&str, [f64; 3])]) -> Arm {
    Arm {
        key: key.into(),
        label: label.into(),
        role,
        description: format!("What “{label}” does, in a line."),
        settings: [("lr", lr), ("beta", "2"), ("steps", "60")]
            .map(|(name, value)| (name.to_owned(), value.to_owned()))
            .into(),
        extra_cost: String::new(),
        values: values(metrics),
    }
}

/// Characters as tokens, a segment a run of one sign (hysteresis around 0 with δ = 0.5), kept where it agrees.
pub(crate) fn record(text: &str, wrong: &[usize], side: Side, tilt: f32) -> CreditRecord {
    let texts: Vec<String> = text.chars().map(String::from).collect();
    let truth: Vec<bool> = (0..texts.len())
        .map(|index| !wrong.contains(&index))
        .collect();
    let wave = |index: usize| ((index * 37 % 17) as f32 - 8.0) / 12.0;
    let right = |index: usize| if truth[index] { 0.55 } else { -3.1 };
    let signal: Vec<f32> = (0..texts.len())
        .map(|i| right(i) + wave(i) + tilt)
        .collect();
    let mut state = Sign::Neutral;
    let mut segments: Vec<SegmentRecord> = Vec::new();
    for (index, &score) in signal.iter().enumerate() {
        state = match Sign::of(score, 0.0, 0.5) {
            Sign::Neutral => state,
            sign => sign,
        };
        match segments.last_mut() {
            Some(last) if last.sign == state => last.end = index + 1,
            _ => segments.push(SegmentRecord {
                start: index,
                end: index + 1,
                score,
                sign: state,
            }),
        }
    }
    let sequence_sign = match side {
        Side::Chosen => Sign::Positive,
        Side::Rejected => Sign::Negative,
    };
    let mut keep = vec![false; texts.len()];
    for segment in &segments {
        keep[segment.start..segment.end].fill(segment.sign == sequence_sign);
    }
    CreditRecord {
        schema_version: SCHEMA_VERSION,
        id: 12,
        side: Some(side),
        prompt_token_ids: vec![1, 2],
        token_ids: (0..texts.len() as u32).collect(),
        token_texts: texts,
        text_offsets: vec![],
        signal_name: "log_ratio".into(),
        signal,
        baseline: vec![0.0],
        offset: 0.5,
        jump: None,
        segments,
        sequence_sign,
        keep,
        truth: Some(truth),
        token_logps: None,
        reference_token_logps: None,
    }
}

/// A pair under two signals.
pub(crate) fn pair(title: &str) -> PairView {
    let chosen = "52-06=46;46+16=62;62+14=76;76-16=60;\n";
    let rejected = "52-06=56;56+16=72;72+14=86;86-16=60;\n";
    let signal = |label: &str, tilt: f32| SignalPair {
        label: label.into(),
        chosen: record(chosen, &[33], Side::Chosen, tilt),
        rejected: record(rejected, &[6, 33], Side::Rejected, tilt),
    };
    PairView {
        title: title.into(),
        note: "The chosen response has an error too, in its last step.".into(),
        prompt: "52-06+16+14-16=".into(),
        signals: vec![
            signal("log_ratio of a mild oracle", 0.0),
            signal("reward model level", -0.7),
        ],
    }
}

/// Six arms, three metrics, three seeds.
pub(crate) fn study() -> Study {
    let mut treatment = arm(
        "log_ratio",
        "Segment credit, log_ratio",
        Role::Treatment,
        "1e-4",
        &[
            ("exact", [0.851, 0.861, 0.856]),
            ("shifted", [0.757, 0.763, 0.760]),
            ("kl", [1.91, 1.80, 1.87]),
        ],
    );
    treatment.extra_cost = "60 more steps for the oracle".into();
    let mut start = arm(
        "start",
        "Start policy",
        Role::Start,
        "–",
        &[("exact", [0.623; 3])],
    );
    start.settings.clear();
    start
        .values
        .extend(values(&[("shifted", [0.537; 3]), ("kl", [0.0; 3])]));
    Study {
        title: "Does segment credit help where labels are noisy?".into(),
        question: "Preference pairs of step-by-step arithmetic in which both responses contain errors and a quarter of \
                   the labels is flipped: does masking by sign beat plain DPO, each at its own best setting?"
            .into(),
        command: "pivotal quickstart --seeds 1,2,3 --out run/quickstart".into(),
        machine: "2 cores, AVX-512".into(),
        date: "2026-11-23".into(),
        versions: [("pivotal", "0.1.0"), ("burn", "0.22.1")]
            .map(|(name, version)| (name.to_owned(), version.to_owned()))
            .into(),
        seeds: vec![1, 2, 3],
        metrics: vec![
            Metric {
                split: "held out".into(),
                description: "Probability of the one right response, averaged over 512 prompts.".into(),
                ..Metric::new("exact", "Exact accuracy")
            },
            Metric {
                split: "longer chains".into(),
                ..Metric::new("shifted", "Exact accuracy")
            },
            Metric {
                unit: "nats".into(),
                better: Better::Neither,
                decimals: 2,
                ..Metric::new("kl", "KL to the start")
            },
        ],
        arms: vec![
            start,
            arm(
                "dpo",
                "Unmasked DPO",
                Role::Baseline,
                "2e-4",
                &[
                    ("exact", [0.741, 0.775, 0.740]),
                    ("shifted", [0.649, 0.673, 0.650]),
                    ("kl", [0.95, 0.91, 1.02]),
                ],
            ),
            treatment,
            arm(
                "level",
                "Segment credit, reward model level",
                Role::Treatment,
                "2e-4",
                &[
                    ("exact", [0.679, 0.781, 0.730]),
                    ("shifted", [0.655, 0.699, 0.668]),
                    ("kl", [2.31, 2.40, 2.35]),
                ],
            ),
            arm(
                "random",
                "Random at equal kept fraction",
                Role::Control,
                "2e-4",
                &[("exact", [0.620, 0.658, 0.630]), ("kl", [0.21, 0.18, 0.22])],
            ),
            arm(
                "truth",
                "Truth mask",
                Role::Ceiling,
                "1e-4",
                &[
                    ("exact", [0.873, 0.882, 0.879]),
                    ("shifted", [0.780, 0.786, 0.783]),
                    ("kl", [2.10, 2.15, 2.11]),
                ],
            ),
        ],
        comparisons: [
            ("log_ratio", "dpo", "exact"),
            ("level", "dpo", "exact"),
            ("random", "dpo", "exact"),
            ("log_ratio", "dpo", "shifted"),
            ("log_ratio", "dpo", "kl"),
            ("random", "dpo", "shifted"),
        ]
        .map(|(arm, against, metric)| Comparison {
            arm: arm.into(),
            against: against.into(),
            metric: metric.into(),
        })
        .to_vec(),
        signal_metrics: vec![
            Metric::new("pairs", "Pair accuracy"),
            Metric::new("auc", "Token AUC"),
        ],
        signals: vec![
            SignalRow {
                label: "log_ratio of a mild oracle".into(),
                description: "DPO on the same noisy pairs, 60 steps.".into(),
                values: values(&[("pairs", [0.71, 0.69, 0.72]), ("auc", [0.98, 0.94, 0.98])]),
            },
            SignalRow {
                label: "reward model level".into(),
                description: "Bradley–Terry on the mean token value.".into(),
                values: values(&[("pairs", [0.56, 0.53, 0.55]), ("auc", [0.51, 0.53, 0.52])]),
            },
        ],
        notes: vec!["Three seeds vary the pairs and their order, not the start policy.".into()],
        examples: vec![pair("A label as it should be"), pair("A flipped label")],
    }
}
