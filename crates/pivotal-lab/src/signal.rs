//! Token signals on pairs, and how good they are against the truth.

use pivotal_core::statistics::{auc, mean};
use pivotal_credit::Signal;
use pivotal_model::{Decoder, HeadInit, RewardModel};
use pivotal_train::optimizer::NamedAdamW;
use pivotal_train::reward;
use pivotal_train::score::{Group, ResponseValues, token_values};
use pivotal_train::settings::{OptimizerSettings, RewardSettings};
use serde::Serialize;

use crate::error::Result;
use crate::training_pairs::{SCORING_TOKENS, TrainingPairs, logps, two};

/// One value a response token, chosen then rejected.
pub(crate) type SideValues = [Vec<f32>; 2];

/// A token signal over pairs.
#[derive(Clone, Debug)]
pub(crate) struct TokenSignal {
    pub(crate) name: Signal,
    pub(crate) values: Vec<SideValues>,
}

/// How good a signal is.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(crate) struct SignalQuality {
    /// Pairs whose chosen response has the higher mean; a tie counts half.
    pub(crate) pair_accuracy: f64,
    /// The probability that a right token's signal is above a wrong token's.
    pub(crate) token_auc: f64,
}

impl TokenSignal {
    /// `log π_oracle − log π_start` of each token.
    pub(crate) fn log_ratio(oracle: &Decoder, pairs: &TrainingPairs) -> Result<Self> {
        let oracle = logps(oracle, &pairs.tokenized)?;
        let ratio = |(oracle, reference): (&SideValues, &SideValues)| {
            [0, 1].map(|side| {
                let tokens = oracle[side].iter().zip(&reference[side]);
                tokens
                    .map(|(oracle, reference)| oracle - reference)
                    .collect()
            })
        };
        let values = oracle.iter().zip(&pairs.reference_logps).map(ratio);
        Ok(Self {
            name: Signal::LogRatio,
            values: values.collect(),
        })
    }

    /// The reward model's value at each token.
    pub(crate) fn level(model: &RewardModel, pairs: &TrainingPairs) -> Result<Self> {
        let groups: Vec<_> = pairs.tokenized.iter().map(Group::of_pair).collect();
        let values = token_values(model, &groups, SCORING_TOKENS)?;
        let levels = |responses| two(responses).map(|v: ResponseValues| v.levels);
        Ok(Self {
            name: Signal::Level,
            values: values.into_iter().map(levels).collect(),
        })
    }

    /// How well it ranks the pairs and finds their wrong tokens.
    pub(crate) fn quality(&self, pairs: &TrainingPairs) -> SignalQuality {
        let ranked = self.values.iter().map(|[chosen, rejected]| {
            match mean(chosen).partial_cmp(&mean(rejected)) {
                Some(std::cmp::Ordering::Greater) => 1.0,
                Some(std::cmp::Ordering::Equal) => 0.5,
                _ => 0.0,
            }
        });
        let ranked: Vec<f64> = ranked.collect();
        let values: Vec<f32> = self.values.iter().flatten().flatten().copied().collect();
        let right: Vec<bool> = pairs.right.iter().flatten().flatten().copied().collect();
        SignalQuality {
            pair_accuracy: mean(&ranked).unwrap_or(0.5),
            // Pairs differ in their mistakes, so both kinds of tokens occur as soon as there is one.
            token_auc: auc(&values, &right).unwrap_or(0.5),
        }
    }
}

/// A value-head reward model on the start policy: Bradley–Terry on the mean token value, zero head.
pub(crate) fn reward_model(
    start: &Decoder,
    pairs: &TrainingPairs,
    seed: u64,
    steps: u64,
    batch: usize,
) -> Result<RewardModel> {
    let settings = OptimizerSettings {
        lr: 1e-3,
        batch,
        ..OptimizerSettings::default()
    };
    let mut model = RewardModel::new(start.clone().trainable(), HeadInit::Zero, seed)?;
    reward::optimize(
        &mut model,
        &pairs.tokenized,
        &RewardSettings::default(),
        &settings,
        &mut NamedAdamW::new(&settings),
        pairs.batches(seed, batch),
        0..steps,
        &mut |_, _, _, _| Ok(()),
    )?;
    Ok(model.detached())
}
