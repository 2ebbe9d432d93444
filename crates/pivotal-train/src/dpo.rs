//! Direct preference optimization on the kept tokens of each pair.
//!
//! A step packs its pairs with the prompt stored once, takes log-probabilities at the kept positions alone, and averages
//! the [`PreferenceLoss`] over the pairs of the step, whatever the micro-batches.

use burn::tensor::{Device, Tensor, TensorData};
use pivotal_core::{Gather, Pack, TokenMask, TokenizedPair};
use pivotal_data::{micro_batches, pack_pairs};
use pivotal_kernels::account::{Part, time};
use pivotal_loss::{PairKl, PairLogps, ResponseIndex, kept_sums, kl_estimates};
use pivotal_model::Decoder;
use serde::{Deserialize, Serialize};

use crate::activations::Activations;
use crate::error::{Error, Result};
use crate::optimizer::{GradientSum, NamedAdamW};
use crate::score::{held, values};
use crate::settings::OptimizerSettings;
use shift::Shifts;

mod mismatch;
mod objective;
mod recipe;
mod settings;
mod shift;

pub use mismatch::{Mismatched, mismatched};
pub use objective::{DpoObjective, PreferenceLoss};
pub use recipe::{DpoConfig, DpoRunFlags, DpoStep, Summary, train};
pub use settings::{DpoFlags, DpoSettings, LossName};

/// A pair, ready for its step.
#[derive(Clone, Debug)]
pub struct DpoItem {
    /// The tokens.
    pub pair: TokenizedPair,
    /// Which response tokens the loss uses, chosen then rejected.
    pub keep: [TokenMask; 2],
    /// The reference's log-probability of every response token, in nats, chosen then rejected; empty for a loss without
    /// a reference.
    pub reference_logps: [Vec<f32>; 2],
    /// For KTO's baseline: this prompt with another row's responses.
    pub mismatched: Option<Box<DpoItem>>,
}

/// One step's numbers: means over its pairs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct DpoMetrics {
    /// The loss; DPO's is in nats, ln 2 where policy and reference agree.
    pub loss: f64,
    /// Pairs whose chosen implicit reward is above the rejected one; a tie counts half.
    pub accuracy: f64,
    /// β times the chosen log-ratio over kept tokens, in nats; for SimPO β times their mean log-probability.
    pub chosen_reward: f64,
    /// The same of the rejected responses.
    pub rejected_reward: f64,
    /// Mean log-probability of a kept chosen token, in nats, like all that follow; absent where there is no such token.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub chosen_kept_logp: Option<f64>,
    /// Of a kept rejected token.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rejected_kept_logp: Option<f64>,
    /// Of a dropped chosen token; every [`DpoObjective::dropped_every`] steps.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub chosen_dropped_logp: Option<f64>,
    /// Of a dropped rejected token, in the same steps.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rejected_dropped_logp: Option<f64>,
    /// Mean change of a kept chosen token's log-probability since the reference; absent without a reference, like the next
    /// three.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub chosen_kept_shift: Option<f64>,
    /// Of a kept rejected token.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rejected_kept_shift: Option<f64>,
    /// Of a dropped chosen token, in the steps that measure them: under a right mask it sinks, for it is wrong.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub chosen_dropped_shift: Option<f64>,
    /// Of a dropped rejected token.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rejected_dropped_shift: Option<f64>,
    /// Mean k1 of policy against reference at kept tokens of both responses, in nats; none without a reference. The data
    /// drew the tokens, not the policy: how far it has gone on them, not its KL divergence.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kl_k1: Option<f64>,
    /// The same of k2.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kl_k2: Option<f64>,
    /// The same of k3.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kl_k3: Option<f64>,
    /// KTO's baseline, in nats.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kto_baseline: Option<f64>,
    /// For TDPO: D of the chosen responses, the forward KL divergence from the reference over the vocabulary, summed over
    /// kept tokens (or as the normalisation has it), in nats.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub chosen_kl: Option<f64>,
    /// The same of the rejected responses.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rejected_kl: Option<f64>,
    /// Kept share of the chosen responses' tokens.
    pub chosen_kept_fraction: f64,
    /// Kept share of the rejected responses' tokens.
    pub rejected_kept_fraction: f64,
    /// Tokens of the pairs, a pair's prompt once.
    #[serde(default)]
    pub tokens: usize,
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
    objective: DpoObjective<'_>,
    settings: &OptimizerSettings,
    step: u64,
) -> Result<(GradientSum, DpoMetrics)> {
    let loss = objective.loss;
    let baseline = loss
        .uses_mismatched()
        .then(|| mismatch::baseline(policy, items, settings.micro_batch_tokens, step))
        .transpose()?;
    let mut sums = StepSums {
        step,
        pairs: items.len(),
        baseline,
        gradients: GradientSum::default(),
        metrics: kept_metrics(items),
        drift: Drift::default(),
        shifts: Shifts::default(),
    };
    let tokens: Vec<usize> = items.iter().map(|item| item_tokens(item)).collect();
    sums.metrics.tokens = tokens.iter().sum();
    for range in micro_batches(&tokens, settings.micro_batch_tokens)? {
        sums.micro_batch(policy, &items[range], objective, settings.activations)?;
    }
    let mut metrics = sums.metrics;
    metrics.kto_baseline = sums.baseline.map(|baseline| f64::from(values(baseline)[0]));
    sums.shifts.report(&mut metrics, loss.uses_reference());
    if loss.uses_reference() {
        let drift = sums.drift;
        let mean = |sum: f64| (drift.tokens > 0).then(|| sum / drift.tokens as f64);
        metrics.kl_k1 = mean(drift.k1);
        metrics.kl_k2 = mean(drift.k2);
        metrics.kl_k3 = mean(drift.k3);
    }
    Ok((sums.gradients, metrics))
}

