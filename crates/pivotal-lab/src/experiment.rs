//! The stages that a quickstart and a grid share: pairs, signals, arms.

use pivotal_core::{TokenMask, TokenizedPair};
use pivotal_model::Decoder;

use crate::arm::{self, ArmKind, ArmSettings, MaskQuality};
use crate::error::{Error, Result};
use crate::evaluate::{EvaluationSet, SplitScores};
use crate::jobs::{self, Job};
use crate::signal::{SignalQuality, TokenSignal, reward_model};
use crate::training_pairs::TrainingPairs;
use crate::world::pairs::PairSettings;
use crate::world::splits::Split;

/// Every study is measured on the same prompts.
pub(crate) const EVALUATION_SEED: u64 = 1;
/// Fresh pairs are drawn from seeds that no study trains on.
const FRESH_SEED: u64 = 1 << 32;

/// How much is computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Scale {
    /// Pairs of a seed.
    pub(crate) pairs: usize,
    /// Pairs of a step.
    pub(crate) batch: usize,
    /// Optimizer steps of an arm.
    pub(crate) steps: u64,
    /// Optimizer steps of the reward model.
    pub(crate) reward_steps: u64,
    /// Pairs that a signal is measured on besides those it was trained on.
    pub(crate) fresh_pairs: usize,
    /// Prompts of the held-out split, and of the tuning split.
    pub(crate) prompts: usize,
    /// Prompts of each other split.
    pub(crate) other_prompts: usize,
}

impl Scale {
    pub(crate) const FULL: Self = Self {
        pairs: 1024,
        batch: 16,
        steps: 60,
        reward_steps: 120,
        fresh_pairs: 256,
        prompts: 512,
        other_prompts: 256,
    };

    /// Runs every stage and shows nothing.
    pub(crate) const SMOKE: Self = Self {
        pairs: 96,
        batch: 8,
        steps: 8,
        reward_steps: 8,
        fresh_pairs: 32,
        prompts: 48,
        other_prompts: 32,
    };
}

/// What a study computes with.
pub(crate) struct Experiment {
    pub(crate) start: Decoder,
    pub(crate) scale: Scale,
    pub(crate) threads: usize,
}

/// The pairs of one seed.
pub(crate) struct SeedPairs {
    pub(crate) seed: u64,
    pub(crate) training: TrainingPairs,
    /// Other pairs with right labels.
    fresh: TrainingPairs,
}

/// A signal of one seed.
pub(crate) struct SeedSignal {
    pub(crate) signal: TokenSignal,
    /// On the training pairs, against their labels as given.
    pub(crate) training: SignalQuality,
    /// On the fresh pairs.
    pub(crate) fresh: SignalQuality,
}

/// What one run of an arm scored.
#[derive(Clone, Debug)]
pub(crate) struct ArmRun {
    pub(crate) seed: u64,
    pub(crate) kind: ArmKind,
    /// In the order of the evaluation sets.
    pub(crate) splits: Vec<SplitScores>,
    pub(crate) masks: MaskQuality,
}

/// An arm to run, on one seed.
#[derive(Clone, Copy)]
pub(crate) struct Plan<'a> {
    pub(crate) kind: ArmKind,
    pub(crate) settings: ArmSettings,
    pub(crate) pairs: &'a SeedPairs,
    /// What the masks are made of; what keeps every token, or the truth, does not look at it.
    pub(crate) signal: &'a TokenSignal,
}

/// A report of what is done, a line each.
pub(crate) type Progress<'a> = &'a mut dyn FnMut(&str);

