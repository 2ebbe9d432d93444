//! An affine map that gives scores mean 0 and standard deviation 1 under the reference policy.

use serde::{Deserialize, Serialize};

use crate::Result;
use crate::advantage::Variance;
use crate::check::{domain, finite};

/// `gain · score + bias`: fitted on the scores of reference samples before (and after) a reward model is trained, and
/// recorded, for Bradley-Terry leaves the zero of a score free (Stiennon et al. 2020; OpenAI's `lm-human-preferences`).
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ScoreNormalisation {
    /// 1 / standard deviation (biased).
    pub gain: f64,
    /// − mean · gain.
    pub bias: f64,
}

impl ScoreNormalisation {
    /// Changes nothing.
    pub const IDENTITY: Self = Self {
        gain: 1.0,
        bias: 0.0,
    };

    /// The map under which `scores` have mean 0 and standard deviation 1.
    ///
    /// # Errors
    /// [`Error::NotFiniteColumn`](crate::Error::NotFiniteColumn), or [`Error::Value`](crate::Error::Value) if the scores are
    /// all alike: no gain gives those a spread.
    ///
    /// # Examples
    /// ```
    /// use pivotal_credit::ScoreNormalisation;
    /// let fitted = ScoreNormalisation::fit(&[1.0, 5.0])?;
    /// assert_eq!((fitted.apply(1.0), fitted.apply(3.0), fitted.apply(5.0)), (-1.0, 0.0, 1.0));
    /// # Ok::<(), pivotal_credit::Error>(())
    /// ```
    pub fn fit(scores: &[f32]) -> Result<Self> {
        finite("scores", scores, &vec![true; scores.len()])?;
        let found = crate::advantage::moments(scores.iter().copied(), Variance::Biased);
        let varied = found.variance > 0.0;
        domain("scores", varied, "at least two different scores", "one")?;
        let gain = 1.0 / found.variance.sqrt();
        Ok(Self {
            gain,
            bias: -found.mean * gain,
        })
    }

    /// The normalised score.
    pub fn apply(&self, score: f32) -> f32 {
        (self.gain * f64::from(score) + self.bias) as f32
    }
}
