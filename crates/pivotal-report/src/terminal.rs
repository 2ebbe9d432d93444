//! The report as plain text, at most 120 columns wide.

use crate::number::count;
use crate::report::Report;
use crate::sentences::{cell_legend, comparison, summary};
use crate::text::{line, wrap};

const COLUMNS: usize = 120;

/// Whether terminal views carry colour.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Colour {
    /// Plain text: for files, pipes and logs.
    #[default]
    Never,
    /// ANSI escape codes: bold titles, significant differences set apart.
    Ansi,
}

impl Colour {
    fn paint(self, code: &str, text: &str) -> String {
        match self {
            Self::Never => text.into(),
            Self::Ansi => format!("\u{1b}[{code}m{text}\u{1b}[0m"),
        }
    }
}

impl Report<'_> {
    /// Summary, table of the arms, comparisons, signals and notes as text.
    pub fn terminal(&self, colour: Colour) -> String {
        let study = self.study;
        let mut lines = Vec::new();
        for part in wrap(&line(&study.title), COLUMNS) {
            lines.push(colour.paint("1", &part));
        }
        for sentence in summary(study, &self.analysis) {
            bullet(&sentence, "", &mut lines);
        }
        lines.push(String::new());
        lines.extend(self.arm_lines());
        if !self.analysis.comparisons.is_empty() {
            lines.push(String::new());
            lines.push(colour.paint("1", "Comparisons"));
        }
        for result in &self.analysis.comparisons {
            let start = lines.len();
            bullet(&comparison(study, result), "- ", &mut lines);
            if result.outcome.significant() {
                for text in &mut lines[start..] {
                    *text = colour.paint("36", text);
                }
            }
        }
        if let Some(table) = self.signal_table() {
            lines.push(String::new());
            lines.push(colour.paint("1", "Signals as token credit"));
            lines.extend(table.text(COLUMNS));
        }
        if !study.notes.is_empty() {
            lines.push(String::new());
            lines.push(colour.paint("1", "Notes"));
        }
        for note in &study.notes {
            bullet(note, "- ", &mut lines);
        }
        lines.join("\n") + "\n"
    }

    /// The table of the arms alone, with what its marks mean, as plain text.
    pub fn terminal_table(&self) -> String {
        self.arm_lines().join("\n") + "\n"
    }

    fn arm_lines(&self) -> Vec<String> {
        let mut lines = self.arm_table().text(COLUMNS);
        let seeds = count(self.study.seeds.len(), "seed");
        lines.push(String::new());
        let legend = cell_legend(&self.analysis.arms).join("; ");
        bullet(&format!("{seeds}; {legend}"), "", &mut lines);
        lines
    }
}

fn bullet(text: &str, mark: &str, lines: &mut Vec<String>) {
    let indent = mark.chars().count();
    for (index, part) in wrap(&line(text), COLUMNS - indent).iter().enumerate() {
        let lead = match index {
            0 => mark.to_owned(),
            _ => " ".repeat(indent),
        };
        lines.push(lead + part);
    }
}
