//! Group-relative policy optimization on the kept tokens of sampled responses: GRPO (Shao et al. 2024, arXiv:2402.03300), Dr. GRPO,
//! RLOO, with DAPO's clip-higher and token mean.
//!
//! The advantages are normalised over whole groups first; the keep mask then drops tokens from the policy loss alone (METHOD,
//! section 8). A KL loss, if any, runs over every response token.

use burn::tensor::{Device, Tensor, TensorData};
use pivotal_core::{Gather, Pack, TokenMask};
use pivotal_loss::{
    DualClipTerms, PpoTerms, ResponseIndex, constant_length_mean, kl_k2, kl_k3,
    kl_straight_through, response_mean, token_mean,
};
use pivotal_model::Decoder;

use crate::error::{Error, Result};
use crate::onpolicy::{MicroBatch, Minibatch, Rollout};
use crate::optimizer::GradientSum;
use crate::score::{held, values};
use crate::settings::OptimizerSettings;

mod recipe;
mod settings;

pub use recipe::{GrpoConfig, GrpoMetrics, GrpoRunFlags, Summary, train};
pub use settings::{Estimator, GrpoFlags, GrpoSettings, KlLoss, Reduction, SignBaseline};

/// What an update is made of, one entry a rollout.
#[derive(Clone, Copy, Debug)]
pub struct GrpoBatch<'a> {
    /// The responses.
    pub rollouts: &'a [Rollout],
    /// Their advantages.
    pub advantages: &'a [f32],
    /// Which of their tokens the policy loss uses.
    pub keep: &'a [TokenMask],
    /// Log-probabilities of the policy that sampled, from the training path, in nats. Empty where that is the policy as it stands, so
    /// that its own pass gives them: the one update of a step with one.
    pub old_logps: &'a [Vec<f32>],
    /// The same under the reference; empty where neither the KL loss nor credit reads it.
    pub reference_logps: &'a [Vec<f32>],
}

/// What a minibatch comes to.
pub struct MinibatchGradients {
    /// The gradients.
    pub gradients: GradientSum,
    /// Sums for the metrics.
    pub sums: UpdateSums,
    /// Log-probabilities of the tokens that the loss reads, in nats, before the update: `[rollouts]`, empty where nothing was read.
    pub token_logps: Vec<Vec<f32>>,
}

/// What the loss is made of besides the responses.
#[derive(Clone, Copy, Debug)]
pub struct GrpoObjective<'a> {
    /// The `[grpo]` table.
    pub settings: &'a GrpoSettings,
    /// The temperature that the responses were sampled at.
    pub temperature: f64,
    /// The longest response allowed, in tokens.
    pub max_response_tokens: usize,
}

/// Sums over the kept tokens of one or more minibatches.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct UpdateSums {
    /// The loss, the KL term included.
    pub loss: f64,
    /// Tokens that went through the policy loss.
    pub tokens: u64,
    /// Those clipped below.
    pub clipped_low: u64,
    /// Those clipped above.
    pub clipped_high: u64,
    /// Those bounded by the dual clip.
    pub clipped_dual: u64,
    /// Σ of the k3 estimate of KL(π_old‖π), in nats.
    pub kl_from_old: f64,
    /// The largest |ratio − 1|; 3.4e38, the largest that f32 holds, where the ratio overflows.
    pub ratio_deviation: f64,
}

impl UpdateSums {
    /// Takes another minibatch in.
    pub fn merge(&mut self, other: &Self) {
        self.loss += other.loss;
        self.tokens += other.tokens;
        self.clipped_low += other.clipped_low;
        self.clipped_high += other.clipped_high;
        self.clipped_dual += other.clipped_dual;
        self.kl_from_old += other.kl_from_old;
        self.ratio_deviation = self.ratio_deviation.max(other.ratio_deviation);
    }
}

/// What the whole minibatch counts: denominators do not depend on how it is cut.
#[derive(Clone, Copy)]
struct Counts {
    kept_tokens: usize,
    tokens: usize,
    responses_kept: usize,
    responses: usize,
}

