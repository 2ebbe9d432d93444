//! The report as one HTML page: no network, no script needed to read it.

use std::collections::BTreeMap;

use minijinja::syntax::SyntaxConfig;
use minijinja::{AutoEscape, Environment, UndefinedBehavior};
use serde::Serialize;
use serde_json::json;

use crate::forest::mark;
use crate::number::{count, plain};
use crate::report::Report;
use crate::sentences::{cell_legend, cell_parts, comparison, difference, summary, verdict};
use crate::text::{block, line};
use crate::token_strip::{Strip, strips};
use crate::{Better, ComparisonResult, Error, Estimate, Metric, Role, SeedValues};

const TEMPLATE: &str = include_str!("../templates/report.html");
const STYLE: &str = include_str!("../templates/report.css");
const SCRIPT: &str = include_str!("../templates/report.js");

#[derive(Serialize)]
struct Heading {
    label: String,
    unit: String,
    split: String,
    better: &'static str,
    description: String,
}

#[derive(Serialize)]
struct Value {
    value: String,
    spread: String,
}

#[derive(Serialize)]
struct Row {
    label: String,
    role: &'static str,
    mark: String,
    description: String,
    settings: Vec<(String, String)>,
    extra_cost: String,
    cells: Vec<Value>,
    /// For each seed, each metric's value.
    seeds: Vec<SeedRow>,
}

#[derive(Serialize)]
struct SeedRow {
    seed: u64,
    values: Vec<String>,
}

#[derive(Serialize)]
struct Compared {
    arm: String,
    against: String,
    metric: String,
    unit: String,
    difference: String,
    p_value: String,
    seeds: usize,
    picture: String,
    verdict: String,
    sentence: String,
    significant: bool,
}

#[derive(Serialize)]
struct Example {
    title: String,
    note: String,
    prompt: String,
    signals: Vec<SignalStrips>,
}

#[derive(Serialize)]
struct SignalStrips {
    label: String,
    strips: [Strip; 2],
}

