//! What the on-policy trainers share: sampling, judging, what models say of the samples, masks.

use pivotal_core::{Sign, TokenMask};
use pivotal_credit::{Selection, Signal, log_ratio};
use pivotal_data::Tokenizer;
use pivotal_model::Decoder;
use pivotal_train::onpolicy::{
    Cutting, Layout, Minibatch, OracleLogps, Rollout, RolloutCredit, RolloutSettings, Sampler,
    SignalInputs, masks,
};
use pivotal_train::optimizer::NamedAdamW;
use pivotal_train::settings::{OptimizerSettings, Precision};

use super::arm::{TokenRule, Trainer, TrainerArm, TrainerSettings};
use super::samples::{Samples, StepPrompts};
use super::tally::{Cost, RunMasks, Tally};
use super::{grpo, ppo, reject};
use crate::error::Result;

/// How much an on-policy step samples, and how many there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RolloutScale {
    pub(crate) steps: u64,
    pub(crate) prompts: usize,
    /// Responses to each prompt.
    pub(crate) samples: usize,
}

/// What the on-policy arms of a seed begin with.
#[derive(Clone, Copy)]
pub(crate) struct Origin<'a> {
    pub(crate) seed: u64,
    /// The start policy: where arms begin, and the reference.
    pub(crate) start: &'a Decoder,
    /// The start policy after DPO on every token of the seed's pairs.
    pub(crate) oracle: &'a Decoder,
    pub(crate) tokenizer: &'a Tokenizer,
    pub(crate) scale: RolloutScale,
}

/// An arm that samples, on its way.
pub(super) struct Run<'a> {
    origin: Origin<'a>,
    arm: TrainerArm,
    pub(super) steps: u64,
    pub(super) policy: Decoder,
    pub(super) optimizer: NamedAdamW,
    pub(super) optimizer_settings: OptimizerSettings,
    sampler: Sampler,
    credit: RolloutCredit,
    pub(super) tally: Tally,
}

/// What the models say of a step's samples, `[rollouts][tokens]`; empty where nobody asks.
pub(super) struct Observed {
    pub(super) old_logps: Vec<Vec<f32>>,
    pub(super) reference_logps: Vec<Vec<f32>>,
    oracle: OracleLogps,
}

/// What a run came to.
pub(crate) struct Trained {
    pub(crate) policy: Decoder,
    pub(crate) masks: RunMasks,
    /// Of the arm's signal over everything that it sampled.
    pub(crate) token_auc: Option<f64>,
    /// Without the oracle's training.
    pub(crate) cost: Cost,
}

/// Trains an arm of an on-policy trainer.
pub(crate) fn train(
    origin: Origin<'_>,
    arm: TrainerArm,
    settings: TrainerSettings,
) -> Result<Trained> {
    let mut run = Run::new(origin, arm, settings.lr)?;
    match arm.trainer {
        Trainer::Reject => reject::train(&mut run)?,
        Trainer::Ppo => ppo::train(&mut run, settings.anchor)?,
        _ => grpo::train(&mut run, settings.anchor)?,
    }
    Ok(Trained {
        masks: run.tally.masks(),
        token_auc: run.tally.token_auc(),
        cost: run.tally.cost,
        policy: run.policy.detached(),
    })
}

impl<'a> Run<'a> {
    pub(super) fn new(origin: Origin<'a>, arm: TrainerArm, lr: f64) -> Result<Self> {
        let optimizer_settings = OptimizerSettings {
            lr,
            ..OptimizerSettings::default()
        };
        let begin = match arm.rule {
            TokenRule::AllFromOracle => origin.oracle,
            _ => origin.start,
        };
        let rollout = RolloutSettings {
            prompts: origin.scale.prompts,
            samples: origin.scale.samples,
            ..RolloutSettings::default()
        };
        Ok(Self {
            steps: origin.scale.steps * arm.step_factor(),
            policy: begin.clone().trainable(),
            optimizer: NamedAdamW::new(&optimizer_settings),
            optimizer_settings,
            sampler: Sampler::new(&rollout, Precision::F32, origin.seed)?,
            credit: RolloutCredit::new(&arm.credit(), origin.seed, "")?,
            tally: Tally::default(),
            origin,
            arm,
        })
    }

