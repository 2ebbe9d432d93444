//! What was run and measured: the one input of every view.

use std::collections::{BTreeMap, BTreeSet};

use pivotal_core::{CreditRecord, Side};
use serde::{Deserialize, Serialize};

use crate::Error;

/// One value a seed; a seed that is absent was not measured.
pub type SeedValues = BTreeMap<u64, f64>;

/// A study: arms run on the same seeds, what they scored, and what is to be compared.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Study {
    /// Title of the report.
    pub title: String,
    /// What was asked, in a sentence or two; may be empty.
    #[serde(default)]
    pub question: String,
    /// The exact command that repeats the study.
    pub command: String,
    /// The machine, in words.
    #[serde(default)]
    pub machine: String,
    /// When it ran, as the caller writes dates.
    #[serde(default)]
    pub date: String,
    /// Versions of what matters, by name.
    #[serde(default)]
    pub versions: BTreeMap<String, String>,
    /// The seeds.
    pub seeds: Vec<u64>,
    /// What was measured on each arm; the first metric is the headline.
    pub metrics: Vec<Metric>,
    /// The arms, in the order to show.
    pub arms: Vec<Arm>,
    /// Differences to test, in the order to show.
    #[serde(default)]
    pub comparisons: Vec<Comparison>,
    /// What was measured on each signal: pair accuracy, token AUC, …
    #[serde(default)]
    pub signal_metrics: Vec<Metric>,
    /// The signals, in the order to show.
    #[serde(default)]
    pub signals: Vec<SignalRow>,
    /// Limits of the study, a sentence or a paragraph each.
    #[serde(default)]
    pub notes: Vec<String>,
    /// Pairs to look at token by token.
    #[serde(default)]
    pub examples: Vec<PairView>,
}

/// A quantity measured once a seed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Metric {
    /// Key in [`Arm::values`].
    pub key: String,
    /// Name to show.
    pub label: String,
    /// Unit to show (`nats`, `s`); empty for a fraction.
    #[serde(default)]
    pub unit: String,
    /// Which way is better.
    pub better: Better,
    /// The split it was measured on (`held out`, `shifted`); may be empty.
    #[serde(default)]
    pub split: String,
    /// What it is, in a sentence.
    #[serde(default)]
    pub description: String,
    /// Digits after the point.
    #[serde(default = "three")]
    pub decimals: u8,
}

const fn three() -> u8 {
    3
}

impl Metric {
    /// A fraction of which more is better, with three decimals; change the fields that differ.
    pub fn new(key: impl Into<String>, label: impl Into<String>) -> Self {
        Self {
            key: key.into(),
            label: label.into(),
            unit: String::new(),
            better: Better::Higher,
            split: String::new(),
            description: String::new(),
            decimals: three(),
        }
    }

    /// Label and split, as sentences name it: `Exact accuracy (held out)`.
    pub fn name(&self) -> String {
        match self.split.is_empty() {
            true => self.label.clone(),
            false => format!("{} ({})", self.label, self.split),
        }
    }
}

/// Which way a metric is better.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Better {
    /// More is better: accuracy.
    Higher,
    /// Less is better: an error rate, a time.
    Lower,
    /// It describes: a kept fraction, the drift from the reference.
    Neither,
}

/// What an arm is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// The policy that every arm starts from.
    Start,
    /// What is done without the method.
    Baseline,
    /// The method.
    Treatment,
    /// What must not work as well, if the method works for the reason given.
    Control,
    /// What the method could reach at best.
    Ceiling,
}

impl Role {
    /// The role in a word, lower case.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Start => "start",
            Self::Baseline => "baseline",
            Self::Treatment => "treatment",
            Self::Control => "control",
            Self::Ceiling => "ceiling",
        }
    }
}

/// One way of training, with what it scored.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Arm {
    /// Key in [`Comparison`].
    pub key: String,
    /// Name to show.
    pub label: String,
    /// What it is for.
    pub role: Role,
    /// What it does, in a line.
    #[serde(default)]
    pub description: String,
    /// The settings it was given after tuning, by name: `lr`, `beta`, `steps`.
    #[serde(default)]
    pub settings: BTreeMap<String, String>,
    /// What it costs beyond the baseline; empty if nothing.
    #[serde(default)]
    pub extra_cost: String,
    /// What it scored: metric key → seed → value.
    #[serde(default)]
    pub values: BTreeMap<String, SeedValues>,
}

/// A difference to test: `arm` minus `against` on `metric`, paired by seed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Comparison {
    /// Key of the arm.
    pub arm: String,
    /// Key of the arm subtracted.
    pub against: String,
    /// Key of the metric.
    pub metric: String,
}

/// A token signal, with how good it is as credit.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SignalRow {
    /// Name to show.
    pub label: String,
    /// Where it comes from, in a line.
    #[serde(default)]
    pub description: String,
    /// What was measured: key of [`Study::signal_metrics`] → seed → value.
    #[serde(default)]
    pub values: BTreeMap<String, SeedValues>,
}

