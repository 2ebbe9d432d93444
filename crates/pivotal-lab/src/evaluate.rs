//! What a policy makes of the splits, exactly: the right response is unique, so nothing is sampled.

use pivotal_core::{Pack, TokenizedResponse};
use pivotal_model::Decoder;
use serde::{Deserialize, Serialize};

use crate::error::Result;
use crate::world::splits::{Split, evaluation_samples};

/// Prompts in one forward pass: about 5000 tokens.
const PROMPTS: usize = 64;

/// What a policy scores on one split.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct SplitScores {
    /// The probability of the one right response at temperature 1, `exp Σ log p`, averaged over the prompts: the exact
    /// accuracy of sampling, without its noise.
    pub exact: f64,
    /// Prompts whose every right token is the most probable one: the exact accuracy of greedy decoding.
    pub greedy_exact: f64,
    /// `Σ_t KL(π(· | right response before t) ‖ π_reference(· | the same))` in nats, over the right response's tokens,
    /// averaged over the prompts. Each term is exact over the whole vocabulary; the path is the right response instead of
    /// the policy's own samples.
    pub kl: f64,
}

/// The prompts of a split with the reference's distributions along their right responses.
#[derive(Clone, Debug)]
pub struct EvaluationSet {
    samples: Vec<TokenizedResponse>,
    /// Log-probabilities, `[response tokens, vocab]`.
    reference: Vec<f32>,
}

impl EvaluationSet {
    /// `count` prompts of `split`, with `reference` to measure KL against.
    ///
    /// # Errors
    /// If a sequence does not fit the model.
    pub fn new(split: Split, seed: u64, count: usize, reference: &Decoder) -> Result<Self> {
        let samples = evaluation_samples(split, seed, count)?;
        Self::of_samples(samples.into_iter().map(|s| s.sample).collect(), reference)
    }

    /// These prompts with their right responses.
    ///
    /// # Errors
    /// As [`EvaluationSet::new`].
    pub fn of_samples(samples: Vec<TokenizedResponse>, reference: &Decoder) -> Result<Self> {
        let mut distributions = Vec::new();
        for samples in samples.chunks(PROMPTS) {
            distributions.extend(log_probabilities(reference, samples)?);
        }
        Ok(Self {
            samples,
            reference: distributions,
        })
    }

    /// The scores of `policy`.
    ///
    /// # Errors
    /// If a sequence does not fit the model.
    pub fn score(&self, policy: &Decoder) -> Result<SplitScores> {
        let vocab = policy.config().vocab_size;
        let (mut exact, mut greedy, mut kl) = (0.0, 0_u32, 0.0);
        let mut reference = self.reference.chunks_exact(vocab);
        for samples in self.samples.chunks(PROMPTS) {
            let policy = log_probabilities(policy, samples)?;
            let mut rows = policy.chunks_exact(vocab).zip(&mut reference);
            for sample in samples {
                let (mut logp, mut is_greedy) = (0.0, true);
                for (&token, (row, reference)) in sample.response.iter().zip(&mut rows) {
                    let own = row[token as usize];
                    logp += f64::from(own);
                    is_greedy &= row.iter().enumerate().all(|(other, &value)| {
                        // Of equal ones the first is decoded.
                        value < own || (value == own && other >= token as usize)
                    });
                    kl += divergence(row, reference);
                }
                exact += logp.exp();
                greedy += u32::from(is_greedy);
            }
        }
        let prompts = self.samples.len().max(1) as f64;
        Ok(SplitScores {
            exact: exact / prompts,
            greedy_exact: f64::from(greedy) / prompts,
            kl: kl / prompts,
        })
    }
}

/// `Σ_v p_v (log p_v − log q_v)`, of log-probabilities.
fn divergence(policy: &[f32], reference: &[f32]) -> f64 {
    policy
        .iter()
        .zip(reference)
        .map(|(&p, &q)| f64::from(p).exp() * (f64::from(p) - f64::from(q)))
        .sum()
}

/// The log-probability of every token of the vocabulary at every response token, `[response tokens, vocab]`.
fn log_probabilities(policy: &Decoder, samples: &[TokenizedResponse]) -> Result<Vec<f32>> {
    let mut pack = Pack::default();
    for sample in samples {
        pack.push(&sample.prompt, &[&sample.response])?;
    }
    let sources: Vec<usize> = pack.gather(|_, _| true).iter().map(|g| g.source).collect();
    let policy = policy.detached();
    let hidden = policy.hidden(&pack)?;
    let logits = policy.logits(&hidden, &sources).into_data();
    let mut logits = logits.try_to_vec::<f32>().expect("models compute in f32");
    for row in logits.chunks_exact_mut(policy.config().vocab_size) {
        let most = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let sum: f64 = row.iter().map(|&x| f64::from(x - most).exp()).sum();
        let normaliser = f64::from(most) + sum.ln();
        row.iter_mut()
            .for_each(|x| *x = (f64::from(*x) - normaliser) as f32);
    }
    Ok(logits)
}