    pub(super) fn seed(&self) -> u64 {
        self.origin.seed
    }

    /// The policy as it is, on a tape of its own.
    pub(super) fn policy_now(&self) -> Decoder {
        self.policy.clone()
    }

    /// The longest response allowed: those of the pairs' shape have 41 tokens.
    pub(super) fn max_response_tokens(&self) -> usize {
        RolloutSettings::default().max_new_tokens
    }

    /// The learning rate of a step, from 1.
    pub(super) fn factor(&self, step: u64) -> f64 {
        let settings = &self.optimizer_settings;
        settings
            .schedule
            .factor(step - 1, self.steps, settings.warmup_steps)
    }

    /// Samples and judges a step's responses.
    pub(super) fn sample(&mut self, step: u64) -> Result<Samples> {
        let prompts = StepPrompts::draw(self.origin.seed, step, self.origin.scale.prompts)?;
        let tokenizer = self.origin.tokenizer;
        let refs = prompts.refs();
        let (rollouts, stats) = self
            .sampler
            .sample(&mut self.policy, &refs, tokenizer, step)?;
        self.tally.cost.score(stats.prompt_tokens + stats.tokens);
        Ok(Samples::judged(prompts, rollouts, self.origin.seed))
    }

    /// The passes over all samples, dealt out to `minibatches`.
    pub(super) fn layout(
        &self,
        samples: &Samples,
        minibatches: usize,
        step: u64,
        epoch: usize,
    ) -> Result<Layout> {
        let cutting = Cutting {
            minibatches,
            micro_batch_tokens: self.optimizer_settings.micro_batch_tokens,
            seed: self.origin.seed,
            stream: &format!("minibatches {step} {epoch}"),
        };
        let prompts = samples.step_prompts.refs();
        Ok(Layout::new(
            &prompts,
            &samples.rollouts,
            &|_| true,
            cutting,
        )?)
    }

    /// What the policy, and, where they are asked, the reference and the oracle say of the samples.
    pub(super) fn observe(
        &mut self,
        layout: &Layout,
        rollouts: &[Rollout],
        with_reference: bool,
    ) -> Result<Observed> {
        let tokens = layout_tokens(layout);
        let by_oracle = self.by_oracle();
        let cost = &mut self.tally.cost;
        let mut logps = |asked: bool, decoder: &Decoder| match asked {
            true => {
                cost.score(tokens);
                layout.token_logps(decoder, rollouts, 1.0)
            }
            false => Ok(Vec::new()),
        };
        let old_logps = logps(true, &self.policy)?;
        let reference_logps = logps(with_reference || by_oracle, self.origin.start)?;
        // The world samples at temperature 1, so that one pass of the reference serves both.
        let oracle = OracleLogps {
            oracle: logps(by_oracle, self.origin.oracle)?,
            reference: reference_logps.clone(),
        };
        Ok(Observed {
            old_logps,
            reference_logps,
            oracle,
        })
    }

    /// The same without a pass of the policy, where the loss needs none: as decoding said.
    pub(super) fn observe_sampled(
        &mut self,
        layout: &Layout,
        rollouts: &[Rollout],
    ) -> Result<Observed> {
        let old_logps = rollouts.iter().map(|rollout| rollout.sampled_logps.clone());
        let mut observed = Observed {
            old_logps: old_logps.collect(),
            reference_logps: Vec::new(),
            oracle: OracleLogps::default(),
        };
        if self.by_oracle() {
            self.tally.cost.score(2 * layout_tokens(layout));
            let oracle = Some(self.origin.oracle);
            observed.oracle = OracleLogps::of(oracle, self.origin.start, layout, rollouts)?;
        }
        Ok(observed)
    }

    fn by_oracle(&self) -> bool {
        let rule = self.credit.rule();
        rule.needs_signal() && rule.signal == Signal::LogRatio
    }

