//! What the commands that run a study share: where the report goes, and how it is written and shown.

use std::path::Path;
use std::time::Instant;

use pivotal_core::write_atomic;
use pivotal_report::{Colour, Report, Study};

use crate::failure::Failure;
use crate::machine;
use crate::output::{print_line, tell};

/// Refuses a directory that exists, unless its reports may be replaced.
pub(crate) fn check_out(out: &Path, overwrite: bool) -> Result<(), Failure> {
    match out.exists() && !overwrite {
        true => Err(Failure::input(format!(
            "`{}` exists: give `--overwrite` to replace its reports, or another `--out`",
            out.display()
        ))),
        false => Ok(()),
    }
}

/// Runs a study with its progress on standard error, writes `study.json`, `report.md` and `report.html`, and prints it.
pub(crate) fn run(
    directory: &Path,
    study: impl FnOnce(&mut dyn FnMut(&str)) -> pivotal_lab::Result<Study>,
) -> Result<(), Failure> {
    let out = directory.display();
    let begin = Instant::now();
    let mut study = study(&mut |line| {
        tell(&format!("{:6.1} s  {line}", begin.elapsed().as_secs_f64()));
    })?;
    study.machine = machine::description();
    study.date = machine::today();
    study
        .versions
        .insert("pivotal".into(), env!("CARGO_PKG_VERSION").into());
    let report = Report::new(&study)?;
    std::fs::create_dir_all(directory)
        .map_err(|error| Failure::system(&format!("could not make `{out}`: {error}")))?;
    write_atomic(&directory.join("study.json"), study.to_json()?.as_bytes())?;
    write_atomic(&directory.join("report.md"), report.markdown().as_bytes())?;
    write_atomic(&directory.join("report.html"), report.html()?.as_bytes())?;
    print_line(&report.terminal(Colour::Never))?;
    print_line(&format!(
        "in {:.0} s; the report with pictures: {out}/report.html",
        begin.elapsed().as_secs_f64()
    ))
}
