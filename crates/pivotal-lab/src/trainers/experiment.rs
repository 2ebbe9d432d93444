//! The stages that the study and its grid share: pairs, oracles, arms.

use pivotal_core::TokenizedPair;
use pivotal_data::Tokenizer;
use pivotal_model::Decoder;

use super::arm::{Trainer, TrainerArm, TrainerSettings};
use super::run::{self, Origin, RolloutScale};
use super::tally::{Cost, RunMasks};
use crate::arm::{self, ArmKind, ArmSettings};
use crate::error::Result;
use crate::evaluate::{EvaluationSet, SplitScores};
use crate::experiment::{ArmRun, Experiment, Progress, Scale, SeedPairs, all_tokens};
use crate::jobs::{self, Job};
use crate::signal::{SignalQuality, TokenSignal};
use crate::start_policy;
use crate::world::tokenizer;

/// How much the on-policy arms compute: as many steps as DPO, and as many responses a step as its 16 pairs have.
pub(crate) const ROLLOUTS: RolloutScale = RolloutScale {
    steps: 60,
    prompts: 4,
    samples: 8,
};

/// Runs every stage and shows nothing.
pub(crate) const SMOKE_ROLLOUTS: RolloutScale = RolloutScale {
    steps: 3,
    prompts: 3,
    samples: 4,
};

/// What the study computes with.
pub(crate) struct TrainersExperiment {
    pub(crate) pairs: Experiment,
    pub(crate) rollouts: RolloutScale,
    tokenizer: Tokenizer,
}

/// Unmasked DPO on a seed's pairs: DPO's own first arm, and the oracle of the signal.
pub(crate) struct Oracle<'a> {
    pub(crate) pairs: &'a SeedPairs,
    pub(crate) policy: Decoder,
    pub(crate) signal: TokenSignal,
    /// Of the log-ratio on the pairs.
    pub(crate) quality: SignalQuality,
    pub(crate) run: TrainerRun,
}

/// What one run of an arm came to.
#[derive(Clone, Debug)]
pub(crate) struct TrainerRun {
    pub(crate) arm: TrainerArm,
    pub(crate) seed: u64,
    /// In the order of the evaluation sets.
    pub(crate) splits: Vec<SplitScores>,
    pub(crate) masks: RunMasks,
    /// Of the arm's signal over its own samples.
    pub(crate) token_auc: Option<f64>,
    /// With the oracle's training, where the arm has one.
    pub(crate) cost: Cost,
}

/// An arm to run on one seed.
#[derive(Clone, Copy)]
pub(crate) struct TrainerPlan<'a> {
    pub(crate) arm: TrainerArm,
    pub(crate) settings: TrainerSettings,
    pub(crate) oracle: &'a Oracle<'a>,
}

impl TrainersExperiment {
    pub(crate) fn new(smoke: bool, threads: usize, seeds: &[u64]) -> Result<Self> {
        let (scale, rollouts) = match smoke {
            true => (Scale::SMOKE, SMOKE_ROLLOUTS),
            false => (Scale::FULL, ROLLOUTS),
        };
        Ok(Self {
            pairs: Experiment::new(start_policy::embedded()?, scale, threads, seeds)?,
            rollouts,
            tokenizer: tokenizer()?,
        })
    }

