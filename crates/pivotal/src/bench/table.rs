//! Outcomes as text.

use crate::bench::ceiling::Ceiling;
use crate::bench::outcome::Outcome;

const HEADER: [&str; 9] = [
    "measured",
    "tokens",
    "seconds",
    "pairs/s",
    "tokens/s",
    "GFLOP/s",
    "of ceiling",
    "attention",
    "peak",
];

/// A suite's outcomes: a table, then where the time of each went, then its own figures.
pub(crate) fn text(outcomes: &[Outcome], ceiling: Option<&Ceiling>) -> String {
    let mut lines = Vec::new();
    if let Some(ceiling) = ceiling {
        let bf16 = ceiling.bf16_gflops.map_or("no".to_owned(), round);
        let f32 = round(ceiling.f32_gflops);
        lines.push(format!(
            "ceiling of matrix products: {bf16} GFLOP/s in bf16, {f32} in f32"
        ));
    }
    let rows: Vec<[String; 9]> = outcomes.iter().map(row).collect();
    lines.extend(aligned(&rows));
    for outcome in outcomes.iter().filter(|outcome| !outcome.parts.is_empty()) {
        let part = |part: &crate::bench::outcome::PartTime| {
            format!("{} {:.1} %", part.name, 100.0 * part.share)
        };
        let parts: Vec<String> = outcome.parts.iter().map(part).collect();
        lines.push(format!("time of {}: {}", name(outcome), parts.join(", ")));
    }
    for outcome in outcomes {
        let mut figures = outcome.figures.clone();
        figures.extend(
            outcome
                .pairs_per_second_without_reference
                .map(|pairs| ("pairs_per_second_without_reference", pairs)),
        );
        if !figures.is_empty() {
            let figure = |(name, value): (&&str, &f64)| format!("{name} {}", round(*value));
            let figures: Vec<String> = figures.iter().map(figure).collect();
            lines.push(format!("{}: {}", name(outcome), figures.join(", ")));
        }
    }
    lines.join("\n") + "\n"
}

fn name(outcome: &Outcome) -> String {
    format!("{} {}", outcome.suite, outcome.variant)
}

fn row(outcome: &Outcome) -> [String; 9] {
    let absent = || "-".to_owned();
    let percent = |share: f64| format!("{:.1} %", 100.0 * share);
    let attention = outcome
        .model_flops_by_kind
        .map(|flops| flops.attention as f64 / flops.total() as f64);
    [
        name(outcome),
        outcome.tokens.to_string(),
        round(outcome.seconds),
        outcome.pairs_per_second.map_or_else(absent, round),
        round(outcome.tokens_per_second),
        outcome
            .model_flops
            .map_or_else(absent, |flops| round(flops as f64 / outcome.seconds / 1e9)),
        outcome.share_of_ceiling.map_or_else(absent, percent),
        attention.map_or_else(absent, percent),
        outcome
            .peak_bytes
            .map_or_else(absent, |bytes| format!("{:.2} GB", bytes as f64 / 1e9)),
    ]
}

/// Three significant digits, or all that stand before the point.
fn round(value: f64) -> String {
    let digits = match value.abs() {
        0.0 => 0,
        value => 2 - value.log10().floor() as i32,
    };
    match digits {
        ..=0 => format!("{value:.0}"),
        // A nanosecond is the last digit worth showing.
        _ => format!("{value:.*}", digits.min(9) as usize),
    }
}

/// The first column to the left, the others to the right.
fn aligned(rows: &[[String; 9]]) -> Vec<String> {
    let header = HEADER.map(str::to_owned);
    let all = || std::iter::once(&header).chain(rows);
    let width = |column: usize| all().map(|row| row[column].chars().count()).max();
    let widths: Vec<usize> = (0..HEADER.len()).filter_map(width).collect();
    let line = |row: &[String; 9]| {
        let mut text = format!("{:<1$}", row[0], widths[0]);
        for (cell, width) in row.iter().zip(&widths).skip(1) {
            text.push_str(&format!("  {cell:>width$}"));
        }
        text
    };
    all().map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_three_digits() {
        let cases = [
            (0.0, "0"),
            (0.000_123_4, "0.000123"),
            (1.234, "1.23"),
            (12.34, "12.3"),
            (999.6, "1000"),
            (123_456.7, "123457"),
            (1e-12, "0.000000000"),
        ];
        for (value, text) in cases {
            assert_eq!(round(value), text);
        }
    }
}
