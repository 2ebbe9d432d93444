//! What the commands that run a study share: where the report goes, and how it is written and shown.

use std::path::Path;
use std::time::Instant;

use pivotal_core::{check_writable, write_atomic};
use pivotal_report::{Colour, Report, Study};

use crate::failure::Failure;
use crate::machine;
use crate::output::{print_line, tell};

/// What is written to the directory of a study.
const REPORTS: [&str; 3] = ["study.json", "report.md", "report.html"];

/// Refuses a directory that exists, unless its reports may be replaced, and a place where none can be written.
pub(crate) fn check_out(out: &Path, overwrite: bool) -> Result<(), Failure> {
    let name = out.display();
    if out.exists() && !out.is_dir() {
        return Err(Failure::input(format!(
            "`{name}` is no directory: give another `--out`"
        )));
    }
    if out.exists() && !overwrite {
        return Err(Failure::input(format!(
            "`{name}` exists: give `--overwrite` to replace its reports, or another `--out`"
        )));
    }
    let missing = |path: &&Path| !path.as_os_str().is_empty() && !path.exists();
    match out.ancestors().take_while(missing).last() {
        Some(first) => check_writable(first)?,
        None => {
            for report in REPORTS {
                check_writable(&out.join(report))?;
            }
        }
    }
    Ok(())
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
    let texts = [study.to_json()?, report.markdown(), report.html()?];
    for (name, text) in REPORTS.into_iter().zip(texts) {
        write_atomic(&directory.join(name), text.as_bytes())?;
    }
    print_line(&report.terminal(Colour::Never))?;
    print_line(&format!(
        "in {:.0} s; the report with pictures: {out}/report.html",
        begin.elapsed().as_secs_f64()
    ))
}
