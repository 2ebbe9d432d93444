//! `pivotal lab`: the study of every trainer, and how the embedded world's start policy and the arms' settings were made.

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};
use pivotal_core::write_atomic;
use pivotal_lab::start_policy::{self, StartPolicySettings};
use pivotal_lab::{
    GridSettings, Trainer, TrainersGridSettings, TrainersStudySettings, grid, trainers,
    trainers_grid,
};

use crate::failure::Failure;
use crate::machine;
use crate::output::{check_file, print_line, tell};
use crate::studies;

/// `pivotal lab`.
#[derive(Args)]
pub(crate) struct Lab {
    #[command(subcommand)]
    command: LabCommand,
}

#[derive(Subcommand)]
enum LabCommand {
    /// Train the embedded start policy from nothing and compare it with the embedded bytes.
    StartPolicy {
        /// Where to write the policy; nowhere if absent.
        #[arg(long)]
        out: Option<PathBuf>,
    },
    /// Train every arm of quickstart at every setting, scored on a split that is never reported; print the table.
    Grid {
        /// Seeds of the preference pairs, with commas between; not those of a report.
        #[arg(long, value_delimiter = ',', default_values_t = [101, 102])]
        seeds: Vec<u64>,
    },
    /// Compare DPO, rejection sampling, GRPO and PPO, each with every token and with segment credit; write a report.
    Trainers {
        /// Every stage at a fraction of its size: shows that it runs, and nothing about credit.
        #[arg(long, conflicts_with = "seeds")]
        smoke: bool,
        /// Seeds of pairs, prompts and samples, with commas between.
        #[arg(long, value_delimiter = ',', default_values_t = [1, 2, 3])]
        seeds: Vec<u64>,
        /// The directory for `report.html`, `report.md` and `study.json`.
        #[arg(long, default_value = "runs/trainers")]
        out: PathBuf,
        /// Replace the reports in an existing directory.
        #[arg(long)]
        overwrite: bool,
    },
    /// Train every arm of `lab trainers` at every setting, scored on a split that is never reported; print the table.
    TrainersGrid {
        /// Seeds of pairs, prompts and samples, with commas between; not those of a report.
        #[arg(long, value_delimiter = ',', default_values_t = [101, 102])]
        seeds: Vec<u64>,
        /// Whose arms, with commas between; `lab grid` has DPO's.
        #[arg(long, value_delimiter = ',', default_values = ["reject", "grpo", "ppo"])]
        trainers: Vec<OnPolicy>,
    },
}

/// The trainers that sample.
#[derive(Clone, Copy, ValueEnum)]
enum OnPolicy {
    Reject,
    Grpo,
    Ppo,
}

impl From<OnPolicy> for Trainer {
    fn from(trainer: OnPolicy) -> Self {
        match trainer {
            OnPolicy::Reject => Self::Reject,
            OnPolicy::Grpo => Self::Grpo,
            OnPolicy::Ppo => Self::Ppo,
        }
    }
}

impl Lab {
    pub(crate) fn run(self, threads: usize) -> Result<(), Failure> {
        match self.command {
            LabCommand::StartPolicy { out } => make_start_policy(out),
            LabCommand::Grid { seeds } => {
                let threads = machine::threads(threads);
                let settings = GridSettings { seeds, threads };
                let result = grid(&settings, &mut tell)?;
                print_line(&format!(
                    "start policy: {:.3}\n\n{}",
                    result.start,
                    result.to_markdown()
                ))
            }
            LabCommand::Trainers {
                smoke,
                seeds,
                out,
                overwrite,
            } => {
                studies::check_out(&out, overwrite)?;
                let mut settings = match smoke {
                    true => TrainersStudySettings::smoke(),
                    false => TrainersStudySettings {
                        seeds,
                        ..TrainersStudySettings::default()
                    },
                };
                settings.threads = machine::threads(threads);
                studies::run(&out, |progress| trainers(&settings, progress))
            }
            LabCommand::TrainersGrid { seeds, trainers } => {
                let settings = TrainersGridSettings {
                    seeds,
                    trainers: trainers.into_iter().map(Trainer::from).collect(),
                    threads: machine::threads(threads),
                };
                let result = trainers_grid(&settings, &mut tell)?;
                let table = result.to_markdown();
                print_line(&format!("start policy: {:.3}\n\n{table}", result.start))
            }
        }
    }
}

fn make_start_policy(out: Option<PathBuf>) -> Result<(), Failure> {
    if let Some(out) = &out {
        check_file("--out", out, false, &[])?;
    }
    let settings = StartPolicySettings::EMBEDDED;
    let steps = settings.steps;
    let policy = start_policy::train(&settings, None, &mut |step, metrics| {
        if step % 100 == 0 || step == steps {
            tell(&format!("step {step} of {steps}: loss {:.4}", metrics.loss));
        }
    })?;
    let bytes = start_policy::to_bytes(&policy)?;
    let (found, embedded) = (start_policy::hash(&bytes), start_policy::EMBEDDED_BLAKE3);
    if let Some(out) = out {
        write_atomic(&out, &bytes)?;
    }
    print_line(&format!("{} bytes, BLAKE3 {found}", bytes.len()))?;
    match found == embedded {
        true => print_line("these are the embedded bytes"),
        false => Err(Failure::system(&format!(
            "the embedded bytes are {embedded}: on a processor without AVX-512 products are summed in another order, \
             and training carries the difference on"
        ))),
    }
}
