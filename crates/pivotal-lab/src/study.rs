//! The quickstart's numbers as a [`Study`]: what is measured, compared and left open.

use std::collections::BTreeMap;

use pivotal_report::{
    Arm, Better, Comparison, Metric, PairView, Role, SeedValues, SignalRow, Study,
};

use crate::arm::{ArmKind, DECISIVE_PROBABILITY};
use crate::evaluate::SplitScores;
use crate::experiment::{ArmRun, Scale, SeedSignal};
use crate::quickstart::QuickstartSettings;
use crate::signal::SignalQuality;
use crate::start_policy::EMBEDDED_BLAKE3;
use crate::world::splits::Split;

/// The splits that a report shows, the headline's first.
pub(crate) const REPORTED: [Split; 4] = [
    Split::HeldOut,
    Split::Shifted,
    Split::Adversarial,
    Split::Retention,
];

/// Everything that was measured.
pub(crate) struct Results<'a> {
    pub(crate) settings: &'a QuickstartSettings,
    pub(crate) scale: Scale,
    pub(crate) start: &'a [SplitScores],
    pub(crate) runs: &'a [ArmRun],
    /// Of each seed the log-ratio, then the level.
    pub(crate) signals: &'a [(SeedSignal, Option<ArmRun>)],
    pub(crate) views: Vec<PairView>,
}

/// Key of the start policy.
pub(crate) const START: &str = "start";

impl Results<'_> {
    pub(crate) fn into_study(self) -> Study {
        let title = match self.settings.smoke {
            true => "Smoke test of the quickstart: the numbers mean nothing",
            false => "Does segment credit help where labels are noisy?",
        };
        let mut arms = vec![start_arm(&self.settings.seeds, self.start)];
        arms.extend(ArmKind::ALL.map(|kind| self.arm(kind)));
        Study {
            title: title.to_owned(),
            question: "Preference pairs of step-by-step arithmetic in which both responses hold mistakes and a quarter of the \
                       labels is flipped: does DPO on the segments that agree with the label beat DPO on every token, each at \
                       its own best setting?"
                .to_owned(),
            command: self.settings.command(),
            versions: BTreeMap::from([
                ("pivotal".to_owned(), env!("CARGO_PKG_VERSION").to_owned()),
                ("start policy (BLAKE3)".to_owned(), EMBEDDED_BLAKE3[..16].to_owned()),
            ]),
            seeds: self.settings.seeds.clone(),
            metrics: metrics(self.scale),
            arms,
            comparisons: comparisons(),
            signal_metrics: signal_metrics(self.scale),
            signals: self.signal_rows(),
            notes: self.notes(),
            examples: self.views,
            ..Study::default()
        }
    }

    fn arm(&self, kind: ArmKind) -> Arm {
        let mut values = BTreeMap::new();
        for run in self.runs.iter().filter(|run| run.kind == kind) {
            add_splits(&mut values, run.seed, &run.splits);
            let agreement = run.masks.agreement;
            let masks = [
                ("decisive_recall", agreement.decisive_recall),
                ("weighted_precision", agreement.weighted_precision),
                ("kept_chosen", Some(run.masks.kept[0])),
                ("kept_rejected", Some(run.masks.kept[1])),
            ];
            for (key, value) in masks {
                if let Some(value) = value {
                    add(&mut values, key, run.seed, value);
                }
            }
        }
        let settings = kind.tuned();
        let steps = self.scale.steps * kind.step_factor();
        Arm {
            key: kind.key().to_owned(),
            label: kind.label().to_owned(),
            role: kind.role(),
            description: kind.description().to_owned(),
            settings: BTreeMap::from([
                ("lr".to_owned(), format!("{:e}", settings.lr)),
                ("beta".to_owned(), settings.beta.to_string()),
                ("steps".to_owned(), steps.to_string()),
                ("pairs a step".to_owned(), self.scale.batch.to_string()),
            ]),
            extra_cost: kind.extra_cost().to_owned(),
            values,
        }
    }

    fn signal_rows(&self) -> Vec<SignalRow> {
        let rows = [
            (
                "log_ratio of the oracle",
                "The unmasked arm against the start policy, on the pairs that it was trained on.",
            ),
            (
                "level of the reward model",
                "Bradley–Terry on the mean token value, zero head, the same pairs.",
            ),
        ];
        let rows = rows.into_iter().enumerate();
        rows.map(|(row, (label, description))| {
            let mut values = BTreeMap::new();
            for (&seed, signals) in self.settings.seeds.iter().zip(self.signals.chunks_exact(2)) {
                let SeedSignal {
                    training, fresh, ..
                } = &signals[row].0;
                let mut add_quality = |suffix: &str, quality: &SignalQuality| {
                    let key = |name: &str| format!("{name}_{suffix}");
                    add(&mut values, &key("pairs"), seed, quality.pair_accuracy);
                    add(&mut values, &key("tokens"), seed, quality.token_auc);
                };
                add_quality("training", training);
                add_quality("fresh", fresh);
            }
            SignalRow {
                label: label.to_owned(),
                description: description.to_owned(),
                values,
            }
        })
        .collect()
    }

    fn notes(&self) -> Vec<String> {
        let mut notes = Vec::new();
        if self.settings.smoke {
            notes.push(format!(
                "This is a smoke test: {} steps on {} pairs, {} prompts. It shows that every stage runs; its numbers say nothing about credit.",
                self.scale.steps, self.scale.pairs, self.scale.prompts
            ));
        }
        notes.extend(
            [
                "One start policy: the intervals are over seeds of pairs and their order, and leave out how another start policy would do.",
                "The pairs are made by a generator with known rates of mistakes; they are not sampled from the policy and not written by people.",
                "A world of 26 tokens and a policy of 0.2 million parameters. Nothing here reproduces a figure of a paper or promises one for a language model.",
                "The noise is where segment credit is expected to help: mistakes on both sides and a quarter of the labels flipped. On clean, easy pairs a first pilot found no gain.",
                "Each arm has the best setting of one grid (learning rate by β), found on a tuning split and on seeds that are not reported: docs/bench/quickstart-grid.md. Credit itself was not tuned: baseline 0, offset 0. `Disagree` has the setting of the arm that it inverts.",
                "The oracle of `log_ratio` is the unmasked arm itself, so it learned from the very pairs whose tokens it judges; its fair rival is the unmasked arm with twice the steps.",
                "The adversarial split plants a wrong result in the prompt. Planted claims are in the start policy's corpus and never in the pairs.",
                "KL is exact over the vocabulary at each token, along the right response instead of along samples.",
            ]
            .map(str::to_owned),
        );
        notes
    }
}

