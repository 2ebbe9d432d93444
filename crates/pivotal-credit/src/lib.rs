#![doc = include_str!("../README.md")]

mod advantage;
mod agreement;
mod assign;
mod baseline;
mod calibration;
mod check;
mod column;
mod config;
mod cut;
mod diagnostics;
mod drift;
mod error;
mod exact;
mod fast;
mod kl_controller;
mod named;
mod offset;
mod response;
mod reward;
mod rule;
mod score;
mod segment;
mod select;
mod signal;
mod top;
mod trigger;
mod warning;

pub use advantage::{
    AfterTruncation, Gae, GaeTerms, GroupAdvantage, GroupAdvantages, MaskedValues, RunningBaseline,
    ScoreBaseline, Variance, WHITEN_EPSILON, WhitenMean, Whitened, discounted_returns,
    explained_variance, group_advantages, sequence_signs, whiten,
};
pub use agreement::{Agreement, AgreementCounts};
pub use assign::{Credit, CreditState};
pub use baseline::{Baseline, BaselineState, Positions, ResolvedBaseline};
pub use calibration::{Calibration, calibrate};
pub use column::{TokenColumn, TokenColumns};
pub use config::{BaselineRule, CreditConfig, CutRule, Field};
pub use cut::{
    Cut, Cutter, EntropyCutter, FixedCutter, ImprobableCutter, JumpCutter, OffsetCutter,
    PunctuationCutter, mark_cuts,
};
pub use diagnostics::{Diagnostics, DiagnosticsReport, SideReport};
pub use drift::Drift;
pub use error::{Error, Result};
pub use fast::{jump_mask, schmitt_mask};
pub use kl_controller::KlController;
pub use offset::Width;
pub use response::{RecordSample, Response, ResponseCredit};
pub use reward::{
    Ending, KlEstimator, KlPenalty, KlShaped, KlSum, MissingEos, RunningScale, ScoreNormalisation,
    ScoreRule, ScoreScaling, ShapedScore, Spread, SpreadParts, spread_reward,
};
pub use rule::CreditRule;
pub use score::Score;
pub use segment::{Segment, merge_short, segments_from_cuts};
pub use select::{
    Neutral, Selection, SequenceSign, Weighting, agree, random_subset, relative_bin, soft_weight,
};
pub use signal::{Signal, advance, check_finite, critic, increment, log_ratio};
pub use top::top_percent;
pub use trigger::{Between, SchmittTrigger};
pub use warning::{Thresholds, Warning};
