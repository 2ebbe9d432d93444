//! Each arm's own small grid, on a split and on seeds that no report shows.

use std::fmt::Write as _;

use pivotal_core::statistics::mean;

use crate::arm::{ArmKind, ArmSettings};
use crate::error::Result;
use crate::experiment::{Experiment, Plan, Scale};
use crate::start_policy;
use crate::world::splits::Split;

/// Learning rates tried with every β.
pub const LEARNING_RATES: [f64; 4] = [5e-5, 1e-4, 2e-4, 4e-4];
/// Values of β tried with every learning rate.
pub const BETAS: [f64; 4] = [0.2, 0.5, 2.0, 5.0];

/// What to try.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GridSettings {
    /// Seeds of the pairs: not those of a report.
    pub seeds: Vec<u64>,
    /// Jobs at a time; the results do not depend on it.
    pub threads: usize,
}

impl Default for GridSettings {
    fn default() -> Self {
        Self {
            seeds: vec![101, 102],
            threads: 2,
        }
    }
}

/// One setting of one arm.
#[derive(Clone, Debug, PartialEq)]
pub struct GridRow {
    /// The arm.
    pub arm: ArmKind,
    /// The setting.
    pub settings: ArmSettings,
    /// The probability of the right response on the tuning split, a seed each.
    pub exact: Vec<f64>,
}

/// Every setting tried.
#[derive(Clone, Debug, PartialEq)]
pub struct GridResult {
    /// What was tried with.
    pub settings: GridSettings,
    /// The start policy's score on the tuning split.
    pub start: f64,
    /// Arm by arm.
    pub rows: Vec<GridRow>,
}

/// The arms that are tuned: `Disagree` takes the setting of the arm that it inverts.
pub fn tuned_arms() -> impl Iterator<Item = ArmKind> {
    ArmKind::ALL
        .into_iter()
        .filter(|&arm| arm != ArmKind::Disagree)
}

/// Trains every arm at every setting and scores it on the tuning split; `progress` gets a line a job.
///
/// The oracle is the unmasked arm at its recorded setting; if that is not the grid's best, record the best and run again.
///
/// # Errors
/// [`crate::Error::Setting`] for no seed or no thread; [`crate::Error::Train`] for a loss that is not finite.
pub fn grid(settings: &GridSettings, progress: &mut dyn FnMut(&str)) -> Result<GridResult> {
    let start = start_policy::embedded()?;
    let experiment = Experiment::new(start, Scale::FULL, settings.threads, &settings.seeds)?;
    let sets = experiment.evaluation_sets(&[Split::Tuning], progress)?;
    let evaluation = [&sets[0].0];
    let pairs = experiment.pairs(&settings.seeds, progress)?;
    let signals = experiment.signals(&pairs, &evaluation, progress)?;
    let mut plans = Vec::new();
    for arm in tuned_arms() {
        for lr in LEARNING_RATES {
            for beta in BETAS {
                for (pairs, signals) in pairs.iter().zip(signals.chunks_exact(2)) {
                    plans.push(Plan {
                        kind: arm,
                        settings: ArmSettings { lr, beta },
                        pairs,
                        signal: &signals[usize::from(arm == ArmKind::Level)].0.signal,
                    });
                }
            }
        }
    }
    let tried: Vec<(ArmKind, ArmSettings)> = plans.iter().map(|p| (p.kind, p.settings)).collect();
    let runs = experiment.arms(plans, &evaluation, progress)?;
    let seeds = settings.seeds.len();
    let rows = tried.chunks(seeds).zip(runs.chunks(seeds));
    Ok(GridResult {
        settings: settings.clone(),
        start: sets[0].1.exact,
        rows: rows
            .map(|(tried, runs)| GridRow {
                arm: tried[0].0,
                settings: tried[0].1,
                exact: runs.iter().map(|run| run.splits[0].exact).collect(),
            })
            .collect(),
    })
}

impl GridResult {
    /// The best setting of an arm by the mean over seeds; the first of equals.
    pub fn best(&self, arm: ArmKind) -> Option<&GridRow> {
        let rows = self.rows.iter().filter(|row| row.arm == arm);
        rows.fold(None, |best: Option<&GridRow>, row| match best {
            Some(best) if best.mean() >= row.mean() => Some(best),
            _ => Some(row),
        })
    }

    /// The grid as Markdown: a row an arm and learning rate, a column a β, the best of each arm in bold.
    pub fn to_markdown(&self) -> String {
        let mut text = String::from("| arm | lr |");
        for beta in BETAS {
            let _ = write!(text, " beta {beta} |");
        }
        text.push_str("\n|---|---|");
        text.push_str(&"---|".repeat(BETAS.len()));
        text.push('\n');
        for arm in tuned_arms() {
            let best = self.best(arm);
            for lr in LEARNING_RATES {
                let _ = write!(text, "| {} | {lr:e} |", arm.key());
                for beta in BETAS {
                    let settings = ArmSettings { lr, beta };
                    let row = self
                        .rows
                        .iter()
                        .find(|row| row.arm == arm && row.settings == settings);
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

impl GridRow {
    /// The mean over seeds.
    pub fn mean(&self) -> f64 {
        mean(&self.exact).unwrap_or(0.0)
    }
}