/// Metric, then seed.
pub(crate) type Values = BTreeMap<String, SeedValues>;

/// The policy that every arm starts from, as an arm.
pub(crate) fn start_arm(seeds: &[u64], scores: &[SplitScores]) -> Arm {
    let mut values = Values::new();
    for &seed in seeds {
        add_splits(&mut values, seed, scores);
    }
    Arm {
        key: START.to_owned(),
        label: "Start policy".to_owned(),
        role: Role::Start,
        description: "The policy that every arm starts from; the same for every seed.".to_owned(),
        settings: BTreeMap::new(),
        extra_cost: String::new(),
        values,
    }
}

pub(crate) fn add(values: &mut Values, key: &str, seed: u64, value: f64) {
    values
        .entry(key.to_owned())
        .or_default()
        .insert(seed, value);
}

/// The reported splits' scores.
pub(crate) fn add_splits(values: &mut Values, seed: u64, splits: &[SplitScores]) {
    for (split, scores) in REPORTED.iter().zip(splits) {
        add(values, split.name(), seed, scores.exact);
        if *split == Split::HeldOut {
            add(values, "greedy", seed, scores.greedy_exact);
            add(values, "kl", seed, scores.kl);
        }
    }
}

pub(crate) fn metric(key: &str, label: &str, split: &str, description: String) -> Metric {
    Metric {
        split: split.to_owned(),
        description,
        ..Metric::new(key, label)
    }
}

/// A metric that no way is better of.
pub(crate) fn describes(metric: Metric) -> Metric {
    Metric {
        better: Better::Neither,
        ..metric
    }
}

