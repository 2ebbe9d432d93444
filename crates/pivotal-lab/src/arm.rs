//! The arms: what each keeps, the settings it was tuned to, and one run of it.

use pivotal_core::{Sign, TokenMask};
use pivotal_credit::{
    Agreement, AgreementCounts, Credit, CreditConfig, CutRule, Response, ResponseCredit, Selection,
};
use pivotal_loss::Normalisation;
use pivotal_model::Decoder;
use pivotal_report::Role;
use pivotal_train::dpo::{self, DpoItem, DpoObjective, PreferenceLoss};
use pivotal_train::optimizer::NamedAdamW;
use pivotal_train::settings::OptimizerSettings;

use crate::error::Result;
use crate::signal::TokenSignal;
use crate::training_pairs::TrainingPairs;

/// A token that the start policy gives less than this is decisive: above it there is hardly a gradient.
pub(crate) const DECISIVE_PROBABILITY: f64 = 0.9;

/// One way of training on the pairs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum ArmKind {
    /// DPO on every token; also the oracle of `log_ratio`.
    Unmasked,
    /// The same with the steps that the oracle cost on top.
    UnmaskedLonger,
    /// Segments that agree, by the oracle's log-ratio.
    LogRatio,
    /// Segments that agree, by the reward model's level.
    Level,
    /// As many tokens of each response as `LogRatio` keeps, drawn.
    Random,
    /// The segments that `LogRatio` drops.
    Disagree,
    /// The tokens whose truth agrees.
    Truth,
}

/// What is tuned for each arm.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ArmSettings {
    /// Peak learning rate; it falls to 0 in a line.
    pub lr: f64,
    /// DPO's β.
    pub beta: f64,
}

impl ArmKind {
    /// Every arm, in the order to show.
    pub const ALL: [Self; 7] = [
        Self::Unmasked,
        Self::UnmaskedLonger,
        Self::LogRatio,
        Self::Level,
        Self::Random,
        Self::Disagree,
        Self::Truth,
    ];

    /// Its key in studies.
    pub const fn key(self) -> &'static str {
        match self {
            Self::Unmasked => "unmasked",
            Self::UnmaskedLonger => "unmasked_longer",
            Self::LogRatio => "log_ratio",
            Self::Level => "level",
            Self::Random => "random",
            Self::Disagree => "disagree",
            Self::Truth => "truth",
        }
    }

    /// The setting that was best on the tuning split (`docs/bench/quickstart-grid.md`).
    ///
    /// `Disagree` has the setting of the arm that it inverts.
    pub const fn tuned(self) -> ArmSettings {
        let (lr, beta) = match self {
            Self::Unmasked | Self::UnmaskedLonger => (2e-4, 0.5),
            Self::LogRatio | Self::Disagree => (2e-4, 5.0),
            Self::Level => (5e-5, 0.5),
            Self::Random => (5e-5, 5.0),
            Self::Truth => (2e-4, 2.0),
        };
        ArmSettings { lr, beta }
    }

    pub(crate) const fn label(self) -> &'static str {
        match self {
            Self::Unmasked => "Unmasked DPO",
            Self::UnmaskedLonger => "Unmasked DPO, twice the steps",
            Self::LogRatio => "Segment credit, log_ratio",
            Self::Level => "Segment credit, level",
            Self::Random => "Random, equal fraction",
            Self::Disagree => "Disagree, log_ratio",
            Self::Truth => "Truth mask",
        }
    }

    pub(crate) const fn description(self) -> &'static str {
        match self {
            Self::Unmasked => "DPO on every token, at its own best setting.",
            Self::UnmaskedLonger => {
                "DPO on every token with the oracle's steps on top: the same compute as log_ratio, at its own best setting."
            }
            Self::LogRatio => {
                "Schmitt cut and agreement on the log-ratio of an oracle: the unmasked arm itself, trained on the same noisy pairs."
            }
            Self::Level => "Schmitt cut and agreement on the value-head reward model's level.",
            Self::Random => {
                "In each response, as many tokens as log_ratio keeps there, drawn at random."
            }
            Self::Disagree => "The tokens that log_ratio drops, at log_ratio's setting.",
            Self::Truth => {
                "The tokens whose known truth agrees with the label: not available in practice."
            }
        }
    }

    pub(crate) const fn role(self) -> Role {
        match self {
            Self::Unmasked | Self::UnmaskedLonger => Role::Baseline,
            Self::LogRatio | Self::Level => Role::Treatment,
            Self::Random | Self::Disagree => Role::Control,
            Self::Truth => Role::Ceiling,
        }
    }

    pub(crate) const fn extra_cost(self) -> &'static str {
        match self {
            Self::Unmasked | Self::Truth => "",
            Self::UnmaskedLonger => "as many steps again",
            Self::LogRatio | Self::Random | Self::Disagree => {
                "as many steps again for the oracle, and one scoring pass"
            }
            Self::Level => "the reward model's steps, and one scoring pass",
        }
    }

    /// How many times the usual steps it takes.
    pub(crate) const fn step_factor(self) -> u64 {
        match self {
            Self::UnmaskedLonger => 2,
            _ => 1,
        }
    }

    /// The credit rule; none where every token is kept or the truth decides.
    pub(crate) fn credit(self) -> CreditConfig {
        let selection = match self {
            Self::Unmasked | Self::UnmaskedLonger => Selection::All,
            Self::LogRatio | Self::Level => Selection::Agree,
            Self::Random => Selection::Random,
            Self::Disagree => Selection::Disagree,
            Self::Truth => Selection::Truth,
        };
        CreditConfig {
            cut: CutRule::Schmitt,
            selection,
            ..CreditConfig::default()
        }
    }
}

