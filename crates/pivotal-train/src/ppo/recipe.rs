//! `pivotal ppo`: from a model and a file of prompts to an adapter whose responses score higher.

// Long because a recipe reads top to bottom: configuration, metrics, inputs, a step, an update.
use std::path::{Path, PathBuf};

use pivotal_core::FileHash;
use pivotal_credit::{CreditConfig, Ending, ResponseCredit, Signal};
use pivotal_data::{BatchOptions, Batcher, Cursor, Order};
use pivotal_kernels::account::{Part, time};
use pivotal_model::{Decoder, Finish};
use serde::{Deserialize, Serialize};

use super::experience::{Experience, ExperienceNumbers, Measured, Shaper, ShaperState};
use super::models::{Models, POLICY, VALUE};
use super::settings::{PpoFlags, PpoSettings};
use super::update::{
    UpdateInputs, UpdateNumbers, UpdateRule, UpdateSums, policy_gradients, rollout_values,
    value_gradients,
};
use crate::checkpoint;
use crate::diagnosis::{CreditNumbers, WarningFlags, WarningSettings};
use crate::error::{Error, Result};
use crate::onpolicy::{
    Clock, Cutting, EvalFlags, EvalSettings, Evaluation, Evaluator, Layout, Minibatch, OracleLogps,
    Prompt, PromptFlags, PromptSettings, ResponseScore, Rollout, RolloutCredit, RolloutFlags,
    RolloutRecord, RolloutSettings, Sampler, ScoreFlags, ScoreSettings, Scorer, SignalFlags,
    SignalInputs, SignalSettings, StepLog, Timings, from_state_text, gap, masks, prompt_warnings,
    read_prompts, state_text,
};
use crate::optimizer::{GradientSum, NamedAdamW};
use crate::progress::{Progress, StepNumbers};
use crate::run::{Run, StartMode, manifest};
use crate::score::ResponseValues;
use crate::settings::{
    CreditFlags, LoraFlags, LoraSettings, ModelFlags, ModelSettings, OptimizerFlags,
    OptimizerSettings, RunFlags, RunSettings,
};
use crate::table::recipe;
use crate::workspace::Workspace;

recipe! {
    /// The configuration of `pivotal ppo`.
    pub struct PpoConfig, PpoRunFlags {
        /// `[model]`
        model: ModelSettings, ModelFlags;
        /// `[lora]`
        lora: LoraSettings, LoraFlags;
        /// `[data]`
        data: PromptSettings, PromptFlags;
        /// `[rollout]`
        rollout: RolloutSettings, RolloutFlags;
        /// `[score]`
        score: ScoreSettings, ScoreFlags;
        /// `[ppo]`
        ppo: PpoSettings, PpoFlags;
        /// `[optimizer]`
        optimizer: OptimizerSettings, OptimizerFlags;
        /// `[run]`
        run: RunSettings, RunFlags;
        /// `[eval]`
        eval: EvalSettings, EvalFlags;
        /// `[signal]`
        signal: SignalSettings, SignalFlags;
        /// `[credit]`
        credit: CreditConfig, CreditFlags;
        /// `[warnings]`
        warnings: WarningSettings, WarningFlags;
    }
}

/// One step's numbers.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct PpoMetrics {
    /// Scores, KL, rewards and advantages.
    #[serde(flatten)]
    pub experience: ExperienceNumbers,
    /// Mean of what checks came to; absent without checks.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub checks: Option<f64>,
    /// Mean score of the reward model; absent without one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reward: Option<f64>,
    /// Losses, ratios and clips.
    #[serde(flatten)]
    pub update: UpdateNumbers,
    /// Mean |sampled − recomputed| log-probability of a token, in nats.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sampling_gap_mean: Option<f64>,
    /// The largest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sampling_gap_max: Option<f64>,
    /// Norm of the policy's last gradient before clipping.
    pub grad_norm: f64,
    /// Norm of the value model's.
    pub value_grad_norm: f64,
    /// Learning rate of the policy.
    pub lr: f64,
    /// Learning rate of the value model.
    pub value_lr: f64,
    /// What credit did.
    #[serde(flatten)]
    pub credit: CreditNumbers,
}

/// What a run came to; `summary.json`.
#[derive(Clone, Debug, Serialize)]
pub struct Summary {
    /// Where the policy lies.
    pub result: PathBuf,
    /// Where the value model lies.
    pub value_model: PathBuf,
    /// Prompts in the data.
    pub prompts: usize,
    /// Steps taken in all.
    pub steps: u64,
    /// The last step's metrics; absent where no step was taken.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last: Option<PpoMetrics>,
    /// The held-out prompts before the first and after the last step.
    pub held_out: Option<[Evaluation; 2]>,
    /// Where the time of this process went.
    pub timings: Timings,
}

