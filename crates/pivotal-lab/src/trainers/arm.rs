//! The arms: a trainer, and which tokens its loss uses.

use pivotal_credit::{BaselineRule, CreditConfig, Selection, Signal};
use pivotal_report::Role;

use crate::arm::ArmKind;

/// A way of learning from preferences or from scored samples.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Trainer {
    /// Direct preference optimization, on the pairs.
    Dpo,
    /// Rejection sampling: fine-tuning on the samples that the judge accepts.
    Reject,
    /// Group-relative policy optimization.
    Grpo,
    /// Proximal policy optimization with a value model.
    Ppo,
}

impl Trainer {
    /// Every trainer, in the order to show.
    pub const ALL: [Self; 4] = [Self::Dpo, Self::Reject, Self::Grpo, Self::Ppo];

    /// Its key in studies.
    pub const fn key(self) -> &'static str {
        match self {
            Self::Dpo => "dpo",
            Self::Reject => "reject",
            Self::Grpo => "grpo",
            Self::Ppo => "ppo",
        }
    }

    pub(crate) const fn label(self) -> &'static str {
        match self {
            Self::Dpo => "DPO",
            Self::Reject => "Reject",
            Self::Grpo => "GRPO",
            Self::Ppo => "PPO",
        }
    }

    /// Values of what holds a policy near its start, tried with every learning rate: DPO's β, the coefficient of GRPO's and
    /// PPO's KL; rejection sampling has none.
    pub const fn anchors(self) -> &'static [f64] {
        match self {
            Self::Dpo => &crate::BETAS,
            Self::Reject => &[0.0],
            Self::Grpo => &[0.0, 0.3],
            Self::Ppo => &[0.0, 0.1],
        }
    }

    /// Learning rates tried with every anchor; PPO takes four updates a step.
    pub const fn learning_rates(self) -> [f64; 4] {
        match self {
            Self::Dpo => crate::LEARNING_RATES,
            Self::Reject | Self::Grpo => [1e-4, 2e-4, 4e-4, 8e-4],
            Self::Ppo => [5e-5, 1e-4, 2e-4, 4e-4],
        }
    }

    /// About how long a step takes, beside those of the others.
    pub(crate) const fn weight(self) -> u64 {
        match self {
            Self::Dpo | Self::Reject => 1,
            Self::Grpo => 2,
            Self::Ppo => 4,
        }
    }

    /// What the anchor is called.
    pub(crate) const fn anchor_name(self) -> &'static str {
        match self {
            Self::Dpo => "beta",
            Self::Reject | Self::Grpo | Self::Ppo => "kl_coef",
        }
    }
}

/// Which tokens the loss uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum TokenRule {
    /// Every token.
    All,
    /// Every token, with more steps: what the oracle costs, and more.
    AllLonger,
    /// Every token, starting from the oracle of `LogRatio` instead of the start policy: the same pairs, the same compute.
    AllFromOracle,
    /// Segments that agree, by the oracle's log-ratio.
    LogRatio,
    /// Segments that agree, by the update's own advantages.
    Advantage,
    /// Segments that agree, by the value model.
    Critic,
    /// As many tokens of each response as `LogRatio` keeps, drawn.
    Random,
    /// The tokens whose truth agrees.
    Truth,
}

impl TokenRule {
    /// Every rule, in the order to show.
    pub const ALL: [Self; 8] = [
        Self::All,
        Self::AllLonger,
        Self::AllFromOracle,
        Self::LogRatio,
        Self::Advantage,
        Self::Critic,
        Self::Random,
        Self::Truth,
    ];

