//! The sign of a segment, or of a whole response.

use serde::{Deserialize, Serialize};

/// Positive, negative or neither (METHOD, section 5).
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize,
)]
#[serde(rename_all = "lowercase")]
#[repr(i8)]
pub enum Sign {
    /// Below the baseline by more than the offset.
    Negative = -1,
    /// Within the offset of the baseline: neither reinforced nor suppressed.
    #[default]
    Neutral = 0,
    /// Above the baseline by more than the offset.
    Positive = 1,
}

impl Sign {
    /// The sign of `score` around `baseline`, neutral within `offset` of it and when `score` is not a number.
    ///
    /// # Examples
    /// ```
    /// use pivotal_core::Sign;
    /// assert_eq!(Sign::of(0.7, 0.5, 0.1), Sign::Positive);
    /// assert_eq!(Sign::of(0.55, 0.5, 0.1), Sign::Neutral);
    /// ```
    #[inline]
    pub fn of(score: f32, baseline: f32, offset: f32) -> Self {
        if score > baseline + offset {
            Self::Positive
        } else if score < baseline - offset {
            Self::Negative
        } else {
            Self::Neutral
        }
    }

    /// −1, 0 or +1.
    pub const fn as_i8(self) -> i8 {
        self as i8
    }
}
