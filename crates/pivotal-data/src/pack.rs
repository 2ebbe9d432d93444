//! From tokenised samples to tree-packed batches, within a budget of tokens, and back.

use std::ops::Range;

use pivotal_core::{Gather, Pack, TokenMask, TokenizedPair, TokenizedResponse};

use crate::error::{DataError, Result};

/// Packs pairs: each prompt once, then its chosen and its rejected response, so that responses `2i` and `2i + 1` of the
/// pack are the chosen and the rejected one of pair `i`.
///
/// # Errors
/// [`DataError::Pack`] for an empty prompt or response.
///
/// # Examples
/// ```
/// use pivotal_core::TokenizedPair;
/// let pair = TokenizedPair { id: 1, prompt: vec![5, 6], chosen: vec![7, 2], rejected: vec![8, 2] };
/// let pack = pivotal_data::pack_pairs(&[pair])?;
/// assert_eq!(pack.token_ids, [5, 6, 7, 2, 8, 2]);
/// assert_eq!(pack.position_ids, [0, 1, 2, 3, 2, 3]);
/// # Ok::<(), pivotal_data::DataError>(())
/// ```
pub fn pack_pairs<'a>(pairs: impl IntoIterator<Item = &'a TokenizedPair>) -> Result<Pack> {
    let mut pack = Pack::default();
    for pair in pairs {
        pack.push(&pair.prompt, &[&pair.chosen, &pair.rejected])?;
    }
    Ok(pack)
}

/// Packs responses in their order; neighbours with equal prompts share one copy (the samples of one prompt, say).
///
/// # Errors
/// [`DataError::Pack`] for an empty prompt or response.
pub fn pack_responses<'a>(
    responses: impl IntoIterator<Item = &'a TokenizedResponse>,
) -> Result<Pack> {
    let responses: Vec<&TokenizedResponse> = responses.into_iter().collect();
    let mut pack = Pack::default();
    for group in responses.chunk_by(|a, b| a.prompt == b.prompt) {
        let of_group: Vec<&[u32]> = group.iter().map(|one| one.response.as_slice()).collect();
        pack.push(&group[0].prompt, &of_group)?;
    }
    Ok(pack)
}

/// The sequences of a pack: the ids of prompt and response, for each response in order.
pub fn unpack(pack: &Pack) -> Vec<(Vec<u32>, Vec<u32>)> {
    let sequence = |response: usize| {
        let span = pack.response_span(response);
        let prompt = &pack.token_ids[span.prefix_start..span.prefix_start + span.prefix_len];
        (prompt.to_vec(), pack.response_ids(response).to_vec())
    };
    (0..pack.responses.len()).map(sequence).collect()
}

/// The log-probabilities of every response token, in order.
pub fn gather_all(pack: &Pack) -> Vec<Gather> {
    pack.gather(|_, _| true)
}

/// The log-probabilities of the tokens that `keep` holds, one mask a response, in order.
///
/// # Errors
/// [`DataError::MaskLength`] if the masks are not one a response, or one flag a token.
pub fn gather_kept(pack: &Pack, keep: &[TokenMask]) -> Result<Vec<Gather>> {
    if keep.len() != pack.responses.len() {
        return Err(DataError::MaskLength {
            unit: "responses",
            expected: pack.responses.len(),
            found: keep.len(),
        });
    }
    for (response, mask) in keep.iter().enumerate() {
        let expected = pack.response_span(response).len;
        if mask.len() != expected {
            return Err(DataError::MaskLength {
                unit: "tokens",
                expected,
                found: mask.len(),
            });
        }
    }
    Ok(pack.gather(|response, position| keep[response].as_slice()[position]))
}

/// Splits items that cost `token_counts` into consecutive micro-batches of at most `budget` tokens.
///
/// Greedy and in order, so the split depends on nothing else. An item above the budget is a micro-batch of its own.
///
/// # Errors
/// [`DataError::Zero`] for a budget of 0.
///
/// # Examples
/// ```
/// let batches = pivotal_data::micro_batches(&[3, 3, 9, 1], 6)?;
/// assert_eq!(batches, [0..2, 2..3, 3..4]);
/// # Ok::<(), pivotal_data::DataError>(())
/// ```
pub fn micro_batches(token_counts: &[usize], budget: usize) -> Result<Vec<Range<usize>>> {
    if budget == 0 {
        return Err(DataError::Zero { name: "budget" });
    }
    let mut batches = Vec::new();
    let (mut start, mut filled) = (0, 0usize);
    for (index, &tokens) in token_counts.iter().enumerate() {
        if index > start && filled.saturating_add(tokens) > budget {
            batches.push(start..index);
            (start, filled) = (index, 0);
        }
        filled = filled.saturating_add(tokens);
    }
    if start < token_counts.len() {
        batches.push(start..token_counts.len());
    }
    Ok(batches)
}
