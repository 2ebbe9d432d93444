//! The clipped surrogate of PPO and GRPO, with token credit.
//!
//! Schulman et al. 2017, arXiv:1707.06347, Eq. 7, for each kept token, with r = exp(log π - log π_old):
//!
//! ```text
//! L_t = -min( r·A, clip(r, 1 - ε_low, 1 + ε_high)·A )
//! ```
//!
//! Unequal bounds are DAPO's clip-higher (Yu et al. 2025, arXiv:2503.14476). [`dual_clip_ppo`] also bounds the loss
//! of a token with a negative advantage whose ratio grew (Ye et al. 2020, arXiv:1912.09729).
//!
//! GRPO's and RLOO's policy loss is this one, on group-relative or leave-one-out advantages, plus, if wanted, a coefficient
//! times one of the [KL losses](crate::kl_k2): the caller adds them, and [reduces](crate::token_mean).
//!
//! The advantages are whitened, or normalised, over all of a response's tokens before they come here: a dropped token is a
//! real action. `keep` then drops it from the loss alone (METHOD, section 8).
//!
//! Reference: TRL 1.16, `GRPOTrainer` with advantages for each token, `epsilon_high` and `delta`, keep given as its
//! completion mask; value, gradient and clip counts agree to 1e-12 in f64 (golden vectors `ppo`). TRL's former `PPOTrainer`
//! has the same formula as a maximum of two losses; the script asserts that the two agree.
//!
//! Differs: nothing in the formula; in the reduction everything, see [`token_mean`](crate::token_mean).

use burn::tensor::{Bool, Tensor};
use pivotal_core::TokenMask;

use crate::LossError;
use crate::error::{expect_tensor_len, expect_weight};
use crate::kept_sums::zero_where_dropped;
use crate::kl::{KlEstimates, estimates_of, kept_log_ratio};

/// How far the ratio may go before a token stops being pushed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Clip {
    /// ε_low: a token with a negative advantage is pushed down no further than to the ratio `1 - low`. From 0 to 1.
    pub low: f64,
    /// ε_high: a token with a positive advantage is pushed up no further than to the ratio `1 + high`. At least 0.
    pub high: f64,
}

impl Clip {
    /// The same distance on both sides, as PPO was published.
    pub fn symmetric(distance: f64) -> Self {
        Self {
            low: distance,
            high: distance,
        }
    }
}

impl Default for Clip {
    /// 0.2 on both sides.
    fn default() -> Self {
        Self::symmetric(0.2)
    }
}

/// What [`ppo`] computes for each token. Each `[tokens]`; nothing is reduced here.
#[derive(Clone, Debug)]
pub struct PpoTerms {
    /// Loss, dimensionless, 0 where dropped: the only field that carries a gradient.
    pub loss: Tensor<1>,
    /// `π/π_old`; 1 where dropped, and exactly 1 before the first update.
    pub ratio: Tensor<1>,
    /// 1 where the advantage is negative and the ratio below `1 - low`, so that the token has no gradient; else 0.
    pub clipped_low: Tensor<1>,
    /// 1 where the advantage is positive and the ratio above `1 + high`, so that the token has no gradient; else 0.
    pub clipped_high: Tensor<1>,
    /// Estimates of KL(π_old‖π), which drew the tokens: how far the update has gone.
    pub kl_from_old: KlEstimates,
}

/// What [`dual_clip_ppo`] computes for each token.
#[derive(Clone, Debug)]
pub struct DualClipTerms {
    /// As [`ppo`] has them, the loss with the second bound.
    pub terms: PpoTerms,
    /// 1 where the advantage is negative and the ratio above the second bound, so that the token has no gradient; else 0.
    pub clipped_dual: Tensor<1>,
}

/// The clipped surrogate loss of each token (Eq. 7).
///
/// `old_token_logps` are those of the policy that drew the tokens, at the same temperature. `advantages` are numbers: no
/// gradient goes through them.
///
/// # Shapes
/// The three tensors `[tokens]` (log-probabilities in nats), `keep` one flag a token; each field of the result `[tokens]`.
///
/// # Errors
/// [`LossError::Length`] if the four are not of one length; [`LossError::Domain`] if a bound of `clip` is out of its range.
///
/// # Examples
/// ```
/// use burn::tensor::{Device, Tensor};
/// use pivotal_core::TokenMask;
/// use pivotal_loss::{Clip, ppo};
/// let tensor = |values: [f32; 2]| Tensor::<1>::from_floats(values, &Device::flex());
/// let (new, old) = (tensor([-1.0, -1.0]), tensor([-2.0, -1.0]));
/// let terms = ppo(new, old, tensor([1.0, -3.0]), &TokenMask::all(2), Clip::default()).unwrap();
/// assert_eq!(terms.loss.try_into_vec_as::<f32>().unwrap(), [-1.2, 3.0]);
/// assert_eq!(terms.clipped_high.try_into_vec_as::<f32>().unwrap(), [1.0, 0.0]);
/// ```
pub fn ppo(
    token_logps: Tensor<1>,
    old_token_logps: Tensor<1>,
    advantages: Tensor<1>,
    keep: &TokenMask,
    clip: Clip,
) -> Result<PpoTerms, LossError> {
    let surrogate = Surrogate::new(token_logps, old_token_logps, advantages, keep, clip)?;
    Ok(surrogate.into_terms(clip))
}

