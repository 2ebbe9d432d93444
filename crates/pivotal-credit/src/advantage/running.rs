//! REINFORCE with a running baseline (Williams 1992): R less the mean of the scores seen before.

use serde::{Deserialize, Serialize};

use crate::Result;
use crate::check::{domain, finite};

/// The mean of all scores so far, a batch counting `decay` times less with every batch after it. Serialise it with a
/// checkpoint and a resumed run continues bit for bit.
///
/// A batch is compared with the batches before it, so that the baseline does not depend on the actions it judges; the first
/// batch, with none before it, with its own mean.
///
/// # Examples
/// ```
/// use pivotal_credit::RunningBaseline;
/// let mut baseline = RunningBaseline::new(0.5)?;
/// assert_eq!(baseline.advantages(&[1.0, 3.0])?, [-1.0, 1.0]);
/// assert_eq!(baseline.advantages(&[5.0])?, [3.0]);
/// // (0.5·(1 + 3) + 5) / (0.5·2 + 1).
/// assert_eq!(baseline.mean(), Some(3.5));
/// # Ok::<(), pivotal_credit::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RunningBaseline {
    #[serde(with = "crate::exact")]
    decay: f64,
    #[serde(with = "crate::exact")]
    sum: f64,
    #[serde(with = "crate::exact")]
    weight: f64,
}

impl RunningBaseline {
    /// A baseline that has seen nothing; `decay` 0 remembers the last batch only, 1 all alike.
    ///
    /// # Errors
    /// [`Error::Value`](crate::Error::Value) outside 0 to 1.
    pub fn new(decay: f64) -> Result<Self> {
        let inside = (0.0..=1.0).contains(&decay);
        domain("decay", inside, "a number from 0 to 1", decay)?;
        Ok(Self {
            decay,
            sum: 0.0,
            weight: 0.0,
        })
    }

    /// The mean so far; `None` before any score.
    pub fn mean(&self) -> Option<f64> {
        (self.weight > 0.0).then(|| self.sum / self.weight)
    }

    /// Each score less the baseline, then takes the batch in.
    ///
    /// # Errors
    /// [`Error::NotFiniteColumn`](crate::Error::NotFiniteColumn); then nothing was learnt from the batch.
    pub fn advantages(&mut self, scores: &[f32]) -> Result<Vec<f32>> {
        finite("scores", scores, &vec![true; scores.len()])?;
        if scores.is_empty() {
            return Ok(Vec::new());
        }
        let sum: f64 = scores.iter().map(|&score| f64::from(score)).sum();
        let baseline = self.mean().unwrap_or(sum / scores.len() as f64);
        self.sum = self.decay * self.sum + sum;
        self.weight = self.decay * self.weight + scores.len() as f64;
        let less = |&score: &f32| (f64::from(score) - baseline) as f32;
        Ok(scores.iter().map(less).collect())
    }
}
