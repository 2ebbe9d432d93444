//! The `pivotal` binary: parse, resolve, call, print.
//!
//! Exit codes: 0 done, 1 the system's fault, 2 the input's, 3 the run diverged.

#[expect(unsafe_code, reason = "a global allocator cannot be written without")]
mod allocator;
mod bench;
mod failure;
mod generate;
mod lab;
mod logps;
mod machine;
mod output;
mod quickstart;
mod recipes;
mod studies;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::failure::Failure;

#[global_allocator]
static ALLOCATOR: allocator::Caching = allocator::Caching;

/// Bytes of a computing thread's stack: what Linux gives a program's first one.
const STACK: usize = 8 << 20;

/// Aligns language models with segment-level credit.
///
/// A reward signal scores every token of a response, a segmenter cuts the response where that score turns, and training
/// uses only the segments whose sign agrees with the whole response's.
#[derive(Parser)]
#[command(version, max_term_width = 100)]
struct Arguments {
    /// Threads to compute with; 0 takes one a core. Results do not depend on it.
    #[arg(long, global = true, default_value_t = 0, value_parser = thread_count)]
    threads: usize,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Compare segment credit with what it must beat, in a small world whose truth is known; write a report.
    Quickstart(quickstart::Quickstart),
    /// Supervised fine-tuning on responses, or on the chosen responses of preferences.
    Sft(recipes::Sft),
    /// Train a reward model that gives every token a value.
    Reward(recipes::Reward),
    /// Score every token of a preference file; segment and mask it; write credit records.
    Annotate(recipes::Annotate),
    /// Direct preference optimization on the segments that credit keeps.
    Dpo(Box<recipes::Dpo>),
    /// Rejection sampling: learn from the kept segments of the best of several sampled responses, round by round.
    Reject(Box<recipes::Reject>),
    /// Group-relative policy optimization (GRPO, RLOO) on sampled responses that checks or a reward model score.
    Grpo(Box<recipes::Grpo>),
    /// Proximal policy optimization on sampled responses, with a value model and segment credit.
    Ppo(Box<recipes::Ppo>),
    /// Sample responses to prompts.
    Generate(generate::Generate),
    /// Print a text's token ids and the log-probability of each token after the first, as one JSON line.
    Logps(logps::Logps),
    /// Measure steps, scoring, sampling and credit on this machine, beside its matrix products.
    Bench(bench::Settings),
    /// The study of every trainer in the embedded world, and how that world's start policy and settings were made.
    Lab(lab::Lab),
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match run(arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            output::tell(&format!("error: {failure}"));
            ExitCode::from(failure.kind.exit_code())
        }
    }
}

/// More threads than any processor has cores; tens of thousands take the system minutes to start, or for ever.
const MOST_THREADS: usize = 1024;

fn thread_count(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(threads) if threads <= MOST_THREADS => Ok(threads),
        _ => Err(format!("expected a whole number up to {MOST_THREADS}")),
    }
}

fn run(arguments: Arguments) -> Result<(), Failure> {
    pivotal_kernels::allowed_processor().map_err(|value| {
        Failure::input(format!(
            "`PIVOTAL_PROCESSOR` is `{value}`, expected `portable`, `avx512` or `amx`"
        ))
    })?;
    rayon::ThreadPoolBuilder::new()
        .num_threads(arguments.threads)
        .stack_size(STACK)
        .build_global()
        .map_err(|error| Failure::system(&error))?;
    // On a thread of the pool, which takes part in every parallel region; the main thread would sleep through each and be
    // woken after it.
    rayon::scope(|_| dispatch(arguments))
}

fn dispatch(arguments: Arguments) -> Result<(), Failure> {
    match arguments.command {
        Command::Quickstart(command) => command.run(arguments.threads),
        Command::Sft(command) => command.run(),
        Command::Reward(command) => command.run(),
        Command::Annotate(command) => command.run(),
        Command::Dpo(command) => command.run(),
        Command::Reject(command) => command.run(),
        Command::Grpo(command) => command.run(),
        Command::Ppo(command) => command.run(),
        Command::Generate(command) => command.run(),
        Command::Logps(command) => command.run(),
        Command::Bench(command) => command.run(arguments.threads),
        Command::Lab(command) => command.run(arguments.threads),
    }
}
