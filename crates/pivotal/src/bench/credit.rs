//! The suite `credit`: from a signal to the mask on one core, at every length, with few pivots and with many; and what that
//! is of a training step.

use std::hint::black_box;
use std::time::Instant;

use pivotal_core::{Sign, random_stream};
use pivotal_credit::{
    Between, Credit, CreditConfig, CutRule, Neutral, Response, SchmittTrigger, Score, jump_mask,
    schmitt_mask,
};
use pivotal_train::signals::{PairSignals, assign};
use rand::RngExt;
use serde_json::json;

use crate::bench::outcome::{Outcome, Repetition};
use crate::bench::{Bench, dpo};
use crate::failure::Failure;

const TOKENS: [usize; 5] = [64, 1_024, 16_384, 131_072, 1_048_576];
/// Mean tokens between two pivots: a handful in a long response, and one at every second token.
const DISTANCES: [(usize, &str); 2] = [(500, "few"), (2, "many")];
/// The signal is ±`LEVEL` with a tenth of noise to either side, so that it turns at its pivots and nowhere else.
const LEVEL: f32 = 0.7;
const OFFSET: f32 = 0.3;
const JUMP: f32 = 1.0;
/// Tokens in a sample: enough for a clock of microseconds.
const SAMPLE_TOKENS: usize = 1 << 20;
const SAMPLES: usize = 5;
/// Steps whose time credit is a share of, where `--steps` does not say.
const STEPS: usize = 3;

/// A way from a signal to a mask.
#[derive(Clone, Copy)]
enum Way {
    Schmitt(Between),
    Jump,
    /// Segments, scores and signs of each as a recipe records them.
    Recorded(CutRule),
}

const WAYS: [(&str, Way); 5] = [
    ("schmitt", Way::Schmitt(Between::Hold)),
    ("schmitt, dead zone", Way::Schmitt(Between::Neutral)),
    ("jump", Way::Jump),
    ("schmitt, recorded", Way::Recorded(CutRule::Schmitt)),
    ("jump, recorded", Way::Recorded(CutRule::Jump)),
];

pub(crate) fn run(bench: &Bench) -> Result<Vec<Outcome>, Failure> {
    let mut outcomes = Vec::new();
    for (name, way) in WAYS {
        for (distance, pivots) in DISTANCES {
            for tokens in TOKENS {
                let variant = format!("{name}, {pivots} pivots, {tokens} tokens");
                outcomes.push(speed(bench, way, tokens, distance, variant)?);
            }
        }
    }
    outcomes.extend(shares(bench)?);
    Ok(outcomes)
}

fn speed(
    bench: &Bench,
    way: Way,
    tokens: usize,
    distance: usize,
    variant: String,
) -> Result<Outcome, Failure> {
    let (signal, pivots) = signal(tokens, distance);
    let mut masker = Masker::new(way)?;
    let mut keep = vec![false; tokens];
    let rounds = (SAMPLE_TOKENS / tokens).max(1);
    let mut repetitions = Vec::with_capacity(SAMPLES);
    for sample in 0..=SAMPLES {
        let begin = Instant::now();
        for _ in 0..rounds {
            masker.mask(black_box(&signal), Sign::Positive, &mut keep)?;
            black_box(&keep);
        }
        let seconds = begin.elapsed().as_secs_f64() / rounds as f64;
        // The first is for warmth.
        if sample > 0 {
            repetitions.push(repetition(seconds));
        }
    }
    let outcome = Outcome {
        data: format!("a signal with {pivots} pivots"),
        threads: 1,
        tokens,
        settings: [("pivots", json!(pivots))].into(),
        ..bench.outcome("credit", variant)
    };
    Ok(outcome.timed(&repetitions))
}

