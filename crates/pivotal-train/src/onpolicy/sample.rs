//! Responses sampled from the policy as it is.

use std::ops::Range;

use pivotal_core::random_stream;
use pivotal_data::Tokenizer;
use pivotal_model::{
    Decoder, Finish, GenerateSettings, GenerationStats, Generator, Request, Sampling, StopStrings,
};
use rand::Rng;

use super::prompts::Prompt;
use super::settings::RolloutSettings;
use crate::error::{Error, Result};
use crate::settings::Precision;

/// A sampled response.
#[derive(Clone, Debug, PartialEq)]
pub struct Rollout {
    /// Index of its prompt among those of the step.
    pub prompt: usize,
    /// The prompt's id: its row.
    pub id: u64,
    /// Which of the prompt's samples it is.
    pub sample: usize,
    /// Its tokens, the one that ended it included; never empty.
    pub token_ids: Vec<u32>,
    /// Log-probability of each at the sampling's temperature, over every token, in nats, as decoding computed it.
    pub sampled_logps: Vec<f32>,
    /// Why it ends.
    pub finish: Finish,
    /// Its text, up to the stop string that ended it.
    pub text: String,
}

/// Samples from a policy that is trained meanwhile.
#[derive(Debug)]
pub struct Sampler {
    settings: RolloutSettings,
    precision: Precision,
    seed: u64,
    stop: Vec<String>,
    /// Packed once if only an adapter is trained; the adapter is taken anew each time.
    generator: Option<Generator>,
}

impl Sampler {
    /// A sampler; `seed` is the run's.
    ///
    /// # Errors
    /// [`Error::Setting`] for settings outside their domain.
    pub fn new(settings: &RolloutSettings, precision: Precision, seed: u64) -> Result<Self> {
        settings.check()?;
        Ok(Self {
            settings: settings.clone(),
            precision,
            seed,
            stop: settings.stop_strings(),
            generator: None,
        })
    }

    /// The responses of `policy` to `prompts` in step `step`, in order of prompt and sample. They depend on the policy, the
    /// settings, the seed, the step and the prompt's id alone.
    ///
    /// # Errors
    /// [`Error::Model`] for a prompt that leaves no room; [`Error::NotFinite`] if the policy's logits are not finite.
    pub fn sample(
        &mut self,
        policy: &mut Decoder,
        prompts: &[&Prompt],
        tokenizer: &Tokenizer,
        step: u64,
    ) -> Result<(Vec<Rollout>, GenerationStats)> {
        let (sampling, samples) = (self.settings.sampling(), self.settings.samples);
        self.respond(policy, prompts, tokenizer, step, (sampling, samples))
    }

    /// The most probable response to each prompt.
    ///
    /// # Errors
    /// As [`Sampler::sample`].
    pub fn greedy(
        &mut self,
        policy: &mut Decoder,
        prompts: &[&Prompt],
        tokenizer: &Tokenizer,
        step: u64,
    ) -> Result<Vec<Rollout>> {
        let sampling = (Sampling::greedy(), 1);
        Ok(self.respond(policy, prompts, tokenizer, step, sampling)?.0)
    }

    fn respond(
        &mut self,
        policy: &mut Decoder,
        prompts: &[&Prompt],
        tokenizer: &Tokenizer,
        step: u64,
        (sampling, samples): (Sampling, usize),
    ) -> Result<(Vec<Rollout>, GenerationStats)> {
        let adapted = policy.has_adapter();
        match &mut self.generator {
            Some(generator) if adapted => generator.refresh(policy),
            generator => *generator = Some(Generator::unmerged(policy, self.precision.into())),
        }
        let generator = self.generator.as_ref().expect("it was made above");
        let settings = GenerateSettings {
            sampling,
            samples,
            max_tokens: self.settings.max_new_tokens,
            eos: policy.config().special_ids.eos.clone(),
            batch: self.settings.decode_batch,
            seed: random_stream(self.seed, &format!("rollouts {step}")).next_u64(),
        };
        let requests: Vec<Request<'_>> = prompts
            .iter()
            .map(|prompt| Request {
                id: prompt.id,
                prompt: &prompt.token_ids,
            })
            .collect();
        let text = |ids: &[u32]| plain_text(tokenizer, ids);
        let stop = StopStrings {
            strings: &self.stop,
            text: &text,
        };
        let stop = (!self.stop.is_empty()).then_some(stop);
        let mut rollouts = Vec::new();
        let stats = generator
            .sample_many(&requests, &settings, stop, &mut |generation| {
                rollouts.push(Rollout {
                    prompt: generation.prompt,
                    id: prompts[generation.prompt].id,
                    sample: generation.sample,
                    text: match generation.text {
                        Some(text) => text,
                        None => plain_text(tokenizer, &generation.token_ids),
                    },
                    token_ids: generation.token_ids,
                    sampled_logps: generation.tempered_logps,
                    finish: generation.finish,
                });
            })
            .map_err(|error| match error {
                pivotal_model::Error::NotFinite { .. } => Error::NotFinite {
                    step,
                    metric: "logits",
                    samples: prompts.iter().map(|prompt| prompt.id).collect(),
                },
                other => other.into(),
            })?;
        rollouts.sort_unstable_by_key(|rollout| (rollout.prompt, rollout.sample));
        Ok((rollouts, stats))
    }
}

/// The text of a response; an id of a padded vocabulary that the tokenizer does not have shows nothing.
fn plain_text(tokenizer: &Tokenizer, ids: &[u32]) -> String {
    let known = ids.iter().copied();
    let known: Vec<u32> = known
        .filter(|&id| tokenizer.token_text(id).is_ok())
        .collect();
    let text = tokenizer.decode_plain(&known);
    text.expect("decoding fails for unknown ids alone")
}

/// The responses of one prompt after the other, as ranges of `rollouts`, which are in order of prompt.
pub fn groups_of(rollouts: &[Rollout]) -> Vec<Range<usize>> {
    let mut groups: Vec<Range<usize>> = Vec::new();
    for (index, rollout) in rollouts.iter().enumerate() {
        match groups.last_mut() {
            Some(group) if rollouts[group.start].prompt == rollout.prompt => group.end = index + 1,
            _ => groups.push(index..index + 1),
        }
    }
    groups
}
