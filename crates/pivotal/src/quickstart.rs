//! `pivotal quickstart`: one command from nothing to a measured result and a report.

use std::path::PathBuf;
use std::time::Instant;

use clap::Args;
use pivotal_core::write_atomic;
use pivotal_lab::{QuickstartSettings, quickstart};
use pivotal_report::{Colour, Report};

use crate::failure::Failure;
use crate::machine;
use crate::output::print_line;

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
        let out = self.out.display();
        if self.out.exists() && !self.overwrite {
            return Err(Failure::input(format!(
                "`{out}` exists: give `--overwrite` to replace its reports, or another `--out`"
            )));
        }
        let mut settings = match self.smoke {
            true => QuickstartSettings::smoke(),
            false => QuickstartSettings {
                seeds: self.seeds,
                ..QuickstartSettings::default()
            },
        };
        settings.threads = machine::threads(threads);
        let begin = Instant::now();
        let mut study = quickstart(&settings, &mut |line| {
            eprintln!("{:6.1} s  {line}", begin.elapsed().as_secs_f64());
        })?;
        study.machine = machine::description();
        study.date = machine::today();
        study
            .versions
            .insert("pivotal".into(), env!("CARGO_PKG_VERSION").into());
        let report = Report::new(&study)?;
        std::fs::create_dir_all(&self.out)
            .map_err(|error| Failure::system(&format!("could not make `{out}`: {error}")))?;
        write_atomic(&self.out.join("study.json"), study.to_json()?.as_bytes())?;
        write_atomic(&self.out.join("report.md"), report.markdown().as_bytes())?;
        write_atomic(&self.out.join("report.html"), report.html()?.as_bytes())?;
        print_line(&report.terminal(Colour::Never))?;
        print_line(&format!(
            "in {:.0} s; the report with pictures: {out}/report.html",
            begin.elapsed().as_secs_f64()
        ))
    }
}
