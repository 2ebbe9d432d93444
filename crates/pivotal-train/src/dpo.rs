//! Direct preference optimization on the kept tokens of each pair.
//!
//! A step packs its pairs with the prompt stored once, takes log-probabilities at the kept positions alone, and averages
//! the loss of [`pivotal_loss::dpo()`] over the pairs of the step, whatever the micro-batches.

use burn::tensor::{Device, Tensor, TensorData};
use pivotal_core::{Gather, Pack, TokenMask, TokenizedPair};
use pivotal_data::{micro_batches, pack_pairs};
use pivotal_kernels::account::{Part, time};
use pivotal_loss::{Normalisation, PairLogps, ResponseIndex, kept_sums};
use pivotal_model::Decoder;
use serde::{Deserialize, Serialize};

use crate::activations::Activations;
use crate::error::{Error, Result};
use crate::optimizer::{GradientSum, NamedAdamW};
use crate::score::values;
use crate::settings::OptimizerSettings;

mod recipe;

pub use recipe::{DpoConfig, DpoRunFlags, Summary, train};

/// A pair, ready for its step.
#[derive(Clone, Debug)]
pub struct DpoItem {
    /// The tokens.
    pub pair: TokenizedPair,
    /// Which response tokens the loss uses, chosen then rejected.
    pub keep: [TokenMask; 2],
    /// The reference's log-probability of every response token, in nats, chosen then rejected.
    pub reference_logps: [Vec<f32>; 2],
}

/// What the loss is made of besides the pairs.
#[derive(Clone, Copy, Debug)]
pub struct DpoObjective {
    /// Strength of the anchor to the reference; above 0.
    pub beta: f64,
    /// What a response's kept log-probabilities are made into.
    pub normalisation: Normalisation,
}

/// One step's numbers: means over its pairs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct DpoMetrics {
    /// Loss in nats; ln 2 where policy and reference agree.
    pub loss: f64,
    /// Pairs whose chosen implicit reward is above the rejected one; a tie counts half.
    pub accuracy: f64,
    /// β times the chosen log-ratio over kept tokens, in nats.
    pub chosen_reward: f64,
    /// The same of the rejected responses.
    pub rejected_reward: f64,
    /// Mean change of a kept chosen token's log-probability since the reference, in nats.
    pub chosen_kept_shift: f64,
    /// Kept share of the chosen responses' tokens.
    pub chosen_kept_fraction: f64,
    /// Kept share of the rejected responses' tokens.
    pub rejected_kept_fraction: f64,
    /// Share of responses of which nothing is kept.
    pub empty_mask_fraction: f64,
    /// Norm of the gradient before clipping; 0 until the step is taken.
    pub grad_norm: f64,
    /// Learning rate of the step; 0 until the step is taken.
    pub lr: f64,
}

/// The gradients and numbers of one optimizer step over `items`.
///
/// # Errors
/// [`Error::NotFinite`] naming the pairs whose loss is not finite; otherwise if a sequence does not fit the model.
pub fn gradients(
    policy: &mut Decoder,
    items: &[&DpoItem],
    objective: DpoObjective,
    settings: &OptimizerSettings,
    step: u64,
) -> Result<(GradientSum, DpoMetrics)> {
    let mut sum = GradientSum::default();
    let mut metrics = kept_metrics(items);
    let tokens: Vec<usize> = items.iter().map(|item| item_tokens(item)).collect();
    for range in micro_batches(&tokens, settings.micro_batch_tokens)? {
        micro_batch(
            policy,
            &items[range],
            items.len(),
            objective,
            settings.activations,
            step,
            &mut sum,
            &mut metrics,
        )?;
    }
    let kept: usize = items.iter().map(|item| item.keep[0].kept()).sum();
    metrics.chosen_kept_shift /= kept.max(1) as f64;
    Ok((sum, metrics))
}

#[expect(
    clippy::too_many_arguments,
    reason = "a struct of them would be built and taken apart in one place each"
)]
fn micro_batch(
    policy: &mut Decoder,
    items: &[&DpoItem],
    step_pairs: usize,
    objective: DpoObjective,
    activations: Activations,
    step: u64,
    sum: &mut GradientSum,
    metrics: &mut DpoMetrics,
) -> Result<()> {
    let pairs = items.len();
    let pack = time(Part::Pack, || {
        pack_pairs(items.iter().map(|item| &item.pair))
    })?;
    let kept = |response: usize, position: usize| {
        items[response / 2].keep[response % 2].as_slice()[position]
    };
    let gathers = pack.gather(kept);
    let device = policy.device().clone();
    let mut pass = None;
    let (policy_logps, reference_logps) = match gathers.is_empty() {
        true => (zeros(2 * pairs, &device), zeros(2 * pairs, &device)),
        false => {
            let index = response_index(&pack, &gathers)?;
            let recomputed = activations.recomputed_layers(policy, pack.len());
            let pass = pass.insert(policy.forward(&pack, recomputed)?);
            let policy_logps = policy.token_logps(&pass.hidden, &gathers);
            let reference = reference_logps(items, &gathers, &device);
            let all = TokenMask::all(gathers.len());
            metrics.chosen_kept_shift += chosen_shift(&gathers, &policy_logps, &reference);
            (
                kept_sums(policy_logps, &index, &all, objective.normalisation)?,
                kept_sums(reference, &index, &all, objective.normalisation)?,
            )
        }
    };
    let terms = pivotal_loss::dpo(sides(policy_logps), sides(reference_logps), objective.beta)?;

    let losses = values(terms.loss.clone());
    let bad = items
        .iter()
        .zip(&losses)
        .filter(|(_, loss)| !loss.is_finite());
    let samples: Vec<u64> = bad.map(|(item, _)| item.pair.id).collect();
    if !samples.is_empty() {
        return Err(Error::NotFinite {
            step,
            metric: "loss",
            samples,
        });
    }
    let share = 1.0 / step_pairs as f64;
    let (chosen, rejected) = (values(terms.chosen_reward), values(terms.rejected_reward));
    for ((loss, chosen), rejected) in losses.iter().zip(&chosen).zip(&rejected) {
        metrics.loss += share * f64::from(*loss);
        metrics.chosen_reward += share * f64::from(*chosen);
        metrics.rejected_reward += share * f64::from(*rejected);
        metrics.accuracy += share * above(*chosen, *rejected);
    }
    if let Some(pass) = pass {
        sum.add_pass(policy, pass, terms.loss.sum() * share);
    }
    Ok(())
}

