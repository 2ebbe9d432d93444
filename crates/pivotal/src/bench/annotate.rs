//! The suite `annotate`: one model's log-probability of every response token, and the whole way from two models to masks.

use pivotal_core::TokenizedPair;
use pivotal_credit::{CreditConfig, Signal, log_ratio};
use pivotal_model::Decoder;
use pivotal_train::score::{Group, token_logps};
use pivotal_train::settings::AnnotateSettings;
use pivotal_train::signals::{PairSignals, assign};
use serde_json::json;

use crate::bench::Bench;
use crate::bench::flops::{Flops, Head, Pass, Work, flops};
use crate::bench::outcome::Outcome;
use crate::bench::training::{Steps, timed};
use crate::failure::Failure;

pub(crate) fn run(bench: &Bench) -> Result<Vec<Outcome>, Failure> {
    Ok(vec![scoring(bench)?, log_ratios(bench)?])
}

/// As a reference or a frozen model scores a data set.
fn scoring(bench: &Bench) -> Result<Outcome, Failure> {
    let steps = Steps::new(bench, bench.settings.steps)?;
    let model = bench.subject.base.detached();
    let repetitions = timed(&steps, bench.settings.repeat, |batches, _| {
        let pairs = taken(bench, batches);
        score(&model, &pairs).map(|_| None)
    })?;
    let outcome = outcome(bench, &steps, "one model");
    let needed = needed(bench, &steps, 0);
    Ok(outcome.counted(needed).timed(&repetitions))
}

/// The recipe's default signal: an oracle with an adapter against its base, then segments and masks.
fn log_ratios(bench: &Bench) -> Result<Outcome, Failure> {
    let steps = Steps::new(bench, bench.settings.steps)?;
    let reference = bench.subject.base.detached();
    let oracle = bench.subject.policy(bench.settings.lora_rank)?.detached();
    let beta = AnnotateSettings::default().signal_beta as f32;
    let credit = CreditConfig {
        signal: Signal::LogRatio,
        ..CreditConfig::default()
    };
    let repetitions = timed(&steps, bench.settings.repeat, |batches, _| {
        let pairs = taken(bench, batches);
        let (of_reference, of_oracle) = (score(&reference, &pairs)?, score(&oracle, &pairs)?);
        let mut known = Vec::with_capacity(pairs.len());
        for (oracle, reference) in of_oracle.iter().zip(&of_reference) {
            let side = |side: usize| log_ratio(beta, &oracle[side], &reference[side]).map(Some);
            known.push(PairSignals {
                signal: [side(0)?, side(1)?],
                ..PairSignals::default()
            });
        }
        assign(&pairs, &known, None, &credit, 1)?;
        Ok(None)
    })?;
    let outcome = outcome(bench, &steps, "log-ratio to masks");
    let rank = bench.settings.lora_rank;
    let needed = needed(bench, &steps, 0) + needed(bench, &steps, rank);
    let mut outcome = outcome.counted(needed).timed(&repetitions);
    outcome.settings.insert("lora_rank", json!(rank));
    Ok(outcome)
}

fn taken(bench: &Bench, batches: &[Vec<usize>]) -> Vec<TokenizedPair> {
    let indices = batches.iter().flatten();
    indices
        .map(|&index| bench.subject.pairs[index].clone())
        .collect()
}

fn score(model: &Decoder, pairs: &[TokenizedPair]) -> Result<Vec<Vec<Vec<f32>>>, Failure> {
    let groups: Vec<_> = pairs.iter().map(Group::of_pair).collect();
    let budget = AnnotateSettings::default().micro_batch_tokens;
    Ok(token_logps(model, &groups, budget)?)
}

fn work(bench: &Bench, steps: &Steps) -> Work {
    let mut work = Work::default();
    for index in steps.indices() {
        work.add_scored(&bench.subject.pairs[index]);
    }
    work
}

fn needed(bench: &Bench, steps: &Steps, rank: usize) -> Flops {
    let config = bench.subject.base.config();
    let work = work(bench, steps);
    flops(config, rank, work, Head::Vocabulary, Pass::Forward)
}

fn outcome(bench: &Bench, steps: &Steps, variant: &str) -> Outcome {
    Outcome {
        pairs: Some(steps.pairs()),
        tokens: work(bench, steps).tokens as usize,
        settings: [
            ("max_tokens", json!(bench.settings.max_tokens)),
            ("steps", json!(bench.settings.steps)),
        ]
        .into(),
        ..bench.outcome("annotate", variant.to_owned())
    }
}
