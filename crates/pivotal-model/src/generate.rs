//! Sampling responses to prompts: many at once, in any order, always the same ones.

use std::sync::Arc;

use pivotal_core::{RandomStream, random_stream};
use rayon::prelude::*;

use crate::decode::{Generator, PromptCache, Scratch, Sequence};
use crate::error::{Error, Result};
use crate::sampling::Sampling;

/// What to sample, and when to stop.
#[derive(Clone, Debug, PartialEq)]
pub struct GenerateSettings {
    /// How a token is drawn.
    pub sampling: Sampling,
    /// Responses to each prompt.
    pub samples: usize,
    /// The longest response, in tokens, the ending one included.
    pub max_tokens: usize,
    /// Each of these ends a response and is its last token; usually the model's own
    /// ([`SpecialIds::eos`](crate::SpecialIds)).
    pub stop: Vec<u32>,
    /// Responses decoded together: more are faster, and each takes memory for its keys and values. Changes no result.
    pub batch: usize,
    /// Seed; every response of every prompt has its own stream of random numbers.
    pub seed: u64,
}

/// A sampled response.
#[derive(Clone, Debug, PartialEq)]
pub struct Generation {
    /// Index of its prompt.
    pub prompt: usize,
    /// Which of that prompt's samples it is.
    pub sample: usize,
    /// The tokens, with the one that ended it.
    pub token_ids: Vec<u32>,
    /// Log-probability of each under the model itself (temperature 1, every token), in nats.
    pub token_logps: Vec<f32>,
    /// Log-probability of each under the distribution it was drawn from, in nats; 0 for greedy choices.
    pub sampling_logps: Vec<f32>,
    /// Why it ends.
    pub finish: Finish,
}

/// Why a response ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finish {
    /// A token that ends it.
    Stop,
    /// The longest response allowed, or the model's last position.
    Length,
}

/// A response on its way.
struct Active {
    generation: Generation,
    stream: RandomStream,
    /// The most tokens it may have.
    limit: usize,
}

impl Generator {
    /// Samples `settings.samples` responses to each prompt, in order of prompt and sample.
    ///
    /// A response depends on the model, the settings' sampling, limits and seed, its prompt and its two indices: not on
    /// the batch size, the other prompts or the number of threads.
    ///
    /// # Errors
    /// Of the sampling and the prompts before anything is computed: [`Error::Domain`], [`Error::TokenOutOfRange`],
    /// [`Error::SequenceTooLong`] for a prompt that leaves no room for a response; then [`Error::NotFinite`], naming
    /// prompt, sample and token.
    pub fn generate(
        &self,
        prompts: &[impl AsRef<[u32]>],
        settings: &GenerateSettings,
    ) -> Result<Vec<Generation>> {
        settings.check()?;
        let prompts: Vec<&[u32]> = prompts.iter().map(AsRef::as_ref).collect();
        for prompt in &prompts {
            self.config().check_tokens(prompt)?;
            self.config().check_length(prompt.len() + 1)?;
        }
        let total = prompts.len() * settings.samples;
        let (mut next, mut last_prompt) = (0, None);
        let (mut active, mut sequences) = (Vec::<Active>::new(), Vec::<Sequence>::new());
        let (mut done, mut scratch) = (Vec::with_capacity(total), Scratch::default());
        while next < total || !active.is_empty() {
            let end = total.min(next + settings.batch - active.len());
            let started = self.start(&prompts, next..end, settings, &mut last_prompt)?;
            next = end;
            for (mut response, cache) in started {
                if response.extend(cache.logits(), settings)? {
                    done.push(response.generation);
                } else {
                    active.push(response);
                    sequences.push(Sequence::new(cache));
                }
            }
            if active.is_empty() {
                continue;
            }
            let token_ids: Vec<u32> = active.iter().map(Active::last_token).collect();
            self.step_in(&mut sequences, &token_ids, &mut scratch)?;
            let vocab = self.config().vocab_size;
            let rows = active.par_iter_mut().zip(scratch.logits.par_chunks(vocab));
            let ended = rows
                .map(|(response, logits)| response.extend(logits, settings))
                .collect::<Vec<_>>()
                .into_iter()
                .collect::<Result<Vec<bool>>>()?;
            // Backwards, so that the indices hold; in order, so that samples of one prompt stay neighbours.
            for (index, ended) in ended.into_iter().enumerate().rev() {
                if ended {
                    done.push(active.remove(index).generation);
                    sequences.remove(index);
                }
            }
        }
        done.sort_unstable_by_key(|generation| (generation.prompt, generation.sample));
        Ok(done)
    }

