//! `pivotal sft`: from a model and a file of responses to a fine-tuned adapter.

use std::path::{Path, PathBuf};

use pivotal_credit::{CreditRule, Diagnostics, DiagnosticsReport, Signal};
use pivotal_data::{BatchOptions, Batcher, Cursor, DataSet, Order, ReadOptions};
use serde::{Deserialize, Serialize};

use super::credit::Responses;
use super::settings::{SftCredit, SftCreditFlags, SftSettings, SftTableFlags};
use super::{SftMetrics, optimize};
use crate::checkpoint;
use crate::diagnosis::{CreditNumbers, WarningFlags, WarningSettings, Watch};
use crate::error::{Error, Result};
use crate::onpolicy::{from_state_text, state_text};
use crate::optimizer::NamedAdamW;
use crate::progress::{Progress, StepNumbers};
use crate::run::{Run, StartMode, manifest};
use crate::settings::{
    DataFlags, DataSettings, LoraFlags, LoraSettings, ModelFlags, ModelSettings, OptimizerFlags,
    OptimizerSettings, RunFlags, RunSettings,
};
use crate::signals::{hard_rule, of_signal, write_records};
use crate::table::recipe;
use crate::workspace::Workspace;

recipe! {
    /// The configuration of `pivotal sft`.
    pub struct SftConfig, SftFlags {
        /// `[model]`
        model: ModelSettings, ModelFlags;
        /// `[lora]`
        lora: LoraSettings, LoraFlags;
        /// `[data]`
        data: DataSettings, DataFlags;
        /// `[sft]`
        sft: SftSettings, SftTableFlags;
        /// `[optimizer]`
        optimizer: OptimizerSettings, OptimizerFlags;
        /// `[run]`
        run: RunSettings, RunFlags;
        /// `[credit]`
        credit: SftCredit, SftCreditFlags;
        /// `[warnings]`
        warnings: WarningSettings, WarningFlags;
    }
}

/// A line of `metrics.jsonl`: one step's numbers.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct SftStep {
    /// Of the loss.
    #[serde(flatten)]
    pub metrics: SftMetrics,
    /// Of credit: all responses are positive.
    #[serde(flatten)]
    pub credit: CreditNumbers,
}

/// What a run came to; `summary.json`.
#[derive(Clone, Debug, Serialize)]
pub struct Summary {
    /// Where the result lies.
    pub result: PathBuf,
    /// Responses trained on.
    pub responses: usize,
    /// Responses dropped because the length limits left nothing of them.
    pub dropped: usize,
    /// Responses that lost their end to the length limits.
    pub truncated_responses: usize,
    /// Optimizer steps taken in all.
    pub steps: u64,
    /// The last step's metrics; absent where no step was taken.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last: Option<SftStep>,
    /// What credit did, where it segmented a signal.
    pub credit: Option<DiagnosticsReport>,
    /// Warnings about the masks.
    pub warnings: Vec<String>,
}

