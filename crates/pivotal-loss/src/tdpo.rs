//! Token-level Direct Preference Optimization: DPO with the forward KL divergence of every position, with token credit.
//!
//! Zeng et al. 2024, arXiv:2404.11999. With h the log-ratio of a response, Σ M·(log π - log π_ref), and
//! D = Σ M·KL( π_ref(·|context) ‖ π(·|context) ) its sequential KL divergence, sg stopping the gradient:
//!
//! ```text
//! TDPO1  L = -log σ( β·[ h_w - h_l - (D_l - D_w) ] )
//! TDPO2  L = -log σ( β·[ h_w - h_l - α·(D_l - sg(D_w)) ] )
//! ```
//!
//! The recipe provides, besides DPO's log-probabilities, the divergence at each token: over the whole vocabulary, reference
//! first, with the policy's gradient: `pivotal_ops::vocabulary_kl` in tiles, or [`token_forward_kl`] from logits, which must then
//! exist for both models. Both h and D go through [`kept_sums`](crate::kept_sums) with the same mask.
//!
//! Reference: the authors' code, `tdpo_loss` and `_tdpo_get_batch_logps` in `trainers.py`, transcribed in torch; value and
//! gradient by log-probabilities, divergences and logits agree to 1e-12 in f64 (golden vectors `tdpo`).
//!
//! Differs: nothing. The authors report β·(h + D) as rewards, and so do these terms.

use burn::tensor::Tensor;

use crate::dpo::implicit_rewards;
use crate::error::{expect_len, expect_tensor_len, expect_weight};
use crate::{LossError, PairLogps, log_sigmoid, log_sum_exp};

/// Sequential KL divergences of both responses of each pair, KL(π_ref‖π) summed over kept tokens, in nats. Each `[pairs]`.
#[derive(Clone, Debug)]
pub struct PairKl {
    /// Of the chosen responses.
    pub chosen: Tensor<1>,
    /// Of the rejected responses.
    pub rejected: Tensor<1>,
}

/// What [`tdpo1`] and [`tdpo2`] compute for each pair. Each `[pairs]`; nothing is reduced here.
#[derive(Clone, Debug)]
pub struct TdpoTerms {
    /// Loss in nats: the only field that carries a gradient.
    pub loss: Tensor<1>,
    /// `β·(h + D)` of the chosen response's kept tokens, in nats.
    pub chosen_reward: Tensor<1>,
    /// The same of the rejected response.
    pub rejected_reward: Tensor<1>,
    /// `D` of the chosen response, in nats.
    pub chosen_kl: Tensor<1>,
    /// The same of the rejected response.
    pub rejected_kl: Tensor<1>,
}

/// The TDPO1 loss of each pair: both divergences at full weight, both with their gradient.
///
/// # Shapes
/// All inputs and each field of the result `[pairs]`.
///
/// # Errors
/// [`LossError::Domain`] if `beta` is not finite and positive; [`LossError::Length`] for unequal lengths.
pub fn tdpo1(
    policy: PairLogps,
    policy_kl: PairKl,
    reference: PairLogps,
    beta: f64,
) -> Result<TdpoTerms, LossError> {
    let excess = |kl: &PairKl| kl.rejected.clone() - kl.chosen.clone();
    tdpo(policy, policy_kl, reference, beta, excess)
}

/// The TDPO2 loss of each pair: the divergences at weight `alpha`, the chosen one without its gradient.
///
/// `alpha` is at least 0, usually 0.5; with 0 this is [`dpo`](crate::dpo).
///
/// # Shapes
/// All inputs and each field of the result `[pairs]`.
///
/// # Errors
/// [`LossError::Domain`] if `beta` is not finite and positive or `alpha` negative; [`LossError::Length`] for unequal lengths.
pub fn tdpo2(
    policy: PairLogps,
    policy_kl: PairKl,
    reference: PairLogps,
    beta: f64,
    alpha: f64,
) -> Result<TdpoTerms, LossError> {
    expect_weight("alpha", alpha)?;
    let excess = |kl: &PairKl| (kl.rejected.clone() - kl.chosen.clone().detach()).mul_scalar(alpha);
    tdpo(policy, policy_kl, reference, beta, excess)
}

fn tdpo(
    policy: PairLogps,
    policy_kl: PairKl,
    reference: PairLogps,
    beta: f64,
    excess: impl Fn(&PairKl) -> Tensor<1>,
) -> Result<TdpoTerms, LossError> {
    let rewards = implicit_rewards(policy, reference, beta)?;
    let margin = rewards.margin();
    let pairs = margin.dims()[0];
    expect_tensor_len("policy_kl.chosen", &policy_kl.chosen, pairs)?;
    expect_tensor_len("policy_kl.rejected", &policy_kl.rejected, pairs)?;
    let loss = log_sigmoid(margin - excess(&policy_kl).mul_scalar(beta)).neg();
    let terms = rewards.into_terms(loss);
    let (chosen_kl, rejected_kl) = (policy_kl.chosen.detach(), policy_kl.rejected.detach());
    Ok(TdpoTerms {
        loss: terms.loss,
        chosen_reward: terms.chosen_reward + chosen_kl.clone().mul_scalar(beta),
        rejected_reward: terms.rejected_reward + rejected_kl.clone().mul_scalar(beta),
        chosen_kl,
        rejected_kl,
    })
}

/// KL(π_ref‖π) at each token over the whole vocabulary, in nats. The reference gets no gradient.
///
/// The logits are those that predict the token, from the position before it.
///
/// # Shapes
/// Both logits `[tokens, vocab]`, finite; returns `[tokens]`.
///
/// # Errors
/// [`LossError::Length`] if the two shapes differ.
///
/// # Examples
/// ```
/// use burn::tensor::{Device, Tensor};
/// let logits = |a: f32, b: f32| Tensor::<2>::from_floats([[a, b]], &Device::flex());
/// let kl = pivotal_loss::token_forward_kl(logits(3f32.ln(), 0.0), logits(0.0, 0.0)).unwrap();
/// // ½·ln(½ / ¾) + ½·ln(½ / ¼)
/// assert!((kl.into_scalar::<f32>() - 0.5 * (4f32 / 3.0).ln()).abs() < 1e-6);
/// ```
pub fn token_forward_kl(
    logits: Tensor<2>,
    reference_logits: Tensor<2>,
) -> Result<Tensor<1>, LossError> {
    let [tokens, vocab] = logits.dims();
    let [reference_tokens, reference_vocab] = reference_logits.dims();
    expect_len("reference_logits", reference_tokens, tokens)?;
    expect_len("reference_logits[0]", reference_vocab, vocab)?;
    let logps = |logits: Tensor<2>| logits.clone() - log_sum_exp(logits).unsqueeze_dim(1);
    let reference = logps(reference_logits.detach());
    let log_ratio = reference.clone() - logps(logits);
    Ok((reference.exp() * log_ratio).sum_dim(1).squeeze_dim(1))
}