/// The gradients and sums of one optimizer step over `minibatch`.
///
/// # Errors
/// [`Error::NotFinite`] naming the prompts whose loss is not finite; otherwise if a sequence does not fit the model.
pub fn gradients(
    policy: &mut Decoder,
    minibatch: &Minibatch,
    batch: GrpoBatch<'_>,
    objective: GrpoObjective<'_>,
    settings: &OptimizerSettings,
    step: u64,
) -> Result<MinibatchGradients> {
    let all = || minibatch.rollouts.iter();
    let counts = Counts {
        kept_tokens: all().map(|&index| batch.keep[index].kept()).sum(),
        tokens: all().map(|&index| batch.keep[index].len()).sum(),
        responses_kept: all().filter(|&&index| batch.keep[index].kept() > 0).count(),
        responses: minibatch.rollouts.len(),
    };
    let mut found = MinibatchGradients {
        gradients: GradientSum::default(),
        sums: UpdateSums::default(),
        token_logps: vec![Vec::new(); batch.rollouts.len()],
    };
    for micro in &minibatch.micro_batches {
        let passed = micro_batch(policy, micro, batch, objective, counts, settings, step)?;
        if let Some(passed) = passed {
            found.sums.merge(&passed.sums);
            for (response, logp) in passed.token_logps {
                found.token_logps[micro.responses[response]].push(logp);
            }
            found.gradients.add_pass(policy, passed.pass, passed.loss);
        }
    }
    Ok(found)
}

struct Passed {
    pass: pivotal_model::ForwardPass,
    loss: Tensor<1>,
    sums: UpdateSums,
    token_logps: Vec<(usize, f32)>,
}

fn micro_batch(
    policy: &Decoder,
    micro: &MicroBatch,
    batch: GrpoBatch<'_>,
    objective: GrpoObjective<'_>,
    counts: Counts,
    optimizer: &OptimizerSettings,
    step: u64,
) -> Result<Option<Passed>> {
    let settings = objective.settings;
    let with_kl = settings.kl_coef > 0.0;
    let kept = |response: usize, position: usize| {
        batch.keep[micro.responses[response]].as_slice()[position]
    };
    // An advantage of 0 has no gradient: its log-probabilities are not needed.
    let pushed = |response: usize| batch.advantages[micro.responses[response]] != 0.0;
    let gathers = micro
        .pack
        .gather(|response, position| with_kl || (pushed(response) && kept(response, position)));
    if gathers.is_empty() {
        return Ok(None);
    }
    let device = policy.device().clone();
    let pass = micro.forward(policy, optimizer.activations)?;
    let logps = MicroBatch::token_logps(policy, &pass.hidden, &gathers, objective.temperature);
    let keep: Vec<bool> = gathers
        .iter()
        .map(|gather| kept(gather.response, gather.position))
        .collect();
    let keep = TokenMask::from(keep);
    let own = values(logps.clone().without_autodiff());
    let old = match batch.old_logps.is_empty() {
        true => own.clone(),
        false => micro.gathered(&gathers, batch.old_logps),
    };
    let old = tensor(old, &device);
    let advantages = gathers
        .iter()
        .map(|gather| batch.advantages[micro.responses[gather.response]]);
    let advantages = tensor(advantages.collect(), &device);
    let index = response_index(&micro.pack, &gathers)?;

    let (terms, clipped_dual) =
        surrogate(logps.clone(), old, advantages, &keep, objective.settings)?;
    check_finite(&gathers, &values(terms.loss.clone()), micro, batch, step)?;
    let here = sums(&terms, clipped_dual, &keep);
    let reduce = Reducing {
        index: &index,
        objective,
        responses: counts.responses,
    };
    let mut loss = reduce.share(terms.loss, &keep, counts.kept_tokens, counts.responses_kept)?;
    if with_kl {
        let all = TokenMask::all(gathers.len());
        let reference = tensor(micro.gathered(&gathers, batch.reference_logps), &device);
        let kl = match settings.kl_loss {
            KlLoss::K2 => kl_k2(logps, reference, &all)?,
            KlLoss::K3 => kl_k3(logps, reference, &all)?,
            KlLoss::StraightThrough => kl_straight_through(logps, reference, &all)?,
        };
        check_finite(&gathers, &values(kl.loss.clone()), micro, batch, step)?;
        let share = reduce.share(kl.loss, &all, counts.tokens, counts.responses)?;
        loss = loss + share.mul_scalar(settings.kl_coef);
    }
    let value = values(loss.clone())
        .iter()
        .map(|&loss| f64::from(loss))
        .sum();
    let sums = UpdateSums {
        loss: value,
        ..here
    };
    let responses = gathers.iter().map(|gather| gather.response);
    Ok(Some(Passed {
        pass,
        loss,
        sums,
        token_logps: responses.zip(own).collect(),
    }))
}