/// What is remembered from step to step besides parameters and moments.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct State {
    credit: String,
    shaper: ShaperState,
}

/// Runs the recipe.
///
/// # Errors
/// [`crate::Error`]: its kind says whose fault it is. Nothing is written before the inputs have been read and checked.
pub fn train(config: &PpoConfig, mode: StartMode) -> Result<Summary> {
    let out = &config.run.out;
    Run::check(
        out,
        mode,
        &[
            &config.model.path,
            &config.model.adapter,
            &config.data.path,
            &config.eval.path,
            &config.score.reward_model,
            &config.ppo.value_model,
            &config.signal.oracle,
        ],
    )?;
    check(config)?;
    let (seed, precision) = (config.run.seed, config.model.precision);
    let mut workspace = Workspace::load_under(&config.model, &config.lora)?;
    let prompts = read_prompts(&config.data, &workspace)?;
    let warnings = prompt_warnings(&config.data.path, &workspace)?;
    let budget = config.optimizer.micro_batch_tokens;
    let scorer = Scorer::new(&config.score, &workspace, precision, budget)?;
    scorer.check_prompts("data", &config.data.path, &prompts)?;
    let evaluator = Evaluator::new(
        &config.eval,
        &config.data,
        &config.score,
        &workspace,
        precision,
        budget,
    )?;
    let rule = config.credit.resolve()?;
    let oracle = match rule.needs_signal() && rule.signal == Signal::LogRatio {
        true => {
            let path = config.signal.require_oracle()?;
            Some(workspace.other_policy(path, precision)?)
        }
        false => None,
    };
    let models = Models::new(&mut workspace, &config.lora, &config.ppo, precision, seed)?;
    let files: Vec<&Path> = [config.data.path.as_path(), &config.eval.path]
        .into_iter()
        .filter(|path| !path.as_os_str().is_empty())
        .collect();
    let weights = weights(config, &workspace, &models, &scorer, oracle.as_ref());
    let manifest = manifest("ppo", seed, workspace.decoder.device(), &files, &weights)?;
    let run = Run::open(out, mode, config, &manifest)?;
    let has_reward_model = scorer.reward_model().is_some();
    let training = Training {
        config,
        credit: RolloutCredit::new(&config.credit, seed, "")?.with_warnings(&config.warnings),
        shaper: Shaper::new(&config.ppo, &rule, has_reward_model, seed, None)?,
        reference: workspace.decoder.detached(),
        workspace: &workspace,
        prompts: &prompts,
        warnings,
        scorer,
        oracle,
        sampler: Sampler::new(&config.rollout, precision, seed)?,
        evaluator,
        optimizer: NamedAdamW::new(&config.optimizer),
        clock: Clock::open(out)?,
        models,
        run,
    };
    training.run(mode)
}

fn check(config: &PpoConfig) -> Result<()> {
    config.optimizer.check()?;
    config.rollout.check()?;
    config.score.check()?;
    config.signal.check()?;
    config.ppo.check()?;
    config.warnings.check()?;
    if config.optimizer.batch != OptimizerSettings::default().batch {
        return Err(Error::Setting {
            key: "batch",
            found: config.optimizer.batch.to_string(),
            expected: "left out: `--prompts`, `--samples` and `--minibatches` say how many responses a step has",
        });
    }
    let responses = (config.rollout.prompts * config.rollout.samples) as u64;
    let horizon = config.ppo.kl_horizon;
    if config.ppo.kl_target > 0.0 && responses >= 5 * horizon {
        return Err(Error::Setting {
            key: "kl-horizon",
            found: horizon.to_string(),
            expected: "more than a fifth of a step's responses, `--prompts` times `--samples`",
        });
    }
    let rule = config.credit.resolve()?;
    let has_reward_model = !config.score.reward_model.as_os_str().is_empty();
    Shaper::new(&config.ppo, &rule, has_reward_model, config.run.seed, None)?;
    RolloutCredit::check(&config.credit, &config.score, &config.signal, true)?;
    Ok(())
}

