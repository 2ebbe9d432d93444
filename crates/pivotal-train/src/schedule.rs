//! The learning rate over a run.

use serde::{Deserialize, Serialize};

/// How the learning rate goes from its peak to the end of the run, after a linear warm-up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub enum Schedule {
    /// Stays at its peak.
    Constant,
    /// Falls to 0 in a line.
    #[default]
    Linear,
    /// Falls to 0 along half a cosine (Loshchilov & Hutter 2017, arXiv:1608.03983).
    Cosine,
}

impl Schedule {
    /// The factor on the peak learning rate in step `step` of `steps`, counted from 0.
    ///
    /// The warm-up's first step has 1/`warmup_steps`; the step after the last would have 0.
    ///
    /// # Examples
    /// ```
    /// use pivotal_train::Schedule;
    /// assert_eq!(Schedule::Linear.factor(0, 4, 0), 1.0);
    /// assert_eq!(Schedule::Linear.factor(3, 4, 0), 0.25);
    /// assert_eq!(Schedule::Linear.factor(0, 12, 2), 0.5);
    /// ```
    pub fn factor(self, step: u64, steps: u64, warmup_steps: u64) -> f64 {
        if step < warmup_steps {
            return (step + 1) as f64 / warmup_steps as f64;
        }
        let after = steps.saturating_sub(warmup_steps).max(1);
        let progress = (step - warmup_steps) as f64 / after as f64;
        match self {
            Self::Constant => 1.0,
            Self::Linear => (1.0 - progress).max(0.0),
            Self::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * progress.min(1.0)).cos()),
        }
    }
}
