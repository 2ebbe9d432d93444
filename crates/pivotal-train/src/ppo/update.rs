//! One optimizer step of each of the two models on a minibatch.

use burn::tensor::{Tensor, TensorData};
use pivotal_core::{Gather, TokenMask};
use pivotal_loss::{ResponseIndex, clipped_value_loss, ppo, response_mean, token_mean, value_loss};
use pivotal_model::{Decoder, RewardModel};
use serde::{Deserialize, Serialize};

use super::experience::Experience;
use super::settings::{PpoSettings, TokenReduction};
use crate::activations::Activations;
use crate::error::{Error, Result};
use crate::onpolicy::{Layout, MicroBatch, Minibatch, Rollout};
use crate::optimizer::GradientSum;
use crate::score::{ResponseValues, held, values};

/// What the losses read, `[rollouts][tokens]`.
#[derive(Clone, Copy, Debug)]
pub struct UpdateInputs<'a> {
    /// The responses.
    pub rollouts: &'a [Rollout],
    /// Log-probabilities of the policy that sampled, from the training path, in nats.
    pub old_logps: &'a [Vec<f32>],
    /// Advantages, returns, old values.
    pub experience: &'a Experience,
    /// Which tokens the policy loss uses, `[rollouts]`.
    pub keep: &'a [TokenMask],
}

/// What the losses are made of besides.
#[derive(Clone, Copy, Debug)]
pub struct UpdateRule<'a> {
    /// `[ppo]`.
    pub settings: &'a PpoSettings,
    /// Divides the logits, as in sampling.
    pub temperature: f64,
    /// What is kept for the backward pass.
    pub activations: Activations,
    /// The step, from 1.
    pub step: u64,
}

/// Sums over the tokens of updates, for means.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct UpdateSums {
    steps: usize,
    policy_loss: f64,
    policy_tokens: usize,
    clipped_low: f64,
    clipped_high: f64,
    kl_from_old: f64,
    value_loss: f64,
    value_tokens: usize,
    value_clipped: f64,
    first_ratio: f64,
}

/// One step's numbers of the update: means over its minibatches' tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct UpdateNumbers {
    /// The clipped surrogate loss.
    pub policy_loss: f64,
    /// Half the squared error of values.
    pub value_loss: f64,
    /// Share of kept tokens that are pushed down no further.
    pub clip_fraction_low: f64,
    /// Share of kept tokens that are pushed up no further.
    pub clip_fraction_high: f64,
    /// Share of tokens whose value is pushed no further.
    pub value_clip_fraction: f64,
    /// Mean k3 of the old policy from the new a kept token, in nats.
    pub kl_from_old: f64,
    /// Largest distance of a ratio from 1 in the first minibatch, before any update: 0.
    pub first_ratio_error: f64,
}

impl UpdateSums {
    /// The means.
    pub fn numbers(&self) -> UpdateNumbers {
        let steps = self.steps.max(1) as f64;
        let policy = self.policy_tokens.max(1) as f64;
        let value = self.value_tokens.max(1) as f64;
        UpdateNumbers {
            policy_loss: self.policy_loss / steps,
            value_loss: self.value_loss / steps,
            clip_fraction_low: self.clipped_low / policy,
            clip_fraction_high: self.clipped_high / policy,
            value_clip_fraction: self.value_clipped / value,
            kl_from_old: self.kl_from_old / policy,
            first_ratio_error: self.first_ratio,
        }
    }
}

/// The values of the value model over a layout's passes, `[rollouts]`.
///
/// # Errors
/// If a sequence does not fit the model.
pub fn rollout_values(
    layout: &Layout,
    model: &RewardModel,
    rollouts: &[Rollout],
) -> Result<Vec<ResponseValues>> {
    let model = model.detached();
    let nothing = ResponseValues {
        prompt_value: 0.0,
        levels: Vec::new(),
    };
    let mut all = vec![nothing; rollouts.len()];
    let minibatches = layout.minibatches.iter();
    for micro in minibatches.flat_map(|minibatch| &minibatch.micro_batches) {
        let levels = values(model.values(&micro.pack)?);
        for (response, &rollout) in micro.responses.iter().enumerate() {
            all[rollout] = ResponseValues::of(&micro.pack, response, &levels);
        }
    }
    Ok(all)
}

