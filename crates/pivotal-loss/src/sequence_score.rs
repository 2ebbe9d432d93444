//! From the values of a response's tokens to the response's score.

use burn::tensor::Tensor;

use crate::error::expect_tensor_len;
use crate::response_index::{factors, indices};
use crate::{LossError, ResponseIndex};

/// How token values become a sequence's score.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum ScoreAggregation {
    /// Their mean: every token's value means something, whatever the length.
    #[default]
    Mean,
    /// Their sum: a longer response can score more.
    Sum,
    /// The last token's value, as most reward models do.
    Last,
}

/// The score of each response.
///
/// # Shapes
/// `token_values` `[entries]`; returns `[responses]`.
///
/// # Errors
/// [`LossError::Length`] if `index` has another length; [`LossError::NoToken`] if a response has no entry.
///
/// # Examples
/// ```
/// use burn::tensor::{Device, Tensor};
/// use pivotal_loss::{ResponseIndex, ScoreAggregation, sequence_scores};
/// let values = Tensor::<1>::from_floats([1.0, 3.0, 5.0], &Device::flex());
/// let index = ResponseIndex::of_whole_responses(&[2, 1]);
/// let scores = sequence_scores(values, &index, ScoreAggregation::Mean).unwrap();
/// assert_eq!(scores.try_into_vec_as::<f32>().unwrap(), [2.0, 5.0]);
/// ```
pub fn sequence_scores(
    token_values: Tensor<1>,
    index: &ResponseIndex,
    aggregation: ScoreAggregation,
) -> Result<Tensor<1>, LossError> {
    expect_tensor_len("token_values", &token_values, index.entries())?;
    let counts = index.count(std::iter::repeat_n(true, index.entries()));
    if let Some(response) = counts.iter().position(|&count| count == 0) {
        return Err(LossError::NoToken { response });
    }
    let (device, dtype) = (token_values.device(), token_values.dtype());
    Ok(match aggregation {
        ScoreAggregation::Sum => index.sums(token_values),
        ScoreAggregation::Mean => {
            let scale = counts.iter().map(|&count| 1.0 / count as f64).collect();
            index.sums(token_values) * factors(scale, &device, dtype)
        }
        ScoreAggregation::Last => {
            let mut last = vec![0; index.responses()];
            for (entry, &response) in index.response_of().iter().enumerate() {
                last[response] = entry;
            }
            token_values.select(0, indices(&last, &device))
        }
    })
}