/// [`ppo`], and for a negative advantage the loss stops growing where the ratio passes `dual`, usually 3.
///
/// # Shapes
/// As [`ppo`].
///
/// # Errors
/// As [`ppo`]; also [`LossError::Domain`] if `dual` is not finite and above `1 + clip.high`.
pub fn dual_clip_ppo(
    token_logps: Tensor<1>,
    old_token_logps: Tensor<1>,
    advantages: Tensor<1>,
    keep: &TokenMask,
    clip: Clip,
    dual: f64,
) -> Result<DualClipTerms, LossError> {
    let mut surrogate = Surrogate::new(token_logps, old_token_logps, advantages, keep, clip)?;
    if !(dual.is_finite() && dual > 1.0 + clip.high) {
        return Err(LossError::Domain {
            name: "dual",
            expected: "a finite number above 1 + `clip.high`",
            found: dual,
        });
    }
    let ratio_above = surrogate.ratio.clone().greater_elem(dual);
    let clipped_dual = ratio_above.bool_and(surrogate.advantages.clone().lower_elem(0.0));
    let flags = ones_where(&surrogate.ratio, clipped_dual.clone());
    surrogate.bounds.push((clipped_dual, dual));
    Ok(DualClipTerms {
        terms: surrogate.into_terms(clip),
        clipped_dual: flags,
    })
}

/// The ratio and the places where a constant bound takes its place.
struct Surrogate {
    /// `log π - log π_old`, with its gradient.
    log_ratio: Tensor<1>,
    /// Its exponential, detached.
    ratio: Tensor<1>,
    advantages: Tensor<1>,
    /// Which tokens have the given constant for their ratio, beyond the two sides of the clip.
    bounds: Vec<(Tensor<1, Bool>, f64)>,
}

impl Surrogate {
    fn new(
        token_logps: Tensor<1>,
        old_token_logps: Tensor<1>,
        advantages: Tensor<1>,
        keep: &TokenMask,
        clip: Clip,
    ) -> Result<Self, LossError> {
        expect_weight("clip.high", clip.high)?;
        if !(0.0..=1.0).contains(&clip.low) {
            return Err(LossError::Domain {
                name: "clip.low",
                expected: "a number from 0 to 1",
                found: clip.low,
            });
        }
        let tokens = token_logps.dims()[0];
        expect_tensor_len("old_token_logps", &old_token_logps, tokens)?;
        expect_tensor_len("advantages", &advantages, tokens)?;
        let log_ratio = kept_log_ratio(token_logps, old_token_logps, keep)?;
        Ok(Self {
            ratio: log_ratio.clone().detach().exp(),
            log_ratio,
            advantages: zero_where_dropped(advantages.detach(), keep),
            bounds: vec![],
        })
    }

    fn into_terms(self, clip: Clip) -> PpoTerms {
        let Self {
            log_ratio,
            ratio,
            advantages,
            mut bounds,
        } = self;
        let (highest, lowest) = (1.0 + clip.high, 1.0 - clip.low);
        let above = ratio.clone().greater_elem(highest);
        let below = ratio.clone().lower_elem(lowest);
        let clipped_high = above.bool_and(advantages.clone().greater_elem(0.0));
        let clipped_low = below.bool_and(advantages.clone().lower_elem(0.0));
        bounds.push((clipped_high.clone(), highest));
        bounds.push((clipped_low.clone(), lowest));
        // Without an advantage there is no loss whatever the ratio, and an infinite one would make it NaN.
        bounds.push((advantages.clone().equal_elem(0.0), 1.0));

        // The log-ratio of a bounded token is cut off before `exp`: after it, an overflow would come back as 0·∞.
        let live = bounds.iter().fold(log_ratio.clone(), |live, (at, _)| {
            live.mask_fill(at.clone(), 0.0)
        });
        let bounded = bounds
            .into_iter()
            .fold(live.exp(), |ratio, (at, bound)| ratio.mask_fill(at, bound));
        PpoTerms {
            loss: bounded * advantages.neg(),
            clipped_low: ones_where(&ratio, clipped_low),
            clipped_high: ones_where(&ratio, clipped_high),
            ratio,
            kl_from_old: estimates_of(log_ratio.detach().neg()),
        }
    }
}

/// 1 where the flag is true, else 0, in the type of `like`.
pub(crate) fn ones_where(like: &Tensor<1>, flags: Tensor<1, Bool>) -> Tensor<1> {
    like.zeros_like().mask_fill(flags, 1.0)
}
