//! How a diagnostic moves over a run.

use std::collections::VecDeque;

use pivotal_core::statistics::{Moments, mean};
use serde::{Deserialize, Serialize};

/// The change of a value from the run's first steps to its latest: of the opposing fraction, say. It is part of a
/// checkpoint.
///
/// # Examples
/// ```
/// use pivotal_credit::Drift;
/// let mut drift = Drift::new(2);
/// [0.1, 0.3, 0.2].into_iter().for_each(|value| drift.push(value));
/// assert_eq!(drift.change(), None);
/// drift.push(0.8);
/// // The last two average 0.5, the first two 0.2.
/// assert!((drift.change().unwrap() - 0.3).abs() < 1e-12);
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Drift {
    window: usize,
    first: Moments,
    last: VecDeque<f64>,
    steps: u64,
}

impl Drift {
    /// Compares the first `window` ≥ 1 steps with the last as many.
    pub fn new(window: usize) -> Self {
        Self {
            window: window.max(1),
            first: Moments::default(),
            last: VecDeque::new(),
            steps: 0,
        }
    }

    /// Takes one step's value.
    pub fn push(&mut self, value: f64) {
        self.steps += 1;
        if self.first.count() < self.window as u64 {
            self.first.push(value);
        }
        self.last.push_back(value);
        if self.last.len() > self.window {
            self.last.pop_front();
        }
    }

    /// True before the first step.
    pub fn is_empty(&self) -> bool {
        self.steps == 0
    }

    /// Mean of the last steps; `None` until there are as many as the window.
    pub fn latest(&self) -> Option<f64> {
        if self.last.len() < self.window {
            return None;
        }
        let last: Vec<f64> = self.last.iter().copied().collect();
        mean(&last)
    }

    /// Mean of the last steps less mean of the first; `None` until the two no longer overlap.
    pub fn change(&self) -> Option<f64> {
        if self.steps < 2 * self.window as u64 {
            return None;
        }
        Some(self.latest()? - self.first.mean()?)
    }
}
