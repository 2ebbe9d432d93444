//! Whose each entry of a flat token tensor is.

use burn::tensor::{DType, Device, IndexingUpdateOp, Int, Tensor, TensorData};

use crate::LossError;

/// Which response of the batch each entry of a flat tensor of tokens belongs to.
///
/// Responses need not have an entry for each of their tokens: a batch may hold the log-probabilities of kept tokens only.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ResponseIndex {
    response_of: Vec<usize>,
    response_tokens: Vec<usize>,
}

impl ResponseIndex {
    /// The index of responses that lie one after the other, every token present. An empty response is allowed.
    ///
    /// # Examples
    /// ```
    /// let index = pivotal_loss::ResponseIndex::of_whole_responses(&[2, 1]);
    /// assert_eq!(index.response_of(), [0, 0, 1]);
    /// ```
    pub fn of_whole_responses(response_tokens: &[usize]) -> Self {
        let response_of = response_tokens
            .iter()
            .enumerate()
            .flat_map(|(response, &tokens)| std::iter::repeat_n(response, tokens))
            .collect();
        Self {
            response_of,
            response_tokens: response_tokens.to_vec(),
        }
    }

    /// The index of chosen tokens: entry `i` is one of response `response_of[i]`, which has `response_tokens` tokens in all.
    ///
    /// # Errors
    /// [`LossError::NoSuchResponse`] if an entry names a response that is not there.
    pub fn of_entries(
        response_of: Vec<usize>,
        response_tokens: Vec<usize>,
    ) -> Result<Self, LossError> {
        let responses = response_tokens.len();
        let outside = response_of
            .iter()
            .enumerate()
            .find(|&(_, &response)| response >= responses);
        match outside {
            Some((token, &found)) => Err(LossError::NoSuchResponse {
                token,
                found,
                responses,
            }),
            None => Ok(Self {
                response_of,
                response_tokens,
            }),
        }
    }

    /// The response of each entry, `[entries]`.
    pub fn response_of(&self) -> &[usize] {
        &self.response_of
    }

    /// Tokens of each response, present as entries or not, `[responses]`.
    pub fn response_tokens(&self) -> &[usize] {
        &self.response_tokens
    }

    /// Entries.
    pub fn entries(&self) -> usize {
        self.response_of.len()
    }

    /// Responses.
    pub fn responses(&self) -> usize {
        self.response_tokens.len()
    }

    /// How many entries with a true flag each response has, `[responses]`.
    pub(crate) fn count(&self, flags: impl IntoIterator<Item = bool>) -> Vec<usize> {
        let mut counts = vec![0; self.responses()];
        for (&response, _) in self
            .response_of
            .iter()
            .zip(flags)
            .filter(|&(_, counts)| counts)
        {
            counts[response] += 1;
        }
        counts
    }

    /// The sum of each response's entries, in their order, `[responses]`; 0 for a response without any.
    pub(crate) fn sums(&self, values: Tensor<1>) -> Tensor<1> {
        let device = values.device();
        let zeros = Tensor::zeros([self.responses()], (&device, values.dtype()));
        if self.response_of.is_empty() {
            return zeros;
        }
        let indices = indices(&self.response_of, &device);
        zeros.select_assign(0, indices, values, IndexingUpdateOp::Add)
    }
}

/// An integer tensor of positions.
pub(crate) fn indices(positions: &[usize], device: &Device) -> Tensor<1, Int> {
    let positions: Vec<i64> = positions.iter().map(|&position| position as i64).collect();
    let len = positions.len();
    Tensor::from_data(TensorData::new(positions, [len]), device)
}

/// Constant factors, in the type of the tensor they multiply.
pub(crate) fn factors(values: Vec<f64>, device: &Device, dtype: DType) -> Tensor<1> {
    let len = values.len();
    Tensor::from_data(TensorData::new(values, [len]), (device, dtype))
}
