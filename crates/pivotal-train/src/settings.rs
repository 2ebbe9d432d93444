//! The tables that recipes share. Precedence: default, then file, then flag; nothing else.

use std::path::{Path, PathBuf};

use clap::{Arg, ArgMatches, Command, ValueEnum};
use pivotal_credit::CreditConfig;
use pivotal_data::{Limits, Prefix, TokenizeOptions};
use pivotal_loss::{Normalisation, ScoreAggregation};
use pivotal_model::LoraSpec;
use serde::{Deserialize, Serialize};

use crate::activations::Activations;
pub use crate::dpo::{DpoFlags, DpoSettings, LossName};
use crate::error::{Error, Result};
pub use crate::progress::ProgressMode;
use crate::schedule::Schedule;
pub use crate::table::path_value;
use crate::table::table;

/// A set of flags that lies over a table of settings.
pub(crate) trait Overlay<T> {
    fn lay(self, settings: &mut T) -> Result<()>;
}

macro_rules! overlay {
    ($($flags:ty => $table:ty),+ $(,)?) => {$(
        impl $crate::settings::Overlay<$table> for $flags {
            fn lay(self, settings: &mut $table) -> $crate::Result<()> {
                self.apply(settings);
                Ok(())
            }
        }
    )+};
}

pub(crate) use overlay;

overlay! {
    ModelFlags => ModelSettings,
    LoraFlags => LoraSettings,
    DataFlags => DataSettings,
    OptimizerFlags => OptimizerSettings,
    RunFlags => RunSettings,
    RewardFlags => RewardSettings,
    AnnotateFlags => AnnotateSettings,
}

/// How matrix products round their operands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub enum Precision {
    /// 32-bit operands.
    F32,
    /// bfloat16 operands with 32-bit sums, where the processor has them; trained weights, gradients and moments stay 32-bit.
    #[default]
    Bf16,
}

impl From<Precision> for pivotal_ops::Precision {
    fn from(precision: Precision) -> Self {
        match precision {
            Precision::F32 => Self::F32,
            Precision::Bf16 => Self::Bf16,
        }
    }
}

/// Where a recipe computes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub enum ComputeDevice {
    /// The processor.
    #[default]
    Cpu,
    /// An NVIDIA card.
    Cuda,
    /// A card with a Vulkan driver.
    Vulkan,
    /// An Apple card.
    Metal,
}

impl From<ComputeDevice> for pivotal_ops::DeviceName {
    fn from(device: ComputeDevice) -> Self {
        match device {
            ComputeDevice::Cpu => Self::Cpu,
            ComputeDevice::Cuda => Self::Cuda,
            ComputeDevice::Vulkan => Self::Vulkan,
            ComputeDevice::Metal => Self::Metal,
        }
    }
}

/// What is done where the prompt's tokens are not the first tokens of prompt and response together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub enum PrefixRule {
    /// The row is refused.
    #[default]
    Error,
    /// Prompt and response are tokenised apart.
    Parts,
}

/// What a response's kept log-probabilities are made into (METHOD, section 8).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub enum KeptNormalisation {
    /// Their sum: DPO as published.
    #[default]
    Sum,
    /// Their mean.
    KeptMean,
    /// Their sum, scaled up to the response's length.
    RescaledSum,
}

impl From<KeptNormalisation> for Normalisation {
    fn from(normalisation: KeptNormalisation) -> Self {
        match normalisation {
            KeptNormalisation::Sum => Self::Sum,
            KeptNormalisation::KeptMean => Self::KeptMean,
            KeptNormalisation::RescaledSum => Self::RescaledSum,
        }
    }
}

/// What makes a response's score of its tokens' values.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub enum Aggregation {
    /// Their mean: it makes intermediate values mean something.
    #[default]
    Mean,
    /// Their sum.
    Sum,
    /// The last token's.
    Last,
}

impl From<Aggregation> for ScoreAggregation {
    fn from(aggregation: Aggregation) -> Self {
        match aggregation {
            Aggregation::Mean => Self::Mean,
            Aggregation::Sum => Self::Sum,
            Aggregation::Last => Self::Last,
        }
    }
}

/// How a fresh value head begins.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub enum HeadInit {
    /// At zero.
    #[default]
    Zero,
    /// Normal with standard deviation 1/√(hidden + 1).
    Normal,
}