impl Report<'_> {
    /// The whole report as one HTML file: works from disk, loads nothing, is light or dark by the reader's preference.
    ///
    /// # Errors
    /// [`Error::Template`] if the template fails, which is our own fault.
    pub fn html(&self) -> Result<String, Error> {
        let study = self.study;
        let mut environment = Environment::new();
        environment.set_auto_escape_callback(|_| AutoEscape::Html);
        environment.set_undefined_behavior(UndefinedBehavior::Strict);
        let syntax = SyntaxConfig::builder()
            .trim_blocks(true)
            .lstrip_blocks(true)
            .build()?;
        environment.set_syntax(syntax);
        let seeds: Vec<String> = study.seeds.iter().map(u64::to_string).collect();
        let roles = [
            Role::Start,
            Role::Baseline,
            Role::Treatment,
            Role::Control,
            Role::Ceiling,
        ];
        let shown = roles
            .into_iter()
            .filter(|&role| study.arms.iter().any(|a| a.role == role));
        let columns = 0..study.metrics.len();
        let lines = |texts: &[String]| texts.iter().map(|text| line(text)).collect::<Vec<_>>();
        let versions = study.versions.iter();
        let page = json!({
            "style": STYLE,
            "script": SCRIPT,
            "title": line(&study.title),
            "question": line(&study.question),
            "date": line(&study.date),
            "machine": line(&study.machine),
            "command": block(&study.command),
            "versions": versions.map(|(name, v)| (line(name), line(v))).collect::<Vec<_>>(),
            "seeds": seeds.join(", "),
            "seed_count": count(seeds.len(), "seed"),
            "summary": lines(&summary(study, &self.analysis)),
            "headings": study.metrics.iter().map(heading).collect::<Vec<_>>(),
            "legend": cell_legend(&self.analysis.arms),
            "arms": self.arm_rows(),
            "roles": shown.map(|role| (role.name(), marker(role))).collect::<Vec<_>>(),
            "forests": columns.map(|column| self.forest(column, false)).collect::<Vec<_>>(),
            "comparisons": self.compared(),
            "signal_headings": study.signal_metrics.iter().map(heading).collect::<Vec<_>>(),
            "signal_legend": cell_legend(&self.analysis.signals),
            "signals": self.signal_rows(),
            "notes": lines(&study.notes),
            "examples": self.examples(),
        });
        Ok(environment.render_named_str("report.html", TEMPLATE, template_value(page))?)
    }

    fn arm_rows(&self) -> Vec<Row> {
        let metrics = &self.study.metrics;
        let arms = self.study.arms.iter().zip(&self.analysis.arms);
        let row = |(arm, estimates): (&crate::Arm, &Vec<Estimate>)| Row {
            label: line(&arm.label),
            role: arm.role.name(),
            mark: marker(arm.role),
            description: line(&arm.description),
            settings: (arm.settings.iter())
                .map(|(name, value)| (line(name), line(value)))
                .collect(),
            extra_cost: line(&arm.extra_cost),
            cells: values(metrics, estimates),
            seeds: self.seed_rows(metrics, |key| arm.values.get(key)),
        };
        arms.map(row).collect()
    }

    fn signal_rows(&self) -> Vec<Row> {
        let metrics = &self.study.signal_metrics;
        let signals = self.study.signals.iter().zip(&self.analysis.signals);
        let row = |(signal, estimates): (&crate::SignalRow, &Vec<Estimate>)| Row {
            label: line(&signal.label),
            role: "",
            mark: String::new(),
            description: line(&signal.description),
            settings: vec![],
            extra_cost: String::new(),
            cells: values(metrics, estimates),
            seeds: self.seed_rows(metrics, |key| signal.values.get(key)),
        };
        signals.map(row).collect()
    }

    fn seed_rows<'v>(
        &self,
        metrics: &[Metric],
        by_seed: impl Fn(&str) -> Option<&'v SeedValues>,
    ) -> Vec<SeedRow> {
        let value = |metric: &Metric, seed| {
            let value = by_seed(&metric.key).and_then(|values| values.get(&seed));
            value.map_or("–".into(), |&value| plain(value, metric.decimals))
        };
        let row = |&seed: &u64| SeedRow {
            seed,
            values: metrics.iter().map(|metric| value(metric, seed)).collect(),
        };
        self.study.seeds.iter().map(row).collect()
    }

    fn compared(&self) -> Vec<Compared> {
        let label = |key: &str| {
            self.study
                .arm(key)
                .map_or(String::new(), |arm| line(&arm.label))
        };
        let row = |result: &ComparisonResult| {
            let metric = self.study.metric(&result.comparison.metric)?;
            Some(Compared {
                arm: label(&result.comparison.arm),
                against: label(&result.comparison.against),
                metric: line(&metric.name()),
                unit: line(&metric.unit),
                difference: difference(result, metric),
                p_value: result.p_value.map_or("–".into(), p_value),
                seeds: result.seeds,
                picture: self.picture(result),
                verdict: verdict(result),
                sentence: line(&comparison(self.study, result)),
                significant: result.outcome.significant(),
            })
        };
        self.analysis.comparisons.iter().filter_map(row).collect()
    }

    /// A small interval around zero, on one scale for all comparisons of a metric.
    fn picture(&self, result: &ComparisonResult) -> String {
        let reach = |result: &ComparisonResult| match result.difference {
            Estimate::Mean { interval, .. } => interval.low.abs().max(interval.high.abs()),
            other => other.value().map_or(0.0, f64::abs),
        };
        let same = |other: &&ComparisonResult| other.comparison.metric == result.comparison.metric;
        let all = self.analysis.comparisons.iter().filter(same);
        let widest = all.map(reach).fold(0.0, f64::max).max(f64::MIN_POSITIVE);
        let x = |value: f64| 70.0 + 62.0 * value / widest;
        let mut svg = String::from(
            "<svg class=\"difference\" viewBox=\"0 0 140 18\" aria-hidden=\"true\">\
             <line class=\"reference\" x1=\"70\" y1=\"0\" x2=\"70\" y2=\"18\"/>",
        );
        if let Some(interval) = result.difference.interval() {
            let (low, high) = (x(interval.low), x(interval.high));
            svg.push_str(&format!(
                "<line class=\"whisker\" x1=\"{low:.1}\" y1=\"9\" x2=\"{high:.1}\" y2=\"9\"/>\
                 <line class=\"whisker\" x1=\"{low:.1}\" y1=\"5\" x2=\"{low:.1}\" y2=\"13\"/>\
                 <line class=\"whisker\" x1=\"{high:.1}\" y1=\"5\" x2=\"{high:.1}\" y2=\"13\"/>"
            ));
        }
        if let Some(value) = result.difference.value() {
            let class = match result.outcome.significant() {
                true => "mark",
                false => "mark hollow",
            };
            let x = x(value);
            svg.push_str(&format!(
                "<circle class=\"{class}\" cx=\"{x:.1}\" cy=\"9\" r=\"3.5\"/>"
            ));
        }
        svg + "</svg>"
    }

    fn examples(&self) -> Vec<Example> {
        let example = |pair: &crate::PairView| Example {
            title: line(&pair.title),
            note: line(&pair.note),
            prompt: block(&pair.prompt),
            signals: (pair.signals.iter())
                .map(|signal| SignalStrips {
                    label: line(&signal.label),
                    strips: strips(signal),
                })
                .collect(),
        };
        self.study.examples.iter().map(example).collect()
    }
}

/// JSON as the template engine's own value.
fn template_value(json: serde_json::Value) -> minijinja::Value {
    use serde_json::Value as Json;
    match json {
        Json::Null => minijinja::Value::from(()),
        Json::Bool(flag) => flag.into(),
        Json::Number(number) => match (number.as_u64(), number.as_i64(), number.as_f64()) {
            (Some(number), _, _) => number.into(),
            (_, Some(number), _) => number.into(),
            (_, _, number) => number.unwrap_or(f64::NAN).into(),
        },
        Json::String(text) => text.into(),
        Json::Array(items) => {
            let items = items.into_iter().map(template_value);
            items.collect::<Vec<minijinja::Value>>().into()
        }
        Json::Object(fields) => {
            let fields = fields
                .into_iter()
                .map(|(name, field)| (name, template_value(field)));
            fields
                .collect::<BTreeMap<String, minijinja::Value>>()
                .into()
        }
    }
}

fn heading(metric: &Metric) -> Heading {
    Heading {
        label: line(&metric.label),
        unit: line(&metric.unit),
        split: line(&metric.split),
        better: match metric.better {
            Better::Higher => "higher is better",
            Better::Lower => "lower is better",
            Better::Neither => "describes",
        },
        description: line(&metric.description),
    }
}

fn values(metrics: &[Metric], estimates: &[Estimate]) -> Vec<Value> {
    let value = |(metric, estimate): (&Metric, &Estimate)| {
        let (value, spread) = cell_parts(estimate, metric);
        Value { value, spread }
    };
    metrics.iter().zip(estimates).map(value).collect()
}

fn marker(role: Role) -> String {
    let mark = mark(role, 7.0, 7.0);
    format!("<svg class=\"marker\" viewBox=\"0 0 14 14\" aria-hidden=\"true\">{mark}</svg>")
}

fn p_value(value: f64) -> String {
    match value < 0.001 {
        true => "< 0.001".into(),
        false => plain(value, 3),
    }
}
