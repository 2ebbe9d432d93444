//! A run drawn in a few lines: a panel with charts where there is room, a short list where there is little.

use std::time::Duration;

use ratatui::buffer::Buffer;
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Color, Style, Stylize};
use ratatui::symbols::{Marker, line};
use ratatui::text::{Line, Span};
use ratatui::widgets::{
    Axis, Block, BorderType, Chart, Dataset, GraphType, LineGauge, Padding, Sparkline, Widget,
};

use super::course::{Course, Trace};
use super::words::{self, PARTS};

/// Below this, a list without a border.
const PANEL: (u16, u16) = (56, 15);
/// From this on, charts with axes.
const TALL: u16 = 34;
/// Longer lines are no easier to read.
const WIDEST: u16 = 140;

/// Draws `course` at most `columns` wide and `rows` high.
pub(super) fn render(course: &Course, now: Duration, columns: u16, rows: u16) -> Buffer {
    let columns = columns.min(WIDEST);
    match columns >= PANEL.0 && rows >= PANEL.1 {
        true => panel(course, now, columns, rows),
        false => list(course, now, columns, rows),
    }
}

fn panel(course: &Course, now: Duration, columns: u16, rows: u16) -> Buffer {
    let inner = usize::from(columns) - 4;
    let numbers = wrap(numbers(course), inner, "  ");
    let (chart_rows, notice_rows) = if rows >= TALL { (10, 8) } else { (3, 4) };
    let charts = if course.loss.ends().is_some() {
        chart_rows
    } else {
        0
    };
    let shares = course.shares();
    let notices = notices(course, inner, notice_rows);
    let heights = [
        1,
        numbers.len() as u16,
        charts,
        u16::from(shares.is_some()),
        notices.len() as u16,
    ];
    let area = Rect::new(0, 0, columns, heights.iter().sum::<u16>() + 2);
    let mut frame = Buffer::empty(area);
    let block = Block::bordered()
        .border_type(BorderType::Rounded)
        .border_style(Color::DarkGray)
        .padding(Padding::horizontal(1))
        .title_top(Line::from(format!(" pivotal {} ", course.recipe).bold()))
        .title_top(Line::from(format!(" {} ", clock(course, now))).right_aligned());
    let within = block.inner(area);
    block.render(area, &mut frame);
    let [
        gauge_area,
        numbers_area,
        charts_area,
        shares_area,
        notices_area,
    ] = Layout::vertical(heights.map(Constraint::Length)).areas(within);
    gauge(course).render(gauge_area, &mut frame);
    lines(numbers, numbers_area, &mut frame);
    draw_charts(course, charts_area, &mut frame);
    if let Some(shares) = shares {
        draw_shares(shares, shares_area, &mut frame);
    }
    lines(notices, notices_area, &mut frame);
    frame
}

/// What matters most stands first: what does not fit is left out at the end.
fn list(course: &Course, now: Duration, columns: u16, rows: u16) -> Buffer {
    let width = usize::from(columns);
    let head = [
        course.recipe.bold(),
        words::position(course).into(),
        words::percent(course.done()).into(),
        clock(course, now).into(),
    ];
    let mut all = wrap(head.map(Line::from).to_vec(), width, " ");
    all.extend(wrap(numbers(course), width, " "));
    for (name, trace) in traces(course) {
        all.extend(one_row(name, trace, width));
    }
    if let Some(shares) = course.shares() {
        let part =
            |(name, share): (&&str, f64)| Line::from(format!("{name} {}", words::percent(share)));
        let parts = PARTS.iter().zip(shares).map(part).collect();
        all.extend(wrap(parts, width, " "));
    }
    let rows = usize::from(rows.min(9));
    all.extend(notices(course, width, rows.saturating_sub(all.len())));
    all.truncate(rows);
    let area = Rect::new(0, 0, columns, all.len() as u16);
    let mut frame = Buffer::empty(area);
    lines(all, area, &mut frame);
    frame
}

fn lines(lines: Vec<Line<'_>>, area: Rect, frame: &mut Buffer) {
    for (line, row) in lines.into_iter().zip(area.rows()) {
        line.render(row, frame);
    }
}