/// Steps over `items` in the order that `batches` gives, from step `start` (from 0) to `steps`.
///
/// `after` sees each step's number (from 1) and metrics, the policy and the optimizer, once they are updated.
///
/// # Errors
/// Whatever a step or `after` meets; the policy then stands as after the last good step.
#[expect(
    clippy::too_many_arguments,
    reason = "a struct of them would be built and taken apart in one place each"
)]
pub fn optimize(
    policy: &mut Decoder,
    items: &[DpoItem],
    objective: DpoObjective,
    settings: &OptimizerSettings,
    optimizer: &mut NamedAdamW,
    batches: impl Iterator<Item = Vec<usize>>,
    range: std::ops::Range<u64>,
    after: &mut dyn FnMut(u64, DpoMetrics, &mut Decoder, &NamedAdamW) -> Result<()>,
) -> Result<()> {
    let steps = range.end;
    for (step, batch) in range.zip(batches) {
        let batch: Vec<&DpoItem> = batch.iter().map(|&index| &items[index]).collect();
        let (sum, mut metrics) = gradients(policy, &batch, objective, settings, step + 1)?;
        metrics.lr = settings.lr * settings.schedule.factor(step, steps, settings.warmup_steps);
        let lr = metrics.lr;
        metrics.grad_norm = time(Part::Optimizer, || {
            optimizer.step(policy, sum, lr, step + 1)
        })?;
        after(step + 1, metrics, policy, optimizer)?;
    }
    Ok(())
}

fn item_tokens(item: &DpoItem) -> usize {
    item.pair.prompt.len() + item.pair.chosen.len() + item.pair.rejected.len()
}

fn zeros(count: usize, device: &Device) -> Tensor<1> {
    Tensor::zeros([count], device)
}

fn response_index(pack: &Pack, gathers: &[Gather]) -> Result<ResponseIndex> {
    let tokens = (0..pack.responses.len()).map(|response| pack.response_span(response).len);
    let of = gathers.iter().map(|gather| gather.response).collect();
    Ok(ResponseIndex::of_entries(of, tokens.collect())?)
}

fn reference_logps(items: &[&DpoItem], gathers: &[Gather], device: &Device) -> Tensor<1> {
    let logp = |gather: &Gather| {
        items[gather.response / 2].reference_logps[gather.response % 2][gather.position]
    };
    let logps: Vec<f32> = gathers.iter().map(logp).collect();
    Tensor::from_data(TensorData::new(logps, [gathers.len()]), device)
}

/// Chosen responses are the even ones of a packed batch of pairs.
fn sides(logps: Tensor<1>) -> PairLogps {
    let [responses] = logps.dims();
    let columns = logps.reshape([responses / 2, 2]);
    let column = |side: usize| columns.clone().narrow(1, side, 1).reshape([responses / 2]);
    PairLogps {
        chosen: column(0),
        rejected: column(1),
    }
}

fn above(chosen: f32, rejected: f32) -> f64 {
    match chosen.total_cmp(&rejected) {
        std::cmp::Ordering::Greater => 1.0,
        std::cmp::Ordering::Equal => 0.5,
        std::cmp::Ordering::Less => 0.0,
    }
}

/// The change of the kept chosen tokens' log-probabilities, summed.
fn chosen_shift(gathers: &[Gather], policy: &Tensor<1>, reference: &Tensor<1>) -> f64 {
    let shift = values(policy.clone().without_autodiff() - reference.clone());
    let chosen = gathers
        .iter()
        .zip(&shift)
        .filter(|(gather, _)| gather.response % 2 == 0);
    chosen.map(|(_, shift)| f64::from(*shift)).sum()
}

fn kept_metrics(items: &[&DpoItem]) -> DpoMetrics {
    let count = |side: usize| {
        let masks = items.iter().map(|item| &item.keep[side]);
        masks.fold((0, 0, 0), |(kept, tokens, empty), mask| {
            let of_mask = mask.kept();
            (
                kept + of_mask,
                tokens + mask.len(),
                empty + usize::from(of_mask == 0),
            )
        })
    };
    let (chosen, rejected) = (count(0), count(1));
    let ratio = |part: usize, whole: usize| part as f64 / whole.max(1) as f64;
    DpoMetrics {
        chosen_kept_fraction: ratio(chosen.0, chosen.1),
        rejected_kept_fraction: ratio(rejected.0, rejected.1),
        empty_mask_fraction: ratio(chosen.2 + rejected.2, 2 * items.len()),
        ..DpoMetrics::default()
    }
}
