//! The tables that the on-policy recipes share.

use std::path::PathBuf;

use clap::ValueEnum;
use pivotal_model::Sampling;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::settings::{Aggregation, domain, overlay};
use crate::table::table;

/// What several checks of a response come to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub enum CheckScore {
    /// The fraction that holds.
    #[default]
    Fraction,
    /// 1 if all hold, else 0.
    All,
}

table! {
    /// The prompts.
    pub struct PromptSettings, PromptFlags {
        /// A JSONL file of prompts (strings or messages), with what responses to them are checked against.
        "data" path: PathBuf = PathBuf::new(),
        /// Longer prompts lose their beginning; 0 does not limit.
        "max-prompt-tokens" max_prompt_tokens: usize = 0,
    }
}

table! {
    /// Sampling of responses.
    pub struct RolloutSettings, RolloutFlags {
        /// Prompts in a step, or round.
        "prompts" prompts: usize = 8,
        /// Responses to each prompt.
        "samples" samples: usize = 8,
        /// The longest response, in tokens.
        "max-new-tokens" max_new_tokens: usize = 64,
        /// Divides the logits, in sampling and in the update (of reject in sampling alone); above 0.
        "temperature" temperature: f64 = 1.0,
        /// Only this many of the most probable tokens; 0 takes all.
        "top-k" top_k: usize = 0,
        /// Only the most probable tokens of this probability together.
        "top-p" top_p: f64 = 1.0,
        /// Only tokens at least this probable, as a part of the most probable one's probability.
        "min-p" min_p: f64 = 0.0,
        /// Texts that end a response, with `|` between them; none if empty.
        "stop" stop: String = String::new(),
        /// Responses decoded together; changes no result.
        "decode-batch" decode_batch: usize = 64,
    }
}

table! {
    /// Scores of responses.
    pub struct ScoreSettings, ScoreFlags {
        /// Weight of the checks: the data's own, `regex` and `command`.
        "check-weight" check_weight: f64 = 1.0,
        /// What several checks come to: fraction or all.
        "check-score" check_score: CheckScore = CheckScore::Fraction,
        /// A regular expression that every response must match; none if empty.
        "regex" regex: String = String::new(),
        /// A program and its arguments, split at spaces and run without a shell on every response; none if empty.
        /// It reads one JSON object with `id`, `response` and the row's `reference`; exit status 0 passes.
        "command" command: String = String::new(),
        /// The command is killed after this many seconds, and the check has failed.
        "command-seconds" command_seconds: f64 = 10.0,
        /// A reward model: a run, adapter or model directory trained by `reward`; none if empty.
        "reward-model" reward_model: PathBuf = PathBuf::new(),
        /// Weight of the reward model's score.
        "reward-weight" reward_weight: f64 = 1.0,
        /// The reward model's score of a response from its tokens' values: mean, sum or last.
        "reward-aggregation" reward_aggregation: Aggregation = Aggregation::Mean,
        /// Subtracted from the score of a response that was cut off at its longest length.
        "missing-eos-penalty" missing_eos_penalty: f64 = 0.0,
    }
}

table! {
    /// The token signal of segment credit; `[credit]` says which, and what is made of it.
    pub struct SignalSettings, SignalFlags {
        /// For log_ratio: an adapter, model or run directory trained by `dpo`.
        "oracle" oracle: PathBuf = PathBuf::new(),
        /// For log_ratio: the factor on the log-ratio.
        "signal-beta" signal_beta: f64 = 1.0,
    }
}

table! {
    /// Held-out prompts, answered greedily along the run and scored alike; nothing is learnt from them.
    pub struct EvalSettings, EvalFlags {
        /// A JSONL file of prompts as `data`; none if empty.
        "eval-data" path: PathBuf = PathBuf::new(),
        /// Steps, or rounds, between evaluations, beside those before the first and after the last; 0 has these two only.
        "eval-every" every: u64 = 0,
    }
}

overlay! {
    EvalFlags => EvalSettings,
    PromptFlags => PromptSettings,
    RolloutFlags => RolloutSettings,
    ScoreFlags => ScoreSettings,
    SignalFlags => SignalSettings,
}

impl RolloutSettings {
    /// Checks every number's domain.
    ///
    /// # Errors
    /// [`Error::Setting`], naming the flag; [`Error::Model`] for the sampling.
    pub fn check(&self) -> Result<()> {
        let counts = [
            ("prompts", self.prompts),
            ("samples", self.samples),
            ("max-new-tokens", self.max_new_tokens),
            ("decode-batch", self.decode_batch),
        ];
        for (key, count) in counts {
            domain(key, count as f64, "at least 1", count > 0)?;
        }
        let most = |count: usize| count <= 1 << 20;
        let counted = "at most 1048576";
        domain("prompts", self.prompts as f64, counted, most(self.prompts))?;
        domain("samples", self.samples as f64, counted, most(self.samples))?;
        let temperature = self.temperature;
        domain("temperature", temperature, "above 0", temperature > 0.0)?;
        Ok(self.sampling().check()?)
    }

    /// How a token is drawn.
    pub fn sampling(&self) -> Sampling {
        Sampling {
            temperature: self.temperature,
            top_k: (self.top_k > 0).then_some(self.top_k),
            top_p: self.top_p,
            min_p: self.min_p,
        }
    }

    /// The texts that end a response.
    pub fn stop_strings(&self) -> Vec<String> {
        let stops = self.stop.split('|').filter(|stop| !stop.is_empty());
        stops.map(str::to_owned).collect()
    }
}

impl ScoreSettings {
    /// Checks every number's domain.
    ///
    /// # Errors
    /// [`Error::Setting`], naming the flag.
    pub fn check(&self) -> Result<()> {
        let any = "a finite number";
        domain("check-weight", self.check_weight, any, true)?;
        domain("reward-weight", self.reward_weight, any, true)?;
        domain(
            "command-seconds",
            self.command_seconds,
            "above 0 and at most a day",
            self.command_seconds > 0.0 && self.command_seconds <= 86_400.0,
        )?;
        domain(
            "missing-eos-penalty",
            self.missing_eos_penalty,
            "a number of at least 0",
            self.missing_eos_penalty >= 0.0,
        )
    }
}

impl SignalSettings {
    /// Checks every number's domain.
    ///
    /// # Errors
    /// [`Error::Setting`], naming the flag.
    pub fn check(&self) -> Result<()> {
        let beta = self.signal_beta;
        domain("signal-beta", beta, "above 0", beta > 0.0)
    }

    /// The oracle's path.
    ///
    /// # Errors
    /// [`Error::Setting`] if there is none.
    pub fn require_oracle(&self) -> Result<&PathBuf> {
        match self.oracle.as_os_str().is_empty() {
            true => Err(Error::Setting {
                key: "oracle",
                found: "empty".into(),
                expected: "a policy trained by `dpo` for the signal log_ratio, another `--credit-signal`, or \
                           `--credit-selection all` to keep every token",
            }),
            false => Ok(&self.oracle),
        }
    }
}
