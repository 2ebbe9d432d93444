//! Forest plots: one line an arm, with its mean, its 95 % interval and every seed.

use std::fmt::Write;

use crate::number::plain;
use crate::report::Report;
use crate::sentences::cell;
use crate::text::{escape, line, width};
use crate::{Arm, Estimate, Metric, Role};

const WIDTH: f64 = 400.0;
const LEFT: f64 = 8.0;
const RIGHT: f64 = 392.0;
const ROW: f64 = 38.0;
const AXIS: f64 = 26.0;

/// Colours of a plot that stands alone; inside the page the page's own apply.
const STYLE: &str = "\
.forest{background:#fcfcfb;font:12px system-ui,-apple-system,'Segoe UI',Roboto,sans-serif}\
.forest text{fill:#1d2126;paint-order:stroke;stroke:#fcfcfb;stroke-width:4px}.forest .quiet{fill:#656c75}\
.forest .rule{stroke:#d9dcdf}.forest .reference{stroke:#8a9099;stroke-dasharray:3 3}\
.forest .whisker,.forest .mark{stroke:#3c434b;fill:#3c434b}.forest .seed{fill:#8a9099}\
.forest .hollow{fill:#fcfcfb}.forest .treatment{stroke:#0b6b8f;fill:#0b6b8f}\
@media(prefers-color-scheme:dark){.forest{background:#15181c}.forest text{fill:#e4e6e8;stroke:#15181c}\
.forest .quiet{fill:#9aa2ab}.forest .rule{stroke:#343a41}.forest .reference{stroke:#737b84}\
.forest .whisker,.forest .mark{stroke:#c3c9cf;fill:#c3c9cf}.forest .seed{fill:#737b84}\
.forest .hollow{fill:#15181c}.forest .treatment{stroke:#63bce0;fill:#63bce0}}";

/// A linear scale with round ticks.
struct Scale {
    low: f64,
    high: f64,
    step: f64,
}

impl Scale {
    fn over(values: impl Iterator<Item = f64>) -> Self {
        let (mut low, mut high) = (f64::INFINITY, f64::NEG_INFINITY);
        for value in values {
            low = low.min(value);
            high = high.max(value);
        }
        if low > high {
            (low, high) = (0.0, 1.0);
        }
        if high - low <= 1e-9 * high.abs().max(1.0) {
            let margin = high.abs().max(1.0) * 0.1;
            (low, high) = (low - margin, high + margin);
        }
        let margin = 0.04 * (high - low);
        let (low, high) = (low - margin, high + margin);
        let rough = (high - low) / 5.0;
        let power = 10f64.powf(rough.log10().floor());
        let factor = [1.0, 2.0, 5.0, 10.0]
            .into_iter()
            .find(|factor| factor * power >= rough);
        Self {
            low,
            high,
            step: factor.unwrap_or(10.0) * power,
        }
    }

    fn x(&self, value: f64) -> f64 {
        LEFT + (RIGHT - LEFT) * (value - self.low) / (self.high - self.low)
    }

    fn ticks(&self) -> Vec<f64> {
        let first = (self.low / self.step).ceil() as i64;
        let last = (self.high / self.step).floor() as i64;
        (first..=last)
            .map(|index| index as f64 * self.step)
            .collect()
    }

    fn decimals(&self) -> u8 {
        (-self.step.log10()).ceil().clamp(0.0, 9.0) as u8
    }
}

impl Report<'_> {
    /// A forest plot of one metric as an SVG file, light or dark by the reader's preference; `None` if the study has no
    /// metric of this key.
    pub fn forest_svg(&self, metric: &str) -> Option<String> {
        let column = self.study.metrics.iter().position(|m| m.key == metric)?;
        Some(self.forest(column, true))
    }

    /// The plot of one metric; `alone` adds what an SVG file needs and a page does not.
    pub(crate) fn forest(&self, column: usize, alone: bool) -> String {
        let metric = &self.study.metrics[column];
        let rows: Vec<(&Arm, Estimate)> = (self.study.arms.iter())
            .zip(self.analysis.arms.iter().map(|row| row[column]))
            .collect();
        let seeds = |arm: &Arm| -> Vec<f64> {
            let values = arm.values.get(&metric.key);
            values.map_or(vec![], |by_seed| by_seed.values().copied().collect())
        };
        let scale = Scale::over(rows.iter().flat_map(|(arm, estimate)| {
            let ends = estimate
                .interval()
                .map(|interval| [interval.low, interval.high]);
            seeds(arm).into_iter().chain(ends.into_iter().flatten())
        }));
        let title = match alone {
            true => 24.0,
            false => 0.0,
        };
        let bottom = title + ROW * rows.len() as f64;
        let height = bottom + AXIS;
        let mut svg = Svg(String::new());
        let said: Vec<String> = (rows.iter())
            .map(|(arm, estimate)| format!("{} {}", arm.label, cell(estimate, metric)))
            .collect();
        let said = escape(&line(&format!("{}: {}", metric.name(), said.join("; "))));
        let namespace = match alone {
            true => " xmlns=\"http://www.w3.org/2000/svg\"",
            false => "",
        };
        svg.push(format_args!(
            "<svg{namespace} class=\"forest\" viewBox=\"0 0 {WIDTH} {height}\" role=\"img\" aria-label=\"{said}\">"
        ));
        if alone {
            svg.push(format_args!("<style>{STYLE}</style>"));
            let name = escape(&line(&metric.name()));
            let weight = "font-weight=\"600\"";
            svg.push(format_args!(
                "<text x=\"{LEFT}\" y=\"16\" {weight}>{name}</text>"
            ));
        }
        for tick in scale.ticks() {
            let x = scale.x(tick);
            svg.line("rule", [x, title, x, bottom]);
            let text = plain(tick, scale.decimals());
            // A label at the very edge would be cut by the picture's border.
            let anchor = match x {
                x if x < LEFT + 14.0 => "start",
                x if x > RIGHT - 14.0 => "end",
                _ => "middle",
            };
            svg.text("quiet", anchor, x, bottom + 16.0, &text);
        }
        let baseline = rows.iter().find(|(arm, _)| arm.role == Role::Baseline);
        if let Some(value) = baseline.and_then(|(_, estimate)| estimate.value()) {
            let x = scale.x(value);
            svg.line("reference", [x, title, x, bottom]);
        }
        for (index, (arm, estimate)) in rows.iter().enumerate() {
            let top = title + ROW * index as f64;
            svg.arm(arm, estimate, metric, &seeds(arm), &scale, top);
        }
        svg.0.push_str("</svg>");
        svg.0
    }
}

