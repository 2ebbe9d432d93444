//! Whitening over a batch's response tokens: `(x − mean) / √(variance + 1e-8)`, the mean removed or put back.
//!
//! Reference codes disagree twice, and a 3 × 3 batch of 1.2 to 2.0 shows it: with the mean kept, the first element is 0.0508
//! with the biased variance (OpenAI's port) and 0.1394 with Bessel's (TRL, torchtune). Removed is what TRL and OpenAI's port
//! do with advantages, kept with rewards; whitening rewards does harm (Huang et al. 2024, arXiv:2403.17031).

use crate::Result;
use crate::check::{finite, length};
use crate::named::named_enum;

named_enum! {
    /// What becomes of the mean.
    pub enum WhitenMean {
        /// It is removed, the result is centred: `shift_mean=True` of OpenAI's port and TRL.
        Removed = "removed",
        /// It is added back, only the spread changes: their `shift_mean=False`.
        Kept = "kept",
    }
}

named_enum! {
    /// Which variance.
    pub enum Variance {
        /// Over n: OpenAI's port.
        Biased = "biased",
        /// Over n − 1: TRL, torchtune, `torch.std`.
        Bessel = "bessel",
    }
}

/// What is added to the variance under the root.
pub const WHITEN_EPSILON: f64 = 1e-8;

/// One response's values and which of them count, both `[tokens]`.
#[derive(Debug)]
pub struct MaskedValues<'a> {
    /// The values; those that do not count are left as they are.
    pub values: &'a mut [f32],
    /// Which are the model's own tokens.
    pub response_mask: &'a [bool],
}

/// What [`whiten`] measured.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Whitened {
    /// Tokens that count.
    pub tokens: usize,
    /// Their mean; 0 of none.
    pub mean: f64,
    /// Their variance; 0 of fewer than two.
    pub variance: f64,
}

impl Variance {
    /// The variance of values whose squared distances from their mean sum to `squares`; 0 of fewer than two, where Bessel's
    /// has no value.
    pub(crate) fn of(self, squares: f64, count: usize) -> f64 {
        match (self, count) {
            (_, 0 | 1) => 0.0,
            (Self::Biased, count) => squares / count as f64,
            (Self::Bessel, count) => squares / (count - 1) as f64,
        }
    }
}

/// Mean and variance of `values`, which runs twice over the same numbers; sums in f64, in order.
pub(crate) fn moments(values: impl Iterator<Item = f32> + Clone, variance: Variance) -> Whitened {
    let (mut tokens, mut sum) = (0_usize, 0.0_f64);
    values.clone().for_each(|value| {
        tokens += 1;
        sum += f64::from(value);
    });
    let mean = sum / tokens.max(1) as f64;
    let squares: f64 = values.map(|value| (f64::from(value) - mean).powi(2)).sum();
    Whitened {
        tokens,
        mean,
        variance: variance.of(squares, tokens),
    }
}

/// Whitens a batch in place. One token, or all alike, become 0 (or stay what they are, with the mean kept).
///
/// # Errors
/// [`Error::Unequal`](crate::Error::Unequal) for a mask of another length,
/// [`Error::NotFiniteColumn`](crate::Error::NotFiniteColumn) for a value that counts and is not finite; nothing is changed then.
///
/// # Examples
/// ```
/// use pivotal_credit::{MaskedValues, Variance, WhitenMean, whiten};
/// let (mut values, response_mask) = ([1.0, 99.0, 3.0], [true, false, true]);
/// let mut batch = [MaskedValues { values: &mut values, response_mask: &response_mask }];
/// let found = whiten(&mut batch, WhitenMean::Removed, Variance::Biased)?;
/// assert_eq!((found.mean, found.variance), (2.0, 1.0));
/// assert_eq!(values, [-1.0, 99.0, 1.0]);
/// # Ok::<(), pivotal_credit::Error>(())
/// ```
pub fn whiten(
    batch: &mut [MaskedValues<'_>],
    mean: WhitenMean,
    variance: Variance,
) -> Result<Whitened> {
    for one in batch.iter() {
        length("response_mask", one.values.len(), one.response_mask.len())?;
        finite("values", one.values, one.response_mask)?;
    }
    let counted = batch.iter().flat_map(|one| {
        let pairs = one.values.iter().zip(one.response_mask);
        pairs.filter(|(_, own)| **own).map(|(&value, _)| value)
    });
    let found = moments(counted, variance);
    let scale = 1.0 / (found.variance + WHITEN_EPSILON).sqrt();
    let shift = match mean {
        WhitenMean::Removed => 0.0,
        WhitenMean::Kept => found.mean,
    };
    for one in batch {
        for (value, _) in one
            .values
            .iter_mut()
            .zip(one.response_mask)
            .filter(|(_, own)| **own)
        {
            *value = ((f64::from(*value) - found.mean) * scale + shift) as f32;
        }
    }
    Ok(found)
}
