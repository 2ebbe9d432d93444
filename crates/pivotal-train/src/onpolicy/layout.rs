//! The packed passes of an update, and log-probabilities taken from them.

use std::ops::Range;

use burn::tensor::Tensor;
use pivotal_core::{Gather, Pack, random_stream};
use pivotal_kernels::account::{Part, time};
use pivotal_model::{Decoder, ForwardPass};
use rand::Rng;

use super::prompts::Prompt;
use super::sample::{Rollout, groups_of};
use crate::activations::Activations;
use crate::error::Result;
use crate::score::values;

/// One packed pass.
#[derive(Clone, Debug)]
pub struct MicroBatch {
    /// The prompts and their responses.
    pub pack: Pack,
    /// Index among the rollouts of each of the pack's responses.
    pub responses: Vec<usize>,
}

/// Which responses go through which pass: minibatches (an optimizer step each) of micro-batches.
#[derive(Clone, Debug)]
pub struct Layout {
    /// The minibatches.
    pub minibatches: Vec<Vec<MicroBatch>>,
}

/// How far decoding's log-probabilities are from training's: different orders of the same sums.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct SamplingGap {
    /// Mean absolute difference, in nats.
    pub mean: f64,
    /// The largest, in nats.
    pub max: f64,
}

/// Cuts the rollouts into units of at most `budget` tokens, prompt included, where one response leaves a choice. Only rollouts for
/// which `live` says so take part.
pub fn units(
    prompts: &[&Prompt],
    rollouts: &[Rollout],
    budget: usize,
    live: impl Fn(usize) -> bool,
) -> Vec<Vec<usize>> {
    let mut units: Vec<Vec<usize>> = Vec::new();
    for group in groups_of(rollouts) {
        let prompt = prompts[rollouts[group.start].prompt].token_ids.len();
        let (mut unit, mut tokens) = (Vec::new(), prompt);
        for index in group.filter(|&index| live(index)) {
            let response = rollouts[index].token_ids.len();
            if !unit.is_empty() && tokens + response > budget {
                units.push(std::mem::take(&mut unit));
                tokens = prompt;
            }
            unit.push(index);
            tokens += response;
        }
        if !unit.is_empty() {
            units.push(unit);
        }
    }
    units
}

impl Layout {
    /// Deals `units` out to `minibatches` parts, as even as can be, in an order that `stream` names and the run's `seed` draws;
    /// fewer parts if there are fewer units.
    ///
    /// # Errors
    /// If the micro-batches' budget is 0, or a sequence cannot be packed.
    pub fn new(
        prompts: &[&Prompt],
        rollouts: &[Rollout],
        mut units: Vec<Vec<usize>>,
        minibatches: usize,
        micro_batch_tokens: usize,
        (seed, stream): (u64, &str),
    ) -> Result<Self> {
        let mut random = random_stream(seed, stream);
        for last in (1..units.len()).rev() {
            let drawn = (u128::from(random.next_u64()) * (last as u128 + 1)) >> 64;
            units.swap(last, drawn as usize);
        }
        let parts = minibatches.clamp(1, units.len().max(1));
        let edge = |part: usize| part * units.len() / parts;
        let minibatch = |part: usize| {
            let mut units = units[edge(part)..edge(part + 1)].to_vec();
            // Back in order: neighbours share their prompts, and the order within a minibatch changes nothing.
            units.sort_unstable();
            micro_batches(prompts, rollouts, &units, micro_batch_tokens)
        };
        let minibatches = (0..parts).map(minibatch);
        let minibatches = minibatches.collect::<Result<Vec<Vec<MicroBatch>>>>()?;
        Ok(Self {
            minibatches: minibatches
                .into_iter()
                .filter(|minibatch| !minibatch.is_empty())
                .collect(),
        })
    }

