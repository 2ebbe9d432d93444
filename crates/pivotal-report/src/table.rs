//! A table of text, laid out for a terminal or as Markdown.

use crate::text::{line, width, wrap};

/// Cells of text: the first column names the row and is set left, the others are set right.
pub(crate) struct Table {
    /// Headings, one a column; `\n` forces a line break.
    pub(crate) header: Vec<String>,
    /// Rows, one cell a column.
    pub(crate) rows: Vec<Vec<String>>,
}

const GAP: usize = 2;
const WIDEST_NAME: usize = 44;

impl Table {
    /// Plain text of at most `limit` cells a line: columns that do not fit go to a further block under the same names.
    pub(crate) fn text(&self, limit: usize) -> Vec<String> {
        let names = self.rows.iter().chain([&self.header]);
        let widest = names.map(|row| width(&row[0]));
        let name_width = widest.max().unwrap_or(0).min(WIDEST_NAME);
        let widths: Vec<usize> = (1..self.header.len())
            .map(|column| self.width(column))
            .collect();
        let mut lines = Vec::new();
        let mut first = 0;
        while first < widths.len() {
            let mut last = first + 1;
            let mut used = name_width + GAP + widths[first];
            while last < widths.len() && used + GAP + widths[last] <= limit {
                used += GAP + widths[last];
                last += 1;
            }
            if first > 0 {
                lines.push(String::new());
            }
            self.block(name_width, first..last, &widths, &mut lines);
            first = last;
        }
        lines
    }

    fn width(&self, column: usize) -> usize {
        let cells = self.rows.iter().map(|row| width(&row[column]));
        let words = self.header[column].split_ascii_whitespace().map(width);
        cells.chain(words).max().unwrap_or(0)
    }

    fn block(
        &self,
        name_width: usize,
        columns: std::ops::Range<usize>,
        widths: &[usize],
        lines: &mut Vec<String>,
    ) {
        let heading = |column: usize| -> Vec<String> {
            let parts = self.header[column + 1].split('\n');
            parts.flat_map(|part| wrap(part, widths[column])).collect()
        };
        let headings: Vec<Vec<String>> = columns.clone().map(heading).collect();
        let height = headings.iter().map(Vec::len).max().unwrap_or(1);
        for index in 0..height {
            // Headings stand on the rule: the short ones begin lower.
            let part = |heading: &Vec<String>| {
                let missing = height - heading.len();
                index
                    .checked_sub(missing)
                    .map_or(String::new(), |i| heading[i].clone())
            };
            let name = match index + 1 == height {
                true => self.header[0].as_str(),
                false => "",
            };
            let cells = headings.iter().map(part);
            lines.push(row(name, name_width, cells.zip(&widths[columns.clone()])));
        }
        let rules = columns.clone().map(|column| "-".repeat(widths[column]));
        let rule = "-".repeat(name_width);
        lines.push(row(&rule, name_width, rules.zip(&widths[columns.clone()])));
        for cells in &self.rows {
            let names = wrap(&cells[0], name_width);
            for (index, name) in names.iter().enumerate() {
                let shown = columns.clone().map(|column| match index {
                    0 => cells[column + 1].clone(),
                    _ => String::new(),
                });
                lines.push(row(name, name_width, shown.zip(&widths[columns.clone()])));
            }
        }
    }

    /// A Markdown table.
    pub(crate) fn markdown(&self) -> String {
        let row = |cells: &[String]| {
            let cells: Vec<String> = cells.iter().map(|cell| markdown(cell)).collect();
            format!("| {} |\n", cells.join(" | "))
        };
        let mut rules = vec!["---"; self.header.len().min(1)];
        rules.resize(self.header.len(), "---:");
        let mut text = row(&self.header) + &format!("| {} |\n", rules.join(" | "));
        text.extend(self.rows.iter().map(|cells| row(cells)));
        text
    }
}

fn row<'a>(
    name: &str,
    name_width: usize,
    cells: impl Iterator<Item = (String, &'a usize)>,
) -> String {
    let mut text = format!(
        "{name}{}",
        " ".repeat(name_width.saturating_sub(width(name)))
    );
    for (cell, &cell_width) in cells {
        text.push_str(&" ".repeat(GAP + cell_width.saturating_sub(width(&cell))));
        text.push_str(&cell);
    }
    text.truncate(text.trim_end().len());
    text
}

/// `text` on one line with what Markdown or its HTML would act on made literal.
pub(crate) fn markdown(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for character in line(text).chars() {
        match character {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '\\' | '|' | '`' | '*' | '_' | '~' | '[' | ']' | '#' => {
                escaped.push('\\');
                escaped.push(character);
            }
            _ => escaped.push(character),
        }
    }
    escaped
}
