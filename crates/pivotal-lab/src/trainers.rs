//! The second study: every trainer with and without segment credit, in the world whose truth is known.

mod arm;
mod experiment;
mod grid;
mod grpo;
mod ppo;
mod reject;
mod run;
mod samples;
mod study;
mod tally;

pub use arm::{TokenRule, Trainer, TrainerArm, TrainerSettings};
pub use grid::{TrainersGrid, TrainersGridRow, TrainersGridSettings, trainers_grid};

use pivotal_report::Study;

use crate::error::Result;
use crate::study::REPORTED;
use experiment::{TrainerPlan, TrainersExperiment};

/// What to run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TrainersStudySettings {
    /// Seeds of the pairs, the prompts and the samples, each once.
    pub seeds: Vec<u64>,
    /// Every stage at a fraction of its size: shows that it runs, and nothing about credit.
    pub smoke: bool,
    /// Jobs at a time; the results do not depend on it.
    pub threads: usize,
}

impl Default for TrainersStudySettings {
    fn default() -> Self {
        Self {
            seeds: vec![1, 2, 3],
            smoke: false,
            threads: 2,
        }
    }
}

impl TrainersStudySettings {
    /// One seed at a fraction of the size.
    pub fn smoke() -> Self {
        Self {
            seeds: vec![1],
            smoke: true,
            ..Self::default()
        }
    }

    /// The command that repeats the study.
    pub fn command(&self) -> String {
        let seeds: Vec<String> = self.seeds.iter().map(u64::to_string).collect();
        let smoke = if self.smoke { " --smoke" } else { "" };
        format!("pivotal lab trainers{smoke} --seeds {}", seeds.join(","))
    }
}

/// Runs the study; `progress` gets a line as each job is done. The caller knows the machine and the date, and fills them in.
///
/// From one start policy each of DPO, rejection sampling, GRPO and PPO learns with every token, with segment credit, with as many
/// random tokens and with the true ones. DPO learns from the quickstart's pairs, a quarter of whose labels is flipped; the others
/// from their own samples and one number a response: whether the judge calls it right, wrongly for a quarter.
///
/// # Errors
/// [`crate::Error::Setting`] for no seed or no thread; [`crate::Error::Train`] for a loss that is not finite.
pub fn trainers(settings: &TrainersStudySettings, progress: &mut dyn FnMut(&str)) -> Result<Study> {
    let experiment = TrainersExperiment::new(settings.smoke, settings.threads, &settings.seeds)?;
    let sets = experiment.pairs.evaluation_sets(&REPORTED, progress)?;
    let (sets, start): (Vec<_>, Vec<_>) = sets.into_iter().unzip();
    let sets: Vec<_> = sets.iter().collect();
    let pairs = experiment.pairs.pairs(&settings.seeds, progress)?;
    let oracles = experiment.oracles(&pairs, &sets, progress)?;
    let arms = TrainerArm::all().filter(|arm| *arm != TrainerArm::ORACLE);
    let plans: Vec<TrainerPlan<'_>> = arms
        .flat_map(|arm| {
            oracles.iter().map(move |oracle| TrainerPlan {
                arm,
                settings: arm.tuned(),
                oracle,
            })
        })
        .collect();
    let mut runs = experiment.arms(&plans, &sets, progress)?;
    runs.extend(oracles.iter().map(|oracle| oracle.run.clone()));
    let results = study::Results {
        settings,
        experiment: &experiment,
        start: &start,
        runs: &runs,
        oracles: &oracles,
    };
    let study = results.into_study();
    study.validate()?;
    Ok(study)
}
