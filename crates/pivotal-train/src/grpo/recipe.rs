//! `pivotal grpo`: from a model and a file of prompts with checks to an adapter that passes more of them.

// Long because a recipe reads top to bottom: configuration, metrics, inputs, a step, an update.
use std::path::{Path, PathBuf};

use pivotal_core::FileHash;
use pivotal_credit::{
    CreditConfig, KlEstimator, KlSum, ResponseCredit, Selection, Signal, Variance,
    group_advantages, sequence_signs,
};
use pivotal_data::{BatchOptions, Batcher, Cursor, Order};
use pivotal_model::{Decoder, Finish};
use serde::{Deserialize, Serialize};

use super::settings::{GrpoFlags, GrpoSettings};
use super::{GrpoBatch, GrpoObjective, UpdateSums, gradients};
use crate::checkpoint;
use crate::diagnosis::{CreditNumbers, WarningFlags, WarningSettings};
use crate::error::{Error, Result};
use crate::onpolicy::{
    Clock, Cutting, EvalFlags, EvalSettings, Evaluation, Evaluator, Layout, OracleLogps, Prompt,
    PromptFlags, PromptSettings, ResponseScore, Rollout, RolloutCredit, RolloutFlags,
    RolloutRecord, RolloutSettings, Sampler, ScoreFlags, ScoreSettings, Scorer, SignalFlags,
    SignalInputs, SignalSettings, StepLog, Timings, gap, masks, prompt_warnings, read_prompts,
};
use crate::optimizer::NamedAdamW;
use crate::progress::{Progress, StepNumbers};
use crate::run::{Run, StartMode, manifest};
use crate::settings::{
    CreditFlags, LoraFlags, LoraSettings, ModelFlags, ModelSettings, OptimizerFlags,
    OptimizerSettings, RunFlags, RunSettings,
};
use crate::table::recipe;
use crate::workspace::Workspace;