    /// The log-probability of every token of every rollout here under `decoder`, at `temperature`, in nats; empty for rollouts
    /// that are not here.
    ///
    /// For the policy itself these are exactly what the first update computes before it changes anything: the same passes.
    ///
    /// # Errors
    /// If a sequence does not fit the model.
    pub fn token_logps(
        &self,
        decoder: &Decoder,
        rollouts: &[Rollout],
        temperature: f64,
    ) -> Result<Vec<Vec<f32>>> {
        let decoder = decoder.detached();
        let mut logps: Vec<Vec<f32>> = vec![Vec::new(); rollouts.len()];
        for micro in self.minibatches.iter().flatten() {
            let gathers = micro.pack.gather(|_, _| true);
            let hidden = decoder.hidden(&micro.pack)?;
            let all = values(tempered_logps(&decoder, &hidden, &gathers, temperature));
            for (gather, logp) in gathers.iter().zip(all) {
                logps[micro.responses[gather.response]].push(logp);
            }
        }
        Ok(logps)
    }
}

impl MicroBatch {
    /// The forward pass that a loss is made of.
    ///
    /// # Errors
    /// If a sequence does not fit the model.
    pub fn forward(&self, policy: &Decoder, activations: Activations) -> Result<ForwardPass> {
        let recomputed = activations.recomputed_layers(policy, self.pack.len());
        Ok(policy.forward(&self.pack, recomputed)?)
    }

    /// Log-probabilities of the gathered tokens at `temperature`, `[gathers]` in nats.
    pub fn token_logps(
        decoder: &Decoder,
        hidden: &Tensor<2>,
        gathers: &[Gather],
        temperature: f64,
    ) -> Tensor<1> {
        tempered_logps(decoder, hidden, gathers, temperature)
    }

    /// One number a gathered token, out of one list a rollout.
    pub fn gathered(&self, gathers: &[Gather], of: &[Vec<f32>]) -> Vec<f32> {
        let value = |gather: &Gather| of[self.responses[gather.response]][gather.position];
        gathers.iter().map(value).collect()
    }
}

/// Logits are linear in the hidden state: dividing the one divides the other.
fn tempered_logps(
    decoder: &Decoder,
    hidden: &Tensor<2>,
    gathers: &[Gather],
    temperature: f64,
) -> Tensor<1> {
    match temperature == 1.0 {
        true => decoder.token_logps(hidden, gathers),
        false => {
            let scaled = hidden.clone().mul_scalar(temperature.recip());
            decoder.token_logps(&scaled, gathers)
        }
    }
}

fn micro_batches(
    prompts: &[&Prompt],
    rollouts: &[Rollout],
    units: &[Vec<usize>],
    micro_batch_tokens: usize,
) -> Result<Vec<MicroBatch>> {
    let prompt = |unit: &[usize]| &prompts[rollouts[unit[0]].prompt].token_ids;
    let tokens = |unit: &Vec<usize>| {
        let responses = unit.iter().map(|&index| rollouts[index].token_ids.len());
        prompt(unit).len() + responses.sum::<usize>()
    };
    let counts: Vec<usize> = units.iter().map(tokens).collect();
    let ranges = pivotal_data::micro_batches(&counts, micro_batch_tokens)?;
    let micro_batch = |range: Range<usize>| {
        let mut pack = Pack::default();
        for unit in &units[range.clone()] {
            let responses: Vec<&[u32]> = unit
                .iter()
                .map(|&index| &rollouts[index].token_ids[..])
                .collect();
            pack.push(prompt(unit), &responses)?;
        }
        let responses = units[range].iter().flatten().copied().collect();
        Ok(MicroBatch { pack, responses })
    };
    time(Part::Pack, || ranges.into_iter().map(micro_batch).collect())
}

/// How far `recomputed` is from what decoding said, over the rollouts that were recomputed.
pub fn gap(rollouts: &[Rollout], recomputed: &[Vec<f32>]) -> SamplingGap {
    let (mut sum, mut max, mut tokens) = (0.0, 0.0_f64, 0_usize);
    for (rollout, recomputed) in rollouts.iter().zip(recomputed) {
        for (sampled, recomputed) in rollout.sampled_logps.iter().zip(recomputed) {
            let difference = f64::from((sampled - recomputed).abs());
            sum += difference;
            max = max.max(difference);
            tokens += 1;
        }
    }
    SamplingGap {
        mean: sum / tokens.max(1) as f64,
        max,
    }
}
