//! What credit did in a step, and what a run warns about (METHOD, section 9).

use pivotal_credit::{
    Agreement, CreditRule, Diagnostics, DiagnosticsReport, Drift, Thresholds, Warning,
};
use serde::{Deserialize, Serialize};

use crate::error::Result;
use crate::settings::{domain, overlay};
use crate::table::table;

table! {
    /// When to warn about credit, step by step. A warning changes nothing: it is said, and stands in the metrics.
    pub struct WarningSettings, WarningFlags {
        /// Over-segmentation: the median segment has at most this many tokens; 0 never warns.
        "warn-segment-tokens" segment_tokens: f64 = 2.0,
        /// Under-segmentation: at least this share of responses is one segment; above 1 never.
        "warn-single-segment" single_segment: f64 = 0.9,
        /// The mask does nothing: at least this share of tokens is kept; above 1 never.
        "warn-keep-all" keep_all: f64 = 0.98,
        /// Nothing is left: at most this share of tokens is kept; below 0 never.
        "warn-keep-none" keep_none: f64 = 0.02,
        /// Responses that train nothing: at least this share of masks is empty; above 1 never.
        "warn-empty-masks" empty_masks: f64 = 0.5,
        /// The share of segments against their response's sign has moved by at least this much over the run; above 1 never.
        "warn-opposing-drift" opposing_drift: f64 = 0.2,
        /// The kept tokens of chosen responses have lost at least so many nats each; a large number never warns.
        "warn-chosen-fall" chosen_fall: f64 = 0.1,
        /// Steps at either end of the run that a drift compares.
        "drift-steps" drift_steps: usize = 20,
    }
}

overlay! {
    WarningFlags => WarningSettings,
}

impl WarningSettings {
    /// Checks every number's domain.
    ///
    /// # Errors
    /// [`crate::Error::Setting`], naming the flag.
    pub fn check(&self) -> Result<()> {
        for (key, value) in [
            ("warn-segment-tokens", self.segment_tokens),
            ("warn-single-segment", self.single_segment),
            ("warn-keep-all", self.keep_all),
            ("warn-keep-none", self.keep_none),
            ("warn-empty-masks", self.empty_masks),
            ("warn-opposing-drift", self.opposing_drift),
            ("warn-chosen-fall", self.chosen_fall),
        ] {
            domain(key, value, "a finite number", true)?;
        }
        let steps = self.drift_steps;
        domain("drift-steps", steps as f64, "at least 1", steps > 0)
    }

    fn thresholds(&self) -> Thresholds {
        Thresholds {
            short_segment_tokens: self.segment_tokens,
            single_segment_fraction: self.single_segment,
            keep_all_fraction: self.keep_all,
            keep_none_fraction: self.keep_none,
            empty_mask_fraction: self.empty_masks,
            opposing_drift: self.opposing_drift,
            chosen_fall_nats: self.chosen_fall,
        }
    }
}

/// One step's diagnostics of credit. What was not measured is absent: without segments, all from the segments on.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct CreditNumbers {
    /// Share of response tokens that the loss uses.
    pub kept_fraction: f64,
    /// The same of responses with a positive sign.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kept_fraction_positive: Option<f64>,
    /// The same of those with a negative sign.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kept_fraction_negative: Option<f64>,
    /// Share of responses of which nothing is kept.
    pub empty_mask_fraction: f64,
    /// Segments a hundred tokens.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub segments_per_100_tokens: Option<f64>,
    /// Tokens of a segment: the 10 % quantile.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub segment_tokens_p10: Option<f64>,
    /// The median.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub segment_tokens_median: Option<f64>,
    /// The 90 % quantile.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub segment_tokens_p90: Option<f64>,
    /// Pivots of a response: tokens where a segment begins.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pivots_per_response: Option<f64>,
    /// Changes of a response from positive to negative or back.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub flips_per_response: Option<f64>,
    /// Share of responses that are one segment.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub single_segment_fraction: Option<f64>,
    /// Share of segments whose sign is opposite to their response's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub opposing_fraction: Option<f64>,
    /// Its change from the first steps of the run to the latest; absent until the two no longer overlap.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub opposing_drift: Option<f64>,
    /// Kept share in each tenth of the positive responses; null where no token fell.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub kept_by_position_positive: Vec<Option<f64>>,
    /// The same of the negative ones.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub kept_by_position_negative: Vec<Option<f64>>,
    /// Agreement of the masks with ground truth, where the data has it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub agreement: Option<Agreement>,
    /// Warnings, in words; each begins with its name.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub warnings: Vec<String>,
}