recipe! {
    /// The configuration of `pivotal grpo`.
    pub struct GrpoConfig, GrpoRunFlags {
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
        /// `[grpo]`
        grpo: GrpoSettings, GrpoFlags;
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
pub struct GrpoMetrics {
    /// Mean loss of the step's updates, the KL term included.
    pub loss: f64,
    /// Mean score of the sampled responses.
    pub score: f64,
    /// Their standard deviation.
    pub score_std: f64,
    /// Mean of what checks came to; absent without checks.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub checks: Option<f64>,
    /// Mean score of the reward model; absent without one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reward: Option<f64>,
    /// Share of prompts whose responses all scored alike: they train nothing.
    pub flat_group_fraction: f64,
    /// Tokens of a response.
    pub response_tokens: f64,
    /// Share of responses that ended by themselves.
    pub ended_fraction: f64,
    /// Mean k1 estimate of KL(π‖π_ref) a token before the update, in nats, like the three that follow; over the responses that
    /// went through a pass. Absent in steps that did not measure it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kl_k1: Option<f64>,
    /// The k2 estimate.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kl_k2: Option<f64>,
    /// The k3 estimate.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kl_k3: Option<f64>,
    /// The largest |log π − log π_ref|.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kl_max: Option<f64>,
    /// Mean |sampled − recomputed| log-probability of a token, in nats.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sampling_gap_mean: Option<f64>,
    /// The largest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sampling_gap_max: Option<f64>,
    /// Largest |ratio − 1| in the first minibatch: 0, for the policy has not moved.
    pub first_ratio_deviation: f64,
    /// Largest |ratio − 1| in all.
    pub ratio_deviation: f64,
    /// Share of the update's tokens clipped below.
    pub clipped_low_fraction: f64,
    /// Share clipped above.
    pub clipped_high_fraction: f64,
    /// Share bounded by the dual clip.
    pub clipped_dual_fraction: f64,
    /// Mean k3 estimate of KL(π_old‖π) over the update, in nats.
    pub kl_from_old: f64,
    /// Optimizer steps taken; 0 if every group was flat.
    pub updates: u64,
    /// Norm of the last gradient before clipping.
    pub grad_norm: f64,
    /// Learning rate.
    pub lr: f64,
    /// What credit did.
    #[serde(flatten)]
    pub credit: CreditNumbers,
}

/// What a run came to; `summary.json`.
#[derive(Clone, Debug, Serialize)]
pub struct Summary {
    /// Where the result lies.
    pub result: PathBuf,
    /// Prompts in the data.
    pub prompts: usize,
    /// Steps taken in all.
    pub steps: u64,
    /// The last step's metrics; absent where no step was taken.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last: Option<GrpoMetrics>,
    /// The held-out prompts before the first and after the last step.
    pub held_out: Option<[Evaluation; 2]>,
    /// Where the time of this process went.
    pub timings: Timings,
}

/// Runs the recipe.
///
/// # Errors
/// [`crate::Error`]: its kind says whose fault it is. Nothing is written before the inputs have been read and checked.
pub fn train(config: &GrpoConfig, mode: StartMode) -> Result<Summary> {
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
    let oracle = match needs_oracle(&config.credit)? {
        true => {
            let path = config.signal.require_oracle()?;
            Some(workspace.other_policy(path, precision)?)
        }
        false => None,
    };
    let policy = workspace.trainable(&config.lora, seed)?;
    let files: Vec<&Path> = [config.data.path.as_path(), &config.eval.path]
        .into_iter()
        .filter(|path| !path.as_os_str().is_empty())
        .collect();
    let weights = weights(config, &workspace, &scorer, oracle.as_ref());
    let manifest = manifest("grpo", seed, workspace.decoder.device(), &files, &weights)?;
    let run = Run::open(out, mode, config, &manifest)?;
    let training = Training {
        config,
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
        policy,
        run,
    };
    training.run(mode)
}

fn check(config: &GrpoConfig) -> Result<()> {
    config.optimizer.check()?;
    config.rollout.check()?;
    config.score.check()?;
    config.signal.check()?;
    config.grpo.check()?;
    config.warnings.check()?;
    RolloutCredit::check(&config.credit, &config.score, &config.signal, false)?;
    if config.optimizer.batch != OptimizerSettings::default().batch {
        return Err(Error::Setting {
            key: "batch",
            found: config.optimizer.batch.to_string(),
            expected: "left out: `--prompts`, `--samples` and `--minibatches` say how many responses a step has",
        });
    }
    Ok(())
}

fn needs_oracle(credit: &CreditConfig) -> Result<bool> {
    let rule = credit.resolve()?;
    Ok(rule.needs_signal() && rule.signal == Signal::LogRatio)
}

fn weights(
    config: &GrpoConfig,
    workspace: &Workspace,
    scorer: &Scorer,
    oracle: Option<&Decoder>,
) -> Vec<FileHash> {
    let precision = config.model.precision;
    let mut weights = vec![workspace.weights(precision)];
    weights.extend(scorer.reward_model().map(|model| FileHash {
        path: config.score.reward_model.display().to_string(),
        blake3: Workspace::reward_model_hash(model, precision),
    }));
    weights.extend(oracle.map(|oracle| FileHash {
        path: config.signal.oracle.display().to_string(),
        blake3: Workspace::decoder_hash(oracle, precision),
    }));
    weights
}

/// Everything that a step touches.
struct Training<'a> {
    config: &'a GrpoConfig,
    workspace: &'a Workspace,
    prompts: &'a [Prompt],
    /// Of the prompts: said before the first step, and in its metrics.
    warnings: Vec<String>,
    policy: Decoder,
    reference: Decoder,
    oracle: Option<Decoder>,
    scorer: Scorer,
    sampler: Sampler,
    evaluator: Option<Evaluator>,
    optimizer: NamedAdamW,
    clock: Clock,
    run: Run,
}

impl Training<'_> {
    fn run(mut self, mode: StartMode) -> Result<Summary> {
        let (config, out) = (self.config, &self.config.run.out);
        let (start, more) = match mode {
            StartMode::Resume => {
                checkpoint::restore_more(out, &mut self.policy, &mut self.optimizer)?
            }
            _ => (0, String::new()),
        };
        self.run.rewind(start)?;
        let mut rollout_log = StepLog::open(out, "rollouts.jsonl", start)?;
        if let Some(evaluator) = &mut self.evaluator {
            evaluator.open(out, start)?;
        }
        let mut credit = RolloutCredit::new(&config.credit, config.run.seed, &more)?
            .with_warnings(&config.warnings);

        let batching = BatchOptions {
            seed: config.run.seed,
            items_per_batch: config.rollout.prompts,
            order: Order::Shuffled,
        };
        let lengths = vec![1; self.prompts.len()];
        let batches = Batcher::new(lengths, batching, Cursor::default())?;
        let steps = config.optimizer.total_steps(batches.batches_per_epoch());
        let batches = batches.skip(start as usize);
        let progress = Progress::start("grpo", start..steps, config.run.progress);
        let mut last: Option<GrpoMetrics> = self.run.last()?;
        let every = config.run.checkpoint_every;
        if start == 0 {
            progress.warn(&self.warnings);
        }
        progress.phase("evaluation");
        self.evaluate(start, steps)?;
        for (step, batch) in (start + 1..=steps).zip(batches) {
            let prompts = self.prompts;
            let prompts: Vec<&Prompt> = batch.items.iter().map(|&item| &prompts[item]).collect();
            let mut taken = self.step(
                step,
                steps,
                &prompts,
                &mut credit,
                &mut rollout_log,
                &progress,
            )?;
            if step == 1 {
                taken.credit.warnings.extend_from_slice(&self.warnings);
            }
            self.run.log(step, &taken)?;
            let numbers = StepNumbers {
                loss: taken.loss,
                score: Some(taken.score),
                kl: taken.kl_k3,
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
                rollout_log.sync()?;
                let (policy, optimizer) = (&mut self.policy, &self.optimizer);
                checkpoint::save_more(out, step, policy, optimizer, &credit.state()?)?;
            }
        }
        drop(progress);
        let result = self.workspace.write_policy(&mut self.policy, out)?;
        let summary = Summary {
            result,
            prompts: self.prompts.len(),
            steps,
            last,
            held_out: self.evaluator.as_ref().and_then(Evaluator::ends),
            timings: self.clock.total(),
        };
        self.run.finish(&summary)?;
        Ok(summary)
    }

    fn evaluate(&mut self, step: u64, steps: u64) -> Result<()> {
        let tokenizer = &self.workspace.tokenizer;
        match &mut self.evaluator {
            Some(evaluator) => {
                evaluator.after(step, steps, &mut self.policy, &mut self.sampler, tokenizer)
            }
            None => Ok(()),
        }
    }

    fn step(
        &mut self,
        step: u64,
        steps: u64,
        prompts: &[&Prompt],
        credit: &mut RolloutCredit,
        log: &mut StepLog,
        progress: &Progress,
    ) -> Result<GrpoMetrics> {
        let (config, tokenizer) = (self.config, &self.workspace.tokenizer);
        progress.phase("generation");
        let (rollouts, stats) = self.clock.generation(|| {
            self.sampler
                .sample(&mut self.policy, prompts, tokenizer, step)
        })?;
        progress.phase("scoring");
        let scores = self
            .clock
            .scoring(|| self.scorer.score(prompts, &rollouts))?;
        let totals = finite_scores(&rollouts, &scores, step)?;
        let ids: Vec<u64> = rollouts.iter().map(|rollout| rollout.id).collect();
        let grpo = &config.grpo;
        let found = group_advantages(
            &ids,
            &totals,
            grpo.estimator.into(),
            Variance::Bessel,
            grpo.std_epsilon,
        )?;
        let advantages = found.advantages;

        // A response that no gradient comes from goes through no pass, unless credit or the KL loss looks at it.
        let segmented = credit.rule().selection != Selection::All;
        let everyone = grpo.kl_coef > 0.0 || segmented;
        let live = |index: usize| everyone || advantages[index] != 0.0;
        let layout = |epoch: usize| {
            let cutting = Cutting {
                minibatches: grpo.minibatches,
                micro_batch_tokens: config.optimizer.micro_batch_tokens,
                seed: config.run.seed,
                stream: &format!("minibatches {step} {epoch}"),
            };
            Layout::new(prompts, &rollouts, &live, cutting)
        };
        let first = layout(0)?;
        let temperature = config.rollout.temperature;
        // A step's only update goes over the policy that sampled: its own pass says what the old log-probabilities are.
        let own_pass = grpo.update_epochs == 1 && first.minibatches.len() == 1 && !segmented;
        let old_logps = match own_pass {
            true => Vec::new(),
            false => self
                .clock
                .update(|| first.token_logps(&self.policy, &rollouts, temperature))?,
        };
        finite_logps(&rollouts, &old_logps, "old_logps", step)?;
        let measured = grpo.kl_every > 0 && (step - 1).is_multiple_of(grpo.kl_every);
        let (reference_logps, given, numbers) = self.clock.scoring(|| {
            let reference_logps = match everyone || measured {
                true => first.token_logps(&self.reference, &rollouts, temperature)?,
                false => Vec::new(),
            };
            let oracle = self.oracle.as_ref();
            let oracle = OracleLogps::of(oracle, &self.reference, &first, &rollouts)?;
            let signs = sequence_signs(&ids, &totals, grpo.sign_baseline.into())?;
            let spread: Vec<Vec<f32>> = rollouts
                .iter()
                .zip(&advantages)
                .map(|(rollout, &advantage)| vec![advantage; rollout.token_ids.len()])
                .collect();
            let inputs = SignalInputs {
                old_logps: &old_logps,
                reference_logps: &reference_logps,
                oracle: &oracle,
                signal_beta: config.signal.signal_beta as f32,
                advantages: &spread,
                critic: &[],
                truth: &[],
            };
            let (given, numbers) = credit.assign(&rollouts, &scores, &signs, inputs, tokenizer)?;
            Ok::<_, Error>((reference_logps, given, numbers))
        })?;
        let keep = masks(&rollouts, given.as_deref());
        let batch = GrpoBatch {
            rollouts: &rollouts,
            advantages: &advantages,
            keep: &keep,
            old_logps: &old_logps,
            reference_logps: &reference_logps,
        };

        let optimizer = &config.optimizer;
        let lr = optimizer.lr
            * optimizer
                .schedule
                .factor(step - 1, steps, optimizer.warmup_steps);
        let mut updates = Updates::default();
        progress.phase("update");
        self.clock.update(|| {
            for epoch in 0..grpo.update_epochs {
                let later;
                let layout = match epoch {
                    0 => &first,
                    _ => {
                        later = layout(epoch)?;
                        &later
                    }
                };
                let taken = (&mut self.policy, &mut self.optimizer);
                update(config, layout, batch, (lr, step), taken, &mut updates)?;
            }
            Ok::<_, Error>(())
        })?;
        let own = old_logps.is_empty().then_some(&updates.token_logps);
        let batch = GrpoBatch {
            old_logps: own.unwrap_or(&old_logps),
            ..batch
        };
        log.write(records(step, batch, &scores, given.as_deref()))?;
        self.clock.lap(step, stats.tokens)?;

        let mut metrics = GrpoMetrics {
            flat_group_fraction: found.flat_groups as f64 / found.groups.max(1) as f64,
            lr,
            credit: numbers,
            ..GrpoMetrics::default()
        };
        metrics.observe(&rollouts, &scores);
        metrics.compare(batch)?;
        metrics.take(&updates);
        Ok(metrics)
    }
}

