//! `pivotal bench`: how fast the recipes' own steps are on this machine, beside what its matrix products reach.

mod annotate;
mod ceiling;
mod credit;
mod dpo;
mod flops;
mod generate;
mod outcome;
mod reward;
mod scaling;
mod sft;
mod subject;
mod table;
mod training;

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use clap::{Args, ValueEnum};
use pivotal_core::write_atomic;
use pivotal_kernels::{Processor, limit_processor};
use pivotal_train::Activations;
use pivotal_train::settings::Precision;
use serde::Serialize;
use serde_json::{Value, json};

use crate::bench::ceiling::Ceiling;
use crate::bench::outcome::Outcome;
use crate::bench::subject::Subject;
use crate::failure::Failure;
use crate::machine;
use crate::output::{check_file, print_line};

/// `pivotal bench`.
#[derive(Args, Clone, Debug)]
pub(crate) struct Settings {
    /// What to measure. Peak memory is the process's: measure one suite alone to know its own.
    #[arg(required = true, value_enum)]
    suites: Vec<Suite>,
    /// A Hugging Face directory, a .gguf file, or a run directory; random weights of SmolLM2-135M's shape if absent.
    #[arg(long)]
    model: Option<PathBuf>,
    /// A JSONL file of preferences; random token ids of like lengths if absent.
    #[arg(long, requires = "model")]
    data: Option<PathBuf>,
    /// Operands of matrix products.
    #[arg(long, default_value = "bf16")]
    precision: Precision,
    /// The most that kernels use of the processor: what one without it would reach.
    #[arg(long, value_enum, default_value_t = MostUsed::Amx)]
    processor: MostUsed,
    /// Pairs in a step.
    #[arg(long, default_value_t = 4, value_parser = at_least::<1>)]
    batch: usize,
    /// Prompt and response together; the response loses its end; 0 does not limit.
    #[arg(long, default_value_t = 512, value_parser = limit)]
    max_tokens: usize,
    /// Steps to measure, after one for warmth; 0 takes one pass over the data.
    #[arg(long, default_value_t = 0)]
    steps: usize,
    /// Rank of the adapter on every linear layer; 0 trains every parameter.
    #[arg(long, default_value_t = 16)]
    lora_rank: usize,
    /// Response tokens that the loss uses: all, or a fraction of each response, in segments of 10 tokens drawn at random.
    #[arg(long, default_value = "all")]
    keep: Keep,
    /// Activations kept for the backward pass: keep, recompute, or a size such as 512MiB.
    #[arg(long, default_value = "keep")]
    activations: Activations,
    /// How often to measure; the median counts.
    #[arg(long, default_value_t = 1, value_parser = at_least::<1>)]
    repeat: usize,
    /// The file to write, one object a measurement under `results`.
    #[arg(long)]
    json: Option<PathBuf>,
    /// Replace an existing file.
    #[arg(long, requires = "json")]
    overwrite: bool,
}

/// What can be measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Suite {
    /// Direct preference optimization, the reference's pass included.
    Dpo,
    /// Supervised fine-tuning on the chosen responses.
    Sft,
    /// Reward modelling.
    Reward,
    /// Scoring every token: by one model, and from two models to masks.
    Annotate,
    /// From a signal to a mask on one core, and what that is of a step.
    Credit,
    /// Training and scoring at response lengths from 64 to 4,096: speed, attention's part, memory.
    Scaling,
    /// Sampling: 16 prompts, and 8 prompts with 8 samples each, 64 tokens a sample.
    Generate,
}

/// The paths of the kernels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum MostUsed {
    /// What the build asks for; products in bf16 are then products in f32.
    Portable,
    /// AVX-512 with BF16.
    Avx512,
    /// AMX with BF16.
    Amx,
}

impl MostUsed {
    /// Limits the kernels, and says what they use.
    fn limit(self) -> Result<&'static str, Failure> {
        let most = match self {
            Self::Portable => Processor::Portable,
            Self::Avx512 => Processor::Avx512,
            Self::Amx => Processor::Amx,
        };
        let used = limit_processor(most);
        used.map(Processor::name).map_err(|settled| {
            Failure::system(&format!("the kernels already use {}", settled.name()))
        })
    }
}

/// Which response tokens the loss uses.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Keep {
    All,
    /// Above 0 and at most 1.
    Fraction(f64),
}

/// Everything a suite needs.
pub(crate) struct Bench {
    settings: Settings,
    threads: usize,
    subject: Subject,
}

#[derive(Serialize)]
struct Report {
    schema_version: u32,
    machine: String,
    /// What the kernels used of it.
    processor: &'static str,
    date: String,
    results: Vec<Outcome>,
}