/// Runs the recipe. Preferences are taken for their chosen responses.
///
/// # Errors
/// [`crate::Error`]: its kind says whose fault it is. Nothing is written before the inputs have been read and checked.
pub fn train(config: &SftConfig, mode: StartMode) -> Result<Summary> {
    let out = &config.run.out;
    let signals = &config.sft.signals;
    Run::check(
        out,
        mode,
        &[
            &config.model.path,
            &config.model.adapter,
            &config.data.path,
            signals,
        ],
    )?;
    config.optimizer.check()?;
    let mut credit_config = config.credit.0.clone();
    hard_rule(&credit_config)?;
    config.warnings.check()?;
    let has_records = !signals.as_os_str().is_empty();
    if credit_config.signal_delay != 0 && has_records {
        return Err(Error::Setting {
            key: "credit-signal-delay",
            found: credit_config.signal_delay.to_string(),
            expected: "0 with `--signals`: records hold the signal as `annotate` moved it",
        });
    }
    let data = DataSet::read(&config.data.path, ReadOptions::default())?;
    let mut workspace = Workspace::load_under(&config.model, &config.lora)?;
    let options = config
        .data
        .tokenize_options(workspace.decoder.config().vocab_size);
    let mut responses = Responses::of(&data, &workspace, &options)?;
    let rows = responses.items.iter();
    let rows = rows.map(|item| (item.id, item.prompt.len() + item.response.len()));
    workspace.check_rows(&config.data.path, rows)?;
    match has_records {
        true => credit_config = of_signal(&credit_config, responses.read_signals(signals)?)?,
        false => credit_config.signal = Signal::External,
    }
    let rule = hard_rule(&credit_config)?;
    let seed = config.run.seed;
    let credit = responses.give_credit(&rule, &workspace.tokenizer, seed)?;

    let mut policy = workspace.trainable(&config.lora, seed)?;
    let weights = workspace.weights(config.model.precision);
    let mut optimizer = NamedAdamW::new(&config.optimizer);
    let inputs = [config.data.path.as_path(), signals];
    let inputs: Vec<&Path> = inputs
        .into_iter()
        .filter(|path| !path.as_os_str().is_empty())
        .collect();
    let mut run = Run::open(
        out,
        mode,
        config,
        &manifest("sft", seed, workspace.decoder.device(), &inputs, &[weights])?,
    )?;
    let (start, more) = match mode {
        StartMode::Resume => checkpoint::restore_more(out, &mut policy, &mut optimizer)?,
        _ => (0, String::new()),
    };
    run.rewind(start)?;
    let mut watch = Watch::new(&config.warnings, from_state_text(&more)?);
    if !credit.given.is_empty() {
        let records = responses.records(credit.given, &workspace.tokenizer)?;
        write_records(&out.join("credit.jsonl"), &records)?;
    }
    let items = &responses.items;

    let batching = BatchOptions {
        seed,
        items_per_batch: config.optimizer.batch,
        order: Order::Shuffled,
    };
    let batches = Batcher::new(vec![1; items.len()], batching, Cursor::default())?;
    let steps = config.optimizer.total_steps(batches.batches_per_epoch());
    let batches = batches.skip(start as usize).map(|batch| batch.items);
    let mut watched = batches.clone();
    let batches = batches.map(|batch| batch.iter().map(|&index| items[index].clone()).collect());
    let progress = Progress::start("sft", start..steps, config.run.progress);
    progress.warn(&credit.warnings);
    let mut last: Option<SftStep> = run.last()?;
    let every = config.run.checkpoint_every;
    optimize(
        &mut policy,
        &config.optimizer,
        &mut optimizer,
        batches,
        start..steps,
        &mut |step, metrics, policy, optimizer| {
            let batch = watched.next().unwrap_or_default();
            let credit = watched_credit(&mut watch, &rule, &credit.diagnostics, &batch);
            let taken = SftStep { metrics, credit };
            run.log(step, &taken)?;
            let numbers = StepNumbers {
                loss: metrics.loss,
                kept_fraction: Some(taken.credit.kept_fraction),
                segments_per_100_tokens: taken.credit.segments_per_100_tokens,
                grad_norm: metrics.grad_norm,
                lr: metrics.lr,
                tokens: metrics.tokens,
                ..StepNumbers::default()
            };
            progress.step(step, numbers, &taken.credit.warnings);
            last = Some(taken);
            match step == steps || (every > 0 && step % every == 0) {
                true => {
                    run.sync()?;
                    let state = state_text(watch.state())?;
                    checkpoint::save_more(out, step, policy, optimizer, &state)
                }
                false => Ok(()),
            }
        },
    )?;
    drop(progress);
    let result = workspace.write_policy(&mut policy, out)?;
    let summary = Summary {
        result,
        responses: items.len(),
        dropped: responses.dropped,
        truncated_responses: responses.truncated,
        steps,
        last,
        credit: credit.report,
        warnings: credit.warnings,
    };
    run.finish(&summary)?;
    Ok(summary)
}

/// What credit did to the responses of a step, and the warnings of the step.
fn watched_credit(
    watch: &mut Watch,
    rule: &CreditRule,
    diagnosed: &[Diagnostics],
    batch: &[usize],
) -> CreditNumbers {
    if diagnosed.is_empty() {
        return CreditNumbers::keep_all();
    }
    let mut of_batch = Diagnostics::default();
    let each = batch.iter().map(|&response| &diagnosed[response]);
    each.for_each(|one| of_batch.merge(one));
    watch.credit(&of_batch, rule)
}