/// The policy's gradients of one minibatch; none if nothing of it is kept.
///
/// # Errors
/// [`Error::NotFinite`] naming the rows whose loss is not finite; otherwise if a sequence does not fit the model.
pub fn policy_gradients(
    policy: &mut Decoder,
    minibatch: &Minibatch,
    inputs: UpdateInputs<'_>,
    rule: UpdateRule<'_>,
    sums: &mut UpdateSums,
) -> Result<GradientSum> {
    let mut sum = GradientSum::default();
    let masks = || {
        minibatch
            .rollouts
            .iter()
            .copied()
            .map(|rollout| &inputs.keep[rollout])
    };
    let step_tokens: usize = masks().map(TokenMask::kept).sum();
    let step_responses = masks().filter(|mask| mask.kept() > 0).count();
    let first = sums.steps == 0;
    sums.steps += 1;
    for micro in &minibatch.micro_batches {
        let kept = |response: usize, position: usize| {
            inputs.keep[micro.responses[response]].as_slice()[position]
        };
        let gathers = micro.pack.gather(kept);
        if gathers.is_empty() {
            continue;
        }
        let pass = micro.forward(policy, rule.activations)?;
        let logps = MicroBatch::token_logps(policy, &pass.hidden, &gathers, rule.temperature);
        let device = policy.device();
        let column = |of: &[Vec<f32>]| {
            let data = micro.gathered(&gathers, of);
            Tensor::<1>::from_data(TensorData::new(data, [gathers.len()]), device)
        };
        let old = column(inputs.old_logps);
        let advantages = column(&inputs.experience.advantages);
        let all = TokenMask::all(gathers.len());
        let terms = ppo(logps, old, advantages, &all, rule.settings.clip())?;
        let losses = values(terms.loss.clone());
        finite(&losses, "policy_loss", &gathers, micro, inputs, rule.step)?;
        let loss = match rule.settings.reduction {
            TokenReduction::TokenMean => token_mean(terms.loss, &all, step_tokens)?,
            TokenReduction::ResponseMean => {
                let index = index(micro, &gathers)?;
                response_mean(terms.loss, &index, &all, step_responses)?
            }
        };
        sums.policy_loss += f64::from(values(loss.clone().without_autodiff())[0]);
        sums.policy_tokens += gathers.len();
        sums.clipped_low += total(terms.clipped_low);
        sums.clipped_high += total(terms.clipped_high);
        let k3 = values(terms.kl_from_old.k3).into_iter();
        sums.kl_from_old += k3.map(held).sum::<f64>();
        if first {
            let errors = values(terms.ratio).into_iter();
            let errors = errors.map(|ratio| f64::from((ratio - 1.0).abs()));
            sums.first_ratio = errors.fold(sums.first_ratio, f64::max);
        }
        sum.add_pass(policy, pass, loss);
    }
    Ok(sum)
}

/// The value model's gradients of one minibatch, over every response token, or over the kept ones where the settings say so.
///
/// # Errors
/// As [`policy_gradients`].
pub fn value_gradients(
    model: &mut RewardModel,
    minibatch: &Minibatch,
    inputs: UpdateInputs<'_>,
    rule: UpdateRule<'_>,
    sums: &mut UpdateSums,
) -> Result<GradientSum> {
    let mut sum = GradientSum::default();
    let counts = |rollout: usize, position: usize| {
        !rule.settings.mask_value_loss || inputs.keep[rollout].as_slice()[position]
    };
    let counted = |rollout: usize| {
        let tokens = inputs.rollouts[rollout].token_ids.len();
        (0..tokens).filter(|&token| counts(rollout, token)).count()
    };
    let step_tokens: usize = minibatch.rollouts.iter().copied().map(counted).sum();
    let step_responses = minibatch
        .rollouts
        .iter()
        .copied()
        .filter(|&rollout| counted(rollout) > 0)
        .count();
    for micro in &minibatch.micro_batches {
        let gathers = micro
            .pack
            .gather(|response, position| counts(micro.responses[response], position));
        if gathers.is_empty() {
            continue;
        }
        let pass = micro.forward(&model.decoder, rule.activations)?;
        // The state before a token is the one that predicts it.
        let sources = gathers.iter().map(|gather| gather.source);
        let rows = model.decoder.rows(&pass.hidden, sources);
        let found = model.values_of(rows);
        let device = model.decoder.device();
        let column = |of: &[Vec<f32>]| {
            let data = micro.gathered(&gathers, of);
            Tensor::<1>::from_data(TensorData::new(data, [gathers.len()]), device)
        };
        let returns = column(&inputs.experience.returns);
        let all = TokenMask::all(gathers.len());
        let loss = match rule.settings.value_clip > 0.0 {
            true => {
                let old = column(&inputs.experience.old_values);
                let clip = rule.settings.value_clip;
                let terms = clipped_value_loss(found, old, returns, &all, clip)?;
                sums.value_clipped += total(terms.clipped);
                terms.loss
            }
            false => value_loss(found, returns, &all)?.loss,
        };
        let losses = values(loss.clone().without_autodiff());
        finite(&losses, "value_loss", &gathers, micro, inputs, rule.step)?;
        let loss = match rule.settings.reduction {
            TokenReduction::TokenMean => token_mean(loss, &all, step_tokens)?,
            TokenReduction::ResponseMean => {
                response_mean(loss, &index(micro, &gathers)?, &all, step_responses)?
            }
        };
        sums.value_loss += f64::from(values(loss.clone().without_autodiff())[0]);
        sums.value_tokens += gathers.len();
        sum.add_pass(model, pass, loss);
    }
    Ok(sum)
}

fn index(micro: &MicroBatch, gathers: &[Gather]) -> Result<ResponseIndex> {
    let spans = (0..micro.pack.responses.len()).map(|response| micro.pack.response_span(response));
    let of = gathers.iter().map(|gather| gather.response).collect();
    let tokens = spans.map(|span| span.len).collect();
    Ok(ResponseIndex::of_entries(of, tokens)?)
}

fn finite(
    losses: &[f32],
    metric: &'static str,
    gathers: &[Gather],
    micro: &MicroBatch,
    inputs: UpdateInputs<'_>,
    step: u64,
) -> Result<()> {
    let bad = gathers
        .iter()
        .zip(losses)
        .filter(|(_, loss)| !loss.is_finite());
    let row = |(gather, _): (&Gather, _)| inputs.rollouts[micro.responses[gather.response]].id;
    let mut samples: Vec<u64> = bad.map(row).collect();
    samples.sort_unstable();
    samples.dedup();
    match samples.is_empty() {
        true => Ok(()),
        false => Err(Error::NotFinite {
            step,
            metric,
            samples,
        }),
    }
}

fn total(tensor: Tensor<1>) -> f64 {
    values(tensor).into_iter().map(f64::from).sum()
}
