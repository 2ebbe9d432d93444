//! Sampling responses to prompts: many at once, in any order, always the same ones.

use std::sync::Arc;
use std::time::{Duration, Instant};

use pivotal_core::{RandomStream, random_stream};
use rayon::prelude::*;

use crate::decode::{Generator, PromptCache, Sequence, StepScratch};
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
    pub eos: Vec<u32>,
    /// Responses decoded together, never more: more are faster, and each takes memory for its keys and values. Changes no
    /// result.
    pub batch: usize,
    /// Seed; every response of every prompt has its own stream of random numbers.
    pub seed: u64,
}

/// The most responses to a prompt: their number over all prompts is one that can be counted.
const MOST_SAMPLES: usize = 1 << 20;

/// A prompt to respond to.
#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    /// Names the random numbers of its responses, with the seed and the sample's index: wherever it stands among the requests,
    /// it gets the same responses.
    pub id: u64,
    /// Its tokens.
    pub prompt: &'a [u32],
}

/// Text that ends a response wherever it appears, also across tokens or inside one.
#[derive(Clone, Copy)]
pub struct StopStrings<'a> {
    /// Any of these; empty ones are ignored.
    pub strings: &'a [String],
    /// The text of a whole response's tokens, as a reader would see it.
    pub text: &'a (dyn Fn(&[u32]) -> String + Sync),
}

/// A sampled response.
#[derive(Clone, Debug, PartialEq)]
pub struct Generation {
    /// Index of its prompt.
    pub prompt: usize,
    /// Which of that prompt's samples it is.
    pub sample: usize,
    /// The tokens as they were sampled, with the one that ended it.
    pub token_ids: Vec<u32>,
    /// Log-probability of each under the model itself (temperature 1, every token), in nats.
    pub token_logps: Vec<f32>,
    /// Log-probability of each at the sampling's temperature, over every token, in nats: the old policy of a clipped ratio,
    /// which TRL computes from its logits over the temperature and vLLM would call processed if nothing were filtered. The
    /// model's own for greedy choices.
    pub tempered_logps: Vec<f32>,
    /// Log-probability of each under the distribution it was drawn from, filters included, in nats; 0 for greedy choices. What
    /// `top_k`, `top_p` and `min_p` raise here no forward pass reproduces.
    pub sampling_logps: Vec<f32>,
    /// Why it ends.
    pub finish: Finish,
    /// Its text up to the stop string, where there were any to look for.
    pub text: Option<String>,
}

/// Why a response ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finish {
    /// A token that ends it.
    Eos,
    /// A stop string in its text.
    Stop,
    /// The longest response allowed, or the model's last position.
    Length,
}