/// What the updates of one step came to.
#[derive(Default)]
struct Updates {
    count: u64,
    first_ratio_deviation: f64,
    grad_norm: f64,
    sums: UpdateSums,
    /// As the last minibatch read them.
    token_logps: Vec<Vec<f32>>,
}

fn update(
    config: &GrpoConfig,
    layout: &Layout,
    batch: GrpoBatch<'_>,
    (lr, step): (f64, u64),
    (policy, optimizer): (&mut Decoder, &mut NamedAdamW),
    updates: &mut Updates,
) -> Result<()> {
    let objective = GrpoObjective {
        settings: &config.grpo,
        temperature: config.rollout.temperature,
        max_response_tokens: config.rollout.max_new_tokens,
    };
    for minibatch in &layout.minibatches {
        let found = gradients(policy, minibatch, batch, objective, &config.optimizer, step)?;
        let sums = found.sums;
        updates.token_logps = found.token_logps;
        if sums.tokens == 0 && config.grpo.kl_coef == 0.0 {
            // Nothing was kept, or every group is flat: Adam's moments are left alone too.
            continue;
        }
        if updates.count == 0 {
            updates.first_ratio_deviation = sums.ratio_deviation;
        }
        let taken = optimizer.step(policy, found.gradients, lr, step);
        updates.grad_norm = taken.map_err(|error| match error {
            Error::NotFinite { step, metric, .. } => Error::NotFinite {
                step,
                metric,
                samples: minibatch.rows(batch.rollouts),
            },
            other => other,
        })?;
        updates.sums.merge(&sums);
        updates.count += 1;
    }
    Ok(())
}