impl From<HeadInit> for pivotal_model::HeadInit {
    fn from(init: HeadInit) -> Self {
        match init {
            HeadInit::Zero => Self::Zero,
            HeadInit::Normal => Self::Normal,
        }
    }
}

/// The signal that `annotate` computes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub enum AnnotatedSignal {
    /// β(log π_oracle − log π_reference) of each token.
    #[default]
    LogRatio,
    /// The reward model's value at each token.
    Level,
    /// The change of that value at each token.
    Increment,
}

table! {
    /// The model that is trained or scored.
    pub struct ModelSettings, ModelFlags {
        /// A Hugging Face directory, a .gguf file, or a run directory.
        "model" path: PathBuf = PathBuf::new(),
        /// A LoRA adapter directory to start from; none if empty.
        /// It is trained on, and what it is at the start is the reference.
        "adapter" adapter: PathBuf = PathBuf::new(),
        /// Operands of matrix products: f32 or bf16.
        "precision" precision: Precision = Precision::Bf16,
        /// Where to compute: cpu, cuda, vulkan or metal.
        /// All but cpu need a program built with the cargo feature of that name, and multiply in f32.
        "device" device: ComputeDevice = ComputeDevice::Cpu,
    }
}

table! {
    /// Low-rank adaptation.
    pub struct LoraSettings, LoraFlags {
        /// Rank of the adapter; 0 trains every parameter.
        "lora-rank" rank: usize = 16,
        /// Scale of the adapter times its rank.
        "lora-alpha" alpha: f64 = 32.0,
        /// Linear layers to adapt, with commas between (q_proj,v_proj); all of them if empty.
        "lora-targets" targets: String = String::new(),
    }
}

impl LoraSettings {
    /// Checks every number's domain; a rank is checked against the model's layers.
    ///
    /// # Errors
    /// [`Error::Setting`], naming the flag.
    pub fn check(&self) -> Result<()> {
        let held = (self.alpha as f32).is_finite();
        domain(
            "lora-alpha",
            self.alpha,
            "a number that 32 bits can hold",
            held,
        )
    }

    /// The adapter to add; none if every parameter is trained.
    pub fn spec(&self) -> Option<LoraSpec> {
        let targets = self
            .targets
            .split(',')
            .map(str::trim)
            .filter(|target| !target.is_empty());
        (self.rank > 0).then(|| LoraSpec {
            rank: self.rank,
            alpha: self.alpha,
            targets: targets.map(str::to_owned).collect(),
        })
    }
}

table! {
    /// The data set.
    pub struct DataSettings, DataFlags {
        /// A JSONL file in one of TRL's shapes.
        "data" path: PathBuf = PathBuf::new(),
        /// Longer prompts lose their beginning; 0 does not limit.
        "max-prompt-tokens" max_prompt_tokens: usize = 0,
        /// Longer responses lose their end; 0 does not limit.
        "max-response-tokens" max_response_tokens: usize = 0,
        /// Prompt and response together; the response loses its end; 0 does not limit.
        "max-tokens" max_tokens: usize = 1024,
        /// Where the prompt is no token prefix of prompt and response: error or parts.
        "prefix" prefix: PrefixRule = PrefixRule::Error,
    }
}

impl DataSettings {
    /// How rows become token ids of a model with `vocabulary_size` ids.
    pub fn tokenize_options(&self, vocabulary_size: usize) -> TokenizeOptions {
        let limit = |tokens: usize| (tokens > 0).then_some(tokens);
        TokenizeOptions {
            prefix: match self.prefix {
                PrefixRule::Error => Prefix::Error,
                PrefixRule::Parts => Prefix::Parts,
            },
            limits: Limits {
                max_prompt_tokens: limit(self.max_prompt_tokens),
                max_response_tokens: limit(self.max_response_tokens),
                max_total_tokens: limit(self.max_tokens),
            },
            vocabulary_size: Some(vocabulary_size),
        }
    }
}

