//! From log-probabilities of tokens to one number a response, over the kept tokens only (METHOD, section 8).

use burn::tensor::{Bool, Tensor, TensorData};
use pivotal_core::TokenMask;

use crate::error::{expect_len, expect_tensor_len};
use crate::response_index::factors;
use crate::{LossError, ResponseIndex};

/// What a response's kept log-probabilities are made into. `M` is 1 for a kept token, `T` the response's tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Normalisation {
    /// `Σ M·log π`: DPO as published.
    #[default]
    Sum,
    /// `Σ M·log π / ΣM`: the mean over kept tokens.
    KeptMean,
    /// `Σ M·log π · T/ΣM`: the sum, as large as if nothing had been dropped.
    RescaledSum,
}

/// The kept log-probabilities of each response, summed and normalised.
///
/// A response of which nothing is kept has the value 0 and no gradient. A dropped token has no part in value or gradient
/// even where its log-probability is not finite. With everything kept and [`Normalisation::Sum`] this is the plain sum in
/// order, bit for bit.
///
/// # Shapes
/// `token_logps` `[entries]` in nats, `keep` one flag an entry; returns `[responses]`.
///
/// # Errors
/// [`LossError::Length`] if `token_logps`, `index` and `keep` are not of one length.
///
/// # Examples
/// ```
/// use burn::tensor::{Device, Tensor};
/// use pivotal_core::TokenMask;
/// use pivotal_loss::{Normalisation, ResponseIndex, kept_sums};
/// let token_logps = Tensor::<1>::from_floats([-1.0, -2.0, -4.0], &Device::flex());
/// let index = ResponseIndex::of_whole_responses(&[2, 1]);
/// let keep = TokenMask::from(vec![false, true, true]);
/// let sums = kept_sums(token_logps, &index, &keep, Normalisation::RescaledSum).unwrap();
/// assert_eq!(sums.try_into_vec_as::<f32>().unwrap(), [-4.0, -4.0]);
/// ```
pub fn kept_sums(
    token_logps: Tensor<1>,
    index: &ResponseIndex,
    keep: &TokenMask,
    normalisation: Normalisation,
) -> Result<Tensor<1>, LossError> {
    expect_tensor_len("token_logps", &token_logps, index.entries())?;
    expect_len("keep", keep.len(), index.entries())?;
    let (device, dtype) = (token_logps.device(), token_logps.dtype());
    let sums = index.sums(zero_where_dropped(token_logps, keep));

    let kept = index.count(keep.as_slice().iter().copied());
    let per_kept = |numerator: usize, kept: usize| match kept {
        0 => 0.0,
        kept => numerator as f64 / kept as f64,
    };
    let scale: Vec<f64> = match normalisation {
        Normalisation::Sum => return Ok(sums),
        Normalisation::KeptMean => kept.iter().map(|&kept| per_kept(1, kept)).collect(),
        Normalisation::RescaledSum => index
            .response_tokens()
            .iter()
            .zip(&kept)
            .map(|(&tokens, &kept)| per_kept(tokens, kept))
            .collect(),
    };
    Ok(sums * factors(scale, &device, dtype))
}

/// The values, with 0 and no gradient where `keep` is false.
pub(crate) fn zero_where_dropped(values: Tensor<1>, keep: &TokenMask) -> Tensor<1> {
    if keep.kept() == keep.len() {
        return values;
    }
    let dropped = keep.inverted().as_slice().to_vec();
    let data = TensorData::new(dropped, [keep.len()]);
    let dropped = Tensor::<1, Bool>::from_data(data, &values.device());
    values.mask_fill(dropped, 0.0)
}
