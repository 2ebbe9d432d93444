//! `pivotal sft`: from a model and a file of responses to a fine-tuned adapter.

use std::path::PathBuf;

use pivotal_core::TokenizedResponse;
use pivotal_data::{
    BatchOptions, Batcher, Cursor, DataSet, Order, ReadOptions, Shape, tokenize_pairs,
    tokenize_responses,
};
use serde::Serialize;

use super::{SftMetrics, optimize};
use crate::checkpoint;
use crate::error::Result;
use crate::optimizer::NamedAdamW;
use crate::progress::{Progress, StepNumbers};
use crate::run::{Run, StartMode, manifest};
use crate::settings::{
    DataFlags, DataSettings, LoraFlags, LoraSettings, ModelFlags, ModelSettings, OptimizerFlags,
    OptimizerSettings, RunFlags, RunSettings,
};
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
        /// `[optimizer]`
        optimizer: OptimizerSettings, OptimizerFlags;
        /// `[run]`
        run: RunSettings, RunFlags;
    }
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
    /// The last step's metrics.
    pub last: SftMetrics,
}

/// Runs the recipe. Preferences are taken for their chosen responses.
///
/// # Errors
/// [`crate::Error`]: its kind says whose fault it is. Nothing is written before the inputs have been read and checked.
pub fn train(config: &SftConfig, mode: StartMode) -> Result<Summary> {
    let out = &config.run.out;
    Run::check(
        out,
        mode,
        &[&config.model.path, &config.model.adapter, &config.data.path],
    )?;
    config.optimizer.check()?;
    let data = DataSet::read(&config.data.path, ReadOptions::default())?;
    let mut workspace = Workspace::load(&config.model)?;
    let options = config
        .data
        .tokenize_options(workspace.decoder.config().vocab_size);
    let (tokenizer, template) = (&workspace.tokenizer, workspace.template.as_ref());
    let (items, dropped, truncated_responses) = match data.shape() {
        Shape::PreferenceText
        | Shape::ImplicitPreferenceText
        | Shape::PreferenceChat
        | Shape::ImplicitPreferenceChat => {
            let pairs = tokenize_pairs(&data, tokenizer, template, &options)?;
            let chosen = pairs.items.into_iter().map(|pair| TokenizedResponse {
                id: pair.id,
                prompt: pair.prompt,
                response_mask: vec![true; pair.chosen.len()],
                response: pair.chosen,
            });
            (chosen.collect(), pairs.dropped, pairs.truncated_responses)
        }
        _ => {
            let responses = tokenize_responses(&data, tokenizer, template, &options)?;
            (
                responses.items,
                responses.dropped,
                responses.truncated_responses,
            )
        }
    };
    let items: Vec<TokenizedResponse> = items;

    let seed = config.run.seed;
    let mut policy = workspace.trainable(&config.lora, seed)?;
    let weights = workspace.weights(config.model.precision);
    let mut optimizer = NamedAdamW::new(&config.optimizer);
    let mut run = Run::open(
        out,
        mode,
        config,
        &manifest(
            "sft",
            seed,
            workspace.decoder.device(),
            &[&config.data.path],
            &[weights],
        )?,
    )?;
    let start = match mode {
        StartMode::Resume => checkpoint::restore(out, &mut policy, &mut optimizer)?,
        _ => 0,
    };
    run.rewind(start)?;

    let batching = BatchOptions {
        seed,
        items_per_batch: config.optimizer.batch,
        order: Order::Shuffled,
    };
    let batches = Batcher::new(vec![1; items.len()], batching, Cursor::default())?;
    let steps = config.optimizer.total_steps(batches.batches_per_epoch());
    let batches = batches.skip(start as usize).map(|batch| {
        batch
            .items
            .iter()
            .map(|&index| items[index].clone())
            .collect()
    });
    let progress = Progress::start("sft", start..steps, config.run.progress);
    let mut last: SftMetrics = run.last()?.unwrap_or_default();
    let every = config.run.checkpoint_every;
    optimize(
        &mut policy,
        &config.optimizer,
        &mut optimizer,
        batches,
        start..steps,
        &mut |step, metrics, policy, optimizer| {
            run.log(step, &metrics)?;
            let numbers = StepNumbers {
                loss: metrics.loss,
                grad_norm: metrics.grad_norm,
                lr: metrics.lr,
                tokens: metrics.tokens,
                ..StepNumbers::default()
            };
            progress.step(step, numbers, &[]);
            last = metrics;
            match step == steps || (every > 0 && step % every == 0) {
                true => {
                    run.sync()?;
                    checkpoint::save(out, step, policy, optimizer)
                }
                false => Ok(()),
            }
        },
    )?;
    drop(progress);
    let result = workspace.write_policy(&mut policy, out)?;
    let responses = items.len();
    let summary = Summary {
        result,
        responses,
        dropped,
        truncated_responses,
        steps,
        last,
    };
    run.finish(&summary)?;
    Ok(summary)
}