fn weights(
    config: &PpoConfig,
    workspace: &Workspace,
    models: &Models,
    scorer: &Scorer,
    oracle: Option<&Decoder>,
) -> Vec<FileHash> {
    let precision = config.model.precision;
    let mut weights = vec![workspace.weights(precision)];
    let hash = |path: &Path, blake3| FileHash {
        path: path.display().to_string(),
        blake3,
    };
    weights.extend(scorer.reward_model().map(|model| {
        let blake3 = Workspace::reward_model_hash(model, precision);
        hash(&config.score.reward_model, blake3)
    }));
    let given = !config.ppo.value_model.as_os_str().is_empty();
    weights.extend(given.then(|| {
        let blake3 = Workspace::reward_model_hash(&models.value, precision);
        hash(&config.ppo.value_model, blake3)
    }));
    weights.extend(oracle.map(|oracle| {
        let blake3 = Workspace::decoder_hash(oracle, precision);
        hash(&config.signal.oracle, blake3)
    }));
    weights
}

/// Everything that a step touches.
struct Training<'a> {
    config: &'a PpoConfig,
    workspace: &'a Workspace,
    prompts: &'a [Prompt],
    /// Of the prompts: said before the first step, and in its metrics.
    warnings: Vec<String>,
    models: Models,
    reference: Decoder,
    oracle: Option<Decoder>,
    scorer: Scorer,
    sampler: Sampler,
    evaluator: Option<Evaluator>,
    optimizer: NamedAdamW,
    shaper: Shaper,
    credit: RolloutCredit,
    clock: Clock,
    run: Run,
}

/// What the models say of a step's rollouts.
struct Observed {
    old_logps: Vec<Vec<f32>>,
    reference_logps: Vec<Vec<f32>>,
    oracle: OracleLogps,
    values: Vec<ResponseValues>,
}

