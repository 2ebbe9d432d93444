//! The study in sentences: no gain without its interval.

use crate::number::{count, plain, signed, unit};
use crate::{Analysis, Better, ComparisonResult, Estimate, Metric, Outcome, Role, Study};

/// How every view explains its ±.
pub(crate) const INTERVAL_LEGEND: &str =
    "mean ± half the width of its 95 % interval (Student's t over seeds)";

/// `0.856 ± 0.012`, or the value with the reason why nothing stands after it.
pub(crate) fn cell(estimate: &Estimate, metric: &Metric) -> String {
    let (value, spread) = cell_parts(estimate, metric);
    match spread.is_empty() {
        true => value,
        false => format!("{value} {spread}"),
    }
}

/// The two parts of a cell: the value, and what is known of its spread.
pub(crate) fn cell_parts(estimate: &Estimate, metric: &Metric) -> (String, String) {
    let decimals = metric.decimals;
    match *estimate {
        Estimate::Missing => ("–".into(), String::new()),
        Estimate::Single(value) => (plain(value, decimals), "(n=1)".into()),
        Estimate::Constant { value, .. } => (plain(value, decimals), "(same)".into()),
        Estimate::Mean { interval, .. } => (
            plain(interval.estimate, decimals),
            format!("± {}", plain(interval.half_width(), decimals)),
        ),
    }
}

/// What the marks in the cells mean, those that occur.
pub(crate) fn cell_legend(estimates: &[Vec<Estimate>]) -> Vec<&'static str> {
    let has = |test: fn(&Estimate) -> bool| estimates.iter().flatten().any(test);
    let mut legend = Vec::new();
    if has(|estimate| matches!(estimate, Estimate::Mean { .. })) {
        legend.push(INTERVAL_LEGEND);
    }
    if has(|estimate| matches!(estimate, Estimate::Constant { .. })) {
        legend.push("(same): every seed has this value, so the seeds give it no interval");
    }
    if has(|estimate| matches!(estimate, Estimate::Single(_))) {
        legend.push("(n=1): one seed, so no interval");
    }
    if has(|estimate| matches!(estimate, Estimate::Missing)) {
        legend.push("–: not measured");
    }
    legend
}

/// `+0.104 [+0.061, +0.147]`, as far as it is known.
pub(crate) fn difference(result: &ComparisonResult, metric: &Metric) -> String {
    let number = |value| signed(value, metric.decimals);
    match result.difference {
        Estimate::Missing => "–".into(),
        Estimate::Single(value) | Estimate::Constant { value, .. } => number(value),
        Estimate::Mean { interval, .. } => format!(
            "{} [{}, {}]",
            number(interval.estimate),
            number(interval.low),
            number(interval.high)
        ),
    }
}

/// The verdict in a few words.
pub(crate) fn verdict(result: &ComparisonResult) -> String {
    let seeds = count(result.seeds, "seed");
    let way = match result.outcome {
        Outcome::Better => "better: ",
        Outcome::Worse => "worse: ",
        Outcome::Different => match result.difference.value() {
            Some(value) if value > 0.0 => "higher: ",
            _ => "lower: ",
        },
        Outcome::NotSignificant => return format!("not significant at 95 % over {seeds}"),
        Outcome::OneSeed => return "one shared seed: no interval, no verdict".into(),
        Outcome::Constant => return format!("the same on all {seeds}: no spread to test against"),
        Outcome::NotCompared => return "not compared: no seed has both values".into(),
    };
    format!("{way}significant at 95 % over {seeds}")
}

/// A comparison in one sentence.
pub(crate) fn comparison(study: &Study, result: &ComparisonResult) -> String {
    let label = |key: &str| {
        study
            .arm(key)
            .map_or(key.to_owned(), |arm| arm.label.clone())
    };
    let arm = label(&result.comparison.arm);
    let against = label(&result.comparison.against);
    let Some(metric) = study.metric(&result.comparison.metric) else {
        return String::new();
    };
    let subject = format!("{arm} against {against} on {}", metric.name());
    let unit = unit(metric);
    let number = |value| signed(value, metric.decimals);
    match result.difference {
        Estimate::Missing => format!("{subject}: {}.", verdict(result)),
        Estimate::Single(value) | Estimate::Constant { value, .. } => {
            format!("{subject}: {}{unit}; {}.", number(value), verdict(result))
        }
        Estimate::Mean { interval, .. } => format!(
            "{subject}: {}{unit}, 95 % interval {} to {}; {}.",
            number(interval.estimate),
            number(interval.low),
            number(interval.high),
            verdict(result)
        ),
    }
}

/// What the arms scored on the headline metric, then how many differences hold.
pub(crate) fn summary(study: &Study, analysis: &Analysis) -> Vec<String> {
    let mut sentences = Vec::new();
    if let Some(metric) = study.metrics.first() {
        let scored = |role: Role| best(study, analysis, metric, role);
        let parts: Vec<String> = [Role::Start, Role::Baseline, Role::Treatment, Role::Ceiling]
            .into_iter()
            .filter_map(scored)
            .collect();
        if !parts.is_empty() {
            let direction = match metric.better {
                Better::Higher => ", higher is better",
                Better::Lower => ", lower is better",
                Better::Neither => "",
            };
            let seeds = count(study.seeds.len(), "seed");
            let parts = parts.join("; ");
            let name = metric.name();
            sentences.push(format!("{name}{direction}, over {seeds}: {parts}."));
        }
    }
    let tested = analysis.comparisons.len();
    if tested > 0 {
        let significant = |result: &&ComparisonResult| result.outcome.significant();
        let held = analysis.comparisons.iter().filter(significant).count();
        let multiple = match tested {
            1 => "",
            _ => " Each interval stands alone: none is widened for the number of comparisons.",
        };
        let comparisons = count(tested, "comparison");
        sentences.push(format!(
            "{held} of {comparisons} significant at 95 %, paired by seed.{multiple}"
        ));
    }
    sentences
}

/// The best mean among the arms of a role, said as a choice where there was one.
fn best(study: &Study, analysis: &Analysis, metric: &Metric, role: Role) -> Option<String> {
    let column = study
        .metrics
        .iter()
        .position(|other| other.key == metric.key)?;
    let worth = |estimate: &Estimate| {
        let value = estimate.value()?;
        Some(match metric.better {
            Better::Lower => -value,
            Better::Higher | Better::Neither => value,
        })
    };
    let mut arms: Vec<_> = (study.arms.iter().zip(&analysis.arms))
        .filter(|(arm, _)| arm.role == role)
        .filter_map(|(arm, row)| Some((arm, row[column], worth(&row[column])?)))
        .collect();
    if metric.better != Better::Neither {
        arms.sort_by(|a, b| b.2.total_cmp(&a.2));
    }
    let (arm, estimate, _) = arms.first()?;
    let chosen = match (arms.len(), metric.better) {
        (1, _) | (_, Better::Neither) => role.name().to_owned(),
        (number, _) => format!("best of {number} {}s", role.name()),
    };
    let value = cell(estimate, metric);
    let unit = unit(metric);
    Some(format!("{} ({chosen}) {value}{unit}", arm.label))
}
