//! What a measurement comes to: one JSON object and one row of the table each.

use std::collections::BTreeMap;
use std::time::Duration;

use pivotal_kernels::Precision;
use pivotal_kernels::account::Part;
use serde::Serialize;
use serde_json::Value;

use crate::bench::ceiling::Ceiling;
use crate::bench::flops::Flops;
use crate::machine;

/// One measurement. What does not apply to it is null.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Outcome {
    pub(crate) suite: &'static str,
    /// Which of the suite's measurements it is.
    pub(crate) variant: String,
    pub(crate) tool: &'static str,
    pub(crate) version: &'static str,
    pub(crate) model: String,
    pub(crate) data: String,
    pub(crate) precision: String,
    pub(crate) threads: usize,
    /// Pairs, or responses where the suite takes those alone.
    pub(crate) pairs: Option<usize>,
    /// Tokens through the model, a shared prompt once; generated tokens where it generates.
    pub(crate) tokens: usize,
    /// The median of the repetitions.
    pub(crate) seconds: f64,
    /// Of each repetition.
    pub(crate) repetitions: Vec<f64>,
    pub(crate) pairs_per_second: Option<f64>,
    pub(crate) tokens_per_second: f64,
    /// The most memory the process has held so far.
    pub(crate) peak_bytes: Option<u64>,
    /// What of `seconds` the reference's pass took.
    pub(crate) reference_seconds: Option<f64>,
    /// Pairs a second as if the reference were known already.
    pub(crate) pairs_per_second_without_reference: Option<f64>,
    pub(crate) ceiling: Option<Ceiling>,
    /// Operations that the model needs, in all.
    pub(crate) model_flops: Option<u64>,
    /// The same by kind.
    pub(crate) model_flops_by_kind: Option<Flops>,
    /// Model operations a second over the ceiling of the precision.
    pub(crate) share_of_ceiling: Option<f64>,
    /// Where the time went, of the repetition nearest the median.
    pub(crate) parts: Vec<PartTime>,
    /// Numbers of this suite alone, their units in their names.
    pub(crate) figures: BTreeMap<&'static str, f64>,
    pub(crate) settings: BTreeMap<&'static str, Value>,
}

/// A part's share of the measured time.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct PartTime {
    pub(crate) name: &'static str,
    pub(crate) seconds: f64,
    pub(crate) share: f64,
}

/// One repetition.
pub(crate) struct Repetition {
    pub(crate) seconds: f64,
    pub(crate) reference_seconds: Option<f64>,
    pub(crate) parts: Vec<(Part, Duration)>,
}

impl Outcome {
    /// Takes over the repetition nearest the median.
    pub(crate) fn timed(mut self, repetitions: &[Repetition]) -> Self {
        self.repetitions = repetitions.iter().map(|one| one.seconds).collect();
        let middle = median(&self.repetitions).unwrap_or_default();
        let off = |one: &Repetition| (one.seconds - middle).abs();
        let nearest = repetitions
            .iter()
            .min_by(|a, b| off(a).total_cmp(&off(b)))
            .expect("at least one repetition");
        self.seconds = middle;
        self.parts = parts(nearest.seconds, &nearest.parts);
        self.reference_seconds = nearest.reference_seconds;
        self.tokens_per_second = self.tokens as f64 / middle;
        self.pairs_per_second = self.pairs.map(|pairs| pairs as f64 / middle);
        self.pairs_per_second_without_reference = nearest
            .reference_seconds
            .and_then(|reference| Some(self.pairs? as f64 / (nearest.seconds - reference)));
        self.peak_bytes = machine::peak_bytes();
        self
    }

    /// Takes the operations that the model needed.
    pub(crate) fn counted(mut self, flops: Flops) -> Self {
        self.model_flops = Some(flops.total());
        self.model_flops_by_kind = Some(flops);
        self
    }

    /// Takes the ceiling measured around it.
    pub(crate) fn under(&mut self, ceiling: &Ceiling, precision: Precision) {
        if let Some(flops) = self.model_flops {
            let gflops = flops as f64 / self.seconds / 1e9;
            self.share_of_ceiling = Some(gflops / ceiling.gflops(precision));
            self.ceiling = Some(ceiling.clone());
        }
    }

    /// The part's share of the time.
    pub(crate) fn share(&self, part: Part) -> Option<f64> {
        let found = self.parts.iter().find(|found| found.name == part.name());
        found.map(|found| found.share)
    }
}

/// Longest first; then `rest`, what no guard saw. Nothing if no part was timed at all.
fn parts(seconds: f64, account: &[(Part, Duration)]) -> Vec<PartTime> {
    let time = |name, part: f64| PartTime {
        name,
        seconds: part,
        share: part / seconds,
    };
    let mut parts: Vec<PartTime> = account
        .iter()
        .filter(|(_, duration)| !duration.is_zero())
        .map(|(part, duration)| time(part.name(), duration.as_secs_f64()))
        .collect();
    parts.sort_by(|a, b| b.seconds.total_cmp(&a.seconds));
    if !parts.is_empty() {
        let known: f64 = parts.iter().map(|part| part.seconds).sum();
        parts.push(time("rest", (seconds - known).max(0.0)));
    }
    parts
}

/// The middle value, or the mean of the two middle ones.
pub(crate) fn median(values: &[f64]) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match sorted.len() {
        0 => None,
        count if count % 2 == 1 => Some(sorted[middle]),
        _ => Some((sorted[middle - 1] + sorted[middle]) / 2.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians() {
        assert_eq!(median(&[]), None);
        assert_eq!(median(&[3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), Some(2.5));
    }

    #[test]
    fn parts_and_rest_make_the_whole() {
        let second = Duration::from_secs(1);
        let account = [
            (Part::Norm, second),
            (Part::Linear, 6 * second),
            (Part::Rope, Duration::ZERO),
        ];
        let found = parts(10.0, &account);
        let names: Vec<_> = found.iter().map(|part| part.name).collect();
        assert_eq!(names, ["linear", "norm", "rest"]);
        assert_eq!(found[2].seconds, 3.0);
        assert_eq!(found.iter().map(|part| part.share).sum::<f64>(), 1.0);
        assert!(parts(1.0, &[(Part::Norm, Duration::ZERO)]).is_empty());
    }
}
