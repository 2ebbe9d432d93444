//! Rejection sampling in the world: the recipe's loop without its files.

use pivotal_core::Sign;
use pivotal_train::reject::{
    AcceptRule, AcceptedResponse, Candidate, Dedupe, choose_accepted, gradients,
};

use super::run::{Run, layout_tokens};
use super::samples::Samples;
use crate::error::Result;

/// Every sample that the judge calls right. The same response is taken as often as it was sampled: of a prompt's right ones
/// there is only one, and each wrong one that the judge lets pass is another.
const ACCEPTED: AcceptRule = AcceptRule {
    best: usize::MAX,
    min_score: Some(0.5),
    dedupe: Dedupe::None,
};

/// Trains the run's policy on the samples that the judge accepts, one update a step.
pub(super) fn train(run: &mut Run<'_>) -> Result<()> {
    for step in 1..=run.steps {
        let samples = run.sample(step)?;
        let accepted = accepted(samples);
        if accepted.rollouts.is_empty() {
            continue;
        }
        let layout = run.layout(&accepted, 1, step, 0)?;
        let observed = run.observe_sampled(&layout, &accepted.rollouts)?;
        let signs = vec![Sign::Positive; accepted.rollouts.len()];
        let keep = run.keep(&accepted, &observed, &signs, &[], &[])?;
        let prompts = &accepted.step_prompts.prompts;
        let responses = accepted.rollouts.iter().zip(keep);
        let responses: Vec<AcceptedResponse> = responses
            .map(|(rollout, keep)| AcceptedResponse {
                id: rollout.id,
                prompt: prompts[rollout.prompt].token_ids.clone(),
                response: rollout.token_ids.clone(),
                keep,
            })
            .collect();
        let responses: Vec<&AcceptedResponse> = responses.iter().collect();
        let (sum, metrics) = gradients(&mut run.policy, &responses, &run.optimizer_settings, step)?;
        run.tally.cost.train(layout_tokens(&layout));
        if metrics.kept_tokens > 0 {
            let lr = run.optimizer_settings.lr * run.factor(step);
            run.optimizer.step(&mut run.policy, sum, lr, step)?;
        }
    }
    Ok(())
}

fn accepted(samples: Samples) -> Samples {
    let candidates: Vec<Candidate<'_>> = samples
        .rollouts
        .iter()
        .zip(&samples.scores)
        .map(|(rollout, score)| Candidate {
            prompt: rollout.id,
            score: score.total,
            token_ids: &rollout.token_ids,
            text: &rollout.text,
        })
        .collect();
    let verdicts = choose_accepted(&candidates, ACCEPTED);
    let wanted: Vec<bool> = verdicts
        .iter()
        .map(|verdict| verdict.is_accepted())
        .collect();
    samples.only(&wanted)
}
