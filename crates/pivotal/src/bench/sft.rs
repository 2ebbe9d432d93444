//! The suite `sft`: the recipe's steps on the chosen responses.

use pivotal_core::TokenizedResponse;
use pivotal_train::optimizer::NamedAdamW;
use pivotal_train::sft::optimize;

use crate::bench::Bench;
use crate::bench::flops::{Head, Pass, Work, flops};
use crate::bench::outcome::Outcome;
use crate::bench::subject::mask;
use crate::bench::training::{Steps, optimizer_settings, timed};
use crate::failure::Failure;

pub(crate) fn run(bench: &Bench) -> Result<Vec<Outcome>, Failure> {
    let (keep, rank) = (bench.settings.keep, bench.settings.lora_rank);
    let pairs = bench.subject.pairs.iter().enumerate();
    let items: Vec<TokenizedResponse> = pairs
        .map(|(index, pair)| TokenizedResponse {
            id: pair.id,
            prompt: pair.prompt.clone(),
            response: pair.chosen.clone(),
            response_mask: mask(keep, pair.chosen.len(), index, 0),
        })
        .collect();
    let steps = Steps::new(bench, bench.settings.steps)?;
    let settings = optimizer_settings(&bench.settings);
    let mut policy = bench.subject.policy(rank)?;
    let mut optimizer = NamedAdamW::new(&settings);
    let repetitions = timed(&steps, bench.settings.repeat, |batches, first| {
        let taken = |batch: &Vec<usize>| batch.iter().map(|&i| items[i].clone()).collect();
        optimize(
            &mut policy,
            &settings,
            &mut optimizer,
            batches.iter().map(taken),
            first..first + batches.len() as u64,
            &mut |_, _, _, _| Ok(()),
        )?;
        Ok(None)
    })?;

    let tokens = steps.indices().map(|index| {
        let item = &items[index];
        item.prompt.len() + item.response.len()
    });
    let mut work = Work::default();
    for index in steps.indices() {
        let item = &items[index];
        work.add_kept(item.prompt.len(), &[&item.response_mask]);
    }
    let config = bench.subject.base.config();
    let needed = flops(config, rank, work, Head::Vocabulary, Pass::Training);
    let outcome = bench.outcome("sft", format!("keep {keep}"));
    let outcome = Outcome {
        pairs: Some(steps.pairs()),
        tokens: tokens.sum(),
        settings: bench.training_settings(),
        ..outcome
    };
    Ok(vec![outcome.counted(needed).timed(&repetitions)])
}