    /// Its key in studies.
    pub const fn key(self) -> &'static str {
        match self {
            Self::All => "all",
            Self::AllLonger => "all_longer",
            Self::AllFromOracle => "all_from_oracle",
            Self::LogRatio => "log_ratio",
            Self::Advantage => "advantage",
            Self::Critic => "critic",
            Self::Random => "random",
            Self::Truth => "truth",
        }
    }

    pub(crate) const fn label(self) -> &'static str {
        match self {
            Self::All => "every token",
            Self::AllLonger => "every token, longer",
            Self::AllFromOracle => "every token, from the oracle",
            Self::LogRatio => "segment credit, log_ratio",
            Self::Advantage => "segment credit, advantage",
            Self::Critic => "segment credit, critic",
            Self::Random => "random, equal fraction",
            Self::Truth => "truth mask",
        }
    }

    const fn description(self) -> &'static str {
        match self {
            Self::All => "Every token.",
            Self::AllLonger => {
                "Every token, so many more steps that it costs more than credit with its oracle."
            }
            Self::AllFromOracle => {
                "Every token, starting from log_ratio's oracle: the pairs and the compute that credit spends on its signal, spent on the policy."
            }
            Self::LogRatio => {
                "Schmitt cut and agreement on the log-ratio of an oracle: unmasked DPO on the seed's noisy pairs."
            }
            Self::Advantage => {
                "Schmitt cut and agreement on the update's whitened advantages, baseline 0."
            }
            Self::Critic => {
                "Schmitt cut and agreement on the value model's value before each token, baseline the batch's mean."
            }
            Self::Random => {
                "In each response, as many tokens as log_ratio would keep there, drawn at random."
            }
            Self::Truth => {
                "The tokens whose known truth agrees with the response's sign: not available in practice."
            }
        }
    }

    const fn role(self) -> Role {
        match self {
            Self::All | Self::AllLonger | Self::AllFromOracle => Role::Baseline,
            Self::LogRatio | Self::Advantage | Self::Critic => Role::Treatment,
            Self::Random => Role::Control,
            Self::Truth => Role::Ceiling,
        }
    }

    /// Whether the oracle's training is part of its cost.
    pub(crate) const fn uses_oracle(self) -> bool {
        matches!(self, Self::AllFromOracle | Self::LogRatio | Self::Random)
    }
}

/// A trainer with a rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct TrainerArm {
    /// How it learns.
    pub trainer: Trainer,
    /// From which tokens.
    pub rule: TokenRule,
}

/// What is tuned for each arm.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TrainerSettings {
    /// Peak learning rate of the policy; it falls to 0 in a line.
    pub lr: f64,
    /// DPO's β, or the coefficient of the KL; see [`Trainer::anchors`].
    pub anchor: f64,
}

impl TrainerArm {
    /// DPO on every token, which is the oracle of the others.
    pub(crate) const ORACLE: Self = Self {
        trainer: Trainer::Dpo,
        rule: TokenRule::All,
    };

    /// Every arm, trainer by trainer.
    pub fn all() -> impl Iterator<Item = Self> {
        Trainer::ALL.into_iter().flat_map(|trainer| {
            let arm = move |rule| Self { trainer, rule };
            TokenRule::ALL
                .into_iter()
                .map(arm)
                .filter(|arm| arm.exists())
        })
    }

    fn exists(self) -> bool {
        match self.rule {
            // More DPO from the oracle is `AllLonger`: the oracle is DPO's own `All`.
            TokenRule::AllFromOracle => self.trainer != Trainer::Dpo,
            TokenRule::Advantage | TokenRule::Critic => self.trainer == Trainer::Ppo,
            _ => true,
        }
    }

    /// Its key in studies.
    pub fn key(self) -> String {
        format!("{}_{}", self.trainer.key(), self.rule.key())
    }

    /// The quickstart's arm that it is, where it is one.
    pub(crate) fn quickstart(self) -> Option<ArmKind> {
        match (self.trainer, self.rule) {
            (Trainer::Dpo, TokenRule::All) => Some(ArmKind::Unmasked),
            (Trainer::Dpo, TokenRule::AllLonger) => Some(ArmKind::UnmaskedLonger),
            (Trainer::Dpo, TokenRule::LogRatio) => Some(ArmKind::LogRatio),
            (Trainer::Dpo, TokenRule::Random) => Some(ArmKind::Random),
            (Trainer::Dpo, TokenRule::Truth) => Some(ArmKind::Truth),
            _ => None,
        }
    }