impl Settings {
    pub(crate) fn run(self, threads: usize) -> Result<(), Failure> {
        self.check_output()?;
        let processor = self.processor.limit()?;
        let subject = Subject::load(&self)?;
        print_line(&format!(
            "model: {}\ndata: {}\nprocessor: {processor}\n",
            subject.model, subject.data
        ))?;
        let json = self.json.clone();
        let suites = self.suites.clone();
        let bench = Bench {
            settings: self,
            threads: machine::threads(threads),
            subject,
        };
        let mut results = Vec::new();
        for suite in suites {
            let before = ceiling::sample();
            let mut outcomes = match suite {
                Suite::Dpo => dpo::run(&bench)?,
                Suite::Sft => sft::run(&bench)?,
                Suite::Reward => reward::run(&bench)?,
                Suite::Annotate => annotate::run(&bench)?,
                Suite::Credit => credit::run(&bench)?,
                Suite::Scaling => scaling::run(&bench)?,
                Suite::Generate => generate::run(&bench)?,
            };
            let ceiling = Ceiling::of(&before, &ceiling::sample());
            let precision = bench.settings.precision.into();
            for outcome in &mut outcomes {
                outcome.under(&ceiling, precision);
            }
            print_line(&table::text(&outcomes, Some(&ceiling)))?;
            results.extend(outcomes);
        }
        let Some(path) = json else { return Ok(()) };
        let report = Report {
            schema_version: 1,
            machine: machine::description(),
            processor,
            date: machine::today(),
            results,
        };
        let text = serde_json::to_vec_pretty(&report).map_err(|error| Failure::system(&error))?;
        Ok(write_atomic(&path, &text)?)
    }

    /// Before the work, not after it.
    fn check_output(&self) -> Result<(), Failure> {
        match &self.json {
            Some(path) => {
                let inputs = [self.model.as_ref(), self.data.as_ref()];
                check_file("--json", path, self.overwrite, &inputs)
            }
            None => Ok(()),
        }
    }
}

#[cfg(test)]
impl Default for Settings {
    fn default() -> Self {
        use clap::{Args, Command, FromArgMatches};
        let command = Self::augment_args(Command::new("bench"));
        let matches = command.get_matches_from(["bench", "dpo"]);
        Self::from_arg_matches(&matches).expect("the defaults parse")
    }
}

impl Bench {
    /// An outcome of which only the circumstances are known.
    fn outcome(&self, suite: &'static str, variant: String) -> Outcome {
        Outcome {
            suite,
            variant,
            tool: "pivotal",
            version: env!("CARGO_PKG_VERSION"),
            model: self.subject.model.clone(),
            data: self.subject.data.clone(),
            precision: self.settings.precision_name(),
            threads: self.threads,
            pairs: None,
            tokens: 0,
            seconds: 0.0,
            repetitions: Vec::new(),
            pairs_per_second: None,
            tokens_per_second: 0.0,
            peak_bytes: None,
            reference_seconds: None,
            pairs_per_second_without_reference: None,
            ceiling: None,
            model_flops: None,
            model_flops_by_kind: None,
            share_of_ceiling: None,
            parts: Vec::new(),
            figures: BTreeMap::new(),
            settings: BTreeMap::new(),
        }
    }

    /// The flags that a suite which trains reads.
    fn training_settings(&self) -> BTreeMap<&'static str, Value> {
        let settings = &self.settings;
        BTreeMap::from([
            ("batch", json!(settings.batch)),
            ("max_tokens", json!(settings.max_tokens)),
            ("steps", json!(settings.steps)),
            ("lora_rank", json!(settings.lora_rank)),
            ("keep", json!(settings.keep.to_string())),
            ("activations", json!(settings.activations.to_string())),
        ])
    }
}

impl Settings {
    fn precision_name(&self) -> String {
        let name = self.precision.to_possible_value();
        name.map_or(String::new(), |value| value.get_name().to_owned())
    }
}

impl Keep {
    pub(crate) fn fraction(self) -> f64 {
        match self {
            Self::All => 1.0,
            Self::Fraction(fraction) => fraction,
        }
    }
}

impl FromStr for Keep {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match (text, text.parse()) {
            ("all", _) => Ok(Self::All),
            (_, Ok(fraction)) if fraction > 0.0 && fraction <= 1.0 => Ok(Self::Fraction(fraction)),
            _ => Err("expected `all`, or a number above 0 and at most 1".to_owned()),
        }
    }
}

impl fmt::Display for Keep {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::All => formatter.write_str("all"),
            Self::Fraction(fraction) => write!(formatter, "{fraction}"),
        }
    }
}

pub(crate) fn at_least<const LEAST: usize>(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(count) if count >= LEAST => Ok(count),
        _ => Err(format!("expected a whole number of at least {LEAST}")),
    }
}

fn limit(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(tokens) if tokens != 1 => Ok(tokens),
        _ => Err("expected 0, or a whole number of at least 2".to_owned()),
    }
}
