//! What the loss of a pair is.

use burn::tensor::Tensor;
use pivotal_loss::{
    DpoTerms, Judgement, KtoTerms, KtoWeights, LossError, Normalisation, PairKl, PairLogps,
    TdpoTerms, cdpo, dpo, hinge, ipo, kto, robust_dpo, simpo, tdpo1, tdpo2,
};

use pivotal_model::Decoder;

use crate::error::Result;

/// What the loss is made of besides the pairs, and what is measured beside it.
#[derive(Clone, Copy, Debug)]
pub struct DpoObjective<'a> {
    /// Which loss.
    pub loss: PreferenceLoss,
    /// Strength of the anchor to the reference, or scale of the rewards where there is none; above 0.
    pub beta: f64,
    /// What a response's kept log-probabilities are made into.
    pub normalisation: Normalisation,
    /// Steps between measurements of the dropped tokens' log-probabilities, which change results in the last bits of sums at most; 0 takes none.
    pub dropped_every: u64,
    /// The reference itself, where [`PreferenceLoss::uses_reference_model`].
    pub reference: Option<&'a Decoder>,
}

/// A loss of preferences, with the numbers that it alone has.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum PreferenceLoss {
    /// [`pivotal_loss::dpo()`].
    Dpo,
    /// [`pivotal_loss::ipo()`]: the paper's with [`Normalisation::Sum`], TRL's with [`Normalisation::KeptMean`].
    Ipo,
    /// [`pivotal_loss::cdpo()`].
    Cdpo {
        /// The chance that a label is flipped.
        label_smoothing: f64,
    },
    /// [`pivotal_loss::robust_dpo()`].
    Robust {
        /// The chance that a label is flipped.
        label_smoothing: f64,
    },
    /// [`pivotal_loss::hinge()`].
    Hinge,
    /// [`pivotal_loss::simpo()`], which has no reference; it wants [`Normalisation::KeptMean`].
    Simpo {
        /// γ, the margin aimed at.
        target_margin: f64,
    },
    /// [`pivotal_loss::kto()`] of both responses, the chosen desirable and the rejected undesirable; a pair's loss is
    /// their mean.
    Kto {
        /// What a response of each kind weighs.
        weights: KtoWeights,
    },
    /// [`pivotal_loss::tdpo1()`].
    Tdpo1,
    /// [`pivotal_loss::tdpo2()`].
    Tdpo2 {
        /// α, what the divergences weigh.
        alpha: f64,
    },
}

impl PreferenceLoss {
    /// False if the reference's log-probabilities have no part in it.
    pub fn uses_reference(self) -> bool {
        !matches!(self, Self::Simpo { .. })
    }

    /// True if it compares with responses behind prompts that are not theirs.
    pub fn uses_mismatched(self) -> bool {
        matches!(self, Self::Kto { .. })
    }

    /// True if it compares the two models' distributions over the whole vocabulary, so that the reference itself is needed.
    pub fn uses_reference_model(self) -> bool {
        matches!(self, Self::Tdpo1 | Self::Tdpo2 { .. })
    }
}

impl DpoObjective<'_> {
    /// True in the steps, counted from 1, that measure the dropped tokens: the first, and every so many after it.
    pub(super) fn measures_dropped(&self, step: u64) -> bool {
        self.dropped_every > 0 && (step - 1).is_multiple_of(self.dropped_every)
    }

    /// The terms of each pair. `reference` is there where [`PreferenceLoss::uses_reference`], `baseline` where
    /// [`PreferenceLoss::uses_mismatched`], `kl` where [`PreferenceLoss::uses_reference_model`].
    pub(super) fn terms(
        &self,
        policy: PairLogps,
        reference: Option<PairLogps>,
        baseline: Option<Tensor<1>>,
        kl: Option<PairKl>,
    ) -> Result<DpoTerms> {
        let beta = self.beta;
        if let PreferenceLoss::Simpo { target_margin } = self.loss {
            return Ok(simpo(policy, beta, target_margin)?);
        }
        let reference = reference.ok_or(LossError::Empty { name: "reference" })?;
        Ok(match self.loss {
            PreferenceLoss::Dpo | PreferenceLoss::Simpo { .. } => dpo(policy, reference, beta)?,
            PreferenceLoss::Ipo => ipo(policy, reference, beta)?,
            PreferenceLoss::Cdpo { label_smoothing } => {
                cdpo(policy, reference, beta, label_smoothing)?
            }
            PreferenceLoss::Robust { label_smoothing } => {
                robust_dpo(policy, reference, beta, label_smoothing)?
            }
            PreferenceLoss::Hinge => hinge(policy, reference, beta)?,
            PreferenceLoss::Kto { weights } => {
                let baseline = baseline.ok_or(LossError::Empty { name: "baseline" })?;
                kto_of_pairs(policy, reference, baseline, beta, weights)?
            }
            PreferenceLoss::Tdpo1 => of_tdpo(tdpo1(policy, expect_kl(kl)?, reference, beta)?),
            PreferenceLoss::Tdpo2 { alpha } => {
                of_tdpo(tdpo2(policy, expect_kl(kl)?, reference, beta, alpha)?)
            }
        })
    }
}

fn expect_kl(kl: Option<PairKl>) -> Result<PairKl, LossError> {
    kl.ok_or(LossError::Empty { name: "policy_kl" })
}

fn of_tdpo(terms: TdpoTerms) -> DpoTerms {
    DpoTerms {
        loss: terms.loss,
        chosen_reward: terms.chosen_reward,
        rejected_reward: terms.rejected_reward,
    }
}

fn kto_of_pairs(
    policy: PairLogps,
    reference: PairLogps,
    baseline: Tensor<1>,
    beta: f64,
    weights: KtoWeights,
) -> Result<DpoTerms> {
    let pairs = policy.chosen.dims()[0];
    let side = |policy, reference, judgement| -> Result<KtoTerms, LossError> {
        let judgements = vec![judgement; pairs];
        kto(
            policy,
            reference,
            &judgements,
            baseline.clone(),
            beta,
            weights,
        )
    };
    let chosen = side(policy.chosen, reference.chosen, Judgement::Desirable)?;
    let rejected = side(policy.rejected, reference.rejected, Judgement::Undesirable)?;
    Ok(DpoTerms {
        loss: (chosen.loss + rejected.loss).mul_scalar(0.5),
        chosen_reward: chosen.reward,
        rejected_reward: rejected.reward,
    })
}
