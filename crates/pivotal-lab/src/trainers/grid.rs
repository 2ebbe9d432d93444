//! Each on-policy arm's own small grid, on a split and on seeds that no report shows.

use std::fmt::Write as _;

use pivotal_core::statistics::mean;

use super::arm::{Trainer, TrainerArm, TrainerSettings};
use super::experiment::{TrainerPlan, TrainersExperiment};
use crate::error::Result;
use crate::world::splits::Split;

/// What to try.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TrainersGridSettings {
    /// Seeds of pairs, prompts and samples: not those of a report.
    pub seeds: Vec<u64>,
    /// Whose arms; DPO's were tuned by [`grid()`](crate::grid()).
    pub trainers: Vec<Trainer>,
    /// Jobs at a time; the results do not depend on it.
    pub threads: usize,
}

impl Default for TrainersGridSettings {
    fn default() -> Self {
        Self {
            seeds: vec![101, 102],
            trainers: Trainer::ALL[1..].to_vec(),
            threads: 2,
        }
    }
}

/// One setting of one arm.
#[derive(Clone, Debug, PartialEq)]
pub struct TrainersGridRow {
    /// The arm.
    pub arm: TrainerArm,
    /// The setting.
    pub settings: TrainerSettings,
    /// The probability of the right response on the tuning split, a seed each.
    pub exact: Vec<f64>,
}

/// Every setting tried.
#[derive(Clone, Debug, PartialEq)]
pub struct TrainersGrid {
    /// The start policy's score on the tuning split.
    pub start: f64,
    /// Arm by arm.
    pub rows: Vec<TrainersGridRow>,
}

/// Trains every arm of the trainers at every setting and scores it on the tuning split; `progress` gets a line a job.
///
/// # Errors
/// [`crate::Error::Setting`] for no seed or no thread; [`crate::Error::Train`] for a loss that is not finite.
pub fn trainers_grid(
    settings: &TrainersGridSettings,
    progress: &mut dyn FnMut(&str),
) -> Result<TrainersGrid> {
    let experiment = TrainersExperiment::new(false, settings.threads, &settings.seeds)?;
    let sets = experiment
        .pairs
        .evaluation_sets(&[Split::Tuning], progress)?;
    let evaluation = [&sets[0].0];
    let pairs = experiment.pairs.pairs(&settings.seeds, progress)?;
    let oracles = experiment.oracles(&pairs, &evaluation, progress)?;
    let arms = TrainerArm::all().filter(|arm| settings.trainers.contains(&arm.trainer));
    let mut plans = Vec::new();
    for arm in arms {
        for &anchor in arm.trainer.anchors() {
            for lr in arm.trainer.learning_rates() {
                let settings = TrainerSettings { lr, anchor };
                plans.extend(oracles.iter().map(|oracle| TrainerPlan {
                    arm,
                    settings,
                    oracle,
                }));
            }
        }
    }
    let runs = experiment.arms(&plans, &evaluation, progress)?;
    let seeds = settings.seeds.len();
    let rows = plans.chunks(seeds).zip(runs.chunks(seeds));
    Ok(TrainersGrid {
        start: sets[0].1.exact,
        rows: rows
            .map(|(plans, runs)| TrainersGridRow {
                arm: plans[0].arm,
                settings: plans[0].settings,
                exact: runs.iter().map(|run| run.splits[0].exact).collect(),
            })
            .collect(),
    })
}

impl TrainersGrid {
    /// The best setting of an arm by the mean over seeds; the first of equals.
    pub fn best(&self, arm: TrainerArm) -> Option<&TrainersGridRow> {
        let rows = self.rows.iter().filter(|row| row.arm == arm);
        rows.fold(None, |best: Option<&TrainersGridRow>, row| match best {
            Some(best) if best.mean() >= row.mean() => Some(best),
            _ => Some(row),
        })
    }

    /// The grid as Markdown, a table a trainer: a row an arm and anchor, a column a learning rate, the best of each arm in bold.
    pub fn to_markdown(&self) -> String {
        let tried = |trainer: &Trainer| self.rows.iter().any(|row| row.arm.trainer == *trainer);
        let trainers = Trainer::ALL.into_iter().filter(tried);
        let tables: Vec<String> = trainers.map(|trainer| self.table(trainer)).collect();
        tables.join("\n")
    }

    fn table(&self, trainer: Trainer) -> String {
        let name = trainer.anchor_name();
        let learning_rates = trainer.learning_rates();
        let mut text = format!("| arm | {name} |");
        for lr in learning_rates {
            let _ = write!(text, " lr {lr:e} |");
        }
        text.push_str("\n|---|---|");
        text.push_str(&"---|".repeat(learning_rates.len()));
        text.push('\n');
        for arm in TrainerArm::all().filter(|arm| arm.trainer == trainer) {
            let best = self.best(arm);
            for &anchor in trainer.anchors() {
                let _ = write!(text, "| {} | {anchor} |", arm.key());
                for lr in learning_rates {
                    let settings = TrainerSettings { lr, anchor };
                    let mut rows = self.rows.iter();
                    let row = rows.find(|row| row.arm == arm && row.settings == settings);
                    let value = row.map_or("–".to_owned(), |row| format!("{:.3}", row.mean()));
                    let _ = match row.is_some() && best == row {
                        true => write!(text, " **{value}** |"),
                        false => write!(text, " {value} |"),
                    };
                }
                text.push('\n');
            }
        }
        text
    }
}

impl TrainersGridRow {
    /// The mean over seeds.
    pub fn mean(&self) -> f64 {
        mean(&self.exact).unwrap_or(0.0)
    }
}
