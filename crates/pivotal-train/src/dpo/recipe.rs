//! `pivotal dpo`: from a model and a file of preferences to an aligned adapter.

use std::path::{Path, PathBuf};

use pivotal_credit::{CreditConfig, CreditRule, Diagnostics, DiagnosticsReport, Signal};
use pivotal_data::{BatchOptions, Batcher, Cursor, DataSet, Order, ReadOptions, tokenize_pairs};
use serde::{Deserialize, Serialize};

use super::{DpoFlags, DpoItem, DpoMetrics, DpoSettings, Mismatched, mismatched, optimize};
use crate::checkpoint;
use crate::diagnosis::{CreditNumbers, WarningFlags, WarningSettings, Watch};
use crate::error::{Error, Result};
use crate::onpolicy::{from_state_text, state_text};
use crate::optimizer::NamedAdamW;
use crate::progress::{Progress, StepNumbers};
use crate::reference::pair_logps;
use crate::run::{Run, StartMode, manifest};
use crate::settings::{
    CreditFlags, DataFlags, DataSettings, LoraFlags, LoraSettings, ModelFlags, ModelSettings,
    OptimizerFlags, OptimizerSettings, RunFlags, RunSettings,
};
use crate::signals;
use crate::table::recipe;
use crate::workspace::Workspace;

recipe! {
    /// The configuration of `pivotal dpo`.
    pub struct DpoConfig, DpoRunFlags {
        /// `[model]`
        model: ModelSettings, ModelFlags;
        /// `[lora]`
        lora: LoraSettings, LoraFlags;
        /// `[data]`
        data: DataSettings, DataFlags;
        /// `[dpo]`
        dpo: DpoSettings, DpoFlags;
        /// `[optimizer]`
        optimizer: OptimizerSettings, OptimizerFlags;
        /// `[run]`
        run: RunSettings, RunFlags;
        /// `[credit]`
        credit: CreditConfig, CreditFlags;
        /// `[warnings]`
        warnings: WarningSettings, WarningFlags;
    }
}

/// A line of `metrics.jsonl`: one step's numbers.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct DpoStep {
    /// Of the loss.
    #[serde(flatten)]
    pub metrics: DpoMetrics,
    /// Of credit: positive responses are the chosen ones.
    #[serde(flatten)]
    pub credit: CreditNumbers,
}

/// What a run came to; `summary.json`.
#[derive(Clone, Debug, Serialize)]
pub struct Summary {
    /// Where the result lies.
    pub result: PathBuf,
    /// Pairs trained on.
    pub pairs: usize,
    /// Pairs dropped because the length limits left nothing of a response.
    pub dropped: usize,
    /// Responses that lost their end to the length limits.
    pub truncated_responses: usize,
    /// Optimizer steps taken in all.
    pub steps: u64,
    /// The last step's metrics; absent where no step was taken.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last: Option<DpoStep>,
    /// What credit did, where it segmented a signal.
    pub credit: Option<DiagnosticsReport>,
    /// Warnings about the masks.
    pub warnings: Vec<String>,
}

