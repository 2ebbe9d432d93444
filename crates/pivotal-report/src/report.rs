//! A study, checked and analysed, ready to be shown.

use crate::number::unit;
use crate::sentences::cell;
use crate::table::Table;
use crate::{Analysis, Better, Error, Estimate, Metric, Study};

/// A study with its analysis; every view is made from this.
#[derive(Clone, Debug)]
pub struct Report<'a> {
    pub(crate) study: &'a Study,
    pub(crate) analysis: Analysis,
}

impl<'a> Report<'a> {
    /// Checks and analyses a study.
    ///
    /// # Errors
    /// As [`Study::validate`].
    pub fn new(study: &'a Study) -> Result<Self, Error> {
        study.validate()?;
        Ok(Self {
            study,
            analysis: Analysis::of(study),
        })
    }

    /// The study.
    pub fn study(&self) -> &Study {
        self.study
    }

    /// The estimates and the comparisons' results.
    pub fn analysis(&self) -> &Analysis {
        &self.analysis
    }

    /// The study in sentences: what the arms reached on the headline metric, how many comparisons hold, then each.
    pub fn sentences(&self) -> Vec<String> {
        let mut sentences = crate::sentences::summary(self.study, &self.analysis);
        let comparison = |result| crate::sentences::comparison(self.study, result);
        sentences.extend(self.analysis.comparisons.iter().map(comparison));
        sentences
    }

    pub(crate) fn arm_table(&self) -> Table {
        let names = self.study.arms.iter().map(|arm| arm.label.as_str());
        table("Arm", &self.study.metrics, names, &self.analysis.arms)
    }

    pub(crate) fn signal_table(&self) -> Option<Table> {
        if self.study.signals.is_empty() {
            return None;
        }
        let names = self.study.signals.iter().map(|row| row.label.as_str());
        let metrics = &self.study.signal_metrics;
        Some(table("Signal", metrics, names, &self.analysis.signals))
    }
}

fn table<'a>(
    first: &str,
    metrics: &[Metric],
    names: impl Iterator<Item = &'a str>,
    estimates: &[Vec<Estimate>],
) -> Table {
    let header = [first.to_owned()]
        .into_iter()
        .chain(metrics.iter().map(heading));
    let row = |(name, estimates): (&str, &Vec<Estimate>)| {
        let cells = metrics.iter().zip(estimates);
        let cells = cells.map(|(metric, estimate)| cell(estimate, metric));
        [crate::text::line(name)].into_iter().chain(cells).collect()
    };
    Table {
        header: header.collect(),
        rows: names.zip(estimates).map(row).collect(),
    }
}

/// Label, unit and direction, then the split; the arrow never begins a line.
fn heading(metric: &Metric) -> String {
    let unit = match metric.unit.is_empty() {
        true => String::new(),
        false => format!(",{}", unit(metric)),
    };
    let arrow = match metric.better {
        Better::Higher => "\u{A0}↑",
        Better::Lower => "\u{A0}↓",
        Better::Neither => "",
    };
    let split = match metric.split.is_empty() {
        true => String::new(),
        false => format!("\n{}", crate::text::line(&metric.split)),
    };
    format!("{}{unit}{arrow}{split}", crate::text::line(&metric.label))
}
