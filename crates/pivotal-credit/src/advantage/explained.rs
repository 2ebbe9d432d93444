//! How much of the returns a value model explains.

use super::Variance;
use super::whiten::moments;
use crate::Result;
use crate::check::{finite, length};

/// Explained variance of one batch laid end to end: 1 − var(return − value) / var(return); 1 is perfect, 0 no better than a
/// constant, below 0 worse. `None` where the returns do not vary.
///
/// # Shapes
/// All three `[tokens]`.
///
/// # Errors
/// [`Error::Unequal`](crate::Error::Unequal) or [`Error::NotFiniteColumn`](crate::Error::NotFiniteColumn).
///
/// # Examples
/// ```
/// use pivotal_credit::explained_variance;
/// let returns = [1.0, 3.0, 50.0];
/// let mask = [true, true, false];
/// // Errors 0.5 and −0.5: variance 0.25 of 1.
/// assert_eq!(explained_variance(&[0.5, 3.5, 0.0], &returns, &mask)?, Some(0.75));
/// assert_eq!(explained_variance(&[0.0, 0.0, 0.0], &[2.0, 2.0, 2.0], &mask)?, None);
/// # Ok::<(), pivotal_credit::Error>(())
/// ```
pub fn explained_variance(
    values: &[f32],
    returns: &[f32],
    response_mask: &[bool],
) -> Result<Option<f64>> {
    length("returns", values.len(), returns.len())?;
    length("response_mask", values.len(), response_mask.len())?;
    finite("values", values, response_mask)?;
    finite("returns", returns, response_mask)?;
    let own = || (0..values.len()).filter(|&index| response_mask[index]);
    let returned = moments(own().map(|index| returns[index]), Variance::Biased).variance;
    let error = |index| returns[index] - values[index];
    let missed = moments(own().map(error), Variance::Biased).variance;
    Ok((returned > 0.0).then(|| 1.0 - missed / returned))
}