fn clock(course: &Course, now: Duration) -> String {
    let phase = course.phase.map(|phase| format!("{phase} · "));
    let eta = course
        .eta()
        .map(|eta| format!(" · eta {}", words::span(eta)));
    let text = |part: Option<String>| part.unwrap_or_default();
    format!("{}{}{}", text(phase), words::span(now), text(eta))
}

fn gauge(course: &Course) -> LineGauge<'static> {
    let label = format!(
        "{} · {}",
        words::position(course),
        words::percent(course.done())
    );
    LineGauge::default()
        .ratio(course.done())
        .label(label)
        .filled_symbol(line::THICK_HORIZONTAL)
        .unfilled_symbol(line::HORIZONTAL)
        .filled_style(Color::Cyan)
        .unfilled_style(Color::DarkGray)
}

fn numbers(course: &Course) -> Vec<Line<'static>> {
    let mut numbers: Vec<Line<'static>> = words::values(course)
        .into_iter()
        .map(|(label, value)| {
            let label = Span::styled(format!("{label} "), Color::DarkGray);
            Line::from(vec![label, value.bold()])
        })
        .collect();
    numbers.extend(words::speed(course).map(|speed| Line::from(speed.bold())));
    if numbers.is_empty() {
        numbers.push(Line::from(format!(
            "waiting for step {}",
            course.start() + 1
        )));
    }
    numbers
}

/// Puts parts on lines of at most `width` columns, in order.
fn wrap(parts: Vec<Line<'static>>, width: usize, gap: &'static str) -> Vec<Line<'static>> {
    let mut lines: Vec<Line<'static>> = Vec::new();
    for part in parts {
        match lines.last_mut() {
            Some(last) if last.width() + gap.len() + part.width() <= width => {
                last.spans.push(gap.into());
                last.spans.extend(part.spans);
            }
            _ => lines.push(part),
        }
    }
    lines
}

/// The warnings, the latest first, in at most `rows` lines: one that does not fit waits for room, except the first.
fn notices(course: &Course, width: usize, rows: usize) -> Vec<Line<'static>> {
    let mut notices: Vec<_> = course.notices.iter().collect();
    notices.sort_by_key(|notice| std::cmp::Reverse(notice.step));
    let mut lines: Vec<Line<'static>> = Vec::new();
    for notice in notices {
        let now = notice.step == course.step;
        let style = Style::from(if now { Color::Yellow } else { Color::DarkGray });
        let text = words::notice(notice);
        let words = text.split(' ').map(|word| Line::from(word.to_owned()));
        let wrapped = wrap(words.collect(), width, " ");
        if lines.is_empty() || lines.len() + wrapped.len() <= rows {
            lines.extend(wrapped.into_iter().map(|line| line.style(style)));
        }
    }
    lines.truncate(rows);
    lines
}

fn traces(course: &Course) -> impl Iterator<Item = (&'static str, &Trace)> {
    let scored = course
        .numbers
        .as_ref()
        .is_some_and(|numbers| numbers.score.is_some());
    let score = if scored { "score" } else { "accuracy" };
    let all = [("loss", &course.loss), (score, &course.score)];
    all.into_iter().filter(|(_, trace)| trace.ends().is_some())
}

fn draw_charts(course: &Course, area: Rect, frame: &mut Buffer) {
    let traces: Vec<_> = traces(course).collect();
    let areas = Layout::horizontal(vec![Constraint::Fill(1); traces.len()])
        .spacing(2)
        .split(area);
    for ((name, trace), &area) in traces.into_iter().zip(areas.iter()) {
        match area.height > 3 {
            true => chart(course, name, trace, area, frame),
            false => spark(name, trace, area, frame),
        }
    }
}

