//! What sampling needs of one row of logits.

use crate::lanes::{exp, maximum};

/// `ln Σ e^x`, in nats; negative infinity for an empty row.
///
/// # Examples
/// ```
/// assert_eq!(pivotal_kernels::log_sum_exp(&[1000.0, 1000.0]), 1000.0 + 2f32.ln());
/// ```
#[must_use]
pub fn log_sum_exp(row: &[f32]) -> f32 {
    let shift = maximum(row);
    if shift.is_infinite() {
        // All is -inf (or nothing is there), or +inf wins; NaN elsewhere is still NaN through the sum below.
        return if row.iter().any(|x| x.is_nan()) {
            f32::NAN
        } else {
            shift
        };
    }
    shift + exp_sum(row, shift).ln()
}

/// `Σ e^(x - shift)`, in an order fixed by the length.
#[inline]
pub(crate) fn exp_sum(row: &[f32], shift: f32) -> f32 {
    let mut sums = [0.0f32; 16];
    let (blocks, rest) = row.as_chunks::<16>();
    for block in blocks {
        for (sum, &x) in sums.iter_mut().zip(block) {
            *sum += exp(x - shift);
        }
    }
    rest.iter()
        .fold(crate::lanes::sum(&sums), |sum, &x| sum + exp(x - shift))
}

/// [`exp_sum`], bit for bit, that leaves `e^(x - shift)` in the place of each `x`.
#[inline]
pub(crate) fn exp_sum_in_place(row: &mut [f32], shift: f32) -> f32 {
    let mut sums = [0.0f32; 16];
    let (blocks, rest) = row.as_chunks_mut::<16>();
    for block in blocks {
        for (sum, x) in sums.iter_mut().zip(block) {
            *x = exp(*x - shift);
            *sum += *x;
        }
    }
    rest.iter_mut().fold(crate::lanes::sum(&sums), |sum, x| {
        *x = exp(*x - shift);
        sum + *x
    })
}

/// The index of the largest element, the first of equals; `None` for an empty row or one of NaN only. NaN is never largest.
///
/// # Examples
/// ```
/// assert_eq!(pivotal_kernels::argmax(&[0.5, 2.0, 2.0]), Some(1));
/// ```
#[must_use]
pub fn argmax(row: &[f32]) -> Option<usize> {
    let largest = maximum(row);
    // In blocks, so that the search vectorises.
    let block = row
        .chunks(SEARCH)
        .position(|block| block.iter().fold(false, |found, &x| found | (x == largest)))?;
    let start = block * SEARCH;
    let within = row[start..].iter().position(|&x| x == largest)?;
    Some(start + within)
}

/// Elements looked through at once.
const SEARCH: usize = 256;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::random;

    #[test]
    fn log_sum_exp_agrees_with_f64() {
        for len in [1, 2, 15, 16, 17, 63, 64, 65, 1000] {
            let row: Vec<f32> = random(len, 1).iter().map(|x| x * 30.0).collect();
            let expected = row.iter().map(|&x| f64::from(x).exp()).sum::<f64>().ln();
            assert!((f64::from(log_sum_exp(&row)) - expected).abs() < 1e-5);
        }
    }

    #[test]
    fn edges() {
        assert_eq!(log_sum_exp(&[]), f32::NEG_INFINITY);
        assert_eq!(log_sum_exp(&[f32::NEG_INFINITY; 3]), f32::NEG_INFINITY);
        assert_eq!(log_sum_exp(&[f32::NEG_INFINITY, 2.0]), 2.0);
        assert_eq!(log_sum_exp(&[f32::INFINITY, 2.0]), f32::INFINITY);
        assert!(log_sum_exp(&[f32::NAN, 2.0]).is_nan());
        assert!(log_sum_exp(&[f32::NAN]).is_nan());
        assert_eq!(argmax(&[]), None);
        assert_eq!(argmax(&[f32::NAN, -1.0]), Some(1));
        assert_eq!(argmax(&[f32::NEG_INFINITY]), Some(0));
        assert_eq!(argmax(&[f32::NAN; 300]), None);
        assert_eq!(argmax(&[f32::NAN, f32::NEG_INFINITY]), Some(1));
        for len in [1, 63, 64, 65] {
            let mut row = vec![-1.0; len];
            row[len - 1] = 2.0;
            assert_eq!(argmax(&row), Some(len - 1));
        }
        let mut long = [0.0; 1000];
        (long[700], long[701]) = (1.0, 1.0);
        assert_eq!(argmax(&long), Some(700));
    }
}