/// The masks of the responses that a few steps of DPO take, over the time of those steps.
fn shares(bench: &Bench) -> Result<Vec<Outcome>, Failure> {
    let count = match bench.settings.steps {
        0 => STEPS,
        steps => steps,
    };
    let (steps, training) = dpo::measure(bench, count)?;
    // Against the steps alone: the reference's pass makes the share smaller.
    let step_seconds = training.seconds - training.reference_seconds.unwrap_or_default();
    let pairs: Vec<_> = steps
        .indices()
        .map(|index| bench.subject.pairs[index].clone())
        .collect();
    let known: Vec<PairSignals> = pairs
        .iter()
        .map(|pair| PairSignals {
            signal: [&pair.chosen, &pair.rejected].map(|ids| Some(signal(ids.len(), 10).0)),
            ..PairSignals::default()
        })
        .collect();
    let tokens = pairs
        .iter()
        .map(|pair| pair.chosen.len() + pair.rejected.len());
    let tokens: usize = tokens.sum();
    let mut outcomes = Vec::new();
    for (name, way) in WAYS {
        let mut masker = Masker::new(way)?;
        let mut repetitions = Vec::with_capacity(SAMPLES);
        let longest = pairs
            .iter()
            .map(|pair| pair.chosen.len().max(pair.rejected.len()));
        let mut keep = vec![false; longest.max().unwrap_or(0)];
        for sample in 0..=SAMPLES {
            let begin = Instant::now();
            for pair in &known {
                for (signal, sign) in pair.signal.iter().zip([Sign::Positive, Sign::Negative]) {
                    let signal = signal.as_deref().unwrap_or_default();
                    masker.mask(black_box(signal), sign, &mut keep[..signal.len()])?;
                    black_box(&keep);
                }
            }
            if sample > 0 {
                repetitions.push(repetition(begin.elapsed().as_secs_f64()));
            }
        }
        outcomes.push(share(
            bench,
            &format!("of a step: {name}"),
            tokens,
            step_seconds,
            &repetitions,
        ));
    }
    let config = CreditConfig {
        offset: Some(OFFSET),
        ..CreditConfig::default()
    };
    let mut repetitions = Vec::with_capacity(SAMPLES);
    for sample in 0..=SAMPLES {
        let begin = Instant::now();
        black_box(assign(&pairs, &known, None, &config, 1)?.keep.len());
        if sample > 0 {
            repetitions.push(repetition(begin.elapsed().as_secs_f64()));
        }
    }
    let name = "of a step: the recipe's, with diagnostics";
    outcomes.push(share(bench, name, tokens, step_seconds, &repetitions));
    Ok(outcomes)
}

fn share(
    bench: &Bench,
    variant: &str,
    tokens: usize,
    step_seconds: f64,
    repetitions: &[Repetition],
) -> Outcome {
    let outcome = Outcome {
        threads: 1,
        tokens,
        settings: bench.training_settings(),
        ..bench.outcome("credit", variant.to_owned())
    };
    let mut outcome = outcome.timed(repetitions);
    let percent = 100.0 * outcome.seconds / step_seconds;
    outcome.figures.insert("percent_of_step", percent);
    outcome
}

fn repetition(seconds: f64) -> Repetition {
    Repetition {
        seconds,
        reference_seconds: None,
        parts: Vec::new(),
    }
}

/// A way, ready for one response after another.
enum Masker {
    Schmitt(SchmittTrigger),
    Jump,
    Recorded(Box<Credit>),
}

impl Masker {
    fn new(way: Way) -> Result<Self, Failure> {
        Ok(match way {
            Way::Schmitt(between) => Self::Schmitt(SchmittTrigger::new(0.0, OFFSET, between)),
            Way::Jump => Self::Jump,
            Way::Recorded(cut) => {
                let config = CreditConfig {
                    cut,
                    offset: Some(OFFSET),
                    jump: (cut == CutRule::Jump).then_some(JUMP),
                    ..CreditConfig::default()
                };
                Self::Recorded(Box::new(Credit::new(config.resolve()?, 1)))
            }
        })
    }

    fn mask(&mut self, signal: &[f32], sign: Sign, keep: &mut [bool]) -> Result<(), Failure> {
        match self {
            Self::Schmitt(trigger) => schmitt_mask(signal, *trigger, sign, Neutral::Drop, keep),
            Self::Jump => {
                let around = (0.0, OFFSET);
                jump_mask(signal, JUMP, around, Score::Mean, sign, Neutral::Drop, keep);
            }
            Self::Recorded(credit) => {
                let given = credit.assign(&[Response::new(1, 0, signal, sign)])?;
                keep.copy_from_slice(given[0].keep.as_slice());
            }
        }
        Ok(())
    }
}

/// A signal that turns every `distance` tokens in the mean, at random, and how often it does.
fn signal(tokens: usize, distance: usize) -> (Vec<f32>, usize) {
    let mut stream = random_stream(tokens as u64, "bench signal");
    let (mut level, mut pivots) = (LEVEL, 0);
    let values = (0..tokens).map(|token| {
        if token > 0 && stream.random_range(0..distance) == 0 {
            level = -level;
            pivots += 1;
        }
        level + stream.random_range(-0.1..0.1)
    });
    (values.collect(), pivots)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_way_makes_the_same_mask_of_a_signal_that_turns_at_its_pivots_alone() {
        for (distance, _) in DISTANCES {
            let (signal, pivots) = signal(5_000, distance);
            let turns = signal.windows(2).filter(|pair| pair[0] * pair[1] < 0.0);
            assert_eq!(turns.count(), pivots);
            assert!(pivots > 0);
            for sign in [Sign::Positive, Sign::Negative] {
                let expected: Vec<bool> = signal
                    .iter()
                    .map(|&value| (value > 0.0) == (sign == Sign::Positive))
                    .collect();
                for (name, way) in WAYS {
                    let mut keep = vec![false; signal.len()];
                    let mut masker = Masker::new(way).unwrap();
                    masker.mask(&signal, sign, &mut keep).unwrap();
                    assert!(keep == expected, "{name}");
                }
            }
        }
    }
}
