//! The report as Markdown.

use crate::number::count;
use crate::report::Report;
use crate::sentences::{cell_legend, difference, summary, verdict};
use crate::table::{Table, markdown};
use crate::text::block;

impl Report<'_> {
    /// Title, summary, table of the arms, comparisons, signals, notes and how to repeat it, as Markdown.
    pub fn markdown(&self) -> String {
        let study = self.study;
        let mut parts = vec![format!("# {}", markdown(&study.title))];
        if !study.question.is_empty() {
            parts.push(markdown(&study.question));
        }
        let summary = summary(study, &self.analysis);
        parts.extend(summary.iter().map(|sentence| markdown(sentence)));
        parts.push("## Arms".into());
        parts.push(self.markdown_table());
        parts.push(list(study.arms.iter().map(|arm| {
            let settings = arm
                .settings
                .iter()
                .map(|(name, value)| format!("{name} {value}"));
            let settings = settings.collect::<Vec<_>>().join(", ");
            let mut text = format!("**{}** ({}).", markdown(&arm.label), arm.role.name());
            for (lead, detail) in [
                ("", &arm.description),
                ("Settings: ", &settings),
                ("Extra cost: ", &arm.extra_cost),
            ] {
                if !detail.is_empty() {
                    text.push_str(&format!(
                        " {lead}{}.",
                        markdown(detail.trim_end_matches('.'))
                    ));
                }
            }
            text
        })));
        if !self.analysis.comparisons.is_empty() {
            parts.push("## Comparisons".into());
            parts.push(self.comparison_table().markdown());
        }
        if let Some(table) = self.signal_table() {
            parts.push("## Signals as token credit".into());
            parts.push(table.markdown());
        }
        if !study.notes.is_empty() {
            parts.push("## Notes".into());
            parts.push(list(study.notes.iter().map(|note| markdown(note))));
        }
        parts.push("## How it was run".into());
        parts.push(fence(&study.command));
        let versions = study
            .versions
            .iter()
            .map(|(name, version)| format!("{name} {version}"));
        let seeds: Vec<String> = study.seeds.iter().map(u64::to_string).collect();
        let facts = [study.machine.clone(), study.date.clone()]
            .into_iter()
            .chain(versions)
            .chain([format!(
                "{} {}",
                count(seeds.len(), "seed"),
                seeds.join(", ")
            )])
            .filter(|fact| !fact.is_empty());
        parts.push(list(facts.map(|fact| markdown(&fact))));
        parts.join("\n\n").replace("\n\n\n", "\n\n") + "\n"
    }

    /// The table of the arms alone, with what its marks mean, as Markdown.
    pub fn markdown_table(&self) -> String {
        let seeds = count(self.study.seeds.len(), "seed");
        let legend = cell_legend(&self.analysis.arms).join("; ");
        format!("{}\n{seeds}; {legend}.\n", self.arm_table().markdown())
    }

    fn comparison_table(&self) -> Table {
        let study = self.study;
        let label = |key: &str| {
            study
                .arm(key)
                .map_or(String::new(), |arm| arm.label.clone())
        };
        let header = [
            "Arm",
            "Against",
            "Metric",
            "Difference [95 % interval]",
            "Verdict",
        ];
        let row = |result: &crate::ComparisonResult| {
            let metric = study.metric(&result.comparison.metric)?;
            Some(vec![
                label(&result.comparison.arm),
                label(&result.comparison.against),
                metric.name(),
                difference(result, metric),
                verdict(result),
            ])
        };
        Table {
            header: header.map(String::from).to_vec(),
            rows: self.analysis.comparisons.iter().filter_map(row).collect(),
        }
    }
}

fn list(items: impl Iterator<Item = String>) -> String {
    items
        .map(|item| format!("- {item}"))
        .collect::<Vec<_>>()
        .join("\n")
}

/// A code block whose fence is longer than any run of backticks inside.
fn fence(code: &str) -> String {
    let code = block(code);
    let longest = code.split(|character| character != '`').map(str::len).max();
    let fence = "`".repeat(longest.unwrap_or(0).max(2) + 1);
    format!("{fence}text\n{code}\n{fence}")
}
