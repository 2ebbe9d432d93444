//! What the on-policy recipes share: prompts with checks, rollouts, their scores, and log-probabilities as training sees them.
//!
//! A step samples responses from the policy as it is ([`Sampler`]), scores them ([`Scorer`]), takes their log-probabilities from
//! the same packed passes that the update will make ([`Layout`]), gives credit ([`RolloutCredit`]) and writes each response
//! down ([`StepLog`]). What a recipe then does with them is its own.
//!
//! Old log-probabilities come from the training path, not from decoding, whose sums run in another order: the ratio of the first
//! minibatch is then exactly 1. How far the two are apart is a metric ([`SamplingGap`]).

mod check;
mod clock;
mod command;
mod credit;
mod evaluation;
mod layout;
mod prompts;
mod record;
mod sample;
mod score;
mod settings;
mod state;

pub use crate::diagnosis::CreditNumbers;
pub use check::Check;
pub use clock::{Clock, Timings};
pub use command::CommandCheck;
pub use credit::{OracleLogps, RolloutCredit, SignalInputs, masks};
pub use evaluation::{Evaluation, Evaluator};
pub use layout::{Cutting, Layout, MicroBatch, Minibatch, SamplingGap, gap};
pub(crate) use prompts::prompt_warnings;
pub use prompts::{Prompt, read_prompts};
pub(crate) use record::finish_name;
pub use record::{RolloutRecord, StepLog, UsedNumbers};
pub use sample::{Rollout, Sampler, groups_of};
pub use score::{ResponseScore, Scorer};
pub use settings::{
    CheckScore, EvalFlags, EvalSettings, PromptFlags, PromptSettings, RolloutFlags,
    RolloutSettings, ScoreFlags, ScoreSettings, SignalFlags, SignalSettings,
};
pub use state::{from_state_text, state_text};