/// Runs the recipe.
///
/// # Errors
/// [`crate::Error`]: its kind says whose fault it is. Nothing is written before the inputs have been read and checked.
pub fn train(config: &DpoConfig, mode: StartMode) -> Result<Summary> {
    let out = &config.run.out;
    Run::check(
        out,
        mode,
        &[
            &config.model.path,
            &config.model.adapter,
            &config.data.path,
            &config.dpo.signals,
        ],
    )?;
    config.optimizer.check()?;
    let mut objective = config.dpo.objective()?;
    config.credit.resolve()?;
    config.warnings.check()?;
    let data = DataSet::read(&config.data.path, ReadOptions::default())?;
    let mut workspace = Workspace::load_under(&config.model, &config.lora)?;
    let options = config
        .data
        .tokenize_options(workspace.decoder.config().vocab_size);
    let tokenized = tokenize_pairs(
        &data,
        &workspace.tokenizer,
        workspace.template.as_ref(),
        &options,
    )?;
    let pairs = tokenized.items;
    workspace.check_pairs(&config.data.path, &pairs)?;

    let mut credit_config = config.credit.clone();
    let known = match config.dpo.signals.as_os_str().is_empty() {
        true => {
            credit_config.signal = Signal::External;
            signals::from_columns(&tokenized.external)
        }
        false => {
            let (known, signal) = signals::from_records(&config.dpo.signals, &pairs)?;
            credit_config = signals::of_signal(&credit_config, signal)?;
            known
        }
    };
    if config.credit.signal_delay != 0 && !config.dpo.signals.as_os_str().is_empty() {
        return Err(Error::Setting {
            key: "credit-signal-delay",
            found: config.credit.signal_delay.to_string(),
            expected: "0 with `--signals`: records hold the signal as `annotate` moved it",
        });
    }
    let seed = config.run.seed;
    let credit = signals::assign(
        &pairs,
        &known,
        Some(&workspace.tokenizer),
        &credit_config,
        seed,
    )?;
    let rule = credit_config.resolve()?;
    let (report, warnings) = (credit.report.clone(), credit.warnings.clone());

    let mut policy = workspace.trainable(&config.lora, seed)?;
    // What the policy starts as, an adapter that it starts from included: DPO's first step has loss ln 2.
    let reference = workspace.decoder.detached();
    let weights = workspace.weights(config.model.precision);
    let budget = config.optimizer.micro_batch_tokens;
    let cache = reference_cache(config);
    let (hash, shown) = (&weights.blake3, config.run.progress);
    let under_reference = |pairs| pair_logps(&reference, pairs, budget, &cache, hash, shown);
    let reference_logps = match objective.loss.uses_reference() {
        true => Some(under_reference(&pairs)?),
        false => None,
    };
    let keep = credit.keep.clone();
    let mismatched: Vec<Option<Box<DpoItem>>> = match objective.loss.uses_mismatched() {
        true => {
            let positions = workspace.decoder.config().max_positions;
            let limit = match config.data.max_tokens {
                0 => positions,
                tokens => tokens.min(positions),
            };
            let rows = mismatched(&pairs, &keep, limit)?;
            let of_rows: Vec<_> = rows.iter().map(|row| row.pair.clone()).collect();
            let logps = under_reference(&of_rows)?;
            rows.into_iter().zip(logps).map(mismatched_item).collect()
        }
        false => pairs.iter().map(|_| None).collect(),
    };
    let reference = objective.loss.uses_reference_model().then_some(reference);
    objective.reference = reference.as_ref();

    let mut optimizer = NamedAdamW::new(&config.optimizer);
    let inputs = [config.data.path.as_path(), &config.dpo.signals];
    let inputs: Vec<&Path> = inputs
        .into_iter()
        .filter(|path| !path.as_os_str().is_empty())
        .collect();
    let mut run = Run::open(
        out,
        mode,
        config,
        &manifest("dpo", seed, workspace.decoder.device(), &inputs, &[weights])?,
    )?;
    let (start, more) = match mode {
        StartMode::Resume => checkpoint::restore_more(out, &mut policy, &mut optimizer)?,
        _ => (0, String::new()),
    };
    run.rewind(start)?;
    let mut watch = Watch::new(&config.warnings, from_state_text(&more)?);

    let logps = reference_logps.as_deref();
    let diagnosed = signals::diagnostics(&credit, &known, logps)?;
    if !credit.given.is_empty() {
        let records = signals::records(&pairs, &known, credit, logps, &workspace.tokenizer)?;
        signals::write_records(&out.join("credit.jsonl"), &records)?;
    }
    let reference_logps = reference_logps.unwrap_or_else(|| vec![Default::default(); pairs.len()]);
    let items: Vec<DpoItem> = pairs
        .into_iter()
        .zip(keep)
        .zip(reference_logps)
        .zip(mismatched)
        .map(|(((pair, keep), reference_logps), mismatched)| DpoItem {
            pair,
            keep,
            reference_logps,
            mismatched,
        })
        .collect();

    let batching = BatchOptions {
        seed,
        items_per_batch: config.optimizer.batch,
        order: Order::Shuffled,
    };
    let batches = Batcher::new(vec![1; items.len()], batching, Cursor::default())?;
    let steps = config.optimizer.total_steps(batches.batches_per_epoch());
    let batches = batches.skip(start as usize).map(|batch| batch.items);
    let mut watched = batches.clone();
    let progress = Progress::start("dpo", start..steps, config.run.progress);
    progress.warn(&warnings);
    let mut last: Option<DpoStep> = run.last()?;
    let every = config.run.checkpoint_every;
    optimize(
        &mut policy,
        &items,
        objective,
        &config.optimizer,
        &mut optimizer,
        batches,
        start..steps,
        &mut |step, metrics, policy, optimizer| {
            let batch = watched.next().unwrap_or_default();
            let credit = watched_credit(&mut watch, &rule, &diagnosed, &batch, &metrics);
            let taken = DpoStep { metrics, credit };
            run.log(step, &taken)?;
            let numbers = StepNumbers {
                loss: metrics.loss,
                accuracy: Some(metrics.accuracy),
                kl: metrics.kl_k3,
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
        pairs: items.len(),
        dropped: tokenized.dropped,
        truncated_responses: tokenized.truncated_responses,
        steps,
        last,
        credit: report,
        warnings,
    };
    run.finish(&summary)?;
    Ok(summary)
}

/// What credit did to the pairs of a step, and the warnings of the step.
fn watched_credit(
    watch: &mut Watch,
    rule: &CreditRule,
    diagnosed: &[Diagnostics],
    batch: &[usize],
    metrics: &DpoMetrics,
) -> CreditNumbers {
    let mut numbers = match diagnosed.is_empty() {
        true => CreditNumbers::keep_all(),
        false => {
            let mut of_batch = Diagnostics::default();
            batch
                .iter()
                .for_each(|&pair| of_batch.merge(&diagnosed[pair]));
            watch.credit(&of_batch, rule)
        }
    };
    // They are in the metrics under the names of the sides.
    (
        numbers.kept_fraction_positive,
        numbers.kept_fraction_negative,
    ) = (None, None);
    numbers.warnings.extend(watch.chosen(
        metrics.chosen_kept_shift,
        metrics.chosen_dropped_shift,
        metrics.chosen_kept_logp,
    ));
    numbers
}

fn mismatched_item((row, reference_logps): (Mismatched, [Vec<f32>; 2])) -> Option<Box<DpoItem>> {
    Some(Box::new(DpoItem {
        pair: row.pair,
        keep: row.keep,
        reference_logps,
        mismatched: None,
    }))
}

/// Beside the run, so that the next run on the same data finds it.
fn reference_cache(config: &DpoConfig) -> PathBuf {
    match config.dpo.reference_cache.as_os_str().is_empty() {
        false => config.dpo.reference_cache.clone(),
        true => config
            .run
            .out
            .parent()
            .unwrap_or(Path::new("."))
            .join(".pivotal-cache"),
    }
}
