//! Everything that needs no gradient: log-probabilities and values of whole data sets.

use std::ops::Range;

use burn::tensor::Tensor;
use pivotal_core::{Pack, TokenizedPair};
use pivotal_data::micro_batches;
use pivotal_kernels::account::{Part, time};
use pivotal_model::{Decoder, RewardModel};

use crate::error::Result;

/// A prompt and the responses that share it.
#[derive(Clone, Debug)]
pub struct Group<'a> {
    /// Token ids of the prompt.
    pub prompt: &'a [u32],
    /// Token ids of each response.
    pub responses: Vec<&'a [u32]>,
}

impl<'a> Group<'a> {
    /// A pair's prompt with its chosen and its rejected response.
    pub fn of_pair(pair: &'a TokenizedPair) -> Self {
        Self {
            prompt: &pair.prompt,
            responses: vec![&pair.chosen, &pair.rejected],
        }
    }

    fn tokens(&self) -> usize {
        self.prompt.len()
            + self
                .responses
                .iter()
                .map(|response| response.len())
                .sum::<usize>()
    }
}

/// A reward model's values of one response.
#[derive(Clone, Debug, PartialEq)]
pub struct ResponseValues {
    /// The value at the last prompt token: level 0.
    pub prompt_value: f32,
    /// The value at each token, that token included, `[tokens]`.
    pub levels: Vec<f32>,
}

impl ResponseValues {
    /// Those of a response of `pack`, out of the values at all that is read of it.
    pub(crate) fn of(pack: &Pack, response: usize, values: &[f32]) -> Self {
        let span = pack.response_span(response);
        let first = pack.row_of(span.start);
        Self {
            prompt_value: values[pack.row_of(pack.prompt_end(response))],
            levels: values[first..first + span.len].to_vec(),
        }
    }
}

