//! The `[dpo]` table.

use std::path::PathBuf;

use clap::ValueEnum;
use pivotal_loss::{KtoWeights, Normalisation};
use serde::{Deserialize, Serialize};

use super::{DpoObjective, PreferenceLoss};
use crate::error::{Error, Result};
use crate::settings::{KeptNormalisation, domain, overlay};
use crate::table::table;

overlay! {
    DpoFlags => DpoSettings,
}

/// A loss of preferences, by name.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub enum LossName {
    /// −log σ of the margin, as published.
    #[default]
    Dpo,
    /// (h − 1/2β)² of summed log-ratios, as in the paper.
    IpoSum,
    /// The same of mean log-ratios, as in TRL.
    IpoMean,
    /// DPO with smoothed labels.
    Cdpo,
    /// DPO's unbiased estimate under flipped labels.
    Robust,
    /// max(0, 1 − margin).
    Hinge,
    /// Means of log-probabilities and a target margin, without a reference.
    Simpo,
    /// Each response for itself, desirable or not, against a baseline.
    Kto,
    /// DPO with the divergence of every kept position from the reference's whole distribution.
    Tdpo1,
    /// The same at weight α, and without the gradient of the chosen response's divergence.
    Tdpo2,
}

impl LossName {
    fn name(self) -> String {
        let value = self.to_possible_value();
        value.map_or_else(String::new, |value| value.get_name().to_owned())
    }
}

table! {
    /// Direct preference optimization and its kin.
    pub struct DpoSettings, DpoFlags {
        /// Loss: dpo, ipo_sum, ipo_mean, cdpo, robust, hinge, simpo, kto, tdpo1 or tdpo2.
        "loss" loss: LossName = LossName::Dpo,
        /// Strength of the anchor to the reference; above 0. For simpo, which has none, the scale of rewards, usually 2.
        "beta" beta: f64 = 0.1,
        /// What a response's kept log-probabilities are made into: sum, kept_mean or rescaled_sum.
        /// The losses ipo_sum, ipo_mean, simpo and kto have their own.
        "normalisation" normalisation: KeptNormalisation = KeptNormalisation::Sum,
        /// For cdpo and robust: the chance that a label is flipped; above 0 and below 0.5.
        "label-smoothing" label_smoothing: f64 = 0.0,
        /// For simpo: the margin aimed at, γ; at least 0.
        "target-margin" target_margin: f64 = 0.0,
        /// For kto: what a chosen response weighs.
        "desirable-weight" desirable_weight: f64 = 1.0,
        /// For kto: what a rejected response weighs.
        "undesirable-weight" undesirable_weight: f64 = 1.0,
        /// Steps between measurements of the dropped tokens' log-probabilities, for the metrics alone; 0 takes none.
        /// One costs the tokens after the last kept one of each response, forward and backward, and the vocabulary's projection of
        /// the dropped ones.
        "dropped-every" dropped_every: u64 = 10,
        /// For tdpo2: what the divergences from the reference weigh, α; at least 0, and 0 is dpo.
        "tdpo-alpha" tdpo_alpha: f64 = 0.5,
        /// Credit records of `annotate`, whose signals the `[credit]` table segments; the data's own columns if empty.
        "signals" signals: PathBuf = PathBuf::new(),
        /// Directory of cached reference log-probabilities; the run directory's parent has one if empty.
        "reference-cache" reference_cache: PathBuf = PathBuf::new(),
    }
}

impl DpoSettings {
    /// Checks every number's domain, and that the loss uses every key that was set.
    ///
    /// # Errors
    /// [`Error::Setting`], naming the flag; [`Error::UnusedSetting`], naming flag and loss.
    pub fn check(&self) -> Result<()> {
        self.objective().map(|_| ())
    }

    /// The objective, checked, and without the reference model that some losses want.
    ///
    /// # Errors
    /// As [`DpoSettings::check`].
    pub fn objective(&self) -> Result<DpoObjective<'static>> {
        use LossName::{Cdpo, Dpo, Hinge, IpoMean, IpoSum, Kto, Robust, Simpo, Tdpo1, Tdpo2};

        self.only_used_keys()?;
        domain("beta", self.beta, "above 0", self.beta > 0.0)?;
        let label_smoothing = self.label_smoothing;
        if matches!(self.loss, Cdpo | Robust) {
            let within = label_smoothing > 0.0 && label_smoothing < 0.5;
            let expected = "above 0 and below 0.5 with losses cdpo and robust";
            domain("label-smoothing", label_smoothing, expected, within)?;
        }
        for (key, value) in [
            ("target-margin", self.target_margin),
            ("desirable-weight", self.desirable_weight),
            ("undesirable-weight", self.undesirable_weight),
            ("tdpo-alpha", self.tdpo_alpha),
        ] {
            domain(key, value, "a number of at least 0", value >= 0.0)?;
        }
        let loss = match self.loss {
            Dpo => PreferenceLoss::Dpo,
            IpoSum | IpoMean => PreferenceLoss::Ipo,
            Cdpo => PreferenceLoss::Cdpo { label_smoothing },
            Robust => PreferenceLoss::Robust { label_smoothing },
            Hinge => PreferenceLoss::Hinge,
            Simpo => PreferenceLoss::Simpo {
                target_margin: self.target_margin,
            },
            Kto => PreferenceLoss::Kto {
                weights: KtoWeights {
                    desirable: self.desirable_weight,
                    undesirable: self.undesirable_weight,
                },
            },
            Tdpo1 => PreferenceLoss::Tdpo1,
            Tdpo2 => PreferenceLoss::Tdpo2 {
                alpha: self.tdpo_alpha,
            },
        };
        let normalisation = match self.loss {
            IpoMean | Simpo => Normalisation::KeptMean,
            _ => self.normalisation.into(),
        };
        Ok(DpoObjective {
            loss,
            beta: self.beta,
            normalisation,
            dropped_every: self.dropped_every,
            reference: None,
        })
    }

    /// A resolved configuration writes every key, so one at its default, which says nothing, is not one that was set.
    fn only_used_keys(&self) -> Result<()> {
        use LossName::{Cdpo, Dpo, Hinge, Kto, Robust, Simpo, Tdpo1, Tdpo2};

        let default = Self::default();
        let smooth = [Cdpo, Robust];
        let normalised = [Dpo, Cdpo, Robust, Hinge, Tdpo1, Tdpo2];
        let uses: [(&'static str, bool, &[LossName]); 6] = [
            (
                "normalisation",
                self.normalisation != default.normalisation,
                &normalised,
            ),
            (
                "label-smoothing",
                self.label_smoothing != default.label_smoothing,
                &smooth,
            ),
            (
                "target-margin",
                self.target_margin != default.target_margin,
                &[Simpo],
            ),
            (
                "desirable-weight",
                self.desirable_weight != default.desirable_weight,
                &[Kto],
            ),
            (
                "undesirable-weight",
                self.undesirable_weight != default.undesirable_weight,
                &[Kto],
            ),
            (
                "tdpo-alpha",
                self.tdpo_alpha != default.tdpo_alpha,
                &[Tdpo2],
            ),
        ];
        let unused = uses
            .iter()
            .find(|(_, set, losses)| *set && !losses.contains(&self.loss));
        match unused {
            None => Ok(()),
            Some(&(key, _, _)) => Err(Error::UnusedSetting {
                key,
                loss: self.loss.name(),
            }),
        }
    }
}
