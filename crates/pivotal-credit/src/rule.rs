//! A checked credit rule.

use serde::Serialize;

use crate::{
    Baseline, Cut, Neutral, Score, Selection, SequenceSign, Signal, TokenColumn, Weighting, Width,
};

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
    /// The sign that segments are compared with.
    pub sequence_sign: SequenceSign,
    /// Which tokens are kept.
    pub selection: Selection,
    /// What becomes of neutral segments.
    pub neutral: Neutral,
    /// Hard or soft.
    pub weighting: Weighting,
    /// For the selections by percentage: how many percent.
    pub selection_percent: Option<f64>,
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
        let own = matches!(
            self.selection,
            Selection::All | Selection::Truth | Selection::ExcessLoss | Selection::EntropyTop
        );
        !drawn && !own
    }

    /// Which columns the rule reads besides the signal, each with the choice that needs it, as `key = name`: a recipe that
    /// cannot give one of them can say so before it begins.
    ///
    /// # Examples
    /// ```
    /// use pivotal_credit::{CreditConfig, TokenColumn};
    /// let config: CreditConfig = toml::from_str("selection = 'entropy_top'").unwrap();
    /// let needed = config.resolve()?.needed_columns();
    /// assert_eq!(needed, [(TokenColumn::PolicyEntropies, "selection = entropy_top")]);
    /// # Ok::<(), pivotal_credit::Error>(())
    /// ```
    pub fn needed_columns(&self) -> Vec<(TokenColumn, &'static str)> {
        let mut needed = Vec::new();
        match self.cut {
            Cut::Entropy(_) => needed.push((TokenColumn::ReferenceEntropies, "cut = entropy")),
            Cut::Improbable { .. } => needed.push((TokenColumn::OldTokenLogps, "cut = improbable")),
            _ => {}
        }
        match self.selection {
            Selection::ExcessLoss => needed.extend([
                (TokenColumn::ReferenceTokenLogps, "selection = excess_loss"),
                (TokenColumn::TokenLogps, "selection = excess_loss"),
            ]),
            Selection::EntropyTop => {
                needed.push((TokenColumn::PolicyEntropies, "selection = entropy_top"));
            }
            _ => {}
        }
        if self.sequence_sign == SequenceSign::Advantage {
            needed.push((TokenColumn::Advantages, "sequence_sign = advantage"));
        }
        needed
    }
}
