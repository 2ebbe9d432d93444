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

/// The rollouts of one optimizer step.
#[derive(Clone, Debug)]
pub struct Minibatch {
    /// Their indices, those that no pass needs included: denominators count them.
    pub rollouts: Vec<usize>,
    /// The passes over those that are live.
    pub micro_batches: Vec<MicroBatch>,
}

/// Which responses go through which pass: minibatches (an optimizer step each) of micro-batches.
#[derive(Clone, Debug)]
pub struct Layout {
    /// The minibatches.
    pub minibatches: Vec<Minibatch>,
}

/// How a layout is cut.
#[derive(Clone, Copy, Debug)]
pub struct Cutting<'a> {
    /// Minibatches to deal the rollouts out to.
    pub minibatches: usize,
    /// Tokens in one pass at most, where one response leaves a choice.
    pub micro_batch_tokens: usize,
    /// The run's seed.
    pub seed: u64,
    /// The stream that draws the order.
    pub stream: &'a str,
}

/// How far decoding's log-probabilities are from training's: different orders of the same sums.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct SamplingGap {
    /// Mean absolute difference, in nats.
    pub mean: f64,
    /// The largest, in nats.
    pub max: f64,
}

/// Cuts the rollouts into units, responses to one prompt that stay together, of at most `budget` tokens with their prompt, where
/// one response leaves a choice.
fn units(prompts: &[&Prompt], rollouts: &[Rollout], budget: usize) -> Vec<Vec<usize>> {
    let mut units: Vec<Vec<usize>> = Vec::new();
    for group in groups_of(rollouts) {
        let prompt = prompts[rollouts[group.start].prompt].token_ids.len();
        let (mut unit, mut tokens) = (Vec::new(), prompt);
        for index in group {
            let response = rollouts[index].token_ids.len();
            if !unit.is_empty() && tokens + response > budget {
                units.push(std::mem::take(&mut unit));
                tokens = prompt;
            }
            unit.push(index);
            tokens += response;
        }
        units.push(unit);
    }
    units
}

impl Layout {
    /// Deals the rollouts out to minibatches, as even as can be, in an order that the stream draws; fewer minibatches if there is
    /// not a group for each. Only rollouts for which `live` says so go through a pass.
    ///
    /// # Errors
    /// If the micro-batches' budget is 0, or a sequence cannot be packed.
    pub fn new(
        prompts: &[&Prompt],
        rollouts: &[Rollout],
        live: &dyn Fn(usize) -> bool,
        cutting: Cutting<'_>,
    ) -> Result<Self> {
        let mut units = units(prompts, rollouts, cutting.micro_batch_tokens);
        let mut random = random_stream(cutting.seed, cutting.stream);
        for last in (1..units.len()).rev() {
            let drawn = (u128::from(random.next_u64()) * (last as u128 + 1)) >> 64;
            units.swap(last, drawn as usize);
        }
        let parts = cutting.minibatches.clamp(1, units.len().max(1));
        let edge = |part: usize| part * units.len() / parts;
        let minibatch = |part: usize| {
            let mut units = units[edge(part)..edge(part + 1)].to_vec();
            // Back in order: the order within a minibatch changes nothing, and the passes of one minibatch then do not depend on it.
            units.sort_unstable();
            let rollouts_here = units.iter().flatten().copied().collect();
            for unit in &mut units {
                unit.retain(|&index| live(index));
            }
            units.retain(|unit| !unit.is_empty());
            Ok(Minibatch {
                rollouts: rollouts_here,
                micro_batches: micro_batches(
                    prompts,
                    rollouts,
                    &units,
                    cutting.micro_batch_tokens,
                )?,
            })
        };
        let minibatches = (0..parts).map(minibatch).collect::<Result<_>>()?;
        Ok(Self { minibatches })
    }

    /// Whether no rollout is live.
    pub fn is_empty(&self) -> bool {
        self.minibatches
            .iter()
            .all(|minibatch| minibatch.micro_batches.is_empty())
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
        let minibatches = self.minibatches.iter();
        for micro in minibatches.flat_map(|minibatch| &minibatch.micro_batches) {
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

impl Minibatch {
    /// The ids of its prompts: what a gradient that is not finite names.
    pub fn rows(&self, rollouts: &[Rollout]) -> Vec<u64> {
        let ids = self.rollouts.iter().map(|&rollout| rollouts[rollout].id);
        let mut ids: Vec<u64> = ids.collect();
        ids.sort_unstable();
        ids.dedup();
        ids
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

/// How far `recomputed` is from what decoding said, over the rollouts that were recomputed; `None` if none was.
pub fn gap(rollouts: &[Rollout], recomputed: &[Vec<f32>]) -> Option<SamplingGap> {
    let (mut sum, mut max, mut tokens) = (0.0, 0.0_f64, 0_usize);
    for (rollout, recomputed) in rollouts.iter().zip(recomputed) {
        for (sampled, recomputed) in rollout.sampled_logps.iter().zip(recomputed) {
            let difference = f64::from((sampled - recomputed).abs());
            sum += difference;
            max = max.max(difference);
            tokens += 1;
        }
    }
    (tokens > 0).then(|| SamplingGap {
        mean: sum / tokens as f64,
        max,
    })
}