struct Svg(String);

impl Svg {
    fn push(&mut self, markup: std::fmt::Arguments<'_>) {
        // Writing to a string cannot fail.
        let _ = self.0.write_fmt(markup);
    }

    fn line(&mut self, class: &str, [x1, y1, x2, y2]: [f64; 4]) {
        self.push(format_args!(
            "<line class=\"{class}\" x1=\"{x1:.1}\" y1=\"{y1:.1}\" x2=\"{x2:.1}\" y2=\"{y2:.1}\"/>"
        ));
    }

    fn text(&mut self, class: &str, anchor: &str, x: f64, y: f64, text: &str) {
        let text = escape(&line(text));
        self.push(format_args!(
            "<text class=\"{class}\" text-anchor=\"{anchor}\" x=\"{x:.1}\" y=\"{y:.1}\">{text}</text>"
        ));
    }

    fn arm(
        &mut self,
        arm: &Arm,
        estimate: &Estimate,
        metric: &Metric,
        seeds: &[f64],
        scale: &Scale,
        top: f64,
    ) {
        let value = cell(estimate, metric);
        // About 62 narrow characters fit a row; a longer label gives way to the number, and stands whole in the table.
        let room = 60usize.saturating_sub(width(&value));
        self.text(
            "name",
            "start",
            LEFT,
            top + 13.0,
            &shortened(&arm.label, room),
        );
        self.text("quiet", "end", RIGHT, top + 13.0, &value);
        let y = top + 25.0;
        if let Some(interval) = estimate.interval() {
            let class = match arm.role {
                Role::Treatment => "whisker treatment",
                _ => "whisker",
            };
            let (low, high) = (scale.x(interval.low), scale.x(interval.high));
            self.line(class, [low, y, high, y]);
            self.line(class, [low, y - 4.0, low, y + 4.0]);
            self.line(class, [high, y - 4.0, high, y + 4.0]);
            for &value in seeds {
                let x = scale.x(value);
                self.push(format_args!(
                    "<circle class=\"seed\" cx=\"{x:.1}\" cy=\"{:.1}\" r=\"1.6\"/>",
                    y + 7.0
                ));
            }
        }
        if let Some(value) = estimate.value() {
            let markup = mark(arm.role, scale.x(value), y);
            self.0.push_str(&markup);
        }
    }
}

/// The marker of a role, told apart by shape and filling.
pub(crate) fn mark(role: Role, x: f64, y: f64) -> String {
    let polygon = |class: &str, points: &[(f64, f64)]| {
        let points: Vec<String> = points
            .iter()
            .map(|(dx, dy)| format!("{:.1},{:.1}", x + dx, y + dy))
            .collect();
        format!(
            "<polygon class=\"mark {class}\" points=\"{}\"/>",
            points.join(" ")
        )
    };
    let circle = |class: &str| {
        format!("<circle class=\"mark {class}\" cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"4.5\"/>")
    };
    match role {
        Role::Start => circle("hollow"),
        Role::Baseline => polygon("", &[(-4.0, -4.0), (4.0, -4.0), (4.0, 4.0), (-4.0, 4.0)]),
        Role::Treatment => circle("treatment"),
        Role::Control => polygon("hollow", &[(0.0, -5.0), (5.0, 4.0), (-5.0, 4.0)]),
        Role::Ceiling => polygon(
            "hollow",
            &[(0.0, -5.5), (5.5, 0.0), (0.0, 5.5), (-5.5, 0.0)],
        ),
    }
}

fn shortened(label: &str, room: usize) -> String {
    if width(label) <= room {
        return label.into();
    }
    let mut short = String::new();
    for character in label.chars() {
        if width(&short) + 2 > room {
            break;
        }
        short.push(character);
    }
    short.trim_end().to_owned() + "…"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round_and_inside() {
        let scale = Scale::over([0.127, 0.878].into_iter());
        let ticks: Vec<String> = scale.ticks().iter().map(|&tick| plain(tick, 1)).collect();
        assert_eq!(ticks, ["0.2", "0.4", "0.6", "0.8"]);
        let flat = Scale::over([5.0, 5.0].into_iter());
        assert!(flat.low < 5.0 && 5.0 < flat.high);
        assert!(!Scale::over(std::iter::empty()).ticks().is_empty());
    }
}