impl CreditNumbers {
    /// Where every token is kept without a signal.
    pub fn keep_all() -> Self {
        Self {
            kept_fraction: 1.0,
            ..Self::default()
        }
    }
}

impl From<&DiagnosticsReport> for CreditNumbers {
    fn from(report: &DiagnosticsReport) -> Self {
        let per_response = |count: u64| Some(count as f64 / report.responses.max(1) as f64);
        let (positive, negative) = (report.positive.as_ref(), report.negative.as_ref());
        let by_position = |side: Option<&pivotal_credit::SideReport>| {
            side.map_or_else(Vec::new, |side| side.kept_fraction_by_position.to_vec())
        };
        Self {
            kept_fraction: report.kept_fraction,
            kept_fraction_positive: positive.map(|side| side.kept_fraction),
            kept_fraction_negative: negative.map(|side| side.kept_fraction),
            empty_mask_fraction: report.empty_mask_fraction,
            segments_per_100_tokens: Some(report.segments_per_100_tokens),
            segment_tokens_p10: Some(report.segment_tokens_p10),
            segment_tokens_median: Some(report.segment_tokens_median),
            segment_tokens_p90: Some(report.segment_tokens_p90),
            pivots_per_response: per_response(report.segments),
            flips_per_response: per_response(report.flips),
            single_segment_fraction: Some(report.single_segment_fraction),
            opposing_fraction: Some(report.opposing_fraction),
            opposing_drift: None,
            kept_by_position_positive: by_position(positive),
            kept_by_position_negative: by_position(negative),
            agreement: report.agreement,
            warnings: Vec::new(),
        }
    }
}

/// Watches credit over the steps of a run.
#[derive(Clone, Debug)]
pub struct Watch {
    thresholds: Thresholds,
    state: WatchState,
}

/// What a checkpoint keeps of a [`Watch`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WatchState {
    /// The last measured change of a dropped chosen token's log-probability, in nats.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    dropped: Option<f64>,
    opposing: Drift,
    chosen: Drift,
}

impl Watch {
    /// A watch under `settings`; `state` is what [`Watch::state`] gave, none at the start of a run.
    pub fn new(settings: &WarningSettings, state: Option<WatchState>) -> Self {
        let fresh = || WatchState {
            dropped: None,
            opposing: Drift::new(settings.drift_steps),
            chosen: Drift::new(settings.drift_steps),
        };
        Self {
            thresholds: settings.thresholds(),
            state: state.unwrap_or_else(fresh),
        }
    }

    /// The same under other `settings`; what was seen stays, and with it the steps that it compares.
    #[must_use]
    pub fn under(self, settings: &WarningSettings) -> Self {
        let seen = !self.state.opposing.is_empty() || !self.state.chosen.is_empty();
        Self::new(settings, seen.then_some(self.state))
    }

    /// What a checkpoint must keep.
    pub fn state(&self) -> &WatchState {
        &self.state
    }

    /// A step's numbers, with its warnings.
    pub fn credit(&mut self, diagnostics: &Diagnostics, rule: &CreditRule) -> CreditNumbers {
        let report = diagnostics.report();
        self.state.opposing.push(report.opposing_fraction);
        let drift = self.thresholds.drift_warning(&self.state.opposing);
        let warnings = self.thresholds.warnings(&report, rule);
        CreditNumbers {
            opposing_drift: self.state.opposing.change(),
            warnings: texts(warnings.into_iter().chain(drift)),
            ..CreditNumbers::from(&report)
        }
    }

    /// Takes in how probable the chosen responses of a step are, in nats a token: `kept` and `dropped` since the reference where
    /// there is one; without one `logp`, the kept tokens' log-probability, is compared with that of the first steps.
    pub fn chosen(
        &mut self,
        kept: Option<f64>,
        dropped: Option<f64>,
        logp: Option<f64>,
    ) -> Vec<String> {
        let state = &mut self.state;
        state.dropped = dropped.or(state.dropped);
        if let Some(value) = kept.or(logp) {
            state.chosen.push(value);
        }
        let change = match kept {
            Some(_) => state.chosen.latest(),
            None => state.chosen.change(),
        };
        let warning = change.and_then(|kept| self.thresholds.chosen_warning(kept, state.dropped));
        texts(warning)
    }
}

fn texts(warnings: impl IntoIterator<Item = Warning>) -> Vec<String> {
    warnings
        .into_iter()
        .map(|warning| warning.to_string())
        .collect()
}
