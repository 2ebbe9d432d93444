//! Location and spread.

use serde::{Deserialize, Serialize};

/// The arithmetic mean; `None` of nothing.
///
/// # Examples
/// ```
/// use pivotal_core::statistics::mean;
/// assert_eq!(mean(&[1.0_f32, 2.0, 6.0]), Some(3.0));
/// assert_eq!(mean(&[true, false]), Some(0.5));
/// assert_eq!(mean::<f64>(&[]), None);
/// ```
pub fn mean<T: Copy + Into<f64>>(values: &[T]) -> Option<f64> {
    if values.is_empty() {
        return None;
    }
    Some(values.iter().map(|&value| value.into()).sum::<f64>() / values.len() as f64)
}

/// The sample standard deviation (n − 1 in the denominator); `None` of fewer than two values.
///
/// # Examples
/// ```
/// use pivotal_core::statistics::standard_deviation;
/// // Squared distances from the mean 5: 9 + 1 + 1 + 9 = 20, over 3.
/// assert_eq!(standard_deviation(&[2.0, 4.0, 6.0, 8.0]), Some((20.0_f64 / 3.0).sqrt()));
/// ```
pub fn standard_deviation<T: Copy + Into<f64>>(values: &[T]) -> Option<f64> {
    if values.len() < 2 {
        return None;
    }
    let mean = mean(values)?;
    let squares: f64 = values
        .iter()
        .map(|&value| (value.into() - mean).powi(2))
        .sum();
    Some((squares / (values.len() - 1) as f64).sqrt())
}

/// The standard error of the mean: the sample standard deviation over √n; `None` of fewer than two values.
pub fn standard_error<T: Copy + Into<f64>>(values: &[T]) -> Option<f64> {
    Some(standard_deviation(values)? / (values.len() as f64).sqrt())
}

/// The `q` quantile by linear interpolation between order statistics (type 7 of Hyndman and Fan 1996, the default of
/// NumPy and R); `None` of nothing or if `q` is outside 0 to 1.
///
/// # Examples
/// ```
/// use pivotal_core::statistics::quantile;
/// // Position 0.25 · 3 = 0.75, three quarters of the way from 1 to 2.
/// assert_eq!(quantile(&[4.0, 1.0, 2.0, 3.0], 0.25), Some(1.75));
/// ```
pub fn quantile<T: Copy + Into<f64>>(values: &[T], q: f64) -> Option<f64> {
    let mut values: Vec<f64> = values.iter().map(|&value| value.into()).collect();
    if values.is_empty() || !(0.0..=1.0).contains(&q) {
        return None;
    }
    let position = q * (values.len() - 1) as f64;
    let below = position.floor() as usize;
    let (_, &mut low, above) = values.select_nth_unstable_by(below, f64::total_cmp);
    let high = above.iter().copied().min_by(f64::total_cmp).unwrap_or(low);
    Some(low + (high - low) * (position - below as f64))
}

/// [`quantile`] of values already in ascending order, without copying them.
pub fn quantile_of_sorted<T: Copy + Into<f64>>(sorted: &[T], q: f64) -> Option<f64> {
    if sorted.is_empty() || !(0.0..=1.0).contains(&q) {
        return None;
    }
    let position = q * (sorted.len() - 1) as f64;
    let below = position.floor() as usize;
    let low: f64 = sorted[below].into();
    let high: f64 = sorted[(below + 1).min(sorted.len() - 1)].into();
    Some(low + (high - low) * (position - below as f64))
}

/// The median; `None` of nothing.
pub fn median<T: Copy + Into<f64>>(values: &[T]) -> Option<f64> {
    quantile(values, 0.5)
}

/// The median absolute deviation from the median, unscaled (times 1.4826 it estimates the standard deviation of normal
/// values); `None` of nothing.
///
/// # Examples
/// ```
/// use pivotal_core::statistics::median_absolute_deviation;
/// // Median 3; distances 2, 1, 0, 1, 97; their median is 1: the outlier does not matter.
/// assert_eq!(median_absolute_deviation(&[1.0, 2.0, 3.0, 4.0, 100.0]), Some(1.0));
/// ```
pub fn median_absolute_deviation<T: Copy + Into<f64>>(values: &[T]) -> Option<f64> {
    let center = median(values)?;
    let distances: Vec<f64> = values
        .iter()
        .map(|&value| (value.into() - center).abs())
        .collect();
    median(&distances)
}

