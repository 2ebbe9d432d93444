//! Supervised fine-tuning on the kept tokens of each response.
//!
//! The loss is `-Σ M·log π / ΣM` with the denominator over the whole optimizer step, so that it does not depend on how
//! the step is cut into micro-batches. M is the keep mask of segment credit under a positive sequence sign (METHOD, sections 6
//! to 8), by default every token of the model's own: plain fine-tuning.

use pivotal_core::{TokenMask, TokenizedResponse};
use pivotal_data::{micro_batches, pack_responses};
use pivotal_kernels::account::{Part, time};
use pivotal_model::Decoder;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::optimizer::{GradientSum, NamedAdamW};
use crate::score::values;
use crate::settings::OptimizerSettings;

mod credit;
mod recipe;
mod settings;

pub use recipe::{SftConfig, SftFlags, SftStep, Summary, train};
pub use settings::{SftCredit, SftCreditFlags, SftSettings, SftTableFlags};

/// One step's numbers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct SftMetrics {
    /// Mean negative log-probability of a kept token, in nats.
    pub loss: f64,
    /// Kept tokens in the step.
    pub kept_tokens: usize,
    /// Tokens that went through the model, prompts included.
    #[serde(default)]
    pub tokens: usize,
    /// Norm of the gradient before clipping; 0 until the step is taken.
    pub grad_norm: f64,
    /// Learning rate of the step; 0 until the step is taken.
    pub lr: f64,
}

/// The gradients and numbers of one optimizer step over `items`, whose `response_mask` is M.
///
/// Where nothing is kept there is no gradient and the loss is 0; [`SftMetrics::kept_tokens`] says so.
///
/// # Errors
/// [`Error::NotFinite`] naming the responses; otherwise if a sequence does not fit the model.
pub fn gradients(
    policy: &mut Decoder,
    items: &[&TokenizedResponse],
    settings: &OptimizerSettings,
    step: u64,
) -> Result<(GradientSum, SftMetrics)> {
    let kept = |item: &TokenizedResponse| item.response_mask.iter().filter(|&&own| own).count();
    let kept_tokens: usize = items.iter().map(|item| kept(item)).sum();
    let mut sum = GradientSum::default();
    let tokens: Vec<usize> = items
        .iter()
        .map(|item| item.prompt.len() + item.response.len())
        .collect();
    let mut metrics = SftMetrics {
        kept_tokens,
        tokens: tokens.iter().sum(),
        ..SftMetrics::default()
    };
    for range in micro_batches(&tokens, settings.micro_batch_tokens)? {
        let items = &items[range];
        let pack = time(Part::Pack, || pack_responses(items.iter().copied()))?;
        let gathers = pack.gather(|response, position| items[response].response_mask[position]);
        if gathers.is_empty() {
            continue;
        }
        let (pack, gathers) = policy.needed(&pack, &gathers)?;
        let recomputed = settings.activations.recomputed_layers(policy, pack.len());
        let pass = policy.forward(&pack, recomputed)?;
        let logps = policy.token_logps(&pass.hidden, &gathers);
        let keep = TokenMask::all(gathers.len());
        let terms = pivotal_loss::sft(logps, &keep, kept_tokens as f64)?;
        let losses = values(terms.loss.clone());
        let bad = gathers
            .iter()
            .zip(&losses)
            .filter(|(_, loss)| !loss.is_finite());
        let mut samples: Vec<u64> = bad.map(|(gather, _)| items[gather.response].id).collect();
        samples.dedup();
        if !samples.is_empty() {
            return Err(Error::NotFinite {
                step,
                metric: "loss",
                samples,
            });
        }
        metrics.loss += losses.iter().map(|&loss| f64::from(loss)).sum::<f64>();
        sum.add_pass(policy, pass, terms.loss.sum());
    }
    Ok((sum, metrics))
}

/// Steps over batches of responses, from step `range.start` (from 0) to `range.end`.
///
/// `after` sees each step's number (from 1) and metrics, the policy and the optimizer, once they are updated.
///
/// # Errors
/// Whatever a step or `after` meets.
pub fn optimize(
    policy: &mut Decoder,
    settings: &OptimizerSettings,
    optimizer: &mut NamedAdamW,
    batches: impl Iterator<Item = Vec<TokenizedResponse>>,
    range: std::ops::Range<u64>,
    after: &mut dyn FnMut(u64, SftMetrics, &mut Decoder, &NamedAdamW) -> Result<()>,
) -> Result<()> {
    let steps = range.end;
    for (step, batch) in range.zip(batches) {
        let batch: Vec<&TokenizedResponse> = batch.iter().collect();
        let (sum, mut metrics) = gradients(policy, &batch, settings, step + 1)?;
        metrics.lr = settings.lr * settings.schedule.factor(step, steps, settings.warmup_steps);
        let lr = metrics.lr;
        let taken = time(Part::Optimizer, || {
            optimizer.step(policy, sum, lr, step + 1)
        });
        metrics.grad_norm = taken.map_err(|error| {
            let ids = batch.iter().map(|response| response.id).collect();
            error.naming(ids, |index| {
                let own = gradients(policy, &batch[index..=index], settings, step + 1);
                own.map(|(sum, _)| sum.norm())
            })
        })?;
        after(step + 1, metrics, policy, optimizer)?;
    }
    Ok(())
}
