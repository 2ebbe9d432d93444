//! KTO's baseline: responses behind prompts that are not theirs.
//!
//! Each row takes the responses of the next row whose prompt is another one, the first following the last, as TRL shifts
//! its completions by one. The rows are fixed by the data, so their reference log-probabilities are computed once.

use burn::tensor::{Tensor, TensorData};
use pivotal_core::{TokenMask, TokenizedPair};
use pivotal_data::{micro_batches, pack_pairs};
use pivotal_loss::{Normalisation, kept_sums, kto_baseline};
use pivotal_model::Decoder;

use super::{DpoItem, item_tokens, reference_logps, response_index};
use crate::error::{Error, Result};
use crate::score::values;

/// A prompt with another row's responses, of which the same tokens are kept as behind their own.
#[derive(Clone, Debug)]
pub struct Mismatched {
    /// The tokens, under the id of the prompt's row.
    pub pair: TokenizedPair,
    /// Which response tokens count, chosen then rejected.
    pub keep: [TokenMask; 2],
}

/// The mismatched row of every pair; `max_tokens` bounds prompt and response together, and cuts the response.
///
/// # Errors
/// [`Error::OnePrompt`] if all pairs have the same prompt.
pub fn mismatched(
    pairs: &[TokenizedPair],
    keep: &[[TokenMask; 2]],
    max_tokens: usize,
) -> Result<Vec<Mismatched>> {
    if pairs.iter().all(|pair| pair.prompt == pairs[0].prompt) {
        return Err(Error::OnePrompt);
    }
    let row = |(at, pair): (usize, &TokenizedPair)| {
        let others = (1..pairs.len()).map(|step| (at + step) % pairs.len());
        let other = others
            .into_iter()
            .find(|&other| pairs[other].prompt != pair.prompt)
            .ok_or(Error::OnePrompt)?;
        let room = max_tokens.saturating_sub(pair.prompt.len()).max(1);
        let cut = |ids: &[u32]| ids[..ids.len().min(room)].to_vec();
        let cut_mask = |mask: &TokenMask| {
            let flags = mask.as_slice();
            TokenMask::from(flags[..flags.len().min(room)].to_vec())
        };
        Ok(Mismatched {
            pair: TokenizedPair {
                id: pair.id,
                prompt: pair.prompt.clone(),
                chosen: cut(&pairs[other].chosen),
                rejected: cut(&pairs[other].rejected),
            },
            keep: keep[other].each_ref().map(cut_mask),
        })
    };
    pairs.iter().enumerate().map(row).collect()
}

/// z of the step: the mean log-ratio of its items' mismatched responses over their kept tokens, or 0; `[1]`, in nats.
pub(super) fn baseline(
    policy: &Decoder,
    items: &[&DpoItem],
    micro_batch_tokens: usize,
    step: u64,
) -> Result<Tensor<1>> {
    let rows: Vec<&DpoItem> = items
        .iter()
        .filter_map(|item| item.mismatched.as_deref())
        .collect();
    let policy = policy.detached();
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    let tokens: Vec<usize> = rows.iter().map(|row| item_tokens(row)).collect();
    for range in micro_batches(&tokens, micro_batch_tokens)? {
        let rows = &rows[range];
        let pack = pack_pairs(rows.iter().map(|row| &row.pair))?;
        let kept = |response: usize, position: usize| {
            rows[response / 2].keep[response % 2].as_slice()[position]
        };
        let gathers = pack.gather(kept);
        if gathers.is_empty() {
            ours.extend(std::iter::repeat_n(0.0, 2 * rows.len()));
            theirs.extend(std::iter::repeat_n(0.0, 2 * rows.len()));
            continue;
        }
        let index = response_index(&pack, &gathers)?;
        let (pack, gathers) = policy.needed(&pack, &gathers)?;
        let all = TokenMask::all(gathers.len());
        let sums = |logps| kept_sums(logps, &index, &all, Normalisation::Sum).map(values);
        ours.extend(sums(policy.token_logps(&policy.hidden(&pack)?, &gathers))?);
        theirs.extend(sums(reference_logps(rows, &gathers, policy.device()))?);
    }
    // The cut at 0 would hide what is not a number.
    let finite = ours.iter().zip(&theirs).map(|(a, b)| (a - b).is_finite());
    let bad = finite.enumerate().filter(|(_, finite)| !finite);
    let mut samples: Vec<u64> = bad.map(|(at, _)| rows[at / 2].pair.id).collect();
    samples.dedup();
    if !samples.is_empty() {
        return Err(Error::NotFinite {
            step,
            metric: "kto_baseline",
            samples,
        });
    }
    let tensor = |sums: Vec<f32>| {
        let count = sums.len();
        Tensor::from_data(TensorData::new(sums, [count]), policy.device())
    };
    Ok(kto_baseline(tensor(ours), tensor(theirs))?)
}