fn surrogate(
    logps: Tensor<1>,
    old: Tensor<1>,
    advantages: Tensor<1>,
    keep: &TokenMask,
    settings: &GrpoSettings,
) -> Result<(PpoTerms, Option<Tensor<1>>)> {
    let clip = settings.clip();
    if settings.dual_clip > 0.0 {
        let dual = settings.dual_clip;
        let DualClipTerms {
            terms,
            clipped_dual,
        } = pivotal_loss::dual_clip_ppo(logps, old, advantages, keep, clip, dual)?;
        return Ok((terms, Some(clipped_dual)));
    }
    Ok((pivotal_loss::ppo(logps, old, advantages, keep, clip)?, None))
}

/// How a minibatch's losses are reduced.
struct Reducing<'a> {
    index: &'a ResponseIndex,
    objective: GrpoObjective<'a>,
    responses: usize,
}

impl Reducing<'_> {
    /// This micro-batch's share of the step's loss.
    fn share(
        &self,
        loss: Tensor<1>,
        keep: &TokenMask,
        step_tokens: usize,
        step_responses: usize,
    ) -> Result<Tensor<1>> {
        let length = self.objective.max_response_tokens;
        Ok(match self.objective.settings.reduction {
            Reduction::TokenMean => token_mean(loss, keep, step_tokens)?,
            Reduction::ResponseMean => response_mean(loss, self.index, keep, step_responses)?,
            Reduction::ConstantLength => {
                constant_length_mean(loss, self.index, keep, self.responses, length)?
            }
        })
    }
}

fn sums(terms: &PpoTerms, clipped_dual: Option<Tensor<1>>, keep: &TokenMask) -> UpdateSums {
    let ones = |tensor: &Tensor<1>| {
        let flags = values(tensor.clone());
        flags.iter().filter(|&&flag| flag == 1.0).count() as u64
    };
    let ratios = values(terms.ratio.clone());
    let deviations = ratios.iter().map(|&ratio| held((ratio - 1.0).abs()));
    let k3 = values(terms.kl_from_old.k3.clone());
    UpdateSums {
        loss: 0.0,
        tokens: keep.kept() as u64,
        clipped_low: ones(&terms.clipped_low),
        clipped_high: ones(&terms.clipped_high),
        clipped_dual: clipped_dual.as_ref().map_or(0, ones),
        kl_from_old: k3.iter().map(|&value| held(value)).sum(),
        ratio_deviation: deviations.fold(0.0, f64::max),
    }
}

fn check_finite(
    gathers: &[Gather],
    losses: &[f32],
    micro: &MicroBatch,
    batch: GrpoBatch<'_>,
    step: u64,
) -> Result<()> {
    let bad = gathers
        .iter()
        .zip(losses)
        .filter(|(_, loss)| !loss.is_finite());
    let mut samples: Vec<u64> = bad
        .map(|(gather, _)| batch.rollouts[micro.responses[gather.response]].id)
        .collect();
    samples.dedup();
    match samples.is_empty() {
        true => Ok(()),
        false => Err(Error::NotFinite {
            step,
            metric: "loss",
            samples,
        }),
    }
}

fn tensor(values: Vec<f32>, device: &Device) -> Tensor<1> {
    let count = values.len();
    Tensor::from_data(TensorData::new(values, [count]), device)
}

fn response_index(pack: &Pack, gathers: &[Gather]) -> Result<ResponseIndex> {
    let tokens = (0..pack.responses.len()).map(|response| pack.response_span(response).len);
    let of = gathers.iter().map(|gather| gather.response).collect();
    Ok(ResponseIndex::of_entries(of, tokens.collect())?)
}