impl Experiment {
    /// # Errors
    /// [`Error::Setting`] for no seed or no thread.
    pub(crate) fn new(start: Decoder, scale: Scale, threads: usize, seeds: &[u64]) -> Result<Self> {
        let setting = |name, found: String, expected| Error::Setting {
            name,
            found,
            expected,
        };
        if threads == 0 {
            return Err(setting("threads", "0".into(), "at least 1"));
        }
        let mut sorted = seeds.to_vec();
        sorted.sort_unstable();
        sorted.dedup();
        if seeds.is_empty() || sorted.len() != seeds.len() || seeds.iter().any(|&s| s >= FRESH_SEED)
        {
            let expected = "one seed or more, each once and below 2^32";
            return Err(setting("seeds", format!("{seeds:?}"), expected));
        }
        Ok(Self {
            start,
            scale,
            threads,
        })
    }

    /// The prompts of each split, with the start policy's own scores.
    pub(crate) fn evaluation_sets(
        &self,
        splits: &[Split],
        progress: Progress<'_>,
    ) -> Result<Vec<(EvaluationSet, SplitScores)>> {
        let jobs = splits.iter().map(|&split| {
            Job::new(format!("start policy on {}", split.name()), move || {
                let count = match split {
                    Split::HeldOut | Split::Tuning => self.scale.prompts,
                    _ => self.scale.other_prompts,
                };
                let set = EvaluationSet::new(split, EVALUATION_SEED, count, &self.start)?;
                let scores = set.score(&self.start)?;
                Ok(((set, scores), format!("exact {:.3}", scores.exact)))
            })
        });
        jobs::run(self.threads, jobs.collect(), progress)
    }

    /// The pairs of every seed.
    pub(crate) fn pairs(&self, seeds: &[u64], progress: Progress<'_>) -> Result<Vec<SeedPairs>> {
        let jobs = seeds.iter().map(|&seed| {
            Job::new(format!("pairs of seed {seed}"), move || {
                let noisy = PairSettings::CONFLICT;
                let clean = PairSettings {
                    flip_permille: 0,
                    ..noisy
                };
                let Scale {
                    pairs, fresh_pairs, ..
                } = self.scale;
                let training = TrainingPairs::draw(&noisy, seed, pairs, &self.start)?;
                let fresh =
                    TrainingPairs::draw(&clean, FRESH_SEED + seed, fresh_pairs, &self.start)?;
                let line = format!("{pairs} pairs, {fresh_pairs} fresh ones");
                let pairs = SeedPairs {
                    seed,
                    training,
                    fresh,
                };
                Ok((pairs, line))
            })
        });
        jobs::run(self.threads, jobs.collect(), progress)
    }

    /// Both signals of every seed, with the run of the unmasked arm that is the oracle.
    pub(crate) fn signals(
        &self,
        pairs: &[SeedPairs],
        sets: &[&EvaluationSet],
        progress: Progress<'_>,
    ) -> Result<Vec<(SeedSignal, Option<ArmRun>)>> {
        let jobs = pairs.iter().flat_map(|pairs| {
            let seed = pairs.seed;
            let oracle = Job::new(
                format!("unmasked DPO, the oracle, seed {seed}"),
                move || {
                    let settings = ArmKind::Unmasked.tuned();
                    let masks = all_tokens(&pairs.training);
                    let (policy, run) =
                        self.train(ArmKind::Unmasked, settings, pairs, masks, sets)?;
                    let signal = TokenSignal::log_ratio(&policy, &pairs.training)?;
                    let signal = SeedSignal {
                        training: signal.quality(&pairs.training),
                        fresh: TokenSignal::log_ratio(&policy, &pairs.fresh)?.quality(&pairs.fresh),
                        signal,
                    };
                    let line =
                        format!("{}, token AUC {:.2}", run.line(), signal.training.token_auc);
                    Ok(((signal, Some(run)), line))
                },
            );
            let reward = Job::new(format!("reward model, seed {seed}"), move || {
                let (steps, batch) = (self.scale.reward_steps, self.scale.batch);
                let model = reward_model(&self.start, &pairs.training, seed, steps, batch)?;
                let signal = TokenSignal::level(&model, &pairs.training)?;
                let signal = SeedSignal {
                    training: signal.quality(&pairs.training),
                    fresh: TokenSignal::level(&model, &pairs.fresh)?.quality(&pairs.fresh),
                    signal,
                };
                let line = format!("token AUC {:.2}", signal.training.token_auc);
                Ok(((signal, None), line))
            });
            [oracle, reward]
        });
        jobs::run(self.threads, jobs.collect(), progress)
    }

