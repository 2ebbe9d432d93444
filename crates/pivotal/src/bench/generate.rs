//! The suite `generate`: samples as rollouts need them, one a prompt and several on shared prompts.

use std::time::Instant;

use pivotal_model::{GenerateSettings, Generator, Sampling};
use serde_json::json;

use crate::bench::flops::{Flops, Head, Pass, Work, flops};
use crate::bench::outcome::{Outcome, Repetition, median};
use crate::bench::{Bench, Settings};
use crate::failure::Failure;

const NEW_TOKENS: usize = 64;
/// Prompts and samples of each.
const SHAPES: [(usize, usize); 2] = [(16, 1), (8, 8)];

pub(crate) fn run(bench: &Bench) -> Result<Vec<Outcome>, Failure> {
    let precision = bench.settings.precision.into();
    let generator = Generator::new(&bench.subject.base, precision);
    SHAPES
        .iter()
        .map(|&(prompts, samples)| measure(bench, &generator, prompts, samples))
        .collect()
}

fn measure(
    bench: &Bench,
    generator: &Generator,
    prompts: usize,
    samples: usize,
) -> Result<Outcome, Failure> {
    let Settings { repeat, .. } = bench.settings;
    let config = generator.config();
    let room = config.max_positions.saturating_sub(NEW_TOKENS).max(1);
    let pairs = bench.subject.pairs.iter().cycle().take(prompts);
    let ids: Vec<&[u32]> = pairs
        .map(|pair| &pair.prompt[pair.prompt.len().saturating_sub(room)..])
        .collect();
    let settings = GenerateSettings {
        sampling: Sampling {
            temperature: 1.0,
            top_k: None,
            top_p: 1.0,
            min_p: 0.0,
        },
        samples,
        max_tokens: NEW_TOKENS,
        eos: Vec::new(),
        batch: prompts * samples,
        seed: 1,
    };
    let (mut repetitions, mut prefills, mut tokens) = (Vec::new(), Vec::new(), 0);
    for index in 0..=repeat {
        let begin = Instant::now();
        drop(generator.prefill(&ids)?);
        let prefill = begin.elapsed().as_secs_f64();
        let begin = Instant::now();
        let generated = generator.generate(&ids, &settings)?;
        let seconds = begin.elapsed().as_secs_f64();
        tokens = generated.iter().map(|one| one.token_ids.len()).sum();
        // The first is for warmth.
        if index > 0 {
            prefills.push(prefill);
            repetitions.push(Repetition {
                seconds,
                reference_seconds: None,
                parts: Vec::new(),
            });
        }
    }
    let outcome = bench.outcome("generate", format!("{prompts} prompts x {samples}"));
    let mut outcome = Outcome {
        tokens,
        settings: [
            ("prompts", json!(prompts)),
            ("samples", json!(samples)),
            ("new_tokens", json!(NEW_TOKENS)),
            ("temperature", json!(1.0)),
        ]
        .into(),
        ..outcome
    }
    .counted(needed(config, &ids, samples))
    .timed(&repetitions);
    let prefill = median(&prefills).unwrap_or_default();
    let decoded = tokens as f64 / (outcome.seconds - prefill);
    outcome.figures.insert("prefill_seconds", prefill);
    outcome
        .figures
        .insert("decoding_tokens_per_second", decoded);
    let read: usize = ids.iter().map(|ids| ids.len()).sum();
    outcome.figures.insert("prompt_tokens", read as f64);
    Ok(outcome)
}

/// A prompt's last position and every new token but the last are projected on the vocabulary; the last token is never read.
fn needed(config: &pivotal_model::DecoderConfig, ids: &[&[u32]], samples: usize) -> Flops {
    let mut work = Work::default();
    for prompt in ids {
        let response = NEW_TOKENS - 1;
        work.add(prompt.len(), &vec![(response, response); samples]);
        work.kept += 1;
        work.unread += prompt.len() as u64 - 1;
    }
    flops(config, 0, work, Head::Vocabulary, Pass::Forward)
}
