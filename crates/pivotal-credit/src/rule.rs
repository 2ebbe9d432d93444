//! A checked credit rule.

use serde::Serialize;

use crate::{Baseline, Cut, Neutral, Score, Selection, Signal, Weighting, Width};

/// Everything that turns a signal into a keep mask, checked; made by [`CreditConfig::resolve`](crate::CreditConfig::resolve).
#[derive(Clone, Debug, PartialEq, Serialize)]
#[non_exhaustive]
pub struct CreditRule {
    /// Which signal.
    pub signal: Signal,
    /// How many tokens late it reacts.
    pub signal_delay: usize,
    /// The baseline b.
    pub baseline: Baseline,
    /// The offset δ.
    pub offset: Width,
    /// Where segments begin.
    pub cut: Cut,
    /// Shorter segments are merged into the one before.
    pub min_len: usize,
    /// A segment's score.
    pub score: Score,
    /// Which tokens are kept.
    pub selection: Selection,
    /// What becomes of neutral segments.
    pub neutral: Neutral,
    /// Hard or soft.
    pub weighting: Weighting,
    /// For the selection `random`: this fraction instead of `agree`'s.
    pub random_fraction: Option<f64>,
}

impl CreditRule {
    /// Whether the rule reads token texts.
    pub const fn needs_texts(&self) -> bool {
        matches!(self.cut, Cut::Punctuation(_))
    }

    /// Whether the rule reads ground truth.
    pub const fn needs_truth(&self) -> bool {
        matches!(self.selection, Selection::Truth)
    }

    /// Whether the rule reads a signal at all: the unmasked trainer and the truth mask do not depend on one.
    pub const fn needs_signal(&self) -> bool {
        let drawn = matches!(self.selection, Selection::Random) && self.random_fraction.is_some();
        !drawn && !matches!(self.selection, Selection::All | Selection::Truth)
    }
}
