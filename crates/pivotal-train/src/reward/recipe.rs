//! `pivotal reward`: from a model and a file of preferences to a value a token.

use std::path::PathBuf;

use pivotal_core::FileHash;
use pivotal_data::{BatchOptions, Batcher, Cursor, DataSet, Order, ReadOptions, tokenize_pairs};
use pivotal_model::RewardModel;
use serde::Serialize;

use super::no_credit::{NoCredit, NoCreditFlags};
use super::{RewardMetrics, optimize};
use crate::checkpoint;
use crate::error::{Error, Result};
use crate::optimizer::NamedAdamW;
use crate::progress::{Progress, StepNumbers};
use crate::run::{Run, StartMode, manifest};
use crate::settings::{
    DataFlags, DataSettings, HeadInit, LoraFlags, LoraSettings, ModelFlags, ModelSettings,
    OptimizerFlags, OptimizerSettings, RewardFlags, RewardSettings, RunFlags, RunSettings,
};
use crate::table::recipe;
use crate::workspace::Workspace;

recipe! {
    /// The configuration of `pivotal reward`.
    pub struct RewardConfig, RewardRunFlags {
        /// `[model]`
        model: ModelSettings, ModelFlags;
        /// `[lora]`
        lora: LoraSettings, LoraFlags;
        /// `[data]`
        data: DataSettings, DataFlags;
        /// `[reward]`
        reward: RewardSettings, RewardFlags;
        /// `[optimizer]`
        optimizer: OptimizerSettings, OptimizerFlags;
        /// `[run]`
        run: RunSettings, RunFlags;
        /// No `[credit]`: giving it is an error that says why.
        #[serde(skip_serializing_if = "NoCredit::is_absent")]
        credit: NoCredit, NoCreditFlags;
    }
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
    pub last: Option<RewardMetrics>,
}

/// Runs the recipe.
///
/// # Errors
/// [`crate::Error`]: its kind says whose fault it is. Nothing is written before the inputs have been read and checked.
pub fn train(config: &RewardConfig, mode: StartMode) -> Result<Summary> {
    let out = &config.run.out;
    Run::check(
        out,
        mode,
        &[&config.model.path, &config.model.adapter, &config.data.path],
    )?;
    config.optimizer.check()?;
    config.reward.check()?;
    let data = DataSet::read(&config.data.path, ReadOptions::default())?;
    let mut workspace = Workspace::load_reward_model_under(&config.model, &config.lora)?;
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

    let seed = config.run.seed;
    let decoder = workspace.trainable(&config.lora, seed)?;
    let mut model = match workspace.value_head() {
        None => RewardModel::new(decoder, config.reward.head_init.into(), seed)?,
        Some(head) => {
            if config.reward.head_init != HeadInit::default() {
                return Err(Error::Setting {
                    key: "head-init",
                    found: "given beside a model with a value head".into(),
                    expected: "left out: the head that is there is trained on",
                });
            }
            RewardModel::with_head(decoder, head)?
        }
    };
    let weights = [workspace.weights(config.model.precision)];
    let weights: Vec<FileHash> = weights.into_iter().chain(workspace.head_hash()).collect();
    let mut optimizer = NamedAdamW::new(&config.optimizer);
    let mut run = Run::open(
        out,
        mode,
        config,
        &manifest(
            "reward",
            seed,
            workspace.decoder.device(),
            &[&config.data.path],
            &weights,
        )?,
    )?;
    let start = match mode {
        StartMode::Resume => checkpoint::restore(out, &mut model, &mut optimizer)?,
        _ => 0,
    };
    run.rewind(start)?;

    let batching = BatchOptions {
        seed,
        items_per_batch: config.optimizer.batch,
        order: Order::Shuffled,
    };
    let batches = Batcher::new(vec![1; pairs.len()], batching, Cursor::default())?;
    let steps = config.optimizer.total_steps(batches.batches_per_epoch());
    let batches = batches.skip(start as usize).map(|batch| batch.items);
    let progress = Progress::start("reward", start..steps, config.run.progress);
    let mut last: Option<RewardMetrics> = run.last()?;
    let every = config.run.checkpoint_every;
    optimize(
        &mut model,
        &pairs,
        &config.reward,
        &config.optimizer,
        &mut optimizer,
        batches,
        start..steps,
        &mut |step, metrics, model, optimizer| {
            run.log(step, &metrics)?;
            let numbers = StepNumbers {
                loss: metrics.loss,
                accuracy: Some(metrics.accuracy),
                grad_norm: metrics.grad_norm,
                lr: metrics.lr,
                tokens: metrics.tokens,
                ..StepNumbers::default()
            };
            progress.step(step, numbers, &[]);
            last = Some(metrics);
            match step == steps || (every > 0 && step % every == 0) {
                true => {
                    run.sync()?;
                    checkpoint::save(out, step, model, optimizer)
                }
                false => Ok(()),
            }
        },
    )?;
    drop(progress);
    let result = workspace.write_reward_model(&mut model, out)?;
    let summary = Summary {
        result,
        pairs: pairs.len(),
        dropped: tokenized.dropped,
        truncated_responses: tokenized.truncated_responses,
        steps,
        last,
    };
    run.finish(&summary)?;
    Ok(summary)
}
