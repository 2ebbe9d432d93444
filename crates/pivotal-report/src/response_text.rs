//! Responses as text: tokens with their signal, segments, mask and truth in aligned lines.

use pivotal_core::{CreditRecord, Side, Sign};

use crate::number::{compact, count};
use crate::text::{Blanks, line, token, width};
use crate::token_strip::{glyph, thresholds};

/// The characters of a text view.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Glyphs {
    /// Block elements and box drawing.
    #[default]
    Unicode,
    /// Nothing beyond ASCII, the tokens' own text included: what is not ASCII is shown as `?`.
    Ascii,
}

impl Glyphs {
    const fn blanks(self) -> Blanks {
        match self {
            Self::Unicode => Blanks {
                space: "·",
                lone_space: "·",
                line_break: "↵",
                tab: "⇥",
                nothing: "∅",
            },
            Self::Ascii => Blanks {
                space: "_",
                lone_space: "_",
                line_break: "\\n",
                tab: "\\t",
                nothing: "~",
            },
        }
    }

    /// Levels of a bar, low to high.
    const fn levels(self) -> &'static [&'static str] {
        match self {
            Self::Unicode => &["▁", "▂", "▃", "▄", "▅", "▆", "▇", "█"],
            Self::Ascii => &["0", "1", "2", "3", "4", "5", "6", "7", "8", "9"],
        }
    }

    const fn fill(self) -> &'static str {
        match self {
            Self::Unicode => "─",
            Self::Ascii => "=",
        }
    }

    /// `text` within the character set.
    fn fit(self, text: &str) -> String {
        match self {
            Self::Unicode => text.into(),
            Self::Ascii => {
                let text = text.replace('−', "-").replace('δ', "delta");
                let fit = |character: char| if character.is_ascii() { character } else { '?' };
                text.chars().map(fit).collect()
            }
        }
    }
}

const MARGIN: usize = 9;

/// One response as text of at most `columns` cells a line: a line of facts, then blocks of aligned lines.
///
/// `signal` is a level between the response's lowest and highest value; `segment` has the sign of each segment at its
/// pivot; `keep` has `^` under each token kept; `wrong` has `x` under each token that is wrong, where the truth is known.
///
/// The record should be one that [`CreditRecord::validate`] accepts; of columns that differ in length only what all of
/// them have is shown.
pub fn render_response(record: &CreditRecord, glyphs: Glyphs, columns: usize) -> String {
    let tokens = record.token_ids.len();
    let side = match record.side {
        Some(Side::Chosen) => " chosen,",
        Some(Side::Rejected) => " rejected,",
        None => "",
    };
    let kept = record.keep.iter().filter(|&&keep| keep).count();
    let facts = format!(
        "sample {},{side} sign {}: {} in {}, {kept} kept; {} with {}",
        record.id,
        glyph(record.sequence_sign),
        count(tokens, "token"),
        count(record.segments.len(), "segment"),
        line(&record.signal_name),
        thresholds(record),
    );
    let mut text = glyphs.fit(&facts) + "\n";
    let range = record
        .signal
        .iter()
        .fold(None, |range: Option<(f32, f32)>, &value| {
            let (low, high) = range.unwrap_or((value, value));
            Some((low.min(value), high.max(value)))
        });
    if let Some((low, high)) = range {
        let levels = glyphs.levels();
        let facts = format!(
            "signal from {} ({}) to {} ({})\n",
            compact(low),
            levels[0],
            compact(high),
            levels[levels.len() - 1]
        );
        text.push_str(&glyphs.fit(&facts));
    }
    let cells = cells(record, glyphs, range.unwrap_or_default());
    let room = columns.saturating_sub(MARGIN).max(8);
    let mut block = Block::new(record.truth.is_some());
    for cell in cells {
        if block.width > 0 && block.width + cell.width > room {
            text.push_str(&block.text());
            block = Block::new(record.truth.is_some());
        }
        let ends_line = cell.ends_line;
        block.push(&cell);
        if ends_line {
            text.push_str(&block.text());
            block = Block::new(record.truth.is_some());
        }
    }
    text + &block.text()
}

