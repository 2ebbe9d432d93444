//! One response token by token: the signal as a bar around the baseline, the segment, the mask and the truth.

use std::fmt::Write;

use pivotal_core::{CreditRecord, SegmentRecord, Side, Sign};
use serde::Serialize;

use crate::SignalPair;
use crate::number::{compact, count};
use crate::text::{Blanks, token};

const BLANKS: Blanks = Blanks {
    space: "\u{A0}",
    lone_space: "␣",
    line_break: "↵",
    tab: "⇥",
    nothing: "∅",
};

/// Height of a token's bar in the units of its picture.
const HEIGHT: f32 = 48.0;

/// A response as the page shows it.
#[derive(Serialize)]
pub(crate) struct Strip {
    side: &'static str,
    label: String,
    facts: String,
    has_truth: bool,
    tokens: Vec<Cell>,
}

#[derive(Serialize)]
struct Cell {
    text: String,
    title: String,
    kept: bool,
    wrong: bool,
    pivot: bool,
    sign: &'static str,
    glyph: &'static str,
    ends_line: bool,
    bar: String,
}

/// What both responses of a pair share: the vertical scale.
struct Scale {
    low: f32,
    high: f32,
}

impl Scale {
    fn of(records: [&CreditRecord; 2]) -> Self {
        let (mut low, mut high) = (f32::INFINITY, f32::NEG_INFINITY);
        for record in records {
            for &value in &record.signal {
                (low, high) = (low.min(value), high.max(value));
            }
            for &value in &record.baseline {
                low = low.min(value - record.offset);
                high = high.max(value + record.offset);
            }
        }
        if low > high {
            (low, high) = (0.0, 0.0);
        }
        if high - low <= f32::EPSILON * high.abs().max(1.0) {
            (low, high) = (low - 1.0, high + 1.0);
        }
        Self { low, high }
    }

    /// Distance from the top; the extremes keep a margin so that they are seen whole.
    fn y(&self, value: f32) -> f32 {
        let share = (self.high - value) / (self.high - self.low);
        2.0 + (HEIGHT - 4.0) * share
    }
}

/// Both responses of a pair on one scale.
pub(crate) fn strips(pair: &SignalPair) -> [Strip; 2] {
    let scale = Scale::of([&pair.chosen, &pair.rejected]);
    [
        strip(&pair.chosen, Side::Chosen, &scale),
        strip(&pair.rejected, Side::Rejected, &scale),
    ]
}

fn strip(record: &CreditRecord, side: Side, scale: &Scale) -> Strip {
    let side = match side {
        Side::Chosen => "Chosen",
        Side::Rejected => "Rejected",
    };
    let tokens = record.token_ids.len();
    let kept = record.keep.iter().filter(|&&keep| keep).count();
    let mut facts = format!(
        "{} in {}, {kept} kept; response sign {}; {}; vertical scale {} to {}",
        count(tokens, "token"),
        count(record.segments.len(), "segment"),
        glyph(record.sequence_sign),
        thresholds(record),
        compact(scale.low),
        compact(scale.high),
    );
    if let Some(truth) = &record.truth {
        let wrong = truth.iter().filter(|&&right| !right).count();
        let kept = truth
            .iter()
            .zip(&record.keep)
            .filter(|&(&right, &keep)| !right && keep);
        // Writing to a string cannot fail.
        let _ = write!(
            facts,
            "; {}, {} of them kept",
            count(wrong, "wrong token"),
            kept.count()
        );
    }
    let segments = record.segments.iter();
    let cells = segments.flat_map(|segment| {
        (segment.start..segment.end).map(move |index| cell(record, segment, index, scale))
    });
    Strip {
        side,
        label: format!("{side} response, {}", count(tokens, "token")),
        facts,
        has_truth: record.truth.is_some(),
        tokens: cells.collect(),
    }
}

/// `b = 0, δ = 0.25`; a baseline that depends on the position by its range.
pub(crate) fn thresholds(record: &CreditRecord) -> String {
    let baseline = match record.baseline.as_slice() {
        [baseline] => format!("b = {}", compact(*baseline)),
        many => {
            let low = many.iter().copied().fold(f32::INFINITY, f32::min);
            let high = many.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            format!("b = {} to {} by position", compact(low), compact(high))
        }
    };
    format!("{baseline}, δ = {}", compact(record.offset))
}

/// The baseline of one token.
pub(crate) fn baseline(record: &CreditRecord, index: usize) -> f32 {
    match record.baseline.as_slice() {
        [baseline] => *baseline,
        many => many[index],
    }
}

/// A sign as a character.
pub(crate) const fn glyph(sign: Sign) -> &'static str {
    match sign {
        Sign::Positive => "+",
        Sign::Negative => "−",
        Sign::Neutral => "0",
    }
}

const fn class(sign: Sign) -> &'static str {
    match sign {
        Sign::Positive => "positive",
        Sign::Negative => "negative",
        Sign::Neutral => "neutral",
    }
}

fn cell(record: &CreditRecord, segment: &SegmentRecord, index: usize, scale: &Scale) -> Cell {
    let raw = &record.token_texts[index];
    let kept = record.keep[index];
    let wrong = record.truth.as_ref().is_some_and(|truth| !truth[index]);
    let text = token(raw, &BLANKS);
    let mut title = format!(
        "token {} “{}” (id {})\n{} {}\nsegment {} to {}, sign {}, score {}\n{}",
        index + 1,
        text,
        record.token_ids[index],
        record.signal_name,
        compact(record.signal[index]),
        segment.start + 1,
        segment.end,
        glyph(segment.sign),
        compact(segment.score),
        match kept {
            true => "kept",
            false => "dropped",
        }
    );
    if let Some(truth) = &record.truth {
        title.push_str(match truth[index] {
            true => ", right",
            false => ", wrong",
        });
    }
    Cell {
        text,
        title,
        kept,
        wrong,
        pivot: index == segment.start,
        sign: class(segment.sign),
        glyph: glyph(segment.sign),
        ends_line: raw.ends_with('\n') && index + 1 < record.token_ids.len(),
        bar: bar(record, index, scale),
    }
}

fn bar(record: &CreditRecord, index: usize, scale: &Scale) -> String {
    let (value, zero) = (record.signal[index], baseline(record, index));
    let (top, bottom) = (scale.y(value.max(zero)), scale.y(value.min(zero)));
    let band = (scale.y(zero + record.offset), scale.y(zero - record.offset));
    let side = class(Sign::of(value, zero, record.offset));
    format!(
        "<svg viewBox=\"0 0 10 {HEIGHT}\" preserveAspectRatio=\"none\" aria-hidden=\"true\">\
         <rect class=\"band\" x=\"0\" y=\"{:.1}\" width=\"10\" height=\"{:.1}\"/>\
         <rect class=\"bar {side}\" x=\"1.5\" y=\"{top:.1}\" width=\"7\" height=\"{:.1}\"/>\
         <line class=\"base\" x1=\"0\" x2=\"10\" y1=\"{zero:.1}\" y2=\"{zero:.1}\"/></svg>",
        band.0,
        band.1 - band.0,
        // A signal at its baseline still leaves a mark.
        (bottom - top).max(0.8),
        zero = scale.y(zero),
    )
}
