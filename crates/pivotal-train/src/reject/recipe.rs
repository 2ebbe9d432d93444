//! `pivotal reject`: from a model and a file of prompts with checks to an adapter that passes more of them, round by round.

use std::path::{Path, PathBuf};

use pivotal_core::{FileHash, Sign};
use pivotal_credit::{CreditConfig, ResponseCredit, TokenColumn};
use pivotal_data::{BatchOptions, Batcher, Cursor, Order};
use pivotal_model::Decoder;
use serde::{Deserialize, Serialize};

use super::check::{check, needs_log_ratio};
use super::round::{Found, PromptColumn, RoundFiles, RoundNumbers, accepted_order, verdicts};
use super::settings::{RejectFlags, RejectSettings};
use super::state::{SampledRound, State, Stored};
use super::{AcceptedResponse, gradients};
use crate::checkpoint;
use crate::diagnosis::{CreditNumbers, WarningFlags, WarningSettings};
use crate::error::{Error, Result};
use crate::onpolicy::{
    Clock, Cutting, EvalFlags, EvalSettings, Evaluation, Evaluator, Layout, OracleLogps, Prompt,
    PromptFlags, PromptSettings, ResponseScore, Rollout, RolloutCredit, RolloutFlags,
    RolloutSettings, Sampler, ScoreFlags, ScoreSettings, Scorer, SignalFlags, SignalInputs,
    SignalSettings, Timings, masks, prompt_warnings, read_prompts,
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
    /// The configuration of `pivotal reject`.
    pub struct RejectConfig, RejectRunFlags {
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
        /// `[reject]`
        reject: RejectSettings, RejectFlags;
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

/// One optimizer step's numbers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct RejectMetrics {
    /// The round whose responses it learns from.
    pub round: u64,
    /// Mean negative log-probability of a kept token, in nats; 0 if nothing is kept.
    pub loss: f64,
    /// Accepted responses in the step.
    pub responses: usize,
    /// Kept tokens in the step; none, and no optimizer step is taken.
    pub kept_tokens: usize,
    /// Their share of the responses' tokens.
    pub kept_fraction: f64,
    /// Norm of the gradient before clipping.
    pub grad_norm: f64,
    /// Learning rate.
    pub lr: f64,
    /// Mean score of the responses that the round sampled.
    pub score: f64,
    /// Mean over the round's prompts of their best response's score.
    pub best_score: f64,
    /// Share of the round's responses that were accepted.
    pub accepted_fraction: f64,
}

/// What a run came to; `summary.json`.
#[derive(Clone, Debug, Serialize)]
pub struct Summary {
    /// Where the result lies.
    pub result: PathBuf,
    /// Prompts in the data.
    pub prompts: usize,
    /// Rounds in all.
    pub rounds: u64,
    /// Responses accepted in all.
    pub accepted: u64,
    /// Optimizer steps in all.
    pub steps: u64,
    /// Those of them in which nothing was kept, so that nothing was learnt.
    pub empty_steps: u64,
    /// The last step's metrics; absent where no step was taken.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last: Option<RejectMetrics>,
    /// The last round's numbers.
    pub last_round: RoundNumbers,
    /// The held-out prompts before the first and after the last round.
    pub held_out: Option<[Evaluation; 2]>,
    /// Where the time of this process went.
    pub timings: Timings,
}

/// Runs the recipe.
///
/// # Errors
/// [`crate::Error`]: its kind says whose fault it is. Nothing is written before the inputs have been read and checked.
pub fn train(config: &RejectConfig, mode: StartMode) -> Result<Summary> {
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
    let oracle = match needs_log_ratio(&config.credit.resolve()?) {
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
    let manifest = manifest("reject", seed, workspace.decoder.device(), &files, &weights)?;
    let column = PromptColumn::read(&config.data.path)?;
    let run = Run::open(out, mode, config, &manifest)?;
    let training = Training {
        config,
        reference: workspace.decoder.detached(),
        workspace: &workspace,
        prompts: &prompts,
        warnings,
        column,
        scorer,
        oracle,
        sampler: Sampler::new(&config.rollout, precision, seed)?,
        evaluator,
        optimizer: NamedAdamW::new(&config.optimizer),
        clock: Clock::open(out)?,
        policy,
        run,
        step: 0,
    };
    training.run(mode)
}

fn weights(
    config: &RejectConfig,
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

/// Everything that a round touches.
struct Training<'a> {
    config: &'a RejectConfig,
    workspace: &'a Workspace,
    prompts: &'a [Prompt],
    /// Of the prompts: said before the first round, and in its numbers.
    warnings: Vec<String>,
    column: PromptColumn,
    policy: Decoder,
    reference: Decoder,
    oracle: Option<Decoder>,
    scorer: Scorer,
    sampler: Sampler,
    evaluator: Option<Evaluator>,
    optimizer: NamedAdamW,
    clock: Clock,
    run: Run,
    /// Optimizer steps taken.
    step: u64,
}

impl Training<'_> {
    fn run(mut self, mode: StartMode) -> Result<Summary> {
        let (config, out) = (self.config, &self.config.run.out);
        let (step, more) = match mode {
            StartMode::Resume => {
                checkpoint::restore_more(out, &mut self.policy, &mut self.optimizer)?
            }
            _ => (0, String::new()),
        };
        self.step = step;
        let mut state = State::from_text(&more)?;
        self.run.rewind(step)?;
        let mut files = RoundFiles::open(out, state.last_sampled())?;
        if let Some(evaluator) = &mut self.evaluator {
            evaluator.open(out, state.round - 1)?;
        }
        let mut credit = RolloutCredit::new(&config.credit, config.run.seed, &state.credit)?
            .with_warnings(&config.warnings);

        let batching = BatchOptions {
            seed: config.run.seed,
            items_per_batch: config.rollout.prompts,
            order: Order::Shuffled,
        };
        let lengths = vec![1; self.prompts.len()];
        let batches = Batcher::new(lengths, batching, Cursor::default())?;
        let rounds = match config.reject.rounds {
            0 => batches.batches_per_epoch() as u64,
            rounds => rounds,
        };
        let batches = batches.skip(state.round as usize - 1);
        // By rounds: how many optimizer steps the later ones take is not known.
        let progress = Progress::start("reject", state.round - 1..rounds, config.run.progress);
        let mut last: Option<RejectMetrics> = self.run.last()?;
        let mut last_round = files.last()?.unwrap_or_default();
        let every = config.run.checkpoint_every;
        if state.round == 1 {
            progress.warn(&self.warnings);
        }
        progress.phase("evaluation");
        self.evaluate(state.round - 1, rounds)?;
        for (round, batch) in (state.round..=rounds).zip(batches) {
            let mut tokens = 0;
            progress.phase("sampling");
            if state.sampled.is_none() {
                let prompts: Vec<&Prompt> = batch
                    .items
                    .iter()
                    .map(|&item| &self.prompts[item])
                    .collect();
                let sampled = self.sample(round, &prompts, &mut credit, &mut files)?;
                tokens = sampled.0;
                state.credit = credit.state()?;
                state.accepted += sampled.1.accepted.len() as u64;
                state.sampled = Some(sampled.1);
                if every > 0 {
                    // What was sampled is not sampled again.
                    self.save(&files, &state)?;
                }
            }
            let sampled = state.sampled.clone().expect("it was sampled above");
            last_round = sampled.numbers.clone();
            progress.phase("update");
            self.learn(rounds, &sampled, &mut state, &files, &mut last)?;
            let timings = self.clock.lap(round, tokens)?;
            let credit = &last_round.credit;
            let learnt = last.unwrap_or_default();
            let numbers = StepNumbers {
                loss: learnt.loss,
                score: Some(last_round.score),
                kept_fraction: Some(credit.kept_fraction),
                segments_per_100_tokens: credit.segments_per_100_tokens,
                grad_norm: learnt.grad_norm,
                lr: learnt.lr,
                tokens,
                timings: Some(timings),
                ..StepNumbers::default()
            };
            progress.step(round, numbers, &credit.warnings);
            progress.phase("evaluation");
            self.evaluate(round, rounds)?;
            state.close();
        }
        self.save(&files, &state)?;
        drop(progress);
        let result = self.workspace.write_policy(&mut self.policy, out)?;
        let summary = Summary {
            result,
            prompts: self.prompts.len(),
            rounds,
            accepted: state.accepted,
            steps: self.step,
            empty_steps: state.empty_steps,
            last,
            last_round,
            held_out: self.evaluator.as_ref().and_then(Evaluator::ends),
            timings: self.clock.total(),
        };
        self.run.finish(&summary)?;
        Ok(summary)
    }

    fn save(&mut self, files: &RoundFiles, state: &State) -> Result<()> {
        self.run.sync()?;
        files.sync()?;
        let (policy, optimizer) = (&mut self.policy, &self.optimizer);
        checkpoint::save_more(
            &self.config.run.out,
            self.step,
            policy,
            optimizer,
            &state.to_text()?,
        )
    }

    fn evaluate(&mut self, round: u64, rounds: u64) -> Result<()> {
        let tokenizer = &self.workspace.tokenizer;
        let next = self.step + 1;
        match &mut self.evaluator {
            Some(evaluator) => evaluator
                .after(
                    round,
                    rounds,
                    &mut self.policy,
                    &mut self.sampler,
                    tokenizer,
                )
                .map_err(|error| at_step(error, next)),
            None => Ok(()),
        }
    }

    /// Samples the responses of a round, chooses, gives credit and writes all of it down; also how many tokens it sampled.
    fn sample(
        &mut self,
        round: u64,
        prompts: &[&Prompt],
        credit: &mut RolloutCredit,
        files: &mut RoundFiles,
    ) -> Result<(usize, SampledRound)> {
        let (config, tokenizer, next) = (self.config, &self.workspace.tokenizer, self.step + 1);
        let (rollouts, stats) = self
            .clock
            .generation(|| {
                self.sampler
                    .sample(&mut self.policy, prompts, tokenizer, round)
            })
            .map_err(|error| at_step(error, next))?;
        let scores = self
            .clock
            .scoring(|| self.scorer.score(prompts, &rollouts))?;
        finite(&rollouts, "score", next, |index| {
            scores[index].total.is_finite()
        })?;
        let verdicts = verdicts(&rollouts, &scores, config.reject.rule());
        let order = accepted_order(&rollouts, &verdicts);
        let chosen: Vec<Rollout> = order.iter().map(|&index| rollouts[index].clone()).collect();
        let chosen_scores: Vec<ResponseScore> =
            order.iter().map(|&index| scores[index].clone()).collect();
        let (given, mut numbers) = self.credit(prompts, &chosen, &chosen_scores, credit)?;
        if round == 1 {
            numbers.warnings.extend_from_slice(&self.warnings);
        }
        let keep = masks(&chosen, given.as_deref());
        let accepted: Vec<AcceptedResponse> = chosen
            .iter()
            .zip(&keep)
            .map(|(rollout, keep)| AcceptedResponse {
                id: rollout.id,
                prompt: prompts[rollout.prompt].token_ids.clone(),
                response: rollout.token_ids.clone(),
                keep: keep.clone(),
            })
            .collect();
        let numbers = RoundNumbers {
            steps: steps_of(accepted.len(), &config.optimizer),
            credit: numbers,
            ..RoundNumbers::of(round, &rollouts, &scores, &verdicts)
        };
        let found = Found {
            rollouts: &rollouts,
            scores: &scores,
            verdicts: &verdicts,
            order: &order,
            given: given.as_deref(),
            keep: &keep,
        };
        files.write(&numbers, found, &self.column)?;
        let accepted = accepted.iter().map(Stored::new).collect();
        Ok((stats.tokens, SampledRound { numbers, accepted }))
    }

    /// The credit of the accepted responses, all of them positive.
    fn credit(
        &mut self,
        prompts: &[&Prompt],
        chosen: &[Rollout],
        scores: &[ResponseScore],
        credit: &mut RolloutCredit,
    ) -> Result<(Option<Vec<ResponseCredit>>, CreditNumbers)> {
        let rule = credit.rule().clone();
        if chosen.is_empty() {
            return Ok((None, CreditNumbers::default()));
        }
        let (config, tokenizer, next) = (self.config, &self.workspace.tokenizer, self.step + 1);
        let needed = rule.needed_columns();
        let reads = |column: TokenColumn| needed.iter().any(|(needed, _)| *needed == column);
        let of_policy = reads(TokenColumn::OldTokenLogps) || reads(TokenColumn::TokenLogps);
        let of_reference = reads(TokenColumn::ReferenceTokenLogps);
        let (policy, reference, oracle) = (&self.policy, &self.reference, self.oracle.as_ref());
        self.clock.scoring(|| {
            let cutting = Cutting {
                minibatches: 1,
                micro_batch_tokens: config.optimizer.micro_batch_tokens,
                seed: config.run.seed,
                stream: "accepted",
            };
            let layout = Layout::new(prompts, chosen, &|_| true, cutting)?;
            // Of the models themselves: temperature is sampling's alone.
            let logps = |decoder: Option<&Decoder>| match decoder {
                Some(decoder) => layout.token_logps(decoder, chosen, 1.0),
                None => Ok(Vec::new()),
            };
            let old_logps = logps(of_policy.then_some(policy))?;
            finite(chosen, "old_logps", next, |index| {
                let own = old_logps.get(index).into_iter().flatten();
                own.copied().all(f32::is_finite)
            })?;
            let reference_logps = logps(of_reference.then_some(reference))?;
            let oracle = OracleLogps::of(oracle, reference, &layout, chosen)?;
            let inputs = SignalInputs {
                old_logps: &old_logps,
                reference_logps: &reference_logps,
                oracle: &oracle,
                signal_beta: config.signal.signal_beta as f32,
                advantages: &[],
                critic: &[],
                truth: &[],
            };
            let signs = vec![Sign::Positive; chosen.len()];
            credit.assign(chosen, scores, &signs, inputs, tokenizer)
        })
    }

    /// The optimizer steps over a round's accepted responses that are still to be taken.
    fn learn(
        &mut self,
        rounds: u64,
        sampled: &SampledRound,
        state: &mut State,
        files: &RoundFiles,
        last: &mut Option<RejectMetrics>,
    ) -> Result<()> {
        let (config, numbers) = (self.config, &sampled.numbers);
        let optimizer = &config.optimizer;
        let restored = sampled.accepted.iter().map(|one| one.restore(self.prompts));
        let accepted: Vec<AcceptedResponse> = restored.collect::<Result<_>>()?;
        if accepted.is_empty() {
            return Ok(());
        }
        let batching = BatchOptions {
            seed: config.run.seed,
            items_per_batch: optimizer.batch,
            order: Order::Shuffled,
        };
        // An epoch of its own for each pass of each round; those of the first are the epochs of `sft`.
        let passes = Cursor {
            epoch: (numbers.round - 1).saturating_mul(optimizer.epochs),
            batch: 0,
        };
        let batches = Batcher::new(vec![1; accepted.len()], batching, passes)?;
        let steps = numbers.steps;
        for (taken, batch) in (0..steps).zip(batches).skip(state.taken as usize) {
            let items: Vec<&AcceptedResponse> =
                batch.items.iter().map(|&item| &accepted[item]).collect();
            let (step, lr) = (self.step + 1, self.lr(rounds, numbers, taken));
            let (policy, adam) = (&mut self.policy, &mut self.optimizer);
            let (learnt, grad_norm) = self.clock.update(|| {
                let (sum, learnt) = gradients(policy, &items, optimizer, step)?;
                // Where nothing is kept Adam's moments are left alone too.
                if learnt.kept_tokens == 0 {
                    return Ok((learnt, 0.0));
                }
                let grad_norm = adam.step(policy, sum, lr, step).map_err(|error| {
                    let ids = items.iter().map(|one| one.id).collect();
                    error.naming(ids, |index| {
                        let own = gradients(policy, &items[index..=index], optimizer, step);
                        own.map(|(sum, _)| sum.norm())
                    })
                })?;
                Ok::<_, Error>((learnt, grad_norm))
            })?;
            self.step = step;
            state.taken = taken + 1;
            state.empty_steps += u64::from(learnt.kept_tokens == 0);
            let tokens: usize = items.iter().map(|item| item.response.len()).sum();
            let metrics = RejectMetrics {
                round: numbers.round,
                loss: learnt.loss,
                responses: items.len(),
                kept_tokens: learnt.kept_tokens,
                kept_fraction: learnt.kept_tokens as f64 / tokens.max(1) as f64,
                grad_norm,
                lr,
                score: numbers.score,
                best_score: numbers.best_score,
                accepted_fraction: numbers.accepted_fraction,
            };
            self.run.log(step, &metrics)?;
            *last = Some(metrics);
            let every = config.run.checkpoint_every;
            if every > 0 && step % every == 0 {
                self.save(files, state)?;
            }
        }
        Ok(())
    }

    /// The learning rate of a round's step `taken`, from 0: the schedule runs over the rounds, evenly within each, for how many
    /// steps the later ones take is not known; the warm-up multiplies it.
    fn lr(&self, rounds: u64, numbers: &RoundNumbers, taken: u64) -> f64 {
        let (optimizer, steps) = (&self.config.optimizer, numbers.steps);
        let place = (numbers.round - 1).saturating_mul(steps) + taken;
        let course = optimizer
            .schedule
            .factor(place, rounds.saturating_mul(steps), 0);
        let warmup = match self.step < optimizer.warmup_steps {
            true => (self.step + 1) as f64 / optimizer.warmup_steps as f64,
            false => 1.0,
        };
        optimizer.lr * course * warmup
    }
}

/// Optimizer steps over so many accepted responses.
fn steps_of(accepted: usize, optimizer: &OptimizerSettings) -> u64 {
    let a_pass = accepted.div_ceil(optimizer.batch) as u64;
    optimizer.epochs.saturating_mul(a_pass)
}

/// A run that diverges in sampling has diverged before its next optimizer step.
fn at_step(error: Error, step: u64) -> Error {
    match error {
        Error::NotFinite {
            metric, samples, ..
        } => Error::NotFinite {
            step,
            metric,
            samples,
        },
        other => other,
    }
}

fn finite(
    rollouts: &[Rollout],
    metric: &'static str,
    step: u64,
    is_finite: impl Fn(usize) -> bool,
) -> Result<()> {
    let bad = (0..rollouts.len()).filter(|&index| !is_finite(index));
    let mut samples: Vec<u64> = bad.map(|index| rollouts[index].id).collect();
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