    pub(crate) fn label(self) -> String {
        format!("{}: {}", self.trainer.label(), self.rule.label())
    }

    pub(crate) const fn description(self) -> &'static str {
        self.rule.description()
    }

    pub(crate) const fn role(self) -> Role {
        self.rule.role()
    }

    /// How many times the usual steps it takes. The cheaper a step, the more of them the oracle is worth.
    pub(crate) const fn step_factor(self) -> u64 {
        match (self.rule, self.trainer) {
            (TokenRule::AllLonger, Trainer::Reject) => 4,
            (TokenRule::AllLonger, Trainer::Grpo) => 3,
            (TokenRule::AllLonger, Trainer::Dpo | Trainer::Ppo) => 2,
            _ => 1,
        }
    }

    pub(crate) fn extra_cost(self) -> &'static str {
        match (self.rule, self.trainer) {
            (TokenRule::All | TokenRule::Truth | TokenRule::Advantage | TokenRule::Critic, _) => "",
            (TokenRule::AllLonger, Trainer::Reject) => "three times as many steps again",
            (TokenRule::AllLonger, Trainer::Grpo) => "twice as many steps again",
            (TokenRule::AllLonger, _) => "as many steps again",
            (TokenRule::AllFromOracle, _) => "the oracle: its pairs and its steps",
            (_, Trainer::Dpo) => "the oracle's steps, and one scoring pass over the pairs",
            _ => "the oracle: its pairs and its steps; and two scoring passes over the samples",
        }
    }

    /// The credit rule of the on-policy trainers.
    pub(crate) fn credit(self) -> CreditConfig {
        let (signal, selection) = match self.rule {
            TokenRule::All | TokenRule::AllLonger | TokenRule::AllFromOracle => {
                (Signal::LogRatio, Selection::All)
            }
            TokenRule::LogRatio => (Signal::LogRatio, Selection::Agree),
            TokenRule::Advantage => (Signal::Advantage, Selection::Agree),
            TokenRule::Critic => (Signal::Critic, Selection::Agree),
            TokenRule::Random => (Signal::LogRatio, Selection::Random),
            TokenRule::Truth => (Signal::LogRatio, Selection::Truth),
        };
        CreditConfig {
            signal,
            selection,
            // A value is a probability of being right: 0 would call every token good.
            baseline: match signal {
                Signal::Critic => BaselineRule::BatchMean,
                _ => BaselineRule::Fixed,
            },
            ..CreditConfig::default()
        }
    }

    /// The setting that was best on the tuning split (`docs/bench/trainers/grid.md`; DPO's: `docs/bench/quickstart-grid.md`).
    pub fn tuned(self) -> TrainerSettings {
        if let Some(kind) = self.quickstart() {
            let settings = kind.tuned();
            return TrainerSettings {
                lr: settings.lr,
                anchor: settings.beta,
            };
        }
        let (lr, anchor) = match (self.trainer, self.rule) {
            (Trainer::Reject, TokenRule::All | TokenRule::Truth) => (8e-4, 0.0),
            (Trainer::Reject, TokenRule::LogRatio) => (2e-4, 0.0),
            (Trainer::Reject, _) => (4e-4, 0.0),
            (Trainer::Grpo, TokenRule::AllLonger | TokenRule::AllFromOracle) => (4e-4, 0.0),
            (Trainer::Grpo, TokenRule::Truth) => (8e-4, 0.0),
            (Trainer::Grpo, _) => (8e-4, 0.3),
            (Trainer::Ppo, TokenRule::AllFromOracle | TokenRule::Truth) => (4e-4, 0.0),
            (Trainer::Ppo, TokenRule::LogRatio) => (1e-4, 0.1),
            (Trainer::Ppo, TokenRule::Critic) => (1e-4, 0.0),
            (Trainer::Ppo, TokenRule::Random) => (4e-4, 0.1),
            (Trainer::Ppo, _) => (2e-4, 0.0),
            (Trainer::Dpo, _) => unreachable!("the quickstart has DPO's other arms"),
        };
        TrainerSettings { lr, anchor }
    }
}
