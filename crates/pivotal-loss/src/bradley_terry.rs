//! Bradley-Terry reward modelling, and the two penalties that pin what it leaves free.
//!
//! ```text
//! L = -log σ( S_w - S_l )  +  center·(S_w + S_l)²  +  token_l2·mean(v²)
//! ```
//!
//! Bradley & Terry 1952; as a loss for language models Christiano et al. 2017, arXiv:1706.03741. `center`: Eisenstein et al.
//! 2023, arXiv:2312.09244. `token_l2` is Pivotal's own (METHOD, section 2). The three are separate functions: who trains
//! adds them and reports each.
//!
//! Reference: TRL 1.16, `RewardTrainer` with `center_rewards_coefficient`; value and gradient agree to 1e-12 in f64 (golden
//! vectors `bradley_terry`).
//!
//! Differs: TRL scores the last token; here the score is any [aggregation](crate::sequence_scores) of token values.

use burn::tensor::Tensor;

use crate::error::{expect_tensor_len, expect_weight};
use crate::{LossError, log_sigmoid};

/// Scores of both responses of each pair. Each `[pairs]`.
#[derive(Clone, Debug)]
pub struct ScorePair {
    /// Of the chosen responses.
    pub chosen: Tensor<1>,
    /// Of the rejected responses.
    pub rejected: Tensor<1>,
}

/// What [`bradley_terry`] computes for each pair. Each `[pairs]`; nothing is reduced here.
#[derive(Clone, Debug)]
pub struct BradleyTerryTerms {
    /// Loss in nats: the only field that carries a gradient.
    pub loss: Tensor<1>,
    /// `S_w - S_l`: above 0, the pair is ranked right.
    pub margin: Tensor<1>,
}

/// `-log σ(S_w - S_l)` of each pair. Adding one number to all scores changes nothing.
///
/// # Shapes
/// Both scores and each field of the result `[pairs]`.
///
/// # Errors
/// [`LossError::Length`] if the two lengths differ.
pub fn bradley_terry(scores: ScorePair) -> Result<BradleyTerryTerms, LossError> {
    let pairs = scores.chosen.dims()[0];
    expect_tensor_len("scores.rejected", &scores.rejected, pairs)?;
    let margin = scores.chosen - scores.rejected;
    Ok(BradleyTerryTerms {
        loss: log_sigmoid(margin.clone()).neg(),
        margin: margin.detach(),
    })
}

/// `center·(S_w + S_l)²` of each pair: pins the zero of the scores.
///
/// # Shapes
/// Both scores and the result `[pairs]`.
///
/// # Errors
/// [`LossError::Length`] if the two lengths differ; [`LossError::Domain`] if `center` is negative or not finite.
pub fn center_penalty(scores: ScorePair, center: f64) -> Result<Tensor<1>, LossError> {
    expect_weight("center", center)?;
    let pairs = scores.chosen.dims()[0];
    expect_tensor_len("scores.rejected", &scores.rejected, pairs)?;
    let sum = scores.chosen + scores.rejected;
    Ok(sum.square().mul_scalar(center))
}

/// `token_l2·v²` of each token, to be averaged over the tokens of the batch: pins the zero of the token values.
///
/// # Shapes
/// `token_values` and the result `[tokens]`.
///
/// # Errors
/// [`LossError::Domain`] if `token_l2` is negative or not finite.
pub fn token_l2_penalty(token_values: Tensor<1>, token_l2: f64) -> Result<Tensor<1>, LossError> {
    expect_weight("token_l2", token_l2)?;
    Ok(token_values.square().mul_scalar(token_l2))
}
