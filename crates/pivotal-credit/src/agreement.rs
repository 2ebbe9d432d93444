//! How well a keep mask agrees with ground truth (METHOD, section 9).

use serde::{Deserialize, Serialize};

/// Agreement of a mask with the tokens that should be kept: the right ones of a positive response, the wrong ones of a
/// negative one. `None` where nothing was kept, or nothing should have been, or no policy was given.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Agreement {
    /// Of the kept tokens, the share that should be.
    pub precision: Option<f64>,
    /// Of the tokens that should be kept, the share that is.
    pub recall: Option<f64>,
    /// The harmonic mean of the two.
    pub f1: Option<f64>,
    /// Recall over decisive tokens only: those to which the policy gives less than the decisive probability.
    pub decisive_recall: Option<f64>,
    /// Precision with each token weighted by 1 − p, p its probability under the policy: a token of p near 1 carries no
    /// gradient, so that keeping it wrongly costs nothing.
    pub weighted_precision: Option<f64>,
}

/// The counts behind an [`Agreement`]; they add up over tokens and responses.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct AgreementCounts {
    kept: u64,
    wanted: u64,
    both: u64,
    decisive_wanted: u64,
    decisive_both: u64,
    kept_weight: f64,
    both_weight: f64,
    has_policy: bool,
}

impl AgreementCounts {
    /// Counts one token: whether it is kept, whether it should be, and its probability under the policy where known.
    ///
    /// # Examples
    /// ```
    /// use pivotal_credit::AgreementCounts;
    /// let mut counts = AgreementCounts::default();
    /// counts.push(true, true, Some(0.5), 0.9);
    /// counts.push(true, false, Some(1.0), 0.9); // wrongly kept, but without consequence
    /// counts.push(false, true, Some(0.8), 0.9);
    /// let agreement = counts.agreement();
    /// assert_eq!((agreement.precision, agreement.recall), (Some(0.5), Some(0.5)));
    /// assert_eq!((agreement.weighted_precision, agreement.decisive_recall), (Some(1.0), Some(0.5)));
    /// ```
    pub fn push(
        &mut self,
        kept: bool,
        wanted: bool,
        policy_probability: Option<f64>,
        decisive_probability: f64,
    ) {
        let both = kept && wanted;
        self.kept += u64::from(kept);
        self.wanted += u64::from(wanted);
        self.both += u64::from(both);
        if let Some(probability) = policy_probability {
            self.has_policy = true;
            let decisive = probability < decisive_probability;
            self.decisive_wanted += u64::from(decisive && wanted);
            self.decisive_both += u64::from(decisive && both);
            let weight = (1.0 - probability).max(0.0);
            self.kept_weight += if kept { weight } else { 0.0 };
            self.both_weight += if both { weight } else { 0.0 };
        }
    }

    /// Counts what `other` has counted.
    pub fn merge(&mut self, other: &Self) {
        self.kept += other.kept;
        self.wanted += other.wanted;
        self.both += other.both;
        self.decisive_wanted += other.decisive_wanted;
        self.decisive_both += other.decisive_both;
        self.kept_weight += other.kept_weight;
        self.both_weight += other.both_weight;
        self.has_policy |= other.has_policy;
    }

    /// The shares.
    pub fn agreement(&self) -> Agreement {
        let share = |part: u64, whole: u64| (whole > 0).then(|| part as f64 / whole as f64);
        let weighted = self.has_policy && self.kept_weight > 0.0;
        Agreement {
            precision: share(self.both, self.kept),
            recall: share(self.both, self.wanted),
            // 2PR/(P+R) without dividing by P + R = 0.
            f1: share(2 * self.both, self.kept + self.wanted),
            decisive_recall: share(self.decisive_both, self.decisive_wanted),
            weighted_precision: weighted.then(|| self.both_weight / self.kept_weight),
        }
    }
}