/// What a run of [`Generator::sample_many`] did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GenerationStats {
    /// Tokens of the prompts read, each prompt once.
    pub prompt_tokens: usize,
    /// Tokens sampled.
    pub tokens: usize,
    /// The most responses that were decoded together.
    pub most_live: usize,
    /// Time spent reading prompts.
    pub prefill: Duration,
    /// Time spent decoding and drawing.
    pub decode: Duration,
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
    /// As [`Generator::sample_many`].
    pub fn generate(
        &self,
        prompts: &[impl AsRef<[u32]>],
        settings: &GenerateSettings,
    ) -> Result<Vec<Generation>> {
        let prompts = prompts.iter().map(AsRef::as_ref).enumerate();
        let requests: Vec<Request<'_>> = prompts
            .map(|(index, prompt)| Request {
                id: index as u64,
                prompt,
            })
            .collect();
        let mut done = Vec::new();
        self.sample_many(&requests, settings, None, &mut |generation| {
            done.push(generation);
        })?;
        done.sort_unstable_by_key(|generation| (generation.prompt, generation.sample));
        Ok(done)
    }

    /// Samples `settings.samples` responses to each request over one cache of its prompt, and hands each to `on_finish` when it
    /// ends; [`Generation::prompt`] is the request's index. The place of a response that ended goes to the next one that waits.
    ///
    /// A response depends on the model, the settings' sampling, limits and seed, its request, its sample index and the stop
    /// strings: not on the batch size, the other requests, their order or the number of threads.
    ///
    /// # Errors
    /// Of the sampling and the prompts before anything is computed: [`Error::Domain`], [`Error::TokenOutOfRange`],
    /// [`Error::SequenceTooLong`] for a prompt that leaves no room for a response; then [`Error::NotFinite`], naming
    /// prompt, sample and token.
    pub fn sample_many(
        &self,
        requests: &[Request<'_>],
        settings: &GenerateSettings,
        stop: Option<StopStrings<'_>>,
        on_finish: &mut dyn FnMut(Generation),
    ) -> Result<GenerationStats> {
        settings.check()?;
        for request in requests {
            self.config().check_tokens(request.prompt)?;
            self.config().check_length(request.prompt.len() + 1)?;
        }
        let mut stats = GenerationStats::default();
        let mut waiting = Waiting {
            next: 0,
            total: requests.len() * settings.samples,
            prompt: None,
        };
        let (mut active, mut sequences) = (Vec::<Active>::new(), Vec::<Sequence>::new());
        let mut scratch = StepScratch::default();
        while waiting.next < waiting.total || !active.is_empty() {
            // Again where a first token ended a response: no place stays free while one waits.
            while waiting.next < waiting.total && active.len() < settings.batch {
                let begin = Instant::now();
                let room = settings.batch - active.len();
                let started = self.start(requests, settings, room, &mut waiting, &mut stats)?;
                stats.prefill += begin.elapsed();
                for (mut response, cache) in started {
                    if response.extend(cache.logits(), settings, stop)? {
                        stats.tokens += response.generation.token_ids.len();
                        on_finish(response.generation);
                    } else {
                        active.push(response);
                        sequences.push(Sequence::new(cache));
                    }
                }
            }
            let begin = Instant::now();
            stats.most_live = stats.most_live.max(active.len());
            if active.is_empty() {
                continue;
            }
            let token_ids: Vec<u32> = active.iter().map(Active::last_token).collect();
            self.step_in(&mut sequences, &token_ids, &mut scratch)?;
            let vocab = self.config().vocab_size;
            let rows = active
                .par_iter_mut()
                .zip(scratch.logits.par_chunks_exact(vocab));
            let ended: Vec<Result<bool>> = rows
                .map(|(response, logits)| response.extend(logits, settings, stop))
                .collect();
            // The first error, not the one that was met first.
            let ended = ended.into_iter().collect::<Result<Vec<bool>>>()?;
            // In order, so that samples of one prompt stay neighbours.
            for index in (0..active.len()).rev().filter(|&index| ended[index]) {
                sequences.remove(index);
                let generation = active.remove(index).generation;
                stats.tokens += generation.token_ids.len();
                on_finish(generation);
            }
            stats.decode += begin.elapsed();
        }
        Ok(stats)
    }

    fn longest_sequence(&self) -> usize {
        let config = self.config();
        config
            .sliding_window
            .map_or(config.max_positions, |window| {
                window.min(config.max_positions)
            })
    }

    /// Takes up to `room` responses from those that wait, and reads the prompts that they are the first to need.
    fn start(
        &self,
        requests: &[Request<'_>],
        settings: &GenerateSettings,
        room: usize,
        waiting: &mut Waiting,
        stats: &mut GenerationStats,
    ) -> Result<Vec<(Active, Arc<PromptCache>)>> {
        let samples = settings.samples;
        let responses = waiting.next..waiting.total.min(waiting.next + room);
        waiting.next = responses.end;
        let fresh: Vec<&[u32]> = responses
            .clone()
            .filter(|index| index.is_multiple_of(samples))
            .map(|index| requests[index / samples].prompt)
            .collect();
        stats.prompt_tokens += fresh.iter().map(|prompt| prompt.len()).sum::<usize>();
        let mut fresh = self.prefill(&fresh)?.into_iter().map(Arc::new);
        let mut started = Vec::with_capacity(responses.len());
        for index in responses {
            let (prompt, sample) = (index / samples, index % samples);
            if sample == 0 {
                waiting.prompt = fresh.next();
            }
            let cache = waiting
                .prompt
                .clone()
                .expect("a prompt is read before its first sample");
            let room = self.longest_sequence() - cache.tokens();
            let id = requests[prompt].id;
            let response = Active {
                generation: Generation {
                    prompt,
                    sample,
                    token_ids: Vec::new(),
                    token_logps: Vec::new(),
                    tempered_logps: Vec::new(),
                    sampling_logps: Vec::new(),
                    finish: Finish::Length,
                    text: None,
                },
                stream: random_stream(settings.seed, &format!("sample {id} {sample}")),
                limit: settings.max_tokens.min(room),
            };
            started.push((response, cache));
        }
        Ok(started)
    }
}

/// The responses that were not started yet.
struct Waiting {
    next: usize,
    total: usize,
    /// The prompt of the last one started: the next may be another sample of it.
    prompt: Option<Arc<PromptCache>>,
}

impl GenerateSettings {
    fn check(&self) -> Result<()> {
        self.sampling.check()?;
        let counts = [
            ("samples", self.samples),
            ("max_tokens", self.max_tokens),
            ("batch", self.batch),
        ];
        let domain = |what, expected, found: usize| {
            Err(Error::Domain {
                what,
                expected,
                found: found as f64,
            })
        };
        match counts.into_iter().find(|&(_, count)| count == 0) {
            Some((what, _)) => domain(what, "at least 1", 0),
            None if self.samples > MOST_SAMPLES => {
                domain("samples", "at most 1048576", self.samples)
            }
            None => Ok(()),
        }
    }
}

impl StopStrings<'_> {
    /// The text up to the first stop string, and whether there is one.
    fn cut(&self, token_ids: &[u32]) -> (String, bool) {
        let mut text = (self.text)(token_ids);
        let strings = self.strings.iter().filter(|stop| !stop.is_empty());
        let first = strings.filter_map(|stop| text.find(stop)).min();
        first.inspect(|&at| text.truncate(at));
        (text, first.is_some())
    }
}

impl std::fmt::Debug for StopStrings<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("StopStrings")
            .field("strings", &self.strings)
            .finish_non_exhaustive()
    }
}

impl Active {
    /// Draws the next token; true if it was the last.
    fn extend(
        &mut self,
        logits: &[f32],
        settings: &GenerateSettings,
        stop: Option<StopStrings<'_>>,
    ) -> Result<bool> {
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
        generation.tempered_logps.push(drawn.tempered_logp);
        generation.sampling_logps.push(drawn.sampling_logp);
        let (text, stopped) = stop.map(|stop| stop.cut(&generation.token_ids)).unzip();
        generation.text = text;
        let finish = if settings.eos.contains(&drawn.token_id) {
            Finish::Eos
        } else if stopped == Some(true) {
            Finish::Stop
        } else {
            Finish::Length
        };
        generation.finish = finish;
        Ok(finish != Finish::Length || generation.token_ids.len() == self.limit)
    }

    fn last_token(&self) -> u32 {
        *self
            .generation
            .token_ids
            .last()
            .expect("a response gets its first token when it is started")
    }
}