/// The credit of every response, chosen and rejected in turn.
pub(crate) fn credits(
    arm: ArmKind,
    signal: &TokenSignal,
    pairs: &TrainingPairs,
    seed: u64,
) -> Result<Vec<ResponseCredit>> {
    let config = CreditConfig {
        signal: signal.name,
        ..arm.credit()
    };
    let mut credit = Credit::new(config.resolve()?, seed);
    let sides = [Sign::Positive, Sign::Negative];
    let responses: Vec<Response<'_>> = signal
        .values
        .iter()
        .zip(&pairs.right)
        .zip(&pairs.tokenized)
        .flat_map(|((values, right), pair)| {
            [0, 1].map(|side| Response {
                truth: Some(&right[side]),
                ..Response::new(pair.id, side as u32, &values[side], sides[side])
            })
        })
        .collect();
    Ok(credit.assign(&responses)?)
}

/// The keep masks, chosen then rejected.
pub(crate) fn masks(
    arm: ArmKind,
    signal: &TokenSignal,
    pairs: &TrainingPairs,
    seed: u64,
) -> Result<Vec<[TokenMask; 2]>> {
    let credits = credits(arm, signal, pairs, seed)?;
    let (credits, _) = credits.as_chunks::<2>();
    Ok(credits
        .iter()
        .map(|pair| [0, 1].map(|side: usize| pair[side].keep.clone()))
        .collect())
}

/// How masks stand to the truth, and how much they keep.
#[derive(Clone, Copy, Debug)]
pub(crate) struct MaskQuality {
    pub(crate) agreement: Agreement,
    /// Kept share of the chosen and of the rejected responses' tokens.
    pub(crate) kept: [f64; 2],
}

pub(crate) fn mask_quality(masks: &[[TokenMask; 2]], pairs: &TrainingPairs) -> MaskQuality {
    let mut counts = AgreementCounts::default();
    let (mut kept, mut tokens) = ([0_usize; 2], [0_usize; 2]);
    for ((masks, right), logps) in masks.iter().zip(&pairs.right).zip(&pairs.reference_logps) {
        for side in 0..2 {
            kept[side] += masks[side].kept();
            tokens[side] += masks[side].len();
            let flags = masks[side].as_slice().iter();
            for ((&keep, &right), &logp) in flags.zip(&right[side]).zip(&logps[side]) {
                // Right tokens of the chosen response are wanted, and wrong ones of the rejected.
                let probability = Some(f64::from(logp).exp());
                counts.push(
                    keep,
                    right == (side == 0),
                    probability,
                    DECISIVE_PROBABILITY,
                );
            }
        }
    }
    MaskQuality {
        agreement: counts.agreement(),
        kept: [0, 1].map(|side: usize| kept[side] as f64 / tokens[side].max(1) as f64),
    }
}

/// Which pairs an arm sees, and when.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Schedule {
    /// Seed of the order.
    pub(crate) seed: u64,
    /// Optimizer steps.
    pub(crate) steps: u64,
    /// Pairs of a step.
    pub(crate) batch: usize,
}

/// The policy after the schedule's steps of DPO on the kept tokens, from the start policy.
pub(crate) fn train(
    start: &Decoder,
    pairs: &TrainingPairs,
    masks: Vec<[TokenMask; 2]>,
    settings: ArmSettings,
    schedule: Schedule,
) -> Result<Decoder> {
    let items: Vec<DpoItem> = (pairs.tokenized.iter().zip(&pairs.reference_logps))
        .zip(masks)
        .map(|((pair, reference_logps), keep)| DpoItem {
            mismatched: None,
            pair: pair.clone(),
            keep,
            reference_logps: reference_logps.clone(),
        })
        .collect();
    let objective = DpoObjective {
        loss: PreferenceLoss::Dpo,
        beta: settings.beta,
        normalisation: Normalisation::Sum,
        dropped_every: 0,
        reference: None,
    };
    let optimizer_settings = OptimizerSettings {
        lr: settings.lr,
        batch: schedule.batch,
        ..OptimizerSettings::default()
    };
    let mut policy = start.clone().trainable();
    dpo::optimize(
        &mut policy,
        &items,
        objective,
        &optimizer_settings,
        &mut NamedAdamW::new(&optimizer_settings),
        pairs.batches(schedule.seed, schedule.batch),
        0..schedule.steps,
        &mut |_, _, _, _| Ok(()),
    )?;
    Ok(policy.detached())
}
