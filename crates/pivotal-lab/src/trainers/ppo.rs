//! PPO in the world: the recipe's loop without its files.

use pivotal_credit::{CreditConfig, Ending, Selection};
use pivotal_model::{Finish, HeadInit, RewardModel};
use pivotal_train::optimizer::NamedAdamW;
use pivotal_train::ppo::{
    Measured, PpoSettings, Shaper, UpdateInputs, UpdateRule, UpdateSums, policy_gradients,
    rollout_values, value_gradients,
};
use pivotal_train::score::ResponseValues;

use super::run::{Observed, Run, layout_tokens, minibatch_tokens};
use super::samples::Samples;
use crate::error::Result;

/// Peak learning rate of the value model, whose head begins at zero; the same for every arm.
pub(crate) const VALUE_LR: f64 = 1e-3;

/// Trains the run's policy, and a value model that starts from the same decoder, paying `kl_coef` a nat.
pub(super) fn train(run: &mut Run<'_>, kl_coef: f64) -> Result<()> {
    let settings = PpoSettings {
        kl_coef,
        value_lr: VALUE_LR,
        ..PpoSettings::default()
    };
    // The score is paid at the end, so that the shaper looks at no segments: any rule will do.
    let no_spread = CreditConfig {
        selection: Selection::All,
        ..CreditConfig::default()
    };
    let mut shaper = Shaper::new(&settings, &no_spread.resolve()?, false, run.seed(), None)?;
    let mut value = RewardModel::new(run.policy_now(), HeadInit::Zero, run.seed())?;
    let mut value_optimizer = NamedAdamW::new(&run.optimizer_settings);
    for step in 1..=run.steps {
        let samples = run.sample(step)?;
        let first = run.layout(&samples, settings.minibatches, step, 0)?;
        let observed = run.observe(&first, &samples.rollouts, true)?;
        let values = rollout_values(&first, &value, &samples.rollouts)?;
        run.tally.cost.score(layout_tokens(&first));
        let measured = measured(&samples, &observed, values);
        let (experience, _) = shaper.shape(&measured, step)?;
        let (signs, advantages) = (&experience.signs, &experience.advantages);
        let critic = &experience.old_values;
        let keep = run.keep(&samples, &observed, signs, advantages, critic)?;
        let inputs = UpdateInputs {
            rollouts: &samples.rollouts,
            old_logps: &observed.old_logps,
            experience: &experience,
            keep: &keep,
        };
        let rule = UpdateRule {
            settings: &settings,
            temperature: 1.0,
            activations: run.optimizer_settings.activations,
            step,
        };
        let factor = run.factor(step);
        let lr = run.optimizer_settings.lr * factor;
        let value_lr = settings.value_lr * factor;
        let mut sums = UpdateSums::default();
        for epoch in 0..settings.update_epochs {
            let later;
            let layout = match epoch {
                0 => &first,
                _ => {
                    later = run.layout(&samples, settings.minibatches, step, epoch)?;
                    &later
                }
            };
            for minibatch in &layout.minibatches {
                let policy = &mut run.policy;
                let of_policy = policy_gradients(policy, minibatch, inputs, rule, &mut sums)?;
                let of_value = value_gradients(&mut value, minibatch, inputs, rule, &mut sums)?;
                run.tally.cost.train(2 * minibatch_tokens(minibatch));
                run.optimizer.step(&mut run.policy, of_policy, lr, step)?;
                value_optimizer.step(&mut value, of_value, value_lr, step)?;
            }
        }
    }
    Ok(())
}

fn measured(samples: &Samples, observed: &Observed, values: Vec<ResponseValues>) -> Vec<Measured> {
    let rollouts = samples.rollouts.iter().zip(values).enumerate();
    rollouts
        .map(|(index, (rollout, values))| Measured {
            id: rollout.id,
            sample: rollout.sample as u32,
            score: samples.scores[index].parts,
            penalty: samples.scores[index].penalty,
            ending: match rollout.finish {
                Finish::Length => Ending::Truncated,
                Finish::Eos | Finish::Stop => Ending::Eos,
            },
            old_logps: observed.old_logps[index].clone(),
            reference_logps: observed.reference_logps[index].clone(),
            values,
            levels: None,
            texts: Vec::new(),
        })
        .collect()
}
