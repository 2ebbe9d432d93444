//! Reward modelling: a value a token, trained by Bradley and Terry's model on the responses' aggregated values.
//!
//! Pair accuracy says nothing about token credit (METHOD, section 2): measure the token signal before a mask trusts it.

use burn::tensor::Tensor;
use pivotal_core::{Pack, TokenizedPair};
use pivotal_data::{micro_batches, pack_pairs};
use pivotal_kernels::account::{Part, time};
use pivotal_loss::{
    ResponseIndex, ScorePair, bradley_terry, center_penalty, sequence_scores, token_l2_penalty,
};
use pivotal_model::{ForwardPass, RewardModel};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::optimizer::{GradientSum, NamedAdamW};
use crate::score::values;
use crate::settings::{OptimizerSettings, RewardSettings};

mod no_credit;
mod recipe;

pub use no_credit::{NoCredit, NoCreditFlags};
pub use recipe::{RewardConfig, RewardRunFlags, Summary, train};

/// One step's numbers: means over its pairs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct RewardMetrics {
    /// Ranking loss and penalties together, in nats.
    pub loss: f64,
    /// Pairs ranked right; a tie counts half.
    pub accuracy: f64,
    /// S_chosen − S_rejected.
    pub margin: f64,
    /// Mean of both scores: what `center` pins to 0.
    pub mean_score: f64,
    /// Tokens that went through the model, a pair's prompt once.
    #[serde(default)]
    pub tokens: usize,
    /// Norm of the gradient before clipping; 0 until the step is taken.
    pub grad_norm: f64,
    /// Learning rate of the step; 0 until the step is taken.
    pub lr: f64,
}

/// The gradients and numbers of one optimizer step over `pairs`.
///
/// # Errors
/// [`Error::NotFinite`] naming the pairs; otherwise if a sequence does not fit the model.
pub fn gradients(
    model: &mut RewardModel,
    pairs: &[&TokenizedPair],
    reward: &RewardSettings,
    settings: &OptimizerSettings,
    step: u64,
) -> Result<(GradientSum, RewardMetrics)> {
    let mut sum = GradientSum::default();
    let mut metrics = RewardMetrics::default();
    let response_tokens: usize = pairs
        .iter()
        .map(|pair| pair.chosen.len() + pair.rejected.len())
        .sum();
    let share = 1.0 / pairs.len() as f64;
    let tokens: Vec<usize> = pairs
        .iter()
        .map(|p| p.prompt.len() + p.chosen.len() + p.rejected.len())
        .collect();
    metrics.tokens = tokens.iter().sum();
    for range in micro_batches(&tokens, settings.micro_batch_tokens)? {
        let pairs = &pairs[range];
        let pack = time(Part::Pack, || pack_pairs(pairs.iter().copied()))?;
        let read = pack.response_tokens().collect();
        let pack = pack.reading(read);
        let decoder = &model.decoder;
        let recomputed = settings.activations.recomputed_layers(decoder, pack.len());
        let pass = decoder.forward(&pack, recomputed)?;
        let (token_values, index) = response_values(model, &pass, &pack);
        let scores = sequence_scores(token_values.clone(), &index, reward.aggregation.into())?;
        let scores = sides(scores);
        let terms = bradley_terry(scores.clone())?;
        let centred = center_penalty(scores.clone(), reward.center)?;
        let small = token_l2_penalty(token_values, reward.token_l2)?;
        let losses = terms.loss + centred;
        let host = values(losses.clone());
        let bad = pairs
            .iter()
            .zip(&host)
            .filter(|(_, loss)| !loss.is_finite());
        let samples: Vec<u64> = bad.map(|(pair, _)| pair.id).collect();
        if !samples.is_empty() {
            return Err(Error::NotFinite {
                step,
                metric: "loss",
                samples,
            });
        }
        let loss = losses.sum() * share + small.sum() / response_tokens as f64;
        metrics.loss += f64::from(values(loss.clone())[0]);
        let (chosen, rejected) = (values(scores.chosen), values(scores.rejected));
        for (chosen, rejected) in chosen.iter().zip(&rejected) {
            let margin = f64::from(chosen - rejected);
            metrics.margin += share * margin;
            metrics.accuracy += share
                * if margin == 0.0 {
                    0.5
                } else {
                    f64::from(margin > 0.0)
                };
            metrics.mean_score += share * f64::from(chosen + rejected) / 2.0;
        }
        sum.add_pass(model, pass, loss);
    }
    Ok((sum, metrics))
}

/// Steps over `pairs` in the order that `batches` gives, from step `range.start` (from 0) to `range.end`.
///
/// `after` sees each step's number (from 1) and metrics, the model and the optimizer, once they are updated.
///
/// # Errors
/// Whatever a step or `after` meets.
#[expect(
    clippy::too_many_arguments,
    reason = "a struct of them would be built and taken apart in one place each"
)]
pub fn optimize(
    model: &mut RewardModel,
    pairs: &[TokenizedPair],
    reward: &RewardSettings,
    settings: &OptimizerSettings,
    optimizer: &mut NamedAdamW,
    batches: impl Iterator<Item = Vec<usize>>,
    range: std::ops::Range<u64>,
    after: &mut dyn FnMut(u64, RewardMetrics, &mut RewardModel, &NamedAdamW) -> Result<()>,
) -> Result<()> {
    let steps = range.end;
    for (step, batch) in range.zip(batches) {
        let batch: Vec<&TokenizedPair> = batch.iter().map(|&index| &pairs[index]).collect();
        let (sum, mut metrics) = gradients(model, &batch, reward, settings, step + 1)?;
        metrics.lr = settings.lr * settings.schedule.factor(step, steps, settings.warmup_steps);
        let lr = metrics.lr;
        let taken = time(Part::Optimizer, || optimizer.step(model, sum, lr, step + 1));
        metrics.grad_norm = taken.map_err(|error| {
            let ids = batch.iter().map(|pair| pair.id).collect();
            error.naming(ids, |index| {
                let own = gradients(model, &batch[index..=index], reward, settings, step + 1);
                own.map(|(sum, _)| sum.norm())
            })
        })?;
        after(step + 1, metrics, model, optimizer)?;
    }
    Ok(())
}

/// The values of the response tokens, all that the pack reads, one response after the other.
fn response_values(
    model: &RewardModel,
    pass: &ForwardPass,
    pack: &Pack,
) -> (Tensor<1>, ResponseIndex) {
    let spans = (0..pack.responses.len()).map(|response| pack.response_span(response));
    let lengths: Vec<usize> = spans.map(|span| span.len).collect();
    let values = model.values_of(pass.hidden.clone());
    (values, ResponseIndex::of_whole_responses(&lengths))
}

/// Chosen responses are the even ones of a packed batch of pairs.
fn sides(scores: Tensor<1>) -> ScorePair {
    let [responses] = scores.dims();
    let columns = scores.reshape([responses / 2, 2]);
    let column = |side: usize| columns.clone().narrow(1, side, 1).reshape([responses / 2]);
    ScorePair {
        chosen: column(0),
        rejected: column(1),
    }
}
