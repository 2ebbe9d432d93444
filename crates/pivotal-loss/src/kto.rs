//! Kahneman-Tversky Optimization with token credit: single responses, each desirable or not.
//!
//! Ethayarajh et al. 2024, arXiv:2402.01306, Eq. 7, with h = Σ M·(log π - log π_ref) of a response and z the baseline:
//!
//! ```text
//! desirable    L = λ_D·( 1 - σ( β·(h - z) ) )
//! undesirable  L = λ_U·( 1 - σ( β·(z - h) ) )
//! z = max( 0, mean of h over responses put behind prompts that are not theirs )
//! ```
//!
//! The recipe provides z by [`kto_baseline`]: log-probabilities, policy and reference, of each prompt of the batch with the
//! response of another row. It estimates a KL divergence and has no gradient.
//!
//! Reference: TRL 1.16, `KTOTrainer` with `loss_type="kto"`, keep given as its completion mask; value and gradient agree to
//! 1e-12 in f64 (golden vectors `kto`).
//!
//! Differs: nothing in the formula. TRL averages over the responses of both kinds together; here nothing is reduced.

use burn::tensor::{Bool, Tensor, TensorData, activation};

use crate::LossError;
use crate::error::{expect_len, expect_positive, expect_tensor_len, expect_weight};
use crate::response_index::factors;

/// What a response was judged to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Judgement {
    /// To be made likelier.
    Desirable,
    /// To be made less likely.
    Undesirable,
}

/// What a response of each kind weighs.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct KtoWeights {
    /// λ_D.
    pub desirable: f64,
    /// λ_U.
    pub undesirable: f64,
}

impl Default for KtoWeights {
    /// 1 and 1; the paper wants λ_D times the desirable to lie between 1 and 4/3 of λ_U times the undesirable.
    fn default() -> Self {
        Self {
            desirable: 1.0,
            undesirable: 1.0,
        }
    }
}

/// What [`kto`] computes for each response. Each `[responses]`; nothing is reduced here.
#[derive(Clone, Debug)]
pub struct KtoTerms {
    /// Loss, dimensionless, between 0 and its weight: the only field that carries a gradient.
    pub loss: Tensor<1>,
    /// `β·log(π/π_ref)` of the response's kept tokens, in nats.
    pub reward: Tensor<1>,
}

/// The KTO loss of each response.
///
/// `policy` and `reference` hold sums over kept tokens ([`kept_sums`](crate::kept_sums)), the same tokens for both; neither
/// `reference` nor `baseline` gets a gradient. `beta` is above 0, usually 0.1. A response of which nothing is kept has the
/// loss of `h = 0`, and no gradient.
///
/// # Shapes
/// `policy` and `reference` `[responses]` in nats, `baseline` `[1]` in nats; each field of the result `[responses]`.
///
/// # Errors
/// [`LossError::Length`] for unequal lengths or a baseline that is not one number; [`LossError::Domain`] if `beta` is not
/// finite and positive or a weight negative.
///
/// # Examples
/// ```
/// use burn::tensor::{Device, Tensor};
/// use pivotal_loss::{Judgement, KtoWeights, kto};
/// let one = |value: f32| Tensor::<1>::from_floats([value], &Device::flex());
/// let judgement = [Judgement::Desirable];
/// let terms = kto(one(-7.0), one(-7.0), &judgement, one(0.0), 0.1, KtoWeights::default()).unwrap();
/// assert_eq!(terms.loss.into_scalar::<f32>(), 0.5);
/// ```
pub fn kto(
    policy: Tensor<1>,
    reference: Tensor<1>,
    judgements: &[Judgement],
    baseline: Tensor<1>,
    beta: f64,
    weights: KtoWeights,
) -> Result<KtoTerms, LossError> {
    expect_positive("beta", beta)?;
    expect_weight("weights.desirable", weights.desirable)?;
    expect_weight("weights.undesirable", weights.undesirable)?;
    let responses = policy.dims()[0];
    expect_tensor_len("reference", &reference, responses)?;
    expect_len("judgements", judgements.len(), responses)?;
    expect_tensor_len("baseline", &baseline, 1)?;

    let undesirable = |judgement: &Judgement| *judgement == Judgement::Undesirable;
    let flags: Vec<bool> = judgements.iter().map(undesirable).collect();
    let weight = |undesirable: &bool| match undesirable {
        true => weights.undesirable,
        false => weights.desirable,
    };
    let device = policy.device();
    let weights = factors(flags.iter().map(weight).collect(), &device, policy.dtype());
    let flags = Tensor::<1, Bool>::from_data(TensorData::new(flags, [responses]), &device);

    let log_ratio = policy - reference.detach();
    // 1 - σ(x) = σ(-x), without the cancellation.
    let short_of_baseline = baseline.detach() - log_ratio.clone();
    let distance = short_of_baseline
        .clone()
        .mask_where(flags, short_of_baseline.neg())
        .mul_scalar(beta);
    Ok(KtoTerms {
        loss: activation::sigmoid(distance) * weights,
        reward: log_ratio.detach().mul_scalar(beta),
    })
}

/// z of [`kto`]: the mean log-ratio of responses behind prompts that are not theirs, or 0 if that is negative. No gradient.
///
/// # Shapes
/// `policy` and `reference` `[rows]` in nats, sums over the response's tokens; returns `[1]` in nats.
///
/// # Errors
/// [`LossError::Empty`] without any row; [`LossError::Length`] for unequal lengths.
pub fn kto_baseline(policy: Tensor<1>, reference: Tensor<1>) -> Result<Tensor<1>, LossError> {
    let rows = policy.dims()[0];
    expect_tensor_len("reference", &reference, rows)?;
    if rows == 0 {
        return Err(LossError::Empty { name: "policy" });
    }
    let mean = (policy - reference).sum().mul_scalar((rows as f64).recip());
    Ok(mean.clamp_min(0.0).detach())
}