table! {
    /// The optimizer, its schedule and the batches.
    pub struct OptimizerSettings, OptimizerFlags {
        /// Peak learning rate.
        "lr" lr: f64 = 1e-4,
        /// Course of the learning rate after the warm-up: constant, linear or cosine.
        "schedule" schedule: Schedule = Schedule::Linear,
        /// Steps of linear warm-up.
        "warmup-steps" warmup_steps: u64 = 0,
        /// Samples (pairs, or responses) in an optimizer step.
        "batch" batch: usize = 8,
        /// Tokens in one forward pass at most; a step takes as many passes as it needs, with the same result.
        "micro-batch-tokens" micro_batch_tokens: usize = 4096,
        /// Activations kept for the backward pass: keep, recompute, or a size such as 512MiB.
        /// What is not kept is computed again, layer by layer: more time, less memory, the same gradients.
        "activations" activations: Activations = Activations::Keep,
        /// Passes over the data; of reject over the accepted responses of each round.
        "epochs" epochs: u64 = 1,
        /// Optimizer steps; 0 takes as many as the epochs need.
        "steps" steps: u64 = 0,
        /// AdamW's decay of the first moment.
        "beta1" beta1: f64 = 0.9,
        /// AdamW's decay of the second moment.
        "beta2" beta2: f64 = 0.999,
        /// AdamW's ε.
        "eps" eps: f64 = 1e-8,
        /// AdamW's weight decay.
        "weight-decay" weight_decay: f64 = 0.0,
        /// The gradient's norm is clipped to this; 0 does not clip.
        "clip-norm" clip_norm: f64 = 1.0,
    }
}

/// Refuses a number outside its domain, before anything is loaded or written.
pub(crate) fn domain(
    key: &'static str,
    value: f64,
    expected: &'static str,
    holds: bool,
) -> Result<()> {
    match value.is_finite() && holds {
        true => Ok(()),
        false => Err(Error::Setting {
            key,
            found: value.to_string(),
            expected: match value.is_finite() {
                true => expected,
                false => "a finite number",
            },
        }),
    }
}

impl OptimizerSettings {
    /// Checks every number's domain.
    ///
    /// # Errors
    /// [`Error::Setting`], naming the flag.
    pub fn check(&self) -> Result<()> {
        let not_negative = "a number of at least 0";
        // AdamW reckons in f32, where 0.99999999 is 1 and 1e-50 is 0.
        let held = "a number of at least 0 that f32 holds";
        let holds = |value: f64| value >= 0.0 && (value as f32).is_finite();
        domain("lr", self.lr, held, holds(self.lr))?;
        let decays = "at least 0 and below 1, also as f32";
        let decay = |value: f64| value >= 0.0 && (value as f32) < 1.0;
        domain("beta1", self.beta1, decays, decay(self.beta1))?;
        domain("beta2", self.beta2, decays, decay(self.beta2))?;
        let above = self.eps as f32 > 0.0 && holds(self.eps);
        domain("eps", self.eps, "above 0, also as f32", above)?;
        let weight_decay = self.weight_decay;
        domain("weight-decay", weight_decay, held, holds(weight_decay))?;
        domain(
            "clip-norm",
            self.clip_norm,
            not_negative,
            self.clip_norm >= 0.0,
        )?;
        domain("batch", self.batch as f64, "at least 1", self.batch > 0)?;
        let tokens = self.micro_batch_tokens;
        domain(
            "micro-batch-tokens",
            tokens as f64,
            "at least 1",
            tokens > 0,
        )?;
        // So many epochs of any data set are a number of steps.
        let countable = self.epochs <= u64::from(u32::MAX);
        let any = self.epochs > 0 || self.steps > 0;
        domain(
            "epochs",
            self.epochs as f64,
            "at least 1 and at most 4294967295, or a number of steps",
            any && countable,
        )
    }

    /// Optimizer steps over a data set whose epoch has `batches`.
    pub fn total_steps(&self, batches: usize) -> u64 {
        match self.steps {
            0 => self.epochs.saturating_mul(batches as u64),
            steps => steps,
        }
    }
}

table! {
    /// The run directory.
    pub struct RunSettings, RunFlags {
        /// The run directory to make.
        "out" out: PathBuf = PathBuf::new(),
        /// Seed of everything random.
        "seed" seed: u64 = 1,
        /// Steps between checkpoints; 0 writes none before the end.
        "checkpoint-every" checkpoint_every: u64 = 50,
        /// Writes the metrics as TensorBoard events too: true or false.
        "tensorboard" tensorboard: bool = false,
        /// Progress on standard error: auto, dashboard, lines or off. Changes no result.
        /// A dashboard wants a terminal; elsewhere auto and dashboard write lines.
        "progress" progress: ProgressMode = ProgressMode::Auto,
    }
}