/// A pair to look at, under one signal or several.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PairView {
    /// Name to show.
    pub title: String,
    /// What to notice: a flipped label, where the error is; may be empty.
    #[serde(default)]
    pub note: String,
    /// Text of the prompt.
    pub prompt: String,
    /// The credit each signal gave.
    pub signals: Vec<SignalPair>,
}

/// What one signal made of a pair.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SignalPair {
    /// Name to show.
    pub label: String,
    /// The chosen response.
    pub chosen: CreditRecord,
    /// The rejected response.
    pub rejected: CreditRecord,
}

impl Study {
    /// Reads and checks a study.
    ///
    /// # Errors
    /// [`Error::Json`] on malformed JSON, a missing or an unknown field; else as [`Study::validate`].
    pub fn from_json(bytes: &[u8]) -> Result<Self, Error> {
        let study: Self = serde_json::from_slice(bytes)?;
        study.validate()?;
        Ok(study)
    }

    /// The study as indented JSON, checked first, so that what is written can be read back.
    ///
    /// # Errors
    /// As [`Study::validate`].
    pub fn to_json(&self) -> Result<String, Error> {
        self.validate()?;
        Ok(serde_json::to_string_pretty(self)?)
    }

    /// The metric with this key.
    pub fn metric(&self, key: &str) -> Option<&Metric> {
        self.metrics.iter().find(|metric| metric.key == key)
    }

    /// The arm with this key.
    pub fn arm(&self, key: &str) -> Option<&Arm> {
        self.arms.iter().find(|arm| arm.key == key)
    }

    /// Checks that keys are unique and known, numbers finite, and every example's records sound.
    ///
    /// # Errors
    /// [`Error`], naming the entry.
    pub fn validate(&self) -> Result<(), Error> {
        let seeds = self.seeds.iter().map(u64::to_string);
        let seeds = unique("seeds", seeds)?;
        let metrics = unique("metrics", self.metrics.iter().map(|m| m.key.clone()))?;
        let arms = unique("arms", self.arms.iter().map(|arm| arm.key.clone()))?;
        let keys = self.signal_metrics.iter().map(|m| m.key.clone());
        let signal_metrics = match self.signals.is_empty() && self.signal_metrics.is_empty() {
            true => BTreeSet::new(),
            false => unique("signal_metrics", keys)?,
        };
        for arm in &self.arms {
            check_values(&arm.label, &arm.values, "metrics", &metrics, &seeds)?;
        }
        for row in &self.signals {
            let list = "signal_metrics";
            check_values(&row.label, &row.values, list, &signal_metrics, &seeds)?;
        }
        for comparison in &self.comparisons {
            known("a comparison", "arms", &comparison.arm, &arms)?;
            known("a comparison", "arms", &comparison.against, &arms)?;
            known("a comparison", "metrics", &comparison.metric, &metrics)?;
            if comparison.arm == comparison.against {
                return Err(Error::SelfComparison {
                    arm: comparison.arm.clone(),
                    metric: comparison.metric.clone(),
                });
            }
        }
        for (index, pair) in self.examples.iter().enumerate() {
            for signal in &pair.signals {
                check_record(index + 1, signal, Side::Chosen, &signal.chosen)?;
                check_record(index + 1, signal, Side::Rejected, &signal.rejected)?;
            }
        }
        Ok(())
    }
}

fn unique(
    list: &'static str,
    keys: impl Iterator<Item = String>,
) -> Result<BTreeSet<String>, Error> {
    let mut seen = BTreeSet::new();
    for key in keys {
        if seen.contains(&key) {
            return Err(Error::Duplicate { list, key });
        }
        seen.insert(key);
    }
    match seen.is_empty() {
        true => Err(Error::Empty { list }),
        false => Ok(seen),
    }
}

fn known(place: &str, list: &'static str, key: &str, keys: &BTreeSet<String>) -> Result<(), Error> {
    if keys.contains(key) {
        return Ok(());
    }
    Err(Error::Unknown {
        place: place.into(),
        list,
        key: key.into(),
        known: keys.iter().cloned().collect::<Vec<_>>().join(", "),
    })
}

fn check_values(
    row: &str,
    values: &BTreeMap<String, SeedValues>,
    list: &'static str,
    metrics: &BTreeSet<String>,
    seeds: &BTreeSet<String>,
) -> Result<(), Error> {
    for (metric, by_seed) in values {
        known(&format!("`{row}`"), list, metric, metrics)?;
        for (seed, &value) in by_seed {
            let place = format!("`{metric}` of `{row}`");
            known(&place, "seeds", &seed.to_string(), seeds)?;
            if !value.is_finite() {
                return Err(Error::NotFinite {
                    row: row.into(),
                    metric: metric.clone(),
                    seed: *seed,
                    value,
                });
            }
        }
    }
    Ok(())
}

fn check_record(
    pair: usize,
    signal: &SignalPair,
    side: Side,
    record: &CreditRecord,
) -> Result<(), Error> {
    record.validate().map_err(|source| Error::Record {
        pair,
        signal: signal.label.clone(),
        side,
        source,
    })?;
    match record.side {
        Some(found) if found != side => Err(Error::SwappedSide {
            pair,
            signal: signal.label.clone(),
            expected: side,
            found,
        }),
        _ => Ok(()),
    }
}