/// What an optimizer step has added up so far.
struct StepSums {
    step: u64,
    pairs: usize,
    baseline: Option<Tensor<1>>,
    gradients: GradientSum,
    metrics: DpoMetrics,
    drift: Drift,
    shifts: Shifts,
}

impl StepSums {
    fn micro_batch(
        &mut self,
        policy: &mut Decoder,
        items: &[&DpoItem],
        objective: DpoObjective<'_>,
        activations: Activations,
    ) -> Result<()> {
        let responses = 2 * items.len();
        let pack = time(Part::Pack, || {
            pack_pairs(items.iter().map(|item| &item.pair))
        })?;
        let kept = |response: usize, position: usize| {
            items[response / 2].keep[response % 2].as_slice()[position]
        };
        let gathers = pack.gather(kept);
        let device = policy.device().clone();
        let with_reference = objective.loss.uses_reference();
        let reference_model = objective.reference;
        let mut pass = None;
        let (policy_logps, reference_logps, kl) = match gathers.is_empty() {
            true => {
                let zeros = || zeros(responses, &device);
                let reference = with_reference.then(zeros);
                (zeros(), reference, reference_model.map(|_| zeros()))
            }
            false => {
                let index = response_index(&pack, &gathers)?;
                let measures_dropped = objective.measures_dropped(self.step);
                // What is measured of dropped tokens needs all states, the loss those that predict its tokens.
                let (pack, gathers) = match measures_dropped {
                    true => (pack, gathers),
                    false => policy.needed(&pack, &gathers)?,
                };
                let recomputed = activations.recomputed_layers(policy, pack.len());
                let pass = pass.insert(policy.forward(&pack, recomputed)?);
                let policy_logps = policy.token_logps(&pass.hidden, &gathers);
                let logps = values(policy_logps.clone().without_autodiff());
                self.shifts.add_kept(items, &gathers, &logps);
                if measures_dropped {
                    self.shifts
                        .measure_dropped(policy, items, &pack, &pass.hidden);
                }
                let reference = with_reference.then(|| reference_logps(items, &gathers, &device));
                if let Some(reference) = &reference {
                    self.drift.add(&gathers, &policy_logps, reference)?;
                }
                let kl = reference_model
                    .map(|reference| {
                        let theirs = reference.hidden(&pack)?;
                        let ours = &pass.hidden;
                        Ok::<_, Error>(policy.vocabulary_kl(ours, reference, &theirs, &gathers))
                    })
                    .transpose()?;
                let all = TokenMask::all(gathers.len());
                let sums = |logps| kept_sums(logps, &index, &all, objective.normalisation);
                let reference = reference.map(sums).transpose()?;
                (sums(policy_logps)?, reference, kl.map(sums).transpose()?)
            }
        };
        let kl = kl.map(sides).map(|sides| PairKl {
            chosen: sides.chosen,
            rejected: sides.rejected,
        });
        let kls = kl
            .clone()
            .map(|kl| [values(kl.chosen), values(kl.rejected)]);
        let terms = objective.terms(
            sides(policy_logps),
            reference_logps.map(sides),
            self.baseline.clone(),
            kl,
        )?;

        let losses = values(terms.loss.clone());
        let (chosen, rejected) = (values(terms.chosen_reward), values(terms.rejected_reward));
        // A bounded loss can be finite where a reward is not.
        let numbers = losses.iter().zip(&chosen).zip(&rejected);
        let finite = numbers.map(|((loss, chosen), rejected)| {
            loss.is_finite() && chosen.is_finite() && rejected.is_finite()
        });
        let bad = items.iter().zip(finite).filter(|(_, finite)| !finite);
        let samples: Vec<u64> = bad.map(|(item, _)| item.pair.id).collect();
        if !samples.is_empty() {
            return Err(Error::NotFinite {
                step: self.step,
                metric: "loss",
                samples,
            });
        }
        let share = 1.0 / self.pairs as f64;
        let metrics = &mut self.metrics;
        for ((loss, chosen), rejected) in losses.iter().zip(&chosen).zip(&rejected) {
            metrics.loss += share * f64::from(*loss);
            metrics.chosen_reward += share * f64::from(*chosen);
            metrics.rejected_reward += share * f64::from(*rejected);
            metrics.accuracy += share * above(*chosen, *rejected);
        }
        if let Some([chosen, rejected]) = kls {
            let mean = |kls: Vec<f32>| kls.into_iter().map(|kl| share * f64::from(kl)).sum::<f64>();
            *metrics.chosen_kl.get_or_insert(0.0) += mean(chosen);
            *metrics.rejected_kl.get_or_insert(0.0) += mean(rejected);
        }
        if let Some(pass) = pass {
            self.gradients
                .add_pass(policy, pass, terms.loss.sum() * share);
        }
        Ok(())
    }
}