/// Mean and variance of a stream in constant memory (Welford 1962), mergeable (Chan, Golub and LeVeque 1979).
///
/// # Examples
/// ```
/// use pivotal_core::statistics::Moments;
/// let mut moments = Moments::default();
/// for value in [2.0, 4.0, 6.0] {
///     moments.push(value);
/// }
/// assert_eq!(moments.mean(), Some(4.0));
/// assert_eq!(moments.standard_deviation(), Some(2.0));
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Moments {
    count: u64,
    mean: f64,
    squares: f64,
}

impl Moments {
    /// Takes one value in.
    pub fn push(&mut self, value: f64) {
        self.count += 1;
        let before = value - self.mean;
        self.mean += before / self.count as f64;
        self.squares += before * (value - self.mean);
    }

    /// Takes in everything `other` has seen.
    pub fn merge(&mut self, other: &Self) {
        if other.count == 0 {
            return;
        }
        let total = (self.count + other.count) as f64;
        let apart = other.mean - self.mean;
        self.squares +=
            other.squares + apart * apart * self.count as f64 * other.count as f64 / total;
        self.mean += apart * other.count as f64 / total;
        self.count += other.count;
    }

    /// How many values were taken in.
    pub const fn count(&self) -> u64 {
        self.count
    }

    /// The mean; `None` before the first value.
    pub fn mean(&self) -> Option<f64> {
        (self.count > 0).then_some(self.mean)
    }

    /// The sample variance; `None` before the second value.
    pub fn variance(&self) -> Option<f64> {
        (self.count > 1).then(|| self.squares / (self.count - 1) as f64)
    }

    /// The sample standard deviation; `None` before the second value.
    pub fn standard_deviation(&self) -> Option<f64> {
        self.variance().map(f64::sqrt)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn nothing_and_one_value_are_not_zero() {
        assert_eq!(mean::<f64>(&[]), None);
        assert_eq!(standard_deviation(&[1.0]), None);
        assert_eq!(standard_error(&[1.0]), None);
        assert_eq!(quantile::<f64>(&[], 0.5), None);
        assert_eq!(quantile(&[1.0], 1.5), None);
        assert_eq!(quantile(&[1.0], f64::NAN), None);
        assert_eq!(quantile(&[7.0], 0.3), Some(7.0));
        assert_eq!(median_absolute_deviation::<f64>(&[]), None);
        assert_eq!(Moments::default().mean(), None);
    }

    #[test]
    fn quantiles_are_those_of_numpy() {
        // numpy.quantile([15, 20, 35, 40, 50], [0, .05, .3, .4, .5, 1])
        let values = [35.0, 15.0, 50.0, 20.0, 40.0];
        let expected = [
            (0.0, 15.0),
            (0.05, 16.0),
            (0.3, 23.0),
            (0.4, 29.0),
            (0.5, 35.0),
            (1.0, 50.0),
        ];
        for (q, want) in expected {
            let got = quantile(&values, q).unwrap();
            assert!((got - want).abs() < 1e-12, "q {q}: {got}, expected {want}");
        }
    }

    #[test]
    fn a_large_offset_costs_no_precision() {
        let mut moments = Moments::default();
        for value in [4.0, 7.0, 13.0, 16.0] {
            moments.push(1e9 + value);
        }
        assert_eq!(moments.variance(), Some(30.0));
    }

    proptest! {
        #[test]
        fn merging_is_pushing(values in prop::collection::vec(-1e3..1e3_f64, 0..50), at in 0usize..50) {
            let at = at.min(values.len());
            let (mut left, mut right, mut whole) = (Moments::default(), Moments::default(), Moments::default());
            values[..at].iter().for_each(|&value| left.push(value));
            values[at..].iter().for_each(|&value| right.push(value));
            values.iter().for_each(|&value| whole.push(value));
            left.merge(&right);
            prop_assert_eq!(left.count(), whole.count());
            for (a, b) in [(left.mean(), whole.mean()), (left.variance(), whole.variance())] {
                prop_assert_eq!(a.is_some(), b.is_some());
                prop_assert!((a.unwrap_or(0.0) - b.unwrap_or(0.0)).abs() < 1e-6);
            }
            if let Some(deviation) = standard_deviation(&values) {
                prop_assert!((deviation - whole.standard_deviation().unwrap()).abs() < 1e-8);
            }
        }

        #[test]
        fn both_quantiles_agree(mut values in prop::collection::vec(-1e3..1e3_f64, 1..50), q in 0.0..=1.0_f64) {
            let selected = quantile(&values, q).unwrap();
            values.sort_by(f64::total_cmp);
            prop_assert_eq!(selected, quantile_of_sorted(&values, q).unwrap());
        }
    }
}