/// The log-probability of every response token under `decoder`, in nats, `[groups][responses][tokens]`.
///
/// `micro_batch_tokens` bounds the tokens of a forward pass (a single group may exceed it).
///
/// # Errors
/// If a sequence does not fit the model.
pub fn token_logps(
    decoder: &Decoder,
    groups: &[Group<'_>],
    micro_batch_tokens: usize,
) -> Result<Vec<Vec<Vec<f32>>>> {
    token_logps_told(decoder, groups, micro_batch_tokens, &mut |_| ())
}

/// [`token_logps`], which tells `done` how many groups it has been through, pass by pass.
pub(crate) fn token_logps_told(
    decoder: &Decoder,
    groups: &[Group<'_>],
    micro_batch_tokens: usize,
    done: &mut dyn FnMut(usize),
) -> Result<Vec<Vec<Vec<f32>>>> {
    let decoder = decoder.detached();
    let mut all = Vec::with_capacity(groups.len());
    for range in ranges(groups, micro_batch_tokens)? {
        let groups = &groups[range];
        let pack = time(Part::Pack, || pack(groups))?;
        let gathers = pack.gather(|_, _| true);
        if gathers.is_empty() {
            all.extend(groups.iter().map(|_| Vec::new()));
        } else {
            let (pack, gathers) = decoder.needed(&pack, &gathers)?;
            let logps = values(decoder.token_logps(&decoder.hidden(&pack)?, &gathers));
            all.extend(split(groups, &logps));
        }
        done(all.len());
    }
    Ok(all)
}

/// The value of every response token under `model`, `[groups][responses]`.
///
/// # Errors
/// If a sequence does not fit the model.
pub fn token_values(
    model: &RewardModel,
    groups: &[Group<'_>],
    micro_batch_tokens: usize,
) -> Result<Vec<Vec<ResponseValues>>> {
    token_values_told(model, groups, micro_batch_tokens, &mut |_| ())
}

/// [`token_values`], which tells `done` how many groups it has been through, pass by pass.
pub(crate) fn token_values_told(
    model: &RewardModel,
    groups: &[Group<'_>],
    micro_batch_tokens: usize,
    done: &mut dyn FnMut(usize),
) -> Result<Vec<Vec<ResponseValues>>> {
    let model = model.detached();
    let mut all = Vec::with_capacity(groups.len());
    for range in ranges(groups, micro_batch_tokens)? {
        let groups = &groups[range];
        let pack = time(Part::Pack, || pack(groups))?;
        if pack.responses.is_empty() {
            all.extend(groups.iter().map(|_| Vec::new()));
            done(all.len());
            continue;
        }
        // The levels are those of the response tokens and of the token before each response.
        let ends = (0..pack.responses.len()).map(|response| pack.prompt_end(response));
        let read = ends.chain(pack.response_tokens()).collect();
        let pack = pack.reading(read);
        let levels = values(model.values(&pack)?);
        let mut response = 0;
        for group in groups {
            let scored = group.responses.iter().map(|_| {
                response += 1;
                ResponseValues::of(&pack, response - 1, &levels)
            });
            all.push(scored.collect());
        }
        done(all.len());
    }
    Ok(all)
}

fn ranges(groups: &[Group<'_>], budget: usize) -> Result<Vec<Range<usize>>> {
    let tokens: Vec<usize> = groups.iter().map(Group::tokens).collect();
    Ok(micro_batches(&tokens, budget)?)
}

fn pack(groups: &[Group<'_>]) -> Result<Pack> {
    let mut pack = Pack::default();
    for group in groups {
        pack.push(group.prompt, &group.responses)?;
    }
    Ok(pack)
}

fn split(groups: &[Group<'_>], logps: &[f32]) -> Vec<Vec<Vec<f32>>> {
    let mut rest = logps;
    let mut take = |count: usize| {
        let (head, tail) = rest.split_at(count);
        rest = tail;
        head.to_vec()
    };
    groups
        .iter()
        .map(|group| {
            group
                .responses
                .iter()
                .map(|response| take(response.len()))
                .collect()
        })
        .collect()
}

/// A number for the metrics, in which an infinite one would be null, which says that nothing was measured: what overflows f32
/// counts as the largest that f32 can hold.
pub(crate) fn held(value: f32) -> f64 {
    f64::from(match value == f32::INFINITY {
        true => f32::MAX,
        false => value,
    })
}

/// A tensor's values in host memory.
pub(crate) fn values<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor
        .into_data()
        .try_to_vec::<f32>()
        .expect("models compute in f32")
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::Device;
    use pivotal_model::{HeadInit, load};

    fn decoder() -> Decoder {
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("../pivotal-model/tests/golden/llama");
        let checkpoint = load(&path).unwrap();
        let precision = pivotal_ops::Precision::F32;
        Decoder::from_checkpoint(&checkpoint, &Device::flex(), precision).unwrap()
    }

    #[test]
    fn a_last_token_that_is_not_computed_is_checked_all_the_same() {
        let decoder = decoder();
        let config = decoder.config();
        let long = vec![3; config.max_positions];
        let unknown = [4, config.vocab_size as u32];
        for (response, fits) in [
            (&long[1..], true),
            (&long[..], false),
            (&unknown[..], false),
        ] {
            let group = Group {
                prompt: &[5],
                responses: vec![response],
            };
            assert_eq!(token_logps(&decoder, &[group], 1).is_ok(), fits);
        }
    }

    #[test]
    fn scoring_tells_after_each_pass_how_far_it_is() {
        let decoder = decoder();
        let group = |responses: usize| Group {
            prompt: &[3, 4],
            responses: vec![&[5, 6, 7]; responses],
        };
        let groups = [group(1), group(2), group(1), group(0)];
        let (mut logps, mut levels) = (Vec::new(), Vec::new());
        let scored = token_logps_told(&decoder, &groups, 13, &mut |done| logps.push(done)).unwrap();
        assert_eq!(logps, [2, 4]);
        assert_eq!(
            scored.iter().map(Vec::len).collect::<Vec<_>>(),
            [1, 2, 1, 0]
        );
        let model = RewardModel::new(decoder, HeadInit::Zero, 1).unwrap();
        token_values_told(&model, &groups, 1, &mut |done| levels.push(done)).unwrap();
        assert_eq!(levels, [1, 2, 3, 4]);
    }
}