impl Training<'_> {
    fn run(mut self, mode: StartMode) -> Result<Summary> {
        let (config, out) = (self.config, &self.config.run.out);
        let start = match mode {
            StartMode::Resume => self.restore(out)?,
            _ => 0,
        };
        self.run.rewind(start)?;
        let mut log = StepLog::open(out, "rollouts.jsonl", start)?;
        if let Some(evaluator) = &mut self.evaluator {
            evaluator.open(out, start)?;
        }
        let batching = BatchOptions {
            seed: config.run.seed,
            items_per_batch: config.rollout.prompts,
            order: Order::Shuffled,
        };
        let lengths = vec![1; self.prompts.len()];
        let batches = Batcher::new(lengths, batching, Cursor::default())?;
        let steps = config.optimizer.total_steps(batches.batches_per_epoch());
        let progress = Progress::start("ppo", start..steps, config.run.progress);
        let mut last: Option<PpoMetrics> = self.run.last()?;
        let every = config.run.checkpoint_every;
        if start == 0 {
            progress.warn(&self.warnings);
        }
        progress.phase("evaluation");
        self.evaluate(start, steps)?;
        for (step, batch) in (start + 1..=steps).zip(batches.skip(start as usize)) {
            let prompts = self.prompts;
            let prompts: Vec<&Prompt> = batch.items.iter().map(|&item| &prompts[item]).collect();
            let mut taken = self.step(step, steps, &prompts, &mut log, &progress)?;
            if step == 1 {
                taken.credit.warnings.extend_from_slice(&self.warnings);
            }
            self.run.log(step, &taken)?;
            let numbers = StepNumbers {
                loss: taken.update.policy_loss,
                score: Some(taken.experience.score),
                kl: Some(taken.experience.kl_k3),
                kept_fraction: Some(taken.credit.kept_fraction),
                segments_per_100_tokens: taken.credit.segments_per_100_tokens,
                grad_norm: taken.grad_norm,
                lr: taken.lr,
                ..StepNumbers::sampled(self.clock.last())
            };
            progress.step(step, numbers, &taken.credit.warnings);
            last = Some(taken);
            progress.phase("evaluation");
            self.evaluate(step, steps)?;
            if step == steps || (every > 0 && step % every == 0) {
                self.run.sync()?;
                log.sync()?;
                let state = state_text(&State {
                    credit: self.credit.state()?,
                    shaper: self.shaper.state(),
                })?;
                checkpoint::save_more(out, step, &mut self.models, &self.optimizer, &state)?;
            }
        }
        drop(progress);
        let result = self.workspace.write_policy(&mut self.models.policy, out)?;
        let value = &mut self.models.value;
        let value_model = self
            .workspace
            .write_reward_model(value, &out.join("value"))?;
        let summary = Summary {
            result,
            value_model,
            prompts: self.prompts.len(),
            steps,
            last,
            held_out: self.evaluator.as_ref().and_then(Evaluator::ends),
            timings: self.clock.total(),
        };
        self.run.finish(&summary)?;
        Ok(summary)
    }

    fn restore(&mut self, out: &Path) -> Result<u64> {
        let (step, more) = checkpoint::restore_more(out, &mut self.models, &mut self.optimizer)?;
        if let Some(State { credit, shaper }) = from_state_text(&more)? {
            let (config, seed) = (self.config, self.config.run.seed);
            let rule = config.credit.resolve()?;
            let has_reward_model = self.scorer.reward_model().is_some();
            self.credit =
                RolloutCredit::new(&config.credit, seed, &credit)?.with_warnings(&config.warnings);
            self.shaper = Shaper::new(&config.ppo, &rule, has_reward_model, seed, Some(shaper))?;
        }
        Ok(step)
    }

    fn evaluate(&mut self, step: u64, steps: u64) -> Result<()> {
        let (policy, tokenizer) = (&mut self.models.policy, &self.workspace.tokenizer);
        match &mut self.evaluator {
            Some(evaluator) => evaluator.after(step, steps, policy, &mut self.sampler, tokenizer),
            None => Ok(()),
        }
    }

    fn step(
        &mut self,
        step: u64,
        steps: u64,
        prompts: &[&Prompt],
        log: &mut StepLog,
        progress: &Progress,
    ) -> Result<PpoMetrics> {
        let (config, tokenizer) = (self.config, &self.workspace.tokenizer);
        progress.phase("generation");
        let (rollouts, stats) = self.clock.generation(|| {
            self.sampler
                .sample(&mut self.models.policy, prompts, tokenizer, step)
        })?;
        progress.phase("scoring");
        let scores = self
            .clock
            .scoring(|| self.scorer.score(prompts, &rollouts))?;
        let layout = |epoch: usize| {
            let cutting = Cutting {
                minibatches: config.ppo.minibatches,
                micro_batch_tokens: config.optimizer.micro_batch_tokens,
                seed: config.run.seed,
                stream: &format!("minibatches {step} {epoch}"),
            };
            Layout::new(prompts, &rollouts, &|_| true, cutting)
        };
        let first = layout(0)?;
        let observed = self.observe(&first, &rollouts)?;
        let measured = self.measured(&rollouts, &scores, &observed)?;
        let (experience, numbers) = time(Part::Credit, || self.shaper.shape(&measured, step))?;
        let inputs = SignalInputs {
            old_logps: &observed.old_logps,
            reference_logps: &observed.reference_logps,
            oracle: &observed.oracle,
            signal_beta: config.signal.signal_beta as f32,
            advantages: &experience.advantages,
            critic: &experience.old_values,
            truth: &[],
        };
        let credit = &mut self.credit;
        let (given, credit) = self
            .clock
            .scoring(|| credit.assign(&rollouts, &scores, &experience.signs, inputs, tokenizer))?;
        let keep = masks(&rollouts, given.as_deref());
        let inputs = UpdateInputs {
            rollouts: &rollouts,
            old_logps: &observed.old_logps,
            experience: &experience,
            keep: &keep,
        };

        let optimizer = &config.optimizer;
        let warmup = optimizer.warmup_steps;
        let factor = optimizer.schedule.factor(step - 1, steps, warmup);
        let mut updates = Updates {
            lr: optimizer.lr * factor,
            value_lr: config.ppo.value_lr * factor,
            ..Updates::default()
        };
        let rule = UpdateRule {
            settings: &config.ppo,
            temperature: config.rollout.temperature,
            activations: optimizer.activations,
            step,
        };
        progress.phase("update");
        self.clock.update(|| {
            for epoch in 0..config.ppo.update_epochs {
                let later;
                let layout = match epoch {
                    0 => &first,
                    _ => {
                        later = layout(epoch)?;
                        &later
                    }
                };
                for minibatch in &layout.minibatches {
                    let taken = (&mut self.models, &mut self.optimizer);
                    update(minibatch, inputs, rule, taken, &mut updates)?;
                }
            }
            Ok::<_, Error>(())
        })?;
        let given = given.as_deref();
        log.write(records(step, inputs, &observed, &scores, given))?;
        self.clock.lap(step, stats.tokens)?;

        let gap = gap(&rollouts, &observed.old_logps);
        Ok(PpoMetrics {
            experience: numbers,
            checks: mean(scores.iter().filter_map(|score| score.checks)),
            reward: mean(scores.iter().filter_map(|score| score.reward)),
            update: updates.sums.numbers(),
            sampling_gap_mean: gap.as_ref().map(|gap| gap.mean),
            sampling_gap_max: gap.as_ref().map(|gap| gap.max),
            grad_norm: updates.grad_norm,
            value_grad_norm: updates.value_grad_norm,
            lr: updates.lr,
            value_lr: updates.value_lr,
            credit,
        })
    }

    /// What the models say of the rollouts before any update: over the very passes of the first one, so that its ratio is 1.
    fn observe(&mut self, layout: &Layout, rollouts: &[Rollout]) -> Result<Observed> {
        let temperature = self.config.rollout.temperature;
        let (policy, value) = (&self.models.policy, &self.models.value);
        let (old_logps, values) = self.clock.update(|| {
            let old_logps = layout.token_logps(policy, rollouts, temperature)?;
            Ok::<_, Error>((old_logps, rollout_values(layout, value, rollouts)?))
        })?;
        let (reference, oracle) = (&self.reference, self.oracle.as_ref());
        let (reference_logps, oracle) = self.clock.scoring(|| {
            let reference_logps = layout.token_logps(reference, rollouts, temperature)?;
            let oracle = OracleLogps::of(oracle, reference, layout, rollouts)?;
            Ok::<_, Error>((reference_logps, oracle))
        })?;
        Ok(Observed {
            old_logps,
            reference_logps,
            oracle,
            values,
        })
    }

    fn measured(
        &self,
        rollouts: &[Rollout],
        scores: &[ResponseScore],
        observed: &Observed,
    ) -> Result<Vec<Measured>> {
        let texts = self.shaper.needs_texts();
        let measured = rollouts.iter().zip(scores).enumerate();
        measured
            .map(|(index, (rollout, score))| {
                Ok(Measured {
                    id: rollout.id,
                    sample: rollout.sample as u32,
                    score: score.parts,
                    penalty: score.penalty,
                    ending: match rollout.finish {
                        Finish::Length => Ending::Truncated,
                        Finish::Eos | Finish::Stop => Ending::Eos,
                    },
                    old_logps: observed.old_logps[index].clone(),
                    reference_logps: observed.reference_logps[index].clone(),
                    values: observed.values[index].clone(),
                    levels: score.values.clone(),
                    texts: match texts {
                        true => self.workspace.tokenizer.token_texts(&rollout.token_ids)?,
                        false => Vec::new(),
                    },
                })
            })
            .collect()
    }
}