/// How far the kept tokens' log-probabilities are from the reference's: sums in nats, and of how many tokens.
#[derive(Default)]
struct Drift {
    tokens: usize,
    k1: f64,
    k2: f64,
    k3: f64,
}

impl Drift {
    fn add(&mut self, gathers: &[Gather], policy: &Tensor<1>, reference: &Tensor<1>) -> Result<()> {
        let all = TokenMask::all(gathers.len());
        let estimates = kl_estimates(policy.clone().without_autodiff(), reference.clone(), &all)?;
        let sum = |tensor| values(tensor).into_iter().map(held).sum::<f64>();
        self.tokens += gathers.len();
        self.k1 += sum(estimates.k1);
        self.k2 += sum(estimates.k2);
        self.k3 += sum(estimates.k3);
        Ok(())
    }
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
    objective: DpoObjective<'_>,
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
        let taken = time(Part::Optimizer, || {
            optimizer.step(policy, sum, lr, step + 1)
        });
        metrics.grad_norm = taken.map_err(|error| {
            let ids = batch.iter().map(|item| item.pair.id).collect();
            error.naming(ids, |index| {
                let own = gradients(policy, &batch[index..=index], objective, settings, step + 1);
                own.map(|(sum, _)| sum.norm())
            })
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

fn kept_metrics(items: &[&DpoItem]) -> DpoMetrics {
    let count = |side: usize| {
        let masks = items.iter().map(|item| &item.keep[side]);
        masks.fold((0, 0), |(kept, tokens), mask| {
            (kept + mask.kept(), tokens + mask.len())
        })
    };
    let (chosen, rejected) = (count(0), count(1));
    let ratio = |part: usize, whole: usize| part as f64 / whole.max(1) as f64;
    DpoMetrics {
        chosen_kept_fraction: ratio(chosen.0, chosen.1),
        rejected_kept_fraction: ratio(rejected.0, rejected.1),
        ..DpoMetrics::default()
    }
}
