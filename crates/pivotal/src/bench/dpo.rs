//! The suite `dpo`: the reference's pass over the pairs, then the recipe's steps.

use std::time::Instant;

use pivotal_core::TokenMask;
use pivotal_loss::Normalisation;
use pivotal_train::dpo::{DpoItem, DpoObjective, PreferenceLoss, optimize};
use pivotal_train::optimizer::NamedAdamW;
use pivotal_train::score::{Group, token_logps};

use crate::bench::flops::{Flops, Head, Pass, Work, flops};
use crate::bench::outcome::Outcome;
use crate::bench::subject::mask;
use crate::bench::training::{Steps, optimizer_settings, timed};
use crate::bench::{Bench, Settings};
use crate::failure::Failure;

pub(crate) fn run(bench: &Bench) -> Result<Vec<Outcome>, Failure> {
    Ok(vec![measure(bench, bench.settings.steps)?.1])
}

/// So many steps, one pass for 0: which they were, and what came out.
pub(crate) fn measure(bench: &Bench, count: usize) -> Result<(Steps, Outcome), Failure> {
    let Settings {
        keep,
        lora_rank,
        repeat,
        ..
    } = bench.settings;
    let pairs = &bench.subject.pairs;
    let steps = Steps::new(bench, count)?;
    let mut items: Vec<DpoItem> = pairs
        .iter()
        .enumerate()
        .map(|(index, pair)| DpoItem {
            mismatched: None,
            pair: pair.clone(),
            keep: [(0, pair.chosen.len()), (1, pair.rejected.len())]
                .map(|(side, tokens)| TokenMask::from(mask(keep, tokens, index, side))),
            reference_logps: [Vec::new(), Vec::new()],
        })
        .collect();
    let objective = DpoObjective {
        loss: PreferenceLoss::Dpo,
        beta: 0.1,
        normalisation: Normalisation::Sum,
        dropped_every: 0,
        reference: None,
    };
    let settings = optimizer_settings(&bench.settings);
    let mut policy = bench.subject.policy(lora_rank)?;
    let reference = bench.subject.base.detached();
    let mut optimizer = NamedAdamW::new(&settings);
    let repetitions = timed(&steps, repeat, |batches, first| {
        let begin = Instant::now();
        let part = Steps {
            batches: batches.to_vec(),
        };
        let used = part.distinct();
        let groups: Vec<_> = used.iter().map(|&i| Group::of_pair(&pairs[i])).collect();
        let known = token_logps(&reference, &groups, settings.micro_batch_tokens)?;
        for (&index, sides) in used.iter().zip(known) {
            if let Ok(sides) = <[Vec<f32>; 2]>::try_from(sides) {
                items[index].reference_logps = sides;
            }
        }
        let seconds = begin.elapsed().as_secs_f64();
        optimize(
            &mut policy,
            &items,
            objective,
            &settings,
            &mut optimizer,
            batches.iter().cloned(),
            first..first + batches.len() as u64,
            &mut |_, _, _, _| Ok(()),
        )?;
        Ok(Some(seconds))
    })?;

    let tokens = steps.indices().map(|index| packed_tokens(&items[index]));
    let outcome = bench.outcome("dpo", format!("keep {keep}"));
    let outcome = Outcome {
        pairs: Some(steps.pairs()),
        tokens: tokens.sum(),
        settings: bench.training_settings(),
        ..outcome
    };
    let needed = needed(bench, &steps, &items);
    Ok((steps, outcome.counted(needed).timed(&repetitions)))
}

fn packed_tokens(item: &DpoItem) -> usize {
    item.pair.prompt.len() + item.pair.chosen.len() + item.pair.rejected.len()
}

fn needed(bench: &Bench, steps: &Steps, items: &[DpoItem]) -> Flops {
    let (mut training, mut reference) = (Work::default(), Work::default());
    for index in steps.indices() {
        let DpoItem { pair, keep, .. } = &items[index];
        let sides = [&keep[0], &keep[1]].map(TokenMask::as_slice);
        training.add_kept(pair.prompt.len(), &sides);
    }
    for index in steps.distinct() {
        reference.add_scored(&items[index].pair);
    }
    let config = bench.subject.base.config();
    let rank = bench.settings.lora_rank;
    flops(config, rank, training, Head::Vocabulary, Pass::Training)
        + flops(config, 0, reference, Head::Vocabulary, Pass::Forward)
}