/// What the updates of one step came to.
#[derive(Default)]
struct Updates {
    sums: UpdateSums,
    lr: f64,
    value_lr: f64,
    grad_norm: f64,
    value_grad_norm: f64,
}

fn update(
    minibatch: &Minibatch,
    inputs: UpdateInputs<'_>,
    rule: UpdateRule<'_>,
    (models, optimizer): (&mut Models, &mut NamedAdamW),
    updates: &mut Updates,
) -> Result<()> {
    let sums = &mut updates.sums;
    let policy = policy_gradients(&mut models.policy, minibatch, inputs, rule, sums)?;
    let value = value_gradients(&mut models.value, minibatch, inputs, rule, sums)?;
    let mut take = |sum: GradientSum, part, metric, lr| {
        let step = rule.step;
        let norm = time(Part::Optimizer, || {
            optimizer.step(models, sum.under(part), lr, step)
        });
        norm.map_err(|error| match error {
            Error::NotFinite { .. } => Error::NotFinite {
                step,
                metric,
                samples: minibatch.rows(inputs.rollouts),
            },
            other => other,
        })
    };
    // Where nothing is kept there is no gradient, and Adam's moments are left alone too.
    updates.grad_norm = take(policy, POLICY, "grad_norm", updates.lr)?;
    updates.value_grad_norm = take(value, VALUE, "value_grad_norm", updates.value_lr)?;
    Ok(())
}

fn records<'a>(
    step: u64,
    inputs: UpdateInputs<'a>,
    observed: &'a Observed,
    scores: &'a [ResponseScore],
    given: Option<&'a [ResponseCredit]>,
) -> impl Iterator<Item = RolloutRecord<'a>> {
    let experience: &'a Experience = inputs.experience;
    (0..inputs.rollouts.len()).map(move |index| {
        let credit = given.map(|given| &given[index]);
        let record = RolloutRecord::new(step, &inputs.rollouts[index], &scores[index]);
        RolloutRecord {
            advantages: &experience.advantages[index],
            old_logps: &observed.old_logps[index],
            reference_logps: &observed.reference_logps[index],
            ..record.with_credit(credit)
        }
    })
}

fn mean(values: impl Iterator<Item = f32>) -> Option<f64> {
    let values: Vec<f64> = values.map(f64::from).collect();
    (!values.is_empty()).then(|| values.iter().sum::<f64>() / values.len() as f64)
}
