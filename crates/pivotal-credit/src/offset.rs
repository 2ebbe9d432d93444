//! Widths: the offset δ around the baseline, and the jump that cuts (METHOD, sections 3 and 4).

use pivotal_core::statistics::{Moments, median_absolute_deviation};
use serde::{Deserialize, Serialize};

/// A width, given in the signal's unit or as a multiple of the batch's spread.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Width {
    /// In the signal's own unit.
    Absolute(f32),
    /// Times the sample standard deviation of the values.
    Std(f32),
    /// Times the median absolute deviation of the values from their median, unscaled.
    Mad(f32),
}

impl Width {
    /// The width as a number, given the values whose spread it may be a multiple of. Fewer than two values have no
    /// spread: a multiple of it is 0.
    ///
    /// # Examples
    /// ```
    /// use pivotal_credit::Width;
    /// // Deviations −2, 0 and 2: the sample variance is 8/2.
    /// assert_eq!(Width::Std(0.5).resolve([1.0, 3.0, 5.0]), 1.0);
    /// assert_eq!(Width::Absolute(0.25).resolve([1.0, 3.0, 5.0]), 0.25);
    /// ```
    pub fn resolve(self, values: impl IntoIterator<Item = f32>) -> f32 {
        match self {
            Self::Absolute(width) => width,
            Self::Std(times) => {
                let mut moments = Moments::default();
                values
                    .into_iter()
                    .for_each(|value| moments.push(f64::from(value)));
                (f64::from(times) * moments.standard_deviation().unwrap_or(0.0)) as f32
            }
            Self::Mad(times) => {
                let values: Vec<f32> = values.into_iter().collect();
                (f64::from(times) * median_absolute_deviation(&values).unwrap_or(0.0)) as f32
            }
        }
    }

    /// The number in it.
    pub const fn value(self) -> f32 {
        match self {
            Self::Absolute(value) | Self::Std(value) | Self::Mad(value) => value,
        }
    }
}