/// A name over its course in two rows.
fn spark(name: &str, trace: &Trace, area: Rect, frame: &mut Buffer) {
    let [head, body] = Layout::vertical([Constraint::Length(1), Constraint::Fill(1)]).areas(area);
    let (first, last) = trace.ends().unwrap_or_default();
    let from = Span::styled(
        format!("{name} {} → ", words::number(first)),
        Color::DarkGray,
    );
    Line::from(vec![from, words::number(last).bold()]).render(head, frame);
    let values = trace.columns(usize::from(body.width));
    let levels = 8 * u64::from(body.height);
    Sparkline::default()
        .data(heights(&values, levels))
        .max(levels)
        .style(Color::Green)
        .render(body, frame);
}

/// A name and its course in one row, in block characters of eight heights.
fn one_row(name: &str, trace: &Trace, width: usize) -> Option<Line<'static>> {
    const BARS: [&str; 8] = ["▁", "▂", "▃", "▄", "▅", "▆", "▇", "█"];
    let columns = width
        .checked_sub(name.len() + 1)
        .filter(|&columns| columns > 3)?;
    let heights = heights(&trace.columns(columns), BARS.len() as u64);
    let bars: String = heights
        .iter()
        .map(|&height| BARS[height as usize - 1])
        .collect();
    let name = Span::styled(format!("{name} "), Color::DarkGray);
    Some(Line::from(vec![name, Span::styled(bars, Color::Green)]))
}

/// Values as heights from 1 to `levels`, the lowest and the highest at the ends; the middle if all are alike.
fn heights(values: &[f64], levels: u64) -> Vec<u64> {
    let (low, high) = bounds(values);
    let height = |&value: &f64| match high > low {
        true => 1 + ((value - low) / (high - low) * (levels - 1) as f64).round() as u64,
        false => levels.div_ceil(2),
    };
    values.iter().map(height).collect()
}

fn bounds(values: &[f64]) -> (f64, f64) {
    let ends = (f64::INFINITY, f64::NEG_INFINITY);
    values.iter().fold(ends, |(low, high), &value| {
        (low.min(value), high.max(value))
    })
}

fn chart(course: &Course, name: &'static str, trace: &Trace, area: Rect, frame: &mut Buffer) {
    // A braille character holds two points side by side.
    let values = trace.columns(2 * usize::from(area.width));
    let (low, high) = bounds(&values);
    // A flat course is drawn in the middle.
    let margin = if high > low { 0.0 } else { 0.5 };
    let points: Vec<(f64, f64)> = (0..).map(f64::from).zip(values.iter().copied()).collect();
    let dim = Style::from(Color::DarkGray);
    let steps = [(course.start() + 1).to_string(), course.step.to_string()];
    let right = (points.len() as f64 - 1.0).max(1.0);
    let dataset = Dataset::default()
        .marker(Marker::Braille)
        .graph_type(GraphType::Line)
        .style(Color::Green)
        .data(&points);
    Chart::new(vec![dataset])
        .block(Block::new().title_top(Line::from(name.bold())))
        .x_axis(
            Axis::default()
                .style(dim)
                .bounds([0.0, right])
                .labels(steps),
        )
        .y_axis(
            Axis::default()
                .style(dim)
                .bounds([low - margin, high + margin])
                .labels([
                    format!("{:.3}", low - margin),
                    format!("{:.3}", high + margin),
                ]),
        )
        .render(area, frame);
}

/// The parts of a step in one row, each as wide as its share.
fn draw_shares(shares: [f64; 3], area: Rect, frame: &mut Buffer) {
    let colors = [Color::Cyan, Color::Yellow, Color::Green];
    let labels: Vec<String> = PARTS
        .iter()
        .zip(shares)
        .map(|(name, share)| format!("{name} {} ", words::percent(share)))
        .collect();
    let labels_width: usize = labels.iter().map(String::len).sum();
    let bars_width = usize::from(area.width).saturating_sub(labels_width + PARTS.len());
    let mut spans = Vec::new();
    for ((label, share), color) in labels.into_iter().zip(shares).zip(colors) {
        let bar = (share * bars_width as f64).round() as usize;
        spans.push(Span::styled(label, Color::DarkGray));
        spans.push(Span::styled("█".repeat(bar), color));
        spans.push(" ".into());
    }
    Line::from(spans).render(area, frame);
}
