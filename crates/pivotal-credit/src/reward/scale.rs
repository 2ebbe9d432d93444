//! Scores in units of the spread that they have shown so far.

use serde::{Deserialize, Serialize};

use crate::Result;
use crate::check::finite;
use crate::named::named_enum;

named_enum! {
    /// What becomes of a score.
    pub enum ScoreScaling {
        /// It stays as it is.
        None = "none",
        /// It is divided by the running standard deviation: TRL's `use_score_scaling`.
        Std = "std",
        /// The running mean is taken from it first: TRL's `use_score_norm` besides.
        Normal = "normal",
    }
}

/// Mean and variance of all scores so far, batch by batch (Chan, Golub and LeVeque 1979). Serialise it with a checkpoint and a
/// resumed run continues bit for bit.
///
/// As in TRL, a batch is taken in before it is scaled, and the variance is Bessel's.
///
/// # Examples
/// ```
/// use pivotal_credit::{RunningScale, ScoreScaling};
/// let mut scale = RunningScale::default();
/// // Mean 2, variance 2.
/// let found = scale.scale(&[1.0, 3.0], ScoreScaling::Normal)?;
/// assert_eq!(found, [-(0.5_f32.sqrt()), 0.5_f32.sqrt()]);
/// assert_eq!((scale.mean(), scale.std()), (2.0, 2.0_f64.sqrt()));
/// # Ok::<(), pivotal_credit::Error>(())
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RunningScale {
    count: u64,
    #[serde(with = "crate::exact")]
    mean: f64,
    #[serde(with = "crate::exact")]
    squares: f64,
}

impl RunningScale {
    /// Scores seen.
    pub const fn count(&self) -> u64 {
        self.count
    }

    /// Their mean; 0 of none.
    pub const fn mean(&self) -> f64 {
        self.mean
    }

    /// Their standard deviation; 0 of fewer than two.
    pub fn std(&self) -> f64 {
        match self.count {
            0 | 1 => 0.0,
            count => (self.squares / (count - 1) as f64).sqrt(),
        }
    }

    /// Takes a batch in, and gives its scores as `scaling` says. Scores that never varied are not divided.
    ///
    /// # Errors
    /// [`Error::NotFiniteColumn`](crate::Error::NotFiniteColumn); then nothing was learnt from the batch.
    pub fn scale(&mut self, scores: &[f32], scaling: ScoreScaling) -> Result<Vec<f32>> {
        finite("scores", scores, &vec![true; scores.len()])?;
        self.take(scores);
        let std = self.std();
        let unit = if std > 0.0 { std } else { 1.0 };
        let scaled = |&score: &f32| match scaling {
            ScoreScaling::None => score,
            ScoreScaling::Std => (f64::from(score) / unit) as f32,
            ScoreScaling::Normal => ((f64::from(score) - self.mean) / unit) as f32,
        };
        Ok(scores.iter().map(scaled).collect())
    }

    fn take(&mut self, scores: &[f32]) {
        if scores.is_empty() {
            return;
        }
        let found = crate::advantage::moments(scores.iter().copied(), crate::Variance::Biased);
        let (before, here) = (self.count as f64, scores.len() as f64);
        let distance = found.mean - self.mean;
        self.squares +=
            found.variance * here + distance * distance * before * here / (before + here);
        self.mean += distance * here / (before + here);
        self.count += scores.len() as u64;
    }
}