/// Several responses, a blank line between them.
pub fn render_responses(records: &[CreditRecord], glyphs: Glyphs, columns: usize) -> String {
    let rendered = records
        .iter()
        .map(|record| render_response(record, glyphs, columns));
    rendered.collect::<Vec<_>>().join("\n")
}

/// A token's column of the view.
struct Cell {
    width: usize,
    token: String,
    level: &'static str,
    segment: String,
    keep: bool,
    wrong: bool,
    ends_line: bool,
}

fn cells(record: &CreditRecord, glyphs: Glyphs, (low, high): (f32, f32)) -> Vec<Cell> {
    let levels = glyphs.levels();
    let level = |value: f32| match high > low {
        true => {
            let share = (value - low) / (high - low);
            levels[((share * levels.len() as f32) as usize).min(levels.len() - 1)]
        }
        false => levels[levels.len() / 2],
    };
    let columns = record
        .token_texts
        .iter()
        .zip(&record.signal)
        .zip(&record.keep);
    let cell = |(index, ((raw, &value), &keep)): (usize, ((&String, &f32), &bool))| {
        let text = glyphs.fit(&token(raw, &glyphs.blanks()));
        // A token of combining marks alone still takes a column.
        let cells = width(&text).max(1);
        let segment = record
            .segments
            .iter()
            .find(|s| s.start <= index && index < s.end);
        let fill = |sign: Sign| match sign {
            Sign::Neutral => " ",
            Sign::Positive | Sign::Negative => glyphs.fill(),
        };
        let segment = match segment {
            Some(segment) if segment.start == index => {
                glyphs.fit(glyph(segment.sign)) + &fill(segment.sign).repeat(cells - 1)
            }
            Some(segment) => fill(segment.sign).repeat(cells),
            None => " ".repeat(cells),
        };
        let truth = record.truth.as_ref().and_then(|truth| truth.get(index));
        Cell {
            token: format!("{text}{}", " ".repeat(cells - width(&text))),
            width: cells,
            level: level(value),
            segment,
            keep,
            wrong: truth == Some(&false),
            ends_line: raw.ends_with('\n'),
        }
    };
    columns.enumerate().map(cell).collect()
}

/// Aligned lines as they grow to the right.
struct Block {
    width: usize,
    signal: String,
    segment: String,
    token: String,
    keep: String,
    wrong: Option<String>,
}

impl Block {
    fn new(truth: bool) -> Self {
        Self {
            width: 0,
            signal: String::new(),
            segment: String::new(),
            token: String::new(),
            keep: String::new(),
            wrong: truth.then(String::new),
        }
    }

    fn push(&mut self, cell: &Cell) {
        let mark = |set: bool, mark: &str| match set {
            true => mark.repeat(cell.width),
            false => " ".repeat(cell.width),
        };
        self.width += cell.width;
        self.signal.push_str(&cell.level.repeat(cell.width));
        self.segment.push_str(&cell.segment);
        self.token.push_str(&cell.token);
        self.keep.push_str(&mark(cell.keep, "^"));
        if let Some(wrong) = &mut self.wrong {
            wrong.push_str(&mark(cell.wrong, "x"));
        }
    }

    fn text(&self) -> String {
        if self.width == 0 {
            return String::new();
        }
        let lines = [
            ("signal", Some(&self.signal)),
            ("segment", Some(&self.segment)),
            ("token", Some(&self.token)),
            ("keep", Some(&self.keep)),
            ("wrong", self.wrong.as_ref()),
        ];
        let mut text = String::new();
        for (name, cells) in lines {
            if let Some(cells) = cells {
                text.push_str(format!("{name:MARGIN$}{cells}").trim_end());
                text.push('\n');
            }
        }
        text
    }
}
