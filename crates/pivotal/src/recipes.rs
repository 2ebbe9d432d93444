//! The recipes as commands: configuration file, flags over it, and what to do with a run that is there already.

use std::path::{Path, PathBuf};

use clap::Args;
use pivotal_core::same_file;
use pivotal_train::annotate::{AnnotateConfig, AnnotateRunFlags};
use pivotal_train::dpo::{DpoConfig, DpoRunFlags};
use pivotal_train::grpo::{GrpoConfig, GrpoRunFlags};
use pivotal_train::ppo::{PpoConfig, PpoRunFlags};
use pivotal_train::reject::{RejectConfig, RejectRunFlags};
use pivotal_train::reward::{RewardConfig, RewardRunFlags};
use pivotal_train::run::Run;
use pivotal_train::settings::path_value;
use pivotal_train::sft::{SftConfig, SftFlags};
use pivotal_train::{Result as TrainResult, StartMode, read_config, show_config};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::failure::Failure;
use crate::output::{print, print_line, tell};

/// What every recipe takes besides its own flags.
#[derive(Args)]
struct Common {
    /// A TOML file; flags lie over it.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Print the resolved configuration and do nothing.
    #[arg(long)]
    show_config: bool,
}

/// What every recipe that makes a run directory takes.
#[derive(Args)]
struct Start {
    /// Continue this run from its last checkpoint, under its own configuration.
    #[arg(long, value_name = "RUN", conflicts_with_all = ["config", "overwrite", "out"], value_parser = path_value())]
    resume: Option<PathBuf>,
    /// Replace an existing run directory.
    #[arg(long)]
    overwrite: bool,
}

impl Start {
    fn mode(&self) -> StartMode {
        match (&self.resume, self.overwrite) {
            (Some(_), _) => StartMode::Resume,
            (None, true) => StartMode::Overwrite,
            (None, false) => StartMode::Fresh,
        }
    }
}

/// The configuration in force: default, then file, then flags.
fn resolve<C: Default + DeserializeOwned>(
    common: &Common,
    resume: Option<&Path>,
    lay: impl FnOnce(&mut C) -> TrainResult<()>,
) -> Result<C, Failure> {
    let file = resume
        .map(|run| run.join("config.toml"))
        .or_else(|| common.config.clone());
    let mut config = match file {
        Some(path) => read_config(&path)?,
        None => C::default(),
    };
    lay(&mut config)?;
    Ok(config)
}

macro_rules! recipe_command {
    ($(#[doc = $doc:literal])+ $name:ident, $recipe:literal, $config:ident, $flags:ident, $train:path, $say:path) => {
        $(#[doc = $doc])+
        #[derive(Args)]
        pub(crate) struct $name {
            #[command(flatten)]
            common: Common,
            #[command(flatten)]
            start: Start,
            #[command(flatten)]
            flags: $flags,
        }

        impl $name {
            pub(crate) fn run(self) -> Result<(), Failure> {
                let (mode, flags) = (self.start.mode(), self.flags);
                let resume = self.start.resume.as_deref();
                if let Some(run) = resume {
                    Run::check_resumed(run, $recipe)?;
                }
                let mut config: $config =
                    resolve(&self.common, resume, |config| flags.apply(config))?;
                if let Some(run) = resume {
                    // A run that was moved is continued where it is now.
                    config.run.out = run.to_path_buf();
                }
                if self.common.show_config {
                    return print(show_config(&config).as_bytes());
                }
                $say(&$train(&config, mode)?)
            }
        }
    };
}

recipe_command!(
    /// `pivotal sft`.
    Sft, "sft", SftConfig, SftFlags, pivotal_train::sft::train, say_sft
);
recipe_command!(
    /// `pivotal reward`.
    Reward, "reward", RewardConfig, RewardRunFlags, pivotal_train::reward::train, say
);
recipe_command!(
    /// `pivotal dpo`.
    Dpo, "dpo", DpoConfig, DpoRunFlags, pivotal_train::dpo::train, say_dpo
);
recipe_command!(
    /// `pivotal reject`.
    Reject, "reject", RejectConfig, RejectRunFlags, pivotal_train::reject::train, say_reject
);
recipe_command!(
    /// `pivotal grpo`.
    Grpo, "grpo", GrpoConfig, GrpoRunFlags, pivotal_train::grpo::train, say_grpo
);
recipe_command!(
    /// `pivotal ppo`.
    Ppo, "ppo", PpoConfig, PpoRunFlags, pivotal_train::ppo::train, say_ppo
);

/// `pivotal annotate`.
#[derive(Args)]
pub(crate) struct Annotate {
    #[command(flatten)]
    common: Common,
    /// Replace an existing file of records.
    #[arg(long)]
    overwrite: bool,
    #[command(flatten)]
    flags: AnnotateRunFlags,
}

impl Annotate {
    pub(crate) fn run(self) -> Result<(), Failure> {
        let flags = self.flags;
        let config: AnnotateConfig = resolve(&self.common, None, |config| flags.apply(config))?;
        if self.common.show_config {
            return print(show_config(&config).as_bytes());
        }
        if let Some(file) = &self.common.config
            && same_file(file, &config.annotate.records)
        {
            return Err(pivotal_train::Error::InputReplaced {
                path: config.annotate.records,
                input: file.clone(),
            }
            .into());
        }
        let summary = pivotal_train::annotate::annotate(&config, self.overwrite)?;
        warn(&summary.warnings);
        say(&summary)
    }
}

fn say_sft(summary: &pivotal_train::sft::Summary) -> Result<(), Failure> {
    warn(&summary.warnings);
    say(summary)
}

fn say_dpo(summary: &pivotal_train::dpo::Summary) -> Result<(), Failure> {
    warn(&summary.warnings);
    say(summary)
}

fn say_reject(summary: &pivotal_train::reject::Summary) -> Result<(), Failure> {
    if summary.accepted == 0 {
        warn(&["no response was accepted: nothing was learnt".to_owned()]);
    }
    warn(&summary.last_round.credit.warnings);
    say(summary)
}

fn say_grpo(summary: &pivotal_train::grpo::Summary) -> Result<(), Failure> {
    if let Some(last) = &summary.last {
        warn(&last.credit.warnings);
    }
    say(summary)
}

fn say_ppo(summary: &pivotal_train::ppo::Summary) -> Result<(), Failure> {
    if let Some(last) = &summary.last {
        warn(&last.credit.warnings);
    }
    say(summary)
}

fn warn(warnings: &[String]) {
    for warning in warnings {
        tell(&format!("warning: {warning}"));
    }
}

/// The summary as JSON: for people who read it, and for programs.
fn say(summary: &impl Serialize) -> Result<(), Failure> {
    let text = serde_json::to_string_pretty(summary).map_err(|error| Failure::system(&error))?;
    print_line(&text)
}
