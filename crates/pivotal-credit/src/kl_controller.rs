//! How the KL coefficient moves during a run.

use serde::{Deserialize, Serialize};

use crate::Result;
use crate::check::{domain, finite_number};

/// The KL coefficient and the rule that moves it. It is its own state: serialise it with a checkpoint and a resumed run
/// continues bit for bit.
///
/// `adaptive` is Ziegler et al. 2019 (arXiv:1909.08593, section 2.2) as OpenAI's code has it:
///
/// ```text
/// kl_coef ← kl_coef · (1 + clip(KL/target − 1, ±0.2) · n/horizon)
/// ```
///
/// with KL the mean over responses of a response's summed k1, in nats, and n the number of those responses.
///
/// # Examples
/// ```
/// use pivotal_credit::KlController;
/// let mut controller = KlController::adaptive(0.15, 6.0, 10_000)?;
/// controller.update(12.0, 1_000)?; // twice the target: 0.15 · (1 + 0.2 · 0.1)
/// assert!((controller.kl_coef() - 0.153).abs() < 1e-15);
/// # Ok::<(), pivotal_credit::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum KlController {
    /// It does not move.
    Fixed {
        /// Reward a nat.
        #[serde(with = "crate::exact")]
        kl_coef: f64,
    },
    /// It moves towards a target.
    Adaptive {
        /// Reward a nat, now.
        #[serde(with = "crate::exact")]
        kl_coef: f64,
        /// The KL to hold, in nats a response.
        #[serde(with = "crate::exact")]
        target_nats: f64,
        /// Responses over which an error of 20 % or more moves the coefficient by 20 %.
        horizon: u64,
    },
}

/// The largest relative error that counts.
const LARGEST_ERROR: f64 = 0.2;

impl KlController {
    /// A coefficient that does not move.
    ///
    /// # Errors
    /// [`Error::Value`](crate::Error::Value) below 0 or not finite.
    pub fn fixed(kl_coef: f64) -> Result<Self> {
        let inside = kl_coef.is_finite() && kl_coef >= 0.0;
        domain("kl_coef", inside, "a finite number of at least 0", kl_coef)?;
        Ok(Self::Fixed { kl_coef })
    }

    /// A coefficient that begins at `kl_coef` and holds the KL at `target_nats` a response. OpenAI's values are 0.15, 6
    /// and 10,000.
    ///
    /// # Errors
    /// [`Error::Value`](crate::Error::Value) unless all three are above 0 and finite.
    pub fn adaptive(kl_coef: f64, target_nats: f64, horizon: u64) -> Result<Self> {
        for (key, value) in [("kl_coef", kl_coef), ("kl_target", target_nats)] {
            let inside = value.is_finite() && value > 0.0;
            domain(key, inside, "a finite number above 0", value)?;
        }
        domain("kl_horizon", horizon >= 1, "at least 1", horizon)?;
        Ok(Self::Adaptive {
            kl_coef,
            target_nats,
            horizon,
        })
    }

    /// The coefficient to use now.
    pub const fn kl_coef(&self) -> f64 {
        match self {
            Self::Fixed { kl_coef } | Self::Adaptive { kl_coef, .. } => *kl_coef,
        }
    }

    /// Takes the KL of `responses` responses, their mean in nats.
    ///
    /// # Errors
    /// [`Error::NotFiniteColumn`](crate::Error::NotFiniteColumn) for the KL; [`Error::Value`](crate::Error::Value) if so many
    /// responses come at once that the coefficient could reach 0.
    pub fn update(&mut self, kl_nats: f64, responses: u64) -> Result<()> {
        finite_number("kl", kl_nats)?;
        if let Self::Adaptive {
            kl_coef,
            target_nats,
            horizon,
        } = self
        {
            let step = responses as f64 / *horizon as f64;
            let inside = LARGEST_ERROR * step < 1.0;
            domain(
                "kl_horizon",
                inside,
                "more than a fifth of the responses of a batch",
                *horizon,
            )?;
            let error = (kl_nats / *target_nats - 1.0).clamp(-LARGEST_ERROR, LARGEST_ERROR);
            *kl_coef *= 1.0 + error * step;
        }
        Ok(())
    }
}