    /// The oracle of every seed.
    pub(crate) fn oracles<'a>(
        &self,
        pairs: &'a [SeedPairs],
        sets: &[&EvaluationSet],
        progress: Progress<'_>,
    ) -> Result<Vec<Oracle<'a>>> {
        let jobs = pairs.iter().map(|pairs| {
            let name = format!("dpo_all, the oracle, seed {}", pairs.seed);
            Job::new(name, move || {
                let kind = ArmKind::Unmasked;
                let masks = all_tokens(&pairs.training);
                let (policy, run) = self.pairs.train(kind, kind.tuned(), pairs, masks, sets)?;
                let signal = TokenSignal::log_ratio(&policy, &pairs.training)?;
                let quality = signal.quality(&pairs.training);
                let run = self.of_pairs(run, kind, pairs, Cost::default());
                let line = format!("{}, token AUC {:.2}", run.line(), quality.token_auc);
                let oracle = Oracle {
                    pairs,
                    policy,
                    signal,
                    quality,
                    run,
                };
                Ok((oracle, line))
            })
        });
        jobs::run(self.pairs.threads, jobs.collect(), progress)
    }

    /// Every planned arm, the longest first; in the order of the plans.
    pub(crate) fn arms(
        &self,
        plans: &[TrainerPlan<'_>],
        sets: &[&EvaluationSet],
        progress: Progress<'_>,
    ) -> Result<Vec<TrainerRun>> {
        // So that no worker is left with a long one at the end.
        let mut order: Vec<usize> = (0..plans.len()).collect();
        let longer = |&index: &usize| {
            let arm = plans[index].arm;
            std::cmp::Reverse((arm.step_factor() * arm.trainer.weight(), arm.trainer))
        };
        order.sort_by_key(longer);
        let jobs = order.iter().map(|&index| {
            let plan = plans[index];
            let TrainerSettings { lr, anchor } = plan.settings;
            let (key, seed) = (plan.arm.key(), plan.oracle.pairs.seed);
            let anchor_name = plan.arm.trainer.anchor_name();
            let name = format!("{key}, lr {lr:e}, {anchor_name} {anchor}, seed {seed}");
            Job::new(name, move || {
                let run = match plan.arm.quickstart() {
                    Some(kind) => self.preferences(plan, kind, sets)?,
                    None => self.on_policy(plan, sets)?,
                };
                let line = run.line();
                Ok(((index, run), line))
            })
        });
        let mut runs = jobs::run(self.pairs.threads, jobs.collect(), progress)?;
        runs.sort_by_key(|(index, _)| *index);
        Ok(runs.into_iter().map(|(_, run)| run).collect())
    }

    /// DPO: the quickstart's arm.
    fn preferences(
        &self,
        plan: TrainerPlan<'_>,
        kind: ArmKind,
        sets: &[&EvaluationSet],
    ) -> Result<TrainerRun> {
        let Oracle { pairs, signal, .. } = plan.oracle;
        let settings = ArmSettings {
            lr: plan.settings.lr,
            beta: plan.settings.anchor,
        };
        let masks = arm::masks(kind, signal, &pairs.training, pairs.seed)?;
        let (_, run) = self.pairs.train(kind, settings, pairs, masks, sets)?;
        let mut of_oracle = Cost::default();
        if plan.arm.rule.uses_oracle() {
            of_oracle.add(plan.oracle.run.cost);
            of_oracle.score(pairs.training.tokenized.iter().map(pair_tokens).sum());
        }
        Ok(self.of_pairs(run, kind, pairs, of_oracle))
    }

    fn of_pairs(
        &self,
        run: ArmRun,
        kind: ArmKind,
        pairs: &SeedPairs,
        mut cost: Cost,
    ) -> TrainerRun {
        let Scale { steps, batch, .. } = self.pairs.scale;
        let training = &pairs.training;
        let batches = training.batches(pairs.seed, batch);
        for pair in batches
            .take((steps * kind.step_factor()) as usize)
            .flatten()
        {
            let tokens = pair_tokens(&training.tokenized[pair]);
            cost.train(tokens);
            // The reference's log-probabilities.
            cost.score(tokens);
        }
        let arms = TrainerArm::all().filter(|arm| arm.trainer == Trainer::Dpo);
        let arm = arms.into_iter().find(|arm| arm.quickstart() == Some(kind));
        TrainerRun {
            arm: arm.expect("the study runs no other arm of the quickstart"),
            seed: run.seed,
            splits: run.splits,
            masks: RunMasks {
                agreement: run.masks.agreement,
                kept: run.masks.kept.map(Some),
            },
            token_auc: None,
            cost,
        }
    }

    fn on_policy(&self, plan: TrainerPlan<'_>, sets: &[&EvaluationSet]) -> Result<TrainerRun> {
        let seed = plan.oracle.pairs.seed;
        let origin = Origin {
            seed,
            start: &self.pairs.start,
            oracle: &plan.oracle.policy,
            tokenizer: &self.tokenizer,
            scale: self.rollouts,
        };
        let trained = run::train(origin, plan.arm, plan.settings)?;
        let mut cost = trained.cost;
        if plan.arm.rule.uses_oracle() {
            cost.add(plan.oracle.run.cost);
        }
        let splits = sets.iter().map(|set| set.score(&trained.policy));
        Ok(TrainerRun {
            arm: plan.arm,
            seed,
            splits: splits.collect::<Result<_>>()?,
            masks: trained.masks,
            token_auc: trained.token_auc,
            cost,
        })
    }
}

impl TrainerRun {
    fn line(&self) -> String {
        let exact = self.splits.first().map_or(f64::NAN, |split| split.exact);
        format!("exact {exact:.3}")
    }
}

fn pair_tokens(pair: &TokenizedPair) -> usize {
    pair.prompt.len() + pair.chosen.len() + pair.rejected.len()
}