fn records<'a>(
    step: u64,
    batch: GrpoBatch<'a>,
    scores: &'a [ResponseScore],
    given: Option<&'a [ResponseCredit]>,
) -> impl Iterator<Item = RolloutRecord<'a>> {
    (0..batch.rollouts.len()).map(move |index| {
        let credit = given.map(|given| &given[index]);
        let record = RolloutRecord::new(step, &batch.rollouts[index], &scores[index]);
        RolloutRecord {
            advantage: Some(batch.advantages[index]),
            old_logps: &batch.old_logps[index],
            reference_logps: batch.reference_logps.get(index).map_or(&[], Vec::as_slice),
            ..record.with_credit(credit)
        }
    })
}

fn finite_scores(rollouts: &[Rollout], scores: &[ResponseScore], step: u64) -> Result<Vec<f32>> {
    let totals: Vec<f32> = scores.iter().map(|score| score.total).collect();
    let of = totals.iter().map(|&total| vec![total]);
    finite_logps(rollouts, &of.collect::<Vec<_>>(), "score", step)?;
    Ok(totals)
}

fn finite_logps(
    rollouts: &[Rollout],
    of: &[Vec<f32>],
    metric: &'static str,
    step: u64,
) -> Result<()> {
    let bad = rollouts
        .iter()
        .zip(of)
        .filter(|(_, values)| values.iter().any(|value| !value.is_finite()));
    let mut samples: Vec<u64> = bad.map(|(rollout, _)| rollout.id).collect();
    samples.dedup();
    match samples.is_empty() {
        true => Ok(()),
        false => Err(Error::NotFinite {
            step,
            metric,
            samples,
        }),
    }
}

