//! 95 % confidence intervals.

use serde::{Deserialize, Serialize};

use super::{mean, standard_error, student_t_critical, student_t_p_value};

const CONFIDENCE: f64 = 0.95;

/// The standard normal's 97.5 % quantile.
const NORMAL_CRITICAL: f64 = 1.959_963_984_540_054;

/// An estimate with its two-sided 95 % confidence interval.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Interval {
    /// The point estimate.
    pub estimate: f64,
    /// Lower end.
    pub low: f64,
    /// Upper end.
    pub high: f64,
}

impl Interval {
    /// Whether `value` lies inside, ends included.
    pub fn contains(&self, value: f64) -> bool {
        self.low <= value && value <= self.high
    }

    /// Half the width: what stands after the ±.
    pub fn half_width(&self) -> f64 {
        0.5 * (self.high - self.low)
    }
}

/// How two arms differ over the same seeds or the same items.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Comparison {
    /// First minus second, averaged over the pairs.
    pub difference: Interval,
    /// Two-sided p value of the paired t test that the true difference is 0.
    pub p_value: f64,
    /// Number of pairs.
    pub pairs: usize,
}

impl Comparison {
    /// Whether the difference is significant at 5 %: exactly when its 95 % interval leaves out 0.
    pub fn significant(&self) -> bool {
        self.p_value < 1.0 - CONFIDENCE
    }
}

/// The mean with its 95 % interval by Student's t; `None` of fewer than two values, whose spread is unknown.
///
/// # Examples
/// ```
/// use pivotal_core::statistics::mean_interval;
/// // Mean 2, standard error 1/√3, critical value 4.3027 at two degrees of freedom: ± 2.4841.
/// let interval = mean_interval(&[1.0, 2.0, 3.0]).unwrap();
/// assert_eq!(interval.estimate, 2.0);
/// assert!((interval.half_width() - 2.4841).abs() < 1e-4);
/// ```
pub fn mean_interval<T: Copy + Into<f64>>(values: &[T]) -> Option<Interval> {
    let half = standard_error(values)? * student_t_critical((values.len() - 1) as f64, CONFIDENCE)?;
    let estimate = mean(values)?;
    Some(Interval {
        estimate,
        low: estimate - half,
        high: estimate + half,
    })
}

/// The paired difference `first − second` with its 95 % interval and p value; `None` of fewer than two pairs.
///
/// Pairs that all differ by the same amount have no spread: the interval is a point and p is 0 (or 1 if that amount is 0).
///
/// # Panics
/// If the two slices differ in length.
///
/// # Examples
/// ```
/// use pivotal_core::statistics::paired_difference;
/// // Differences 1, 2, 3: t = 2 / (1/√3) = 3.464 at two degrees of freedom, not enough at 5 %.
/// let comparison = paired_difference(&[2.0, 4.0, 6.0], &[1.0, 2.0, 3.0]).unwrap();
/// assert!((comparison.p_value - 0.0742).abs() < 1e-4);
/// assert!(!comparison.significant());
/// assert!(comparison.difference.contains(0.0));
/// ```
pub fn paired_difference(first: &[f64], second: &[f64]) -> Option<Comparison> {
    assert_eq!(first.len(), second.len(), "paired values differ in number");
    let differences: Vec<f64> = first.iter().zip(second).map(|(a, b)| a - b).collect();
    let difference = mean_interval(&differences)?;
    let error = standard_error(&differences)?;
    let p_value = if error > 0.0 {
        student_t_p_value(difference.estimate / error, (differences.len() - 1) as f64)
    } else if difference.estimate == 0.0 {
        1.0
    } else {
        0.0
    };
    Some(Comparison {
        difference,
        p_value,
        pairs: differences.len(),
    })
}

/// The proportion `successes / trials` with its 95 % Wilson score interval; `None` of no trial or of more successes than
/// trials. Unlike the normal interval it stays inside 0 to 1 and has width at both ends.
///
/// # Examples
/// ```
/// use pivotal_core::statistics::proportion_interval;
/// let interval = proportion_interval(0, 10).unwrap();
/// assert_eq!((interval.estimate, interval.low), (0.0, 0.0));
/// assert!((interval.high - 0.2775).abs() < 1e-4);
/// ```
pub fn proportion_interval(successes: u64, trials: u64) -> Option<Interval> {
    if trials == 0 || successes > trials {
        return None;
    }
    let n = trials as f64;
    let estimate = successes as f64 / n;
    let z2 = NORMAL_CRITICAL * NORMAL_CRITICAL;
    let center = (estimate + z2 / (2.0 * n)) / (1.0 + z2 / n);
    let half = NORMAL_CRITICAL / (1.0 + z2 / n)
        * (estimate * (1.0 - estimate) / n + z2 / (4.0 * n * n)).sqrt();
    // At 0 and n successes an end is 0 or 1 exactly; rounding must not move it.
    let low = if successes == 0 { 0.0 } else { center - half };
    let high = if successes == trials {
        1.0
    } else {
        center + half
    };
    Some(Interval {
        estimate,
        low,
        high,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn wilson_at_known_points() {
        // From mpmath 1.3.0 at 40 digits.
        for (successes, trials, low, high) in [
            (0, 10, 0.0, 0.27753279986289),
            (10, 10, 0.72246720013711, 1.0),
            (7, 10, 0.39677814746115, 0.8922087325937),
            (425, 512, 0.79511732717215, 0.8601227552608),
        ] {
            let got = proportion_interval(successes, trials).unwrap();
            assert!(
                (got.low - low).abs() < 1e-12,
                "{successes}/{trials}: {}",
                got.low
            );
            assert!(
                (got.high - high).abs() < 1e-12,
                "{successes}/{trials}: {}",
                got.high
            );
        }
        assert_eq!(proportion_interval(0, 0), None);
        assert_eq!(proportion_interval(3, 2), None);
    }

    #[test]
    fn one_value_has_no_interval() {
        assert_eq!(mean_interval(&[1.0]), None);
        assert_eq!(paired_difference(&[1.0], &[2.0]), None);
    }

    #[test]
    fn equal_differences_have_no_spread() {
        let same = paired_difference(&[1.0, 2.0], &[1.0, 2.0]).unwrap();
        assert_eq!((same.p_value, same.significant()), (1.0, false));
        let constant = paired_difference(&[2.0, 3.0], &[1.0, 2.0]).unwrap();
        assert_eq!((constant.p_value, constant.significant()), (0.0, true));
    }

    #[test]
    #[should_panic(expected = "differ in number")]
    fn unequal_lengths_are_a_bug() {
        let _ = paired_difference(&[1.0], &[]);
    }

    proptest! {
        #[test]
        fn p_and_interval_tell_the_same_story(
            pairs in prop::collection::vec((-5.0..5.0_f64, -5.0..5.0_f64), 2..12)
        ) {
            let (first, second): (Vec<f64>, Vec<f64>) = pairs.into_iter().unzip();
            let comparison = paired_difference(&first, &second).unwrap();
            prop_assume!((comparison.p_value - 0.05).abs() > 1e-6);
            prop_assert_eq!(comparison.significant(), !comparison.difference.contains(0.0));
            let back = paired_difference(&second, &first).unwrap();
            prop_assert!((back.difference.estimate + comparison.difference.estimate).abs() < 1e-12);
            prop_assert!((back.p_value - comparison.p_value).abs() < 1e-12);
        }
    }
}
