//! The first study: does segment credit help where both responses hold mistakes and labels are noisy?

use pivotal_report::Study;

use crate::arm::ArmKind;
use crate::error::Result;
use crate::experiment::{Experiment, Plan, Scale};
use crate::start_policy;
use crate::study::{REPORTED, Results};
use crate::views::pair_views;

/// What to run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QuickstartSettings {
    /// Seeds of the pairs and of their order, each once.
    pub seeds: Vec<u64>,
    /// Every stage at a fraction of its size: shows that it runs, and nothing about credit.
    pub smoke: bool,
    /// Jobs at a time; the results do not depend on it.
    pub threads: usize,
}

impl Default for QuickstartSettings {
    fn default() -> Self {
        Self {
            seeds: vec![1, 2, 3],
            smoke: false,
            threads: 2,
        }
    }
}

impl QuickstartSettings {
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
        format!("pivotal quickstart{smoke} --seeds {}", seeds.join(","))
    }
}

/// Runs the study; `progress` gets a line as each job is done. The caller knows the machine and the date, and fills them in.
///
/// The world's pairs hold mistakes on both sides and a quarter of their labels is flipped. From one start policy, each arm
/// takes its own best setting (see [`grid()`](crate::grid())); every arm of a seed sees the same pairs in the same order.
///
/// # Errors
/// [`crate::Error::Setting`] for no seed or no thread; [`crate::Error::Train`] for a loss that is not finite.
pub fn quickstart(settings: &QuickstartSettings, progress: &mut dyn FnMut(&str)) -> Result<Study> {
    let scale = match settings.smoke {
        true => Scale::SMOKE,
        false => Scale::FULL,
    };
    let start = start_policy::embedded()?;
    let experiment = Experiment::new(start, scale, settings.threads, &settings.seeds)?;
    let sets = experiment.evaluation_sets(&REPORTED, progress)?;
    let (sets, start_scores): (Vec<_>, Vec<_>) = sets.into_iter().unzip();
    let sets: Vec<_> = sets.iter().collect();
    let pairs = experiment.pairs(&settings.seeds, progress)?;
    let signals = experiment.signals(&pairs, &sets, progress)?;

    let mut plans = Vec::new();
    // The longest first, so that no worker is left with it at the end.
    let mut kinds = ArmKind::ALL.to_vec();
    kinds.sort_by_key(|kind| std::cmp::Reverse(kind.step_factor()));
    for kind in kinds {
        if kind == ArmKind::Unmasked {
            continue; // It is the oracle, and was run with the signals.
        }
        for (pairs, signals) in pairs.iter().zip(signals.chunks_exact(2)) {
            plans.push(Plan {
                kind,
                settings: kind.tuned(),
                pairs,
                signal: &signals[usize::from(kind == ArmKind::Level)].0.signal,
            });
        }
    }
    let mut runs = experiment.arms(plans, &sets, progress)?;
    runs.extend(signals.iter().filter_map(|(_, run)| run.clone()));
    let views = match signals.as_slice() {
        [(log_ratio, _), (level, _), ..] => pair_views(&pairs[0], log_ratio, level)?,
        _ => Vec::new(),
    };
    let results = Results {
        settings,
        scale,
        start: &start_scores,
        runs: &runs,
        signals: &signals,
        views,
    };
    let study = results.into_study();
    study.validate()?;
    Ok(study)
}