impl GrpoMetrics {
    fn observe(&mut self, rollouts: &[Rollout], scores: &[ResponseScore]) {
        let count = rollouts.len().max(1) as f64;
        let mean = |values: &mut dyn Iterator<Item = f64>| values.sum::<f64>() / count;
        let total = |score: &ResponseScore| f64::from(score.total);
        self.score = mean(&mut scores.iter().map(total));
        let center = self.score;
        let variance = mean(&mut scores.iter().map(|score| (total(score) - center).powi(2)));
        self.score_std = variance.sqrt();
        let known = |of: &dyn Fn(&ResponseScore) -> Option<f32>| {
            let known: Vec<f64> = scores.iter().filter_map(of).map(f64::from).collect();
            (!known.is_empty()).then(|| known.iter().sum::<f64>() / known.len() as f64)
        };
        self.checks = known(&|score| score.checks);
        self.reward = known(&|score| score.reward);
        self.response_tokens = mean(&mut rollouts.iter().map(|r| r.token_ids.len() as f64));
        let ended = |rollout: &&Rollout| rollout.finish != Finish::Length;
        self.ended_fraction = rollouts.iter().filter(ended).count() as f64 / count;
    }

    fn compare(&mut self, batch: GrpoBatch<'_>) -> Result<()> {
        let mut kl = KlSum::default();
        for (old, reference) in batch.old_logps.iter().zip(batch.reference_logps) {
            kl.merge(&KlSum::of(old, reference, &vec![true; old.len()])?);
        }
        // Absent where no response of the step went through the reference.
        self.kl_k1 = kl.token_mean(KlEstimator::K1);
        self.kl_k2 = kl.token_mean(KlEstimator::K2);
        self.kl_k3 = kl.token_mean(KlEstimator::K3);
        self.kl_max = self.kl_k1.map(|_| kl.max_abs_log_ratio);
        let gap = gap(batch.rollouts, batch.old_logps);
        self.sampling_gap_mean = gap.as_ref().map(|gap| gap.mean);
        self.sampling_gap_max = gap.as_ref().map(|gap| gap.max);
        Ok(())
    }

    fn take(&mut self, updates: &Updates) {
        let sums = &updates.sums;
        let share = |part: u64| part as f64 / sums.tokens.max(1) as f64;
        self.loss = sums.loss / updates.count.max(1) as f64;
        self.first_ratio_deviation = updates.first_ratio_deviation;
        self.ratio_deviation = sums.ratio_deviation;
        self.clipped_low_fraction = share(sums.clipped_low);
        self.clipped_high_fraction = share(sums.clipped_high);
        self.clipped_dual_fraction = share(sums.clipped_dual);
        self.kl_from_old = sums.kl_from_old / sums.tokens.max(1) as f64;
        self.updates = updates.count;
        self.grad_norm = updates.grad_norm;
    }
}