table! {
    /// Bradley-Terry reward modelling.
    pub struct RewardSettings, RewardFlags {
        /// Score of a response from its tokens' values: mean, sum or last.
        "aggregation" aggregation: Aggregation = Aggregation::Mean,
        /// Weight of (S_chosen + S_rejected)², which pins the scores' zero.
        "center" center: f64 = 0.01,
        /// Weight of the tokens' mean squared value, which pins theirs.
        "token-l2" token_l2: f64 = 0.02,
        /// How the value head begins: zero or normal.
        "head-init" head_init: HeadInit = HeadInit::Zero,
    }
}

impl RewardSettings {
    /// Checks every number's domain.
    ///
    /// # Errors
    /// [`Error::Setting`], naming the flag.
    pub fn check(&self) -> Result<()> {
        let expected = "a number of at least 0";
        domain("center", self.center, expected, self.center >= 0.0)?;
        domain("token-l2", self.token_l2, expected, self.token_l2 >= 0.0)
    }
}

table! {
    /// Scoring every token of a data set.
    pub struct AnnotateSettings, AnnotateFlags {
        /// The signal: log_ratio, level or increment.
        "signal" signal: AnnotatedSignal = AnnotatedSignal::LogRatio,
        /// For log_ratio: an adapter, model or run directory trained by `dpo`.
        "oracle" oracle: PathBuf = PathBuf::new(),
        /// For level and increment: an adapter, model or run directory trained by `reward`.
        "reward-model" reward_model: PathBuf = PathBuf::new(),
        /// For log_ratio: the factor on the log-ratio.
        "signal-beta" signal_beta: f64 = 1.0,
        /// Seed of the random selections.
        "seed" seed: u64 = 1,
        /// The file of credit records to write.
        "records" records: PathBuf = PathBuf::new(),
        /// Tokens in one forward pass at most.
        "micro-batch-tokens" micro_batch_tokens: usize = 4096,
        /// Progress on standard error: auto, dashboard, lines or off. Changes no result.
        "progress" progress: ProgressMode = ProgressMode::Auto,
    }
}

impl AnnotateSettings {
    /// Where the model lies whose scores become the signal.
    pub(crate) fn scorer(&self) -> &Path {
        match self.signal {
            AnnotatedSignal::LogRatio => &self.oracle,
            AnnotatedSignal::Level | AnnotatedSignal::Increment => &self.reward_model,
        }
    }

    /// Checks every number's domain.
    ///
    /// # Errors
    /// [`Error::Setting`], naming the flag.
    pub fn check(&self) -> Result<()> {
        domain(
            "signal-beta",
            self.signal_beta,
            "above 0",
            self.signal_beta > 0.0,
        )?;
        let tokens = self.micro_batch_tokens;
        domain(
            "micro-batch-tokens",
            tokens as f64,
            "at least 1",
            tokens > 0,
        )
    }
}

/// The flags of the `[credit]` table, with what they are unless given.
pub(crate) fn credit_arguments(command: Command, defaults: &CreditConfig) -> Command {
    let defaults = serde_json::to_value(defaults).unwrap_or_default();
    CreditConfig::FIELDS.iter().fold(command, |command, field| {
        let help = match defaults.get(field.key) {
            Some(default) => crate::table::help(&[field.help], default),
            None => field.help.to_owned(),
        };
        command.arg(
            Arg::new(field.flag)
                .long(field.flag)
                .value_name("VALUE")
                .allow_negative_numbers(true)
                .help(help)
                .help_heading("Credit"),
        )
    })
}

/// The flags that lie over the `[credit]` table: those that [`CreditConfig::FIELDS`] lists.
#[derive(Clone, Debug, Default)]
pub struct CreditFlags(Vec<(&'static str, String)>);

impl clap::Args for CreditFlags {
    fn augment_args(command: Command) -> Command {
        credit_arguments(command, &CreditConfig::default())
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

impl clap::FromArgMatches for CreditFlags {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let given = CreditConfig::FIELDS.iter().filter_map(|field| {
            matches
                .get_one::<String>(field.flag)
                .map(|value| (field.key, value.clone()))
        });
        Ok(Self(given.collect()))
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

impl Overlay<CreditConfig> for CreditFlags {
    fn lay(self, settings: &mut CreditConfig) -> Result<()> {
        let flags = self.0.iter().map(|(key, value)| (*key, value.as_str()));
        Ok(settings.apply(flags)?)
    }
}