    /// The mask of each sample, given its sign; `advantages` and `critic` as the trainer has them.
    pub(super) fn keep(
        &mut self,
        samples: &Samples,
        observed: &Observed,
        signs: &[Sign],
        advantages: &[Vec<f32>],
        critic: &[Vec<f32>],
    ) -> Result<Vec<TokenMask>> {
        let inputs = SignalInputs {
            old_logps: &observed.old_logps,
            reference_logps: &observed.reference_logps,
            oracle: &observed.oracle,
            signal_beta: 1.0,
            advantages,
            critic,
            truth: &samples.truth,
        };
        let (rollouts, scores) = (&samples.rollouts, &samples.scores);
        let tokenizer = self.origin.tokenizer;
        let (given, _) = self
            .credit
            .assign(rollouts, scores, signs, inputs, tokenizer)?;
        let keep = masks(rollouts, given.as_deref());
        for (index, mask) in keep.iter().enumerate() {
            let (truth, logps) = (&samples.truth[index], &observed.old_logps[index]);
            self.tally.mask(mask, truth, signs[index], logps);
        }
        if self.credit.rule().selection == Selection::Agree {
            for (index, truth) in samples.truth.iter().enumerate() {
                match self.arm.rule {
                    TokenRule::Advantage => self.tally.signal(&advantages[index], truth),
                    TokenRule::Critic => self.tally.signal(&critic[index], truth),
                    _ => {
                        let OracleLogps { oracle, reference } = &observed.oracle;
                        let ratio = log_ratio(1.0, &oracle[index], &reference[index])?;
                        self.tally.signal(&ratio, truth);
                    }
                }
            }
        }
        Ok(keep)
    }
}

/// Tokens of every pass of a layout.
pub(super) fn layout_tokens(layout: &Layout) -> usize {
    layout.minibatches.iter().map(minibatch_tokens).sum()
}

/// Tokens of every pass of a minibatch.
pub(super) fn minibatch_tokens(minibatch: &Minibatch) -> usize {
    let micro_batches = minibatch.micro_batches.iter();
    micro_batches.map(|micro| micro.pack.len()).sum()
}

#[cfg(test)]
mod tests {
    use pivotal_credit::CreditConfig;

    use super::*;
    use crate::start_policy;
    use crate::world::tokenizer;

    const SCALE: RolloutScale = RolloutScale {
        steps: 2,
        prompts: 2,
        samples: 4,
    };

    /// The policy's bytes after an arm, or after it under another credit rule; at learning rates at which every step counts.
    fn trained(arm: TrainerArm, credit: Option<CreditConfig>) -> Vec<u8> {
        let start = start_policy::embedded().unwrap();
        let tokenizer = tokenizer().unwrap();
        let origin = Origin {
            seed: 3,
            start: &start,
            oracle: &start,
            tokenizer: &tokenizer,
            scale: SCALE,
        };
        let mut run = Run::new(origin, arm, 1e-3).unwrap();
        if let Some(credit) = credit {
            run.credit = RolloutCredit::new(&credit, 3, "").unwrap();
        }
        match arm.trainer {
            Trainer::Reject => reject::train(&mut run).unwrap(),
            Trainer::Ppo => ppo::train(&mut run, 0.1).unwrap(),
            _ => grpo::train(&mut run, 0.1).unwrap(),
        }
        start_policy::to_bytes(&run.policy.detached()).unwrap()
    }

    #[test]
    fn credit_that_keeps_all_is_the_trainer_on_every_token_bit_for_bit() {
        // Masks are drawn, and every token is: the way of a mask, to the masks of no credit.
        let everything = CreditConfig {
            selection: Selection::Random,
            random_fraction: Some(1.0),
            ..CreditConfig::default()
        };
        for trainer in [Trainer::Reject, Trainer::Grpo, Trainer::Ppo] {
            let arm = |rule| TrainerArm { trainer, rule };
            let every_token = trained(arm(TokenRule::All), None);
            let kept = trained(arm(TokenRule::LogRatio), Some(everything.clone()));
            assert!(kept == every_token, "{trainer:?}");
            // The masks of the truth are others, and change what is learnt.
            let truth = trained(arm(TokenRule::Truth), None);
            assert!(truth != every_token, "{trainer:?}");
            assert!(every_token != start_policy::EMBEDDED, "{trainer:?}");
        }
    }
}