    /// Every planned arm.
    pub(crate) fn arms(
        &self,
        plans: Vec<Plan<'_>>,
        sets: &[&EvaluationSet],
        progress: Progress<'_>,
    ) -> Result<Vec<ArmRun>> {
        let jobs = plans.into_iter().map(|plan| {
            let ArmSettings { lr, beta } = plan.settings;
            let name = format!(
                "{}, lr {lr:e}, beta {beta}, seed {}",
                plan.kind.key(),
                plan.pairs.seed
            );
            Job::new(name, move || {
                let training = &plan.pairs.training;
                let masks = arm::masks(plan.kind, plan.signal, training, plan.pairs.seed)?;
                let (_, run) = self.train(plan.kind, plan.settings, plan.pairs, masks, sets)?;
                let line = run.line();
                Ok((run, line))
            })
        });
        jobs::run(self.threads, jobs.collect(), progress)
    }

    pub(crate) fn train(
        &self,
        kind: ArmKind,
        settings: ArmSettings,
        pairs: &SeedPairs,
        masks: Vec<[TokenMask; 2]>,
        sets: &[&EvaluationSet],
    ) -> Result<(Decoder, ArmRun)> {
        let quality = arm::mask_quality(&masks, &pairs.training);
        let schedule = arm::Schedule {
            seed: pairs.seed,
            steps: self.scale.steps * kind.step_factor(),
            batch: self.scale.batch,
        };
        let policy = arm::train(&self.start, &pairs.training, masks, settings, schedule)?;
        let splits = sets.iter().map(|set| set.score(&policy));
        let run = ArmRun {
            seed: pairs.seed,
            kind,
            splits: splits.collect::<Result<_>>()?,
            masks: quality,
        };
        Ok((policy, run))
    }
}

impl ArmRun {
    fn line(&self) -> String {
        match self.splits.first() {
            Some(first) => format!("exact {:.3}", first.exact),
            None => "not evaluated".to_owned(),
        }
    }
}

/// Masks that keep everything.
pub(crate) fn all_tokens(pairs: &TrainingPairs) -> Vec<[TokenMask; 2]> {
    let all = |pair: &TokenizedPair| [pair.chosen.len(), pair.rejected.len()].map(TokenMask::all);
    pairs.tokenized.iter().map(all).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::start_policy;

    #[test]
    fn credit_that_keeps_all_is_unmasked_dpo_bit_for_bit() {
        let start = start_policy::embedded().unwrap();
        let pairs = TrainingPairs::draw(&PairSettings::CONFLICT, 3, 12, &start).unwrap();
        // Any signal will do: keeping all does not look at it.
        let signal = TokenSignal {
            name: pivotal_credit::Signal::LogRatio,
            values: pairs.reference_logps.clone(),
        };
        let kept = arm::masks(ArmKind::Unmasked, &signal, &pairs, 3).unwrap();
        let truth = arm::masks(ArmKind::Truth, &signal, &pairs, 3).unwrap();
        let trained = |masks| {
            let schedule = arm::Schedule {
                seed: 3,
                steps: 3,
                batch: 4,
            };
            let settings = ArmKind::Unmasked.tuned();
            let policy = arm::train(&start, &pairs, masks, settings, schedule).unwrap();
            start_policy::to_bytes(&policy).unwrap()
        };
        let unmasked = trained(all_tokens(&pairs));
        assert!(trained(kept) == unmasked);
        assert!(trained(truth) != unmasked);
        assert!(start_policy::EMBEDDED != unmasked);
    }
}
