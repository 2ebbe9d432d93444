//! The suite `reward`: the recipe's steps on pairs, a value at every token.

use pivotal_model::RewardModel;
use pivotal_train::optimizer::NamedAdamW;
use pivotal_train::reward::optimize;
use pivotal_train::settings::RewardSettings;

use crate::bench::Bench;
use crate::bench::flops::{Head, Pass, Work, flops};
use crate::bench::outcome::Outcome;
use crate::bench::training::{Steps, optimizer_settings, timed};
use crate::failure::Failure;

pub(crate) fn run(bench: &Bench) -> Result<Vec<Outcome>, Failure> {
    let (pairs, rank) = (&bench.subject.pairs, bench.settings.lora_rank);
    let steps = Steps::new(bench, bench.settings.steps)?;
    let settings = optimizer_settings(&bench.settings);
    let reward = RewardSettings::default();
    let policy = bench.subject.policy(rank)?;
    let mut model = RewardModel::new(policy, reward.head_init.into(), 1)?;
    let mut optimizer = NamedAdamW::new(&settings);
    let repetitions = timed(&steps, bench.settings.repeat, |batches, first| {
        optimize(
            &mut model,
            pairs,
            &reward,
            &settings,
            &mut optimizer,
            batches.iter().cloned(),
            first..first + batches.len() as u64,
            &mut |_, _, _, _| Ok(()),
        )?;
        Ok(None)
    })?;

    let mut work = Work::default();
    for index in steps.indices() {
        let pair = &pairs[index];
        let sides = [&pair.chosen, &pair.rejected].map(|ids| (ids.len(), ids.len()));
        work.add(pair.prompt.len(), &sides);
        work.unread += pair.prompt.len() as u64;
    }
    let config = bench.subject.base.config();
    let needed = flops(config, rank, work, Head::Value, Pass::Training);
    let mut settings = bench.training_settings();
    settings.remove("keep");
    let outcome = Outcome {
        pairs: Some(steps.pairs()),
        tokens: work.tokens as usize,
        settings,
        ..bench.outcome("reward", "mean value".to_owned())
    };
    Ok(vec![outcome.counted(needed).timed(&repetitions)])
}
