//! The numbers as a [`Study`]: what is measured, compared and left open.

use std::collections::BTreeMap;

use pivotal_report::{Arm, Comparison, Metric, Role, SignalRow, Study};

use super::TrainersStudySettings;
use super::arm::{TokenRule, Trainer, TrainerArm};
use super::experiment::{Oracle, TrainerRun, TrainersExperiment};
use super::ppo::VALUE_LR;
use crate::arm::DECISIVE_PROBABILITY;
use crate::evaluate::SplitScores;
use crate::start_policy::EMBEDDED_BLAKE3;
use crate::study::{Values, add, add_splits, describes, metric, split_metrics, start_arm};
use crate::world::splits::Split;

/// Everything that was measured.
pub(super) struct Results<'a> {
    pub(super) settings: &'a TrainersStudySettings,
    pub(super) experiment: &'a TrainersExperiment,
    pub(super) start: &'a [SplitScores],
    pub(super) runs: &'a [TrainerRun],
    pub(super) oracles: &'a [Oracle<'a>],
}

impl Results<'_> {
    pub(super) fn into_study(self) -> Study {
        let title = match self.settings.smoke {
            true => "Smoke test of the trainers: the numbers mean nothing",
            false => "Does segment credit help DPO, rejection sampling, GRPO and PPO?",
        };
        let mut arms = vec![start_arm(&self.settings.seeds, self.start)];
        arms.extend(TrainerArm::all().map(|arm| self.arm(arm)));
        Study {
            title: title.to_owned(),
            question: "Four trainers from one start policy in step-by-step arithmetic. DPO learns from pairs of which a quarter of \
                       the labels is flipped; the others from their own samples and one number a response, whether a judge \
                       calls it right, of which a quarter is flipped. Does learning from the segments that agree with the \
                       response's sign beat learning from every token, each arm at its own best setting? Arms are to be \
                       compared within a trainer: the four see different data and spend different compute."
                .to_owned(),
            command: self.settings.command(),
            versions: BTreeMap::from([
                ("pivotal".to_owned(), env!("CARGO_PKG_VERSION").to_owned()),
                ("start policy (BLAKE3)".to_owned(), EMBEDDED_BLAKE3[..16].to_owned()),
            ]),
            seeds: self.settings.seeds.clone(),
            metrics: metrics(self.experiment),
            arms,
            comparisons: comparisons(),
            signal_metrics: signal_metrics(),
            signals: self.signal_rows(),
            notes: self.notes(),
            ..Study::default()
        }
    }

    fn arm(&self, arm: TrainerArm) -> Arm {
        let mut values = Values::new();
        for run in self.runs.iter().filter(|run| run.arm == arm) {
            add_splits(&mut values, run.seed, &run.splits);
            let agreement = run.masks.agreement;
            let cost = run.cost.tokens() as f64 / 1e6;
            let numbers = [
                ("decisive_recall", agreement.decisive_recall),
                ("weighted_precision", agreement.weighted_precision),
                ("kept_positive", run.masks.kept[0]),
                ("kept_negative", run.masks.kept[1]),
                ("cost", Some(cost)),
            ];
            for (key, value) in numbers {
                if let Some(value) = value {
                    add(&mut values, key, run.seed, value);
                }
            }
        }
        let settings = arm.tuned();
        let mut shown = BTreeMap::from([("lr".to_owned(), format!("{:e}", settings.lr))]);
        if arm.trainer != Trainer::Reject {
            let name = arm.trainer.anchor_name().to_owned();
            shown.insert(name, settings.anchor.to_string());
        }
        let (pairs, rollouts) = (self.experiment.pairs.scale, self.experiment.rollouts);
        let (steps, a_step) = match arm.trainer {
            Trainer::Dpo => (pairs.steps, ("pairs a step", pairs.batch)),
            _ => (
                rollouts.steps,
                ("samples a step", rollouts.prompts * rollouts.samples),
            ),
        };
        shown.insert("steps".to_owned(), (steps * arm.step_factor()).to_string());
        shown.insert(a_step.0.to_owned(), a_step.1.to_string());
        Arm {
            key: arm.key(),
            label: arm.label(),
            role: arm.role(),
            description: arm.description().to_owned(),
            settings: shown,
            extra_cost: arm.extra_cost().to_owned(),
            values,
        }
    }

    fn signal_rows(&self) -> Vec<SignalRow> {
        let mut pairs = Values::new();
        for oracle in self.oracles {
            let (seed, auc) = (oracle.pairs.seed, oracle.quality.token_auc);
            add(&mut pairs, "token_auc", seed, auc);
        }
        let mut rows = vec![SignalRow {
            label: "log_ratio, on DPO's pairs".to_owned(),
            description: "Unmasked DPO against the start policy, on the pairs it was trained on."
                .to_owned(),
            values: pairs,
        }];
        let treatments = TrainerArm::all().filter(|arm| arm.role() == Role::Treatment);
        for arm in treatments.filter(|arm| arm.trainer != Trainer::Dpo) {
            let mut values = Values::new();
            for run in self.runs.iter().filter(|run| run.arm == arm) {
                if let Some(auc) = run.token_auc {
                    add(&mut values, "token_auc", run.seed, auc);
                }
            }
            rows.push(SignalRow {
                label: format!("{}, on {}'s samples", arm.rule.key(), arm.trainer.label()),
                description: "Over the samples that the masked arm learnt from.".to_owned(),
                values,
            });
        }
        rows
    }

    fn notes(&self) -> Vec<String> {
        let mut notes = Vec::new();
        if self.settings.smoke {
            notes.push(
                "This is a smoke test: every stage at a fraction of its size. Its numbers say nothing about credit."
                    .to_owned(),
            );
        }
        let rollouts = self.experiment.rollouts;
        notes.extend([
            format!(
                "Scores: 1 if the judge calls a response right (it is the one right response, token for token), else 0; a quarter of the verdicts is flipped, drawn for each sample. Nothing but this number reaches reject, GRPO and PPO; {} prompts a step, {} samples each, new problems at each step.",
                rollouts.prompts, rollouts.samples
            ),
            "Rejection sampling takes every sample that the judge calls right, and samples anew from the policy at each step. GRPO: group-normalised advantages, one update a step. PPO: two epochs of two minibatches, GAE with λ 0.95, the score at the last token, the KL as a price in the reward; GRPO's is a loss. The other settings are the recipes' defaults.".to_owned(),
            format!(
                "The value model of PPO starts from the start policy with a head of zero, learning rate {VALUE_LR:e}, which was not tuned. Nor was credit: Schmitt cut, offset 0, baseline 0 (the critic's: the batch's mean)."
            ),
            "The oracle is unmasked DPO on the seed's noisy pairs, which reject, GRPO and PPO on every token never see. Two fair rivals spend what it costs: more steps (the cost column shows that this is no less, but for DPO's one scoring pass; of the trainers that sample, they see more verdicts as well, which credit does without), and the same trainer starting from the oracle, which has its pairs as well.".to_owned(),
            "Cost: tokens sampled, scored and trained on; a token's forward pass is 1 and its backward pass 2. The oracle's training is counted into every arm that needs it. Evaluation is not counted, nor is what only measures.".to_owned(),
            "Each arm has the best setting of its own grid, found on a tuning split and on seeds that are not reported: docs/bench/trainers/grid.md (learning rate by KL coefficient), and for DPO docs/bench/quickstart-grid.md.".to_owned(),
            "One start policy: the intervals are over seeds of pairs, prompts and samples, and leave out how another start policy would do. One world of 26 tokens and a policy of 0.2 million parameters: nothing here promises a gain for a language model, or reproduces a figure of a paper.".to_owned(),
            "The adversarial split plants a wrong result in the prompt. Planted claims are in the start policy's corpus and never in the pairs or prompts.".to_owned(),
            "KL is exact over the vocabulary at each token, along the right response instead of along samples.".to_owned(),
        ]);
        notes
    }
}