    fn longest_sequence(&self) -> usize {
        let config = self.config();
        config
            .sliding_window
            .map_or(config.max_positions, |window| {
                window.min(config.max_positions)
            })
    }

    /// Reads the prompts that the next responses need and that the last ones did not leave behind.
    fn start(
        &self,
        prompts: &[&[u32]],
        responses: std::ops::Range<usize>,
        settings: &GenerateSettings,
        last_prompt: &mut Option<Arc<PromptCache>>,
    ) -> Result<Vec<(Active, Arc<PromptCache>)>> {
        let samples = settings.samples;
        let fresh: Vec<&[u32]> = responses
            .clone()
            .filter(|index| index.is_multiple_of(samples))
            .map(|index| prompts[index / samples])
            .collect();
        let mut fresh = self.prefill(&fresh)?.into_iter().map(Arc::new);
        let mut started = Vec::with_capacity(responses.len());
        for index in responses {
            let (prompt, sample) = (index / samples, index % samples);
            if sample == 0 {
                *last_prompt = fresh.next();
            }
            let cache = last_prompt
                .clone()
                .expect("a prompt is read before its first sample");
            let room = self.longest_sequence() - cache.tokens();
            let response = Active {
                generation: Generation {
                    prompt,
                    sample,
                    token_ids: Vec::new(),
                    token_logps: Vec::new(),
                    sampling_logps: Vec::new(),
                    finish: Finish::Length,
                },
                stream: random_stream(settings.seed, &format!("sample {prompt} {sample}")),
                limit: settings.max_tokens.min(room),
            };
            started.push((response, cache));
        }
        Ok(started)
    }
}

impl GenerateSettings {
    fn check(&self) -> Result<()> {
        self.sampling.check()?;
        let counts = [
            ("samples", self.samples),
            ("max_tokens", self.max_tokens),
            ("batch", self.batch),
        ];
        match counts.into_iter().find(|&(_, count)| count == 0) {
            None => Ok(()),
            Some((what, _)) => Err(Error::Domain {
                what,
                expected: "at least 1",
                found: 0.0,
            }),
        }
    }
}

impl Active {
    /// Draws the next token; true if it was the last.
    fn extend(&mut self, logits: &[f32], settings: &GenerateSettings) -> Result<bool> {
        let generation = &mut self.generation;
        let drawn =
            settings
                .sampling
                .draw(logits, &mut self.stream)
                .map_err(|error| match error {
                    Error::NotFinite { .. } => Error::NotFinite {
                        what: format!(
                            "logits of token {} of sample {} of prompt {}",
                            generation.token_ids.len(),
                            generation.sample,
                            generation.prompt
                        ),
                    },
                    other => other,
                })?;
        generation.token_ids.push(drawn.token_id);
        generation.token_logps.push(drawn.token_logp);
        generation.sampling_logps.push(drawn.sampling_logp);
        if settings.stop.contains(&drawn.token_id) {
            generation.finish = Finish::Stop;
            return Ok(true);
        }
        Ok(generation.token_ids.len() == self.limit)
    }

    fn last_token(&self) -> u32 {
        *self
            .generation
            .token_ids
            .last()
            .expect("a response gets its first token when it is started")
    }
}
