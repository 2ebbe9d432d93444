//! GRPO in the world: the recipe's loop without its files.

use pivotal_credit::{Variance, group_advantages, sequence_signs};
use pivotal_train::grpo::{GrpoBatch, GrpoObjective, GrpoSettings, gradients};

use super::run::{Run, minibatch_tokens};
use crate::error::Result;

/// Trains the run's policy with `kl_coef` of the KL loss, all else as the recipe's defaults.
pub(super) fn train(run: &mut Run<'_>, kl_coef: f64) -> Result<()> {
    let settings = GrpoSettings {
        kl_coef,
        ..GrpoSettings::default()
    };
    for step in 1..=run.steps {
        let samples = run.sample(step)?;
        let (ids, totals) = (samples.ids(), samples.totals());
        let estimator = settings.estimator.into();
        let epsilon = settings.std_epsilon;
        let found = group_advantages(&ids, &totals, estimator, Variance::Bessel, epsilon)?;
        let signs = sequence_signs(&ids, &totals, settings.sign_baseline.into())?;
        let layout = run.layout(&samples, settings.minibatches, step, 0)?;
        let observed = run.observe(&layout, &samples.rollouts, kl_coef > 0.0)?;
        let keep = run.keep(&samples, &observed, &signs, &[], &[])?;
        let batch = GrpoBatch {
            rollouts: &samples.rollouts,
            advantages: &found.advantages,
            keep: &keep,
            old_logps: &observed.old_logps,
            reference_logps: &observed.reference_logps,
        };
        let objective = GrpoObjective {
            settings: &settings,
            temperature: 1.0,
            max_response_tokens: run.max_response_tokens(),
        };
        let lr = run.optimizer_settings.lr * run.factor(step);
        for minibatch in &layout.minibatches {
            let optimizer_settings = &run.optimizer_settings;
            let policy = &mut run.policy;
            let found = gradients(
                policy,
                minibatch,
                batch,
                objective,
                optimizer_settings,
                step,
            )?;
            run.tally.cost.train(minibatch_tokens(minibatch));
            if found.sums.tokens > 0 || kl_coef > 0.0 {
                run.optimizer
                    .step(&mut run.policy, found.gradients, lr, step)?;
            }
        }
    }
    Ok(())
}
