//! Estimators of KL(π ‖ π_ref) from one sampled token (Schulman 2020, "Approximating KL divergence").
//!
//! With Δ = log π(y) − log π_ref(y), y drawn from π:
//!
//! ```text
//! k1 = Δ          k2 = Δ²/2          k3 = e^(−Δ) − 1 + Δ ≥ 0          E[k1] = E[k3] = KL
//! ```
//!
//! As a *loss*, k1 has an expected gradient of 0, k2 the gradient of KL(π ‖ π_ref), and k3 that of KL(π_ref ‖ π): what k1 is
//! right for in a reward it is wrong for in a loss. verl's `k1+` and `k3+` are k2's gradient under another value.

use serde::{Deserialize, Serialize};

use crate::Result;
use crate::check::{finite, length};
use crate::named::named_enum;

named_enum! {
    /// Which estimator.
    pub enum KlEstimator {
        /// Δ: unbiased, of either sign.
        K1 = "k1",
        /// Δ²/2: biased, never negative.
        K2 = "k2",
        /// e^(−Δ) − 1 + Δ: unbiased, never negative.
        K3 = "k3",
    }
}

impl KlEstimator {
    /// The estimate in nats, of a log-ratio Δ in nats.
    ///
    /// # Examples
    /// ```
    /// use pivotal_credit::KlEstimator::{K1, K2, K3};
    /// let half = 0.5_f64.ln(); // the policy gives half of what the reference gives
    /// assert_eq!(K1.of(half), half);
    /// assert_eq!(K2.of(half), half * half / 2.0);
    /// assert!((K3.of(half) - (1.0 - 2.0_f64.ln())).abs() < 1e-15);
    /// ```
    #[inline]
    pub fn of(self, log_ratio: f64) -> f64 {
        match self {
            Self::K1 => log_ratio,
            Self::K2 => log_ratio * log_ratio / 2.0,
            // `exp_m1`, or all digits cancel for Δ near 0; `max`, for what is left is rounding.
            Self::K3 => ((-log_ratio).exp_m1() + log_ratio).max(0.0),
        }
    }

    /// Its derivative by log π(y).
    #[inline]
    pub fn derivative(self, log_ratio: f64) -> f64 {
        match self {
            Self::K1 => 1.0,
            Self::K2 => log_ratio,
            Self::K3 => -(-log_ratio).exp_m1(),
        }
    }
}

/// Sums of all three estimators over tokens, and the largest |Δ|: what every run logs. They add up over responses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KlSum {
    /// Tokens counted.
    pub tokens: u64,
    /// Σ k1, in nats.
    pub k1: f64,
    /// Σ k2, in nats.
    pub k2: f64,
    /// Σ k3, in nats.
    pub k3: f64,
    /// max |Δ|, in nats.
    pub max_abs_log_ratio: f64,
}

impl KlSum {
    /// Over the model's own tokens of one response; log-probabilities `[tokens]`, in nats.
    ///
    /// # Errors
    /// [`Error::Unequal`](crate::Error::Unequal) or [`Error::NotFiniteColumn`](crate::Error::NotFiniteColumn).
    ///
    /// # Examples
    /// ```
    /// use pivotal_credit::KlSum;
    /// let sum = KlSum::of(&[-1.0, -2.0, 9.0], &[-2.0, -1.5, 0.0], &[true, true, false])?;
    /// assert_eq!((sum.tokens, sum.k1, sum.k2, sum.max_abs_log_ratio), (2, 0.5, 0.625, 1.0));
    /// # Ok::<(), pivotal_credit::Error>(())
    /// ```
    pub fn of(
        token_logps: &[f32],
        reference_token_logps: &[f32],
        response_mask: &[bool],
    ) -> Result<Self> {
        let tokens = token_logps.len();
        length("reference_token_logps", tokens, reference_token_logps.len())?;
        length("response_mask", tokens, response_mask.len())?;
        finite("token_logps", token_logps, response_mask)?;
        finite(
            "reference_token_logps",
            reference_token_logps,
            response_mask,
        )?;
        let mut sum = Self::default();
        for index in (0..tokens).filter(|&index| response_mask[index]) {
            sum.push(f64::from(token_logps[index]) - f64::from(reference_token_logps[index]));
        }
        Ok(sum)
    }

    /// Takes one token's log-ratio.
    pub fn push(&mut self, log_ratio: f64) {
        self.tokens += 1;
        self.k1 += KlEstimator::K1.of(log_ratio);
        self.k2 += KlEstimator::K2.of(log_ratio);
        self.k3 += KlEstimator::K3.of(log_ratio);
        self.max_abs_log_ratio = self.max_abs_log_ratio.max(log_ratio.abs());
    }

    /// Takes another sum in.
    pub fn merge(&mut self, other: &Self) {
        self.tokens += other.tokens;
        self.k1 += other.k1;
        self.k2 += other.k2;
        self.k3 += other.k3;
        self.max_abs_log_ratio = self.max_abs_log_ratio.max(other.max_abs_log_ratio);
    }

    /// The mean a token of one estimator; `None` of no token.
    pub fn token_mean(&self, estimator: KlEstimator) -> Option<f64> {
        let sum = match estimator {
            KlEstimator::K1 => self.k1,
            KlEstimator::K2 => self.k2,
            KlEstimator::K3 => self.k3,
        };
        (self.tokens > 0).then(|| sum / self.tokens as f64)
    }
}