fn metrics(experiment: &TrainersExperiment) -> Vec<Metric> {
    let mut metrics = split_metrics(experiment.pairs.scale);
    let decisive = format!(
        "Of the tokens that should be kept and have a probability below {DECISIVE_PROBABILITY} under the policy that sampled (pairs: the start policy), the share that is kept. Should be kept: right tokens of positive responses, wrong ones of negative responses."
    );
    let weighted = "Of the kept tokens, each weighted by 1 − p under that policy, the share that should be kept.";
    let kept = "Share of these responses' tokens in the loss.".to_owned();
    metrics.extend([
        metric("decisive_recall", "Decisive recall", "training", decisive),
        metric(
            "weighted_precision",
            "Weighted precision",
            "training",
            weighted.to_owned(),
        ),
        describes(metric("kept_positive", "Kept", "positive", kept.clone())),
        describes(metric("kept_negative", "Kept", "negative", kept)),
        describes(Metric {
            unit: "million tokens".to_owned(),
            decimals: 2,
            ..metric(
                "cost",
                "Cost",
                "with the oracle's",
                "Tokens sampled, scored and trained on, backward passes double.".to_owned(),
            )
        }),
    ]);
    metrics
}

fn signal_metrics() -> Vec<Metric> {
    let tokens = "Probability that a right token's signal is above a wrong token's; 0.5 is chance.";
    vec![metric("token_auc", "Token AUC", "", tokens.to_owned())]
}

fn comparisons() -> Vec<Comparison> {
    use TokenRule::{Advantage, All, AllFromOracle, AllLonger, Critic, LogRatio, Random, Truth};
    let known: Vec<TrainerArm> = TrainerArm::all().collect();
    let comparison = |trainer, arm, against, metric: &str| {
        let arms = [arm, against].map(|rule| TrainerArm { trainer, rule });
        arms.iter()
            .all(|arm| known.contains(arm))
            .then(|| Comparison {
                arm: arms[0].key(),
                against: arms[1].key(),
                metric: metric.to_owned(),
            })
    };
    let held_out = Split::HeldOut.name();
    let each = [
        (LogRatio, All, held_out),
        (LogRatio, AllLonger, held_out),
        (LogRatio, AllFromOracle, held_out),
        (LogRatio, Random, held_out),
        (LogRatio, Truth, held_out),
        (Advantage, All, held_out),
        (Critic, All, held_out),
        (Random, All, held_out),
        (Truth, All, held_out),
        (LogRatio, AllLonger, Split::Shifted.name()),
        (LogRatio, AllLonger, Split::Adversarial.name()),
    ];
    Trainer::ALL
        .into_iter()
        .flat_map(|trainer| {
            each.into_iter()
                .filter_map(move |(arm, against, metric)| comparison(trainer, arm, against, metric))
                .collect::<Vec<_>>()
        })
        .collect()
}
