//! `pivotal quickstart`: one command from nothing to a measured result and a report.

use std::path::PathBuf;

use clap::Args;
use pivotal_lab::{QuickstartSettings, quickstart};

use crate::failure::Failure;
use crate::machine;
use crate::studies;

/// `pivotal quickstart`.
#[derive(Args)]
pub(crate) struct Quickstart {
    /// Every stage at a fraction of its size: shows that it runs, and nothing about credit.
    #[arg(long, conflicts_with = "seeds")]
    smoke: bool,
    /// Seeds of the preference pairs and their order, with commas between.
    #[arg(long, value_delimiter = ',', default_values_t = [1, 2, 3])]
    seeds: Vec<u64>,
    /// The directory for `report.html`, `report.md` and `study.json`.
    #[arg(long, default_value = "runs/quickstart")]
    out: PathBuf,
    /// Replace the reports in an existing directory.
    #[arg(long)]
    overwrite: bool,
}

impl Quickstart {
    pub(crate) fn run(self, threads: usize) -> Result<(), Failure> {
        studies::check_out(&self.out, self.overwrite)?;
        let mut settings = match self.smoke {
            true => QuickstartSettings::smoke(),
            false => QuickstartSettings {
                seeds: self.seeds,
                ..QuickstartSettings::default()
            },
        };
        settings.threads = machine::threads(threads);
        studies::run(&self.out, |progress| quickstart(&settings, progress))
    }
}
