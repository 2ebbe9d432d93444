//! Means, paired differences and what may be said of them.

use std::collections::BTreeMap;

use pivotal_core::statistics::{self, Interval};

use crate::{Arm, Better, Comparison, Metric, SeedValues, Study};

/// What the seeds say of one number.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub enum Estimate {
    /// No seed has a value.
    Missing,
    /// One seed: a value, and no idea of its spread.
    Single(f64),
    /// Every seed has the same value, so the seeds do not vary it and there is no interval to give.
    Constant {
        /// The value.
        value: f64,
        /// How many seeds.
        seeds: usize,
    },
    /// A mean over seeds.
    Mean {
        /// The mean with its 95 % interval by Student's t.
        interval: Interval,
        /// How many seeds.
        seeds: usize,
    },
}

impl Estimate {
    /// The estimate of one number by its value at each seed.
    ///
    /// # Examples
    /// ```
    /// use pivotal_report::Estimate;
    /// assert_eq!(Estimate::of(&[0.5]), Estimate::Single(0.5));
    /// assert_eq!(Estimate::of(&[1.0, 2.0, 3.0]).value(), Some(2.0));
    /// ```
    pub fn of(values: &[f64]) -> Self {
        let seeds = values.len();
        match (values, statistics::mean_interval(values)) {
            ([], _) => Self::Missing,
            (&[value], _) => Self::Single(value),
            (&[value, ..], _) if all_equal(values) => Self::Constant { value, seeds },
            (_, Some(interval)) => Self::Mean { interval, seeds },
            (_, None) => Self::Missing,
        }
    }

    /// The value or the mean.
    pub fn value(&self) -> Option<f64> {
        match *self {
            Self::Missing => None,
            Self::Single(value) | Self::Constant { value, .. } => Some(value),
            Self::Mean { interval, .. } => Some(interval.estimate),
        }
    }

    /// The 95 % interval, where there is one.
    pub fn interval(&self) -> Option<Interval> {
        match *self {
            Self::Mean { interval, .. } => Some(interval),
            _ => None,
        }
    }
}

/// Equal but for the rounding of a subtraction.
fn all_equal(values: &[f64]) -> bool {
    let low = values.iter().copied().fold(f64::INFINITY, f64::min);
    let high = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    high - low <= 1e-12 * high.abs().max(low.abs()).max(1.0)
}

/// What may be said of a difference.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Outcome {
    /// The 95 % interval leaves out 0, in the metric's better direction.
    Better,
    /// The 95 % interval leaves out 0, in the other direction.
    Worse,
    /// The 95 % interval leaves out 0, on a metric that only describes.
    Different,
    /// The 95 % interval holds 0.
    NotSignificant,
    /// One shared seed: no interval, so nothing may be said.
    OneSeed,
    /// The difference is the same on every seed: there is no spread to test it against.
    Constant,
    /// No seed has both values.
    NotCompared,
}

impl Outcome {
    /// Whether the difference is significant at 95 %.
    pub const fn significant(self) -> bool {
        matches!(self, Self::Better | Self::Worse | Self::Different)
    }
}

/// A [`Comparison`] with its result.
#[derive(Clone, Debug, PartialEq)]
pub struct ComparisonResult {
    /// What was compared.
    pub comparison: Comparison,
    /// `arm` minus `against` over the seeds that have both.
    pub difference: Estimate,
    /// Two-sided p value of the paired t test, where there is an interval.
    pub p_value: Option<f64>,
    /// Seeds that have both values.
    pub seeds: usize,
    /// What may be said.
    pub outcome: Outcome,
}

/// Every estimate of a study.
#[derive(Clone, Debug, PartialEq)]
pub struct Analysis {
    /// For each arm in the study's order, for each metric in the study's order.
    pub arms: Vec<Vec<Estimate>>,
    /// The comparisons, in the study's order.
    pub comparisons: Vec<ComparisonResult>,
    /// For each signal, for each signal metric, in the study's order.
    pub signals: Vec<Vec<Estimate>>,
}

impl Analysis {
    /// Analyses a study that [`Study::validate`] accepts.
    pub(crate) fn of(study: &Study) -> Self {
        let row = |values: &BTreeMap<String, SeedValues>, metrics: &[Metric]| {
            let cell = |metric: &Metric| Estimate::of(&seed_values(values, &metric.key));
            metrics.iter().map(cell).collect()
        };
        let arms = study.arms.iter();
        let signals = study.signals.iter();
        Self {
            arms: arms.map(|arm| row(&arm.values, &study.metrics)).collect(),
            comparisons: study
                .comparisons
                .iter()
                .map(|c| compare(study, c))
                .collect(),
            signals: signals
                .map(|signal| row(&signal.values, &study.signal_metrics))
                .collect(),
        }
    }
}

fn seed_values(values: &BTreeMap<String, SeedValues>, key: &str) -> Vec<f64> {
    values
        .get(key)
        .map_or(vec![], |by_seed| by_seed.values().copied().collect())
}

fn compare(study: &Study, comparison: &Comparison) -> ComparisonResult {
    let metric = &comparison.metric;
    let by_seed = |key: &str| study.arm(key).and_then(|arm: &Arm| arm.values.get(metric));
    let mut first = Vec::new();
    let mut second = Vec::new();
    if let (Some(arm), Some(against)) = (by_seed(&comparison.arm), by_seed(&comparison.against)) {
        for (seed, &value) in arm {
            if let Some(&other) = against.get(seed) {
                first.push(value);
                second.push(other);
            }
        }
    }
    let differences: Vec<f64> = first.iter().zip(&second).map(|(a, b)| a - b).collect();
    let difference = Estimate::of(&differences);
    let paired = statistics::paired_difference(&first, &second);
    let better = study
        .metric(metric)
        .map_or(Better::Neither, |metric| metric.better);
    let outcome = match (difference, paired) {
        (Estimate::Missing, _) => Outcome::NotCompared,
        (Estimate::Single(_), _) => Outcome::OneSeed,
        (Estimate::Constant { .. }, _) => Outcome::Constant,
        (Estimate::Mean { interval, .. }, Some(paired)) if paired.significant() => {
            match (better, interval.estimate > 0.0) {
                (Better::Neither, _) => Outcome::Different,
                (Better::Higher, true) | (Better::Lower, false) => Outcome::Better,
                (Better::Higher, false) | (Better::Lower, true) => Outcome::Worse,
            }
        }
        (Estimate::Mean { .. }, _) => Outcome::NotSignificant,
    };
    let p_value = match difference {
        Estimate::Mean { .. } => paired.map(|paired| paired.p_value),
        _ => None,
    };
    ComparisonResult {
        comparison: comparison.clone(),
        difference,
        p_value,
        seeds: differences.len(),
        outcome,
    }
}
