//! When credit degenerates: the failure signatures that a run warns about (METHOD, section 9).

use serde::{Deserialize, Serialize};

use crate::{CreditRule, Cut, DiagnosticsReport, Drift, Selection};

/// Beyond which values to warn.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Thresholds {
    /// Over-segmentation: the median segment has at most this many tokens (2).
    pub short_segment_tokens: f64,
    /// Under-segmentation: at least this fraction of responses is one segment (0.9).
    pub single_segment_fraction: f64,
    /// Keep-all: at least this fraction of tokens is kept (0.98).
    pub keep_all_fraction: f64,
    /// Keep-none: at most this fraction of tokens is kept (0.02).
    pub keep_none_fraction: f64,
    /// Too many responses that train nothing: at least this fraction of masks is empty (0.5).
    pub empty_mask_fraction: f64,
    /// The opposing fraction moved by at least this much over the run (0.2).
    pub opposing_drift: f64,
    /// The log-probability of the chosen responses' kept tokens fell by at least so many nats a token (0.1).
    pub chosen_fall_nats: f64,
}

impl Default for Thresholds {
    fn default() -> Self {
        Self {
            short_segment_tokens: 2.0,
            single_segment_fraction: 0.9,
            keep_all_fraction: 0.98,
            keep_none_fraction: 0.02,
            empty_mask_fraction: 0.5,
            opposing_drift: 0.2,
            chosen_fall_nats: 0.1,
        }
    }
}

/// A failure signature that was met. Its text begins with [`Warning::name`] and a colon.
#[derive(Clone, Copy, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Warning {
    /// Segments of hardly more than a token.
    #[error(
        "over-segmentation: the median segment has {median_tokens} tokens; raise the offset or `min_len`"
    )]
    OverSegmentation {
        /// Tokens of the median segment.
        median_tokens: f64,
    },
    /// Responses that are one segment.
    #[error(
        "under-segmentation: {:.0} % of responses are one segment; check the baseline and lower the offset",
        100.0 * fraction
    )]
    UnderSegmentation {
        /// Fraction of such responses.
        fraction: f64,
    },
    /// A mask that drops nothing.
    #[error("keep-all: {:.1} % of tokens are kept, the mask does nothing; check the baseline", 100.0 * fraction)]
    KeepAll {
        /// Fraction kept.
        fraction: f64,
    },
    /// A mask that keeps nothing.
    #[error("keep-none: {:.1} % of tokens are kept, there is nothing to learn from; check the baseline", 100.0 * fraction)]
    KeepNone {
        /// Fraction kept.
        fraction: f64,
    },
    /// Responses that train nothing.
    #[error("empty-masks: {:.0} % of responses have an empty mask", 100.0 * fraction)]
    EmptyMasks {
        /// Fraction of such responses.
        fraction: f64,
    },
    /// Segments turned against, or towards, their response over the run.
    #[error(
        "opposing-drift: the fraction of segments against their response's sign moved by {change:+.2} over the run"
    )]
    OpposingDrift {
        /// Latest steps less first steps.
        change: f64,
    },
    /// The chosen responses' kept tokens have become less probable. Under a right mask only the dropped ones, which are wrong,
    /// should.
    #[error(
        "chosen-falling: a kept token of the chosen responses has changed by {kept:+.2} nats{}; lower the learning rate or raise `beta`",
        beside(*dropped)
    )]
    ChosenFalling {
        /// Mean change of a kept token's log-probability, in nats.
        kept: f64,
        /// The same of a dropped one, where it was measured.
        dropped: Option<f64>,
    },
}

impl Warning {
    /// Its name, which does not change with the numbers.
    pub fn name(&self) -> &'static str {
        match self {
            Self::OverSegmentation { .. } => "over-segmentation",
            Self::UnderSegmentation { .. } => "under-segmentation",
            Self::KeepAll { .. } => "keep-all",
            Self::KeepNone { .. } => "keep-none",
            Self::EmptyMasks { .. } => "empty-masks",
            Self::OpposingDrift { .. } => "opposing-drift",
            Self::ChosenFalling { .. } => "chosen-falling",
        }
    }
}

fn beside(dropped: Option<f64>) -> String {
    dropped.map_or_else(String::new, |dropped| {
        format!(", a dropped one by {dropped:+.2}")
    })
}

impl Thresholds {
    /// The warnings that `report` earns under `rule`; what the rule asks for outright is no cause (one segment a token with the
    /// cut rule `token`, every token kept with the selection `all`). Nothing observed earns none.
    pub fn warnings(&self, report: &DiagnosticsReport, rule: &CreditRule) -> Vec<Warning> {
        let mut warnings = Vec::new();
        if report.tokens == 0 {
            return warnings;
        }
        let asked_short = match rule.cut {
            Cut::Token => true,
            Cut::Fixed(tokens) => tokens as f64 <= self.short_segment_tokens,
            _ => false,
        };
        let asked_single = matches!(rule.cut, Cut::Sequence);
        if !asked_short && report.segment_tokens_median <= self.short_segment_tokens {
            let median_tokens = report.segment_tokens_median;
            warnings.push(Warning::OverSegmentation { median_tokens });
        }
        if !asked_single && report.single_segment_fraction >= self.single_segment_fraction {
            let fraction = report.single_segment_fraction;
            warnings.push(Warning::UnderSegmentation { fraction });
        }
        let fraction = report.kept_fraction;
        if fraction >= self.keep_all_fraction && rule.selection != Selection::All {
            warnings.push(Warning::KeepAll { fraction });
        }
        if fraction <= self.keep_none_fraction {
            warnings.push(Warning::KeepNone { fraction });
        }
        if report.empty_mask_fraction >= self.empty_mask_fraction {
            warnings.push(Warning::EmptyMasks {
                fraction: report.empty_mask_fraction,
            });
        }
        warnings
    }

    /// The warning that the opposing fraction's course over the run earns.
    pub fn drift_warning(&self, opposing: &Drift) -> Option<Warning> {
        let change = opposing.change()?;
        (change.abs() >= self.opposing_drift).then_some(Warning::OpposingDrift { change })
    }

    /// The warning that a change of the chosen responses' log-probabilities earns, in nats a kept token, and a dropped one where
    /// that is known.
    pub fn chosen_warning(&self, kept: f64, dropped: Option<f64>) -> Option<Warning> {
        (kept <= -self.chosen_fall_nats).then_some(Warning::ChosenFalling { kept, dropped })
    }
}