/// What is measured on the reported splits.
pub(crate) fn split_metrics(scale: Scale) -> Vec<Metric> {
    let Scale {
        prompts,
        other_prompts,
        ..
    } = scale;
    let exact = |key: &str, split: &str, what: &str, prompts: usize| {
        let description = format!(
            "Probability of the one right response at temperature 1, mean over {prompts} prompts: {what}."
        );
        metric(key, "Exact", split, description)
    };
    let greedy = "Held-out prompts whose greedy response is the right one.".to_owned();
    let kl = "Σ over the right response's tokens of KL(policy ‖ start policy), exact over the vocabulary, mean over prompts.";
    vec![
        exact(
            "held_out",
            "held out",
            "new problems of the pairs' shape",
            prompts,
        ),
        exact(
            "shifted",
            "longer, larger",
            "longer chains, larger numbers",
            other_prompts,
        ),
        exact(
            "adversarial",
            "planted claims",
            "a wrong result in the prompt",
            other_prompts,
        ),
        exact(
            "retention",
            "sorting",
            "a skill that no pair touches",
            other_prompts,
        ),
        metric("greedy", "Greedy exact", "held out", greedy),
        describes(Metric {
            unit: "nats".to_owned(),
            ..metric("kl", "KL to start", "held out", kl.to_owned())
        }),
    ]
}

fn metrics(scale: Scale) -> Vec<Metric> {
    let mut metrics = split_metrics(scale);
    let decisive = format!(
        "Of the tokens that should be kept and have a probability below {DECISIVE_PROBABILITY} under the start policy, the share that is kept."
    );
    let weighted = "Of the kept tokens, each weighted by 1 − p under the start policy, the share that should be kept.";
    metrics.extend([
        metric("decisive_recall", "Decisive recall", "pairs", decisive),
        metric(
            "weighted_precision",
            "Weighted precision",
            "pairs",
            weighted.to_owned(),
        ),
        describes(metric(
            "kept_chosen",
            "Kept",
            "chosen",
            "Share of the chosen responses' tokens in the loss.".to_owned(),
        )),
        describes(metric(
            "kept_rejected",
            "Kept",
            "rejected",
            "Share of the rejected responses' tokens in the loss.".to_owned(),
        )),
    ]);
    metrics
}

fn signal_metrics(scale: Scale) -> Vec<Metric> {
    let fresh = format!("{} other pairs, labels right", scale.fresh_pairs);
    let pairs = "Pairs whose chosen response has the higher mean signal.";
    let tokens = "Probability that a right token's signal is above a wrong token's; 0.5 is chance.";
    vec![
        metric(
            "pairs_training",
            "Pair accuracy",
            "own pairs, noisy labels",
            pairs.to_owned(),
        ),
        metric(
            "pairs_fresh",
            "Pair accuracy",
            "fresh pairs",
            format!("{pairs} On {fresh}."),
        ),
        metric(
            "tokens_training",
            "Token AUC",
            "own pairs",
            tokens.to_owned(),
        ),
        metric(
            "tokens_fresh",
            "Token AUC",
            "fresh pairs",
            format!("{tokens} On {fresh}."),
        ),
    ]
}

fn comparisons() -> Vec<Comparison> {
    use ArmKind::{Disagree, Level, LogRatio, Random, Truth, Unmasked, UnmaskedLonger};
    let held_out = Split::HeldOut.name();
    [
        (LogRatio, Unmasked, held_out),
        (LogRatio, UnmaskedLonger, held_out),
        (LogRatio, Random, held_out),
        (LogRatio, Truth, held_out),
        (Level, Unmasked, held_out),
        (Random, Unmasked, held_out),
        (Disagree, Random, held_out),
        (Truth, UnmaskedLonger, held_out),
        (LogRatio, UnmaskedLonger, Split::Shifted.name()),
        (LogRatio, UnmaskedLonger, Split::Adversarial.name()),
        (LogRatio, UnmaskedLonger, Split::Retention.name()),
        (LogRatio, UnmaskedLonger, "greedy"),
        (LogRatio, UnmaskedLonger, "kl"),
    ]
    .map(|(arm, against, metric)| Comparison {
        arm: arm.key().to_owned(),
        against: against.key().to_owned(),
        metric: metric.to_owned(),
    })
    .to_vec()
}
