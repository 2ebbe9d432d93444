//! Drawing a token from a row of logits: greedy, temperature, top-k, top-p (Holtzman et al. 2019, arXiv:1904.09751) and
//! min-p (Nguyen et al. 2024, arXiv:2407.01082), in transformers' order.
//!
//! Differs: of equal logits at the edge of `top_k` the smaller ids stay, where transformers keeps them all.

use pivotal_core::RandomStream;
use pivotal_kernels::{argmax, log_sum_exp};
use rand::RngExt;

use crate::error::{Error, Result};

/// How a token is drawn from a model's distribution.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampling {
    /// Divides the logits; 0 takes the largest one, the first of equals.
    pub temperature: f64,
    /// Only this many of the most probable tokens; all if absent.
    pub top_k: Option<usize>,
    /// Then only the fewest of the most probable tokens that have this probability together; 1 keeps all.
    pub top_p: f64,
    /// Then only tokens at least this probable, as a part of the most probable one's probability; 0 keeps all.
    pub min_p: f64,
}

/// A token, and how probable it was.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Drawn {
    /// The token.
    pub token_id: u32,
    /// Its log-probability under the model itself (temperature 1, every token), in nats.
    pub token_logp: f32,
    /// Its log-probability under the distribution it was drawn from, in nats; 0 for a greedy choice.
    pub sampling_logp: f32,
}

/// Tokens whose probabilities are summed at once before one of them is looked for.
const BLOCK: usize = 1024;

/// Sums of f32 exponentials are this exact: what lies closer to the edge of `top_p` is at it.
const SUM_TOLERANCE: f64 = 1e-6;

impl Default for Sampling {
    /// The model's own distribution.
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_k: None,
            top_p: 1.0,
            min_p: 0.0,
        }
    }
}

impl Sampling {
    /// Always the most probable token.
    #[must_use]
    pub fn greedy() -> Self {
        Self {
            temperature: 0.0,
            ..Self::default()
        }
    }

    /// Checks every number's domain.
    ///
    /// # Errors
    /// [`Error::Domain`], naming the field.
    pub fn check(&self) -> Result<()> {
        let domain = |what, expected, found| {
            Err(Error::Domain {
                what,
                expected,
                found,
            })
        };
        if !(self.temperature.is_finite() && self.temperature >= 0.0) {
            return domain("temperature", "finite and at least 0", self.temperature);
        }
        if self.top_k == Some(0) {
            return domain("top_k", "at least 1", 0.0);
        }
        if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            return domain("top_p", "above 0 and at most 1", self.top_p);
        }
        if !(self.min_p >= 0.0 && self.min_p <= 1.0) {
            return domain("min_p", "from 0 to 1", self.min_p);
        }
        Ok(())
    }

    /// Draws a token from `logits` `[vocab]`; at most one number is taken from `stream`, none for a greedy choice.
    ///
    /// # Errors
    /// [`Error::Domain`] as [`Sampling::check`]; [`Error::NotFinite`] if a logit is NaN or positive infinity, or none is
    /// finite.
    ///
    /// # Examples
    /// ```
    /// use pivotal_model::Sampling;
    /// let mut stream = pivotal_core::random_stream(1, "example");
    /// let drawn = Sampling::greedy().draw(&[0.0, 3f32.ln()], &mut stream).unwrap();
    /// assert_eq!(drawn.token_id, 1);
    /// assert!((drawn.token_logp - 0.75f32.ln()).abs() < 1e-6);
    /// ```
    pub fn draw(&self, logits: &[f32], stream: &mut RandomStream) -> Result<Drawn> {
        self.check()?;
        let normaliser = log_sum_exp(logits);
        let largest = argmax(logits).filter(|_| normaliser.is_finite());
        let Some(largest) = largest else {
            return Err(Error::NotFinite {
                what: "logits".into(),
            });
        };
        let (index, sampling_logp) = if self.temperature == 0.0 {
            (largest, 0.0)
        } else if *self == Self::default() {
            let index = draw_from_all(logits, stream.random());
            (index, logits[index] - normaliser)
        } else {
            self.draw_filtered(logits, logits[largest], stream.random())
        };
        Ok(Drawn {
            token_id: index as u32,
            token_logp: logits[index] - normaliser,
            sampling_logp,
        })
    }

    fn draw_filtered(&self, logits: &[f32], largest: f32, uniform: f64) -> (usize, f32) {
        let temperature = self.temperature as f32;
        // The largest is 0, so that no temperature overflows.
        let scaled: Vec<f32> = logits
            .iter()
            .map(|logit| (logit - largest) / temperature)
            .collect();
        if self.top_k.is_none() && self.top_p == 1.0 && self.min_p == 0.0 {
            let index = draw_from_all(&scaled, uniform);
            return (index, scaled[index] - log_sum_exp(&scaled));
        }
        let kept = self.kept(&scaled);
        let total: f64 = kept.iter().map(|&index| weight(scaled[index])).sum();
        let index = kept[position(
            kept.iter().map(|&index| weight(scaled[index])),
            uniform * total,
        )];
        let logp = f64::from(scaled[index]) - total.ln();
        (index, logp as f32)
    }

    /// The tokens that pass every filter, the most probable first.
    fn kept(&self, scaled: &[f32]) -> Vec<usize> {
        let mut floor = (self.min_p as f32).ln();
        if self.top_k.is_none() && self.top_p < 1.0 {
            // All tokens below this have less than 1 - top_p together: they need not be sorted.
            let total = f64::from(log_sum_exp(scaled)).exp();
            let floor_weight = total * (1.0 - self.top_p) / scaled.len() as f64;
            floor = floor.max((floor_weight * (1.0 - 1e-3)).ln() as f32);
        }
        let by_weight = |a: &usize, b: &usize| scaled[*b].total_cmp(&scaled[*a]).then(a.cmp(b));
        let mut kept: Vec<usize> = (0..scaled.len())
            .filter(|&index| scaled[index] >= floor && scaled[index] > f32::NEG_INFINITY)
            .collect();
        if let Some(top_k) = self.top_k.filter(|&top_k| top_k < kept.len()) {
            kept.select_nth_unstable_by(top_k - 1, by_weight);
            kept.truncate(top_k);
        }
        kept.sort_unstable_by(by_weight);
        if self.top_p < 1.0 {
            let total: f64 = match self.top_k {
                None => f64::from(log_sum_exp(scaled)).exp(),
                Some(_) => kept.iter().map(|&index| weight(scaled[index])).sum(),
            };
            let enough = self.top_p * total * (1.0 - SUM_TOLERANCE);
            let mut sum = 0.0;
            let fewest = kept.iter().take_while(|&&index| {
                let before = sum;
                sum += weight(scaled[index]);
                before < enough
            });
            let fewest = fewest.count();
            kept.truncate(fewest);
        }
        kept
    }
}

fn weight(scaled: f32) -> f64 {
    f64::from(scaled).exp()
}

/// An index with the probability of its logit, from a number in [0, 1): first the block, then the token in it.
fn draw_from_all(logits: &[f32], uniform: f64) -> usize {
    let blocks: Vec<f32> = logits.chunks(BLOCK).map(log_sum_exp).collect();
    let normaliser = log_sum_exp(&blocks);
    let weights = blocks.iter().map(|&block| weight(block - normaliser));
    let total: f64 = weights.clone().sum();
    let mut left = uniform * total;
    let block = position(weights.clone(), left);
    left -= weights.clone().take(block).sum::<f64>();
    let share = left / weight(blocks[block] - normaliser);
    let start = block * BLOCK;
    let tokens = &logits[start..(start + BLOCK).min(logits.len())];
    let weights = tokens.iter().map(|&logit| weight(logit - blocks[block]));
    let total: f64 = weights.clone().sum();
    start + position(weights, share * total)
}

/// Where the running sum of `weights` passes `target`: never at a weight of 0, and at the last other one if rounding leaves
/// it short.
fn position(weights: impl Iterator<Item = f64>, target: f64) -> usize {
    let (mut sum, mut last) = (0.0, 0);
    for (index, weight) in weights.enumerate().filter(|&(_, weight)| weight > 0.0) {
        sum += weight;
        last = index;
        if target < sum {
            break;
        }
    }
    last
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use pivotal_core::random_stream;

    use super::*;

    const DRAWS: usize = 20_000;

    /// How often each token is drawn, and the log-probability it was said to be drawn with.
    fn frequencies(sampling: Sampling, logits: &[f32]) -> Vec<(f64, f32)> {
        let mut stream = random_stream(7, "frequencies");
        let mut counts = vec![(0.0, f32::NAN); logits.len()];
        for _ in 0..DRAWS {
            let drawn = sampling.draw(logits, &mut stream).unwrap();
            let (count, logp) = &mut counts[drawn.token_id as usize];
            *count += 1.0;
            *logp = drawn.sampling_logp;
        }
        for (count, _) in &mut counts {
            *count /= DRAWS as f64;
        }
        counts
    }

    /// Five standard deviations of a frequency, and the log-probability to f32 rounding.
    fn assert_distribution(sampling: Sampling, logits: &[f32], expected: &[f64]) {
        for (token, (&(frequency, logp), &p)) in frequencies(sampling, logits)
            .iter()
            .zip(expected)
            .enumerate()
        {
            let deviation = (p * (1.0 - p) / DRAWS as f64).sqrt();
            let what = format!("{sampling:?}: token {token}, {frequency} for {p}");
            assert!((frequency - p).abs() <= 5.0 * deviation, "{what}");
            assert_eq!(frequency > 0.0, p > 0.0, "{what}");
            assert!(
                p == 0.0 || (f64::from(logp) - p.ln()).abs() < 1e-6,
                "{what}, {logp}"
            );
        }
    }

    fn logs(probabilities: &[f64]) -> Vec<f32> {
        // A constant shift changes nothing.
        probabilities.iter().map(|p| p.ln() as f32 + 3.0).collect()
    }

    #[test]
    fn each_filter_leaves_the_distribution_it_names() {
        let p = [0.1, 0.4, 0.2, 0.25, 0.05];
        let all = Sampling::default();
        let logits = logs(&p);
        assert_distribution(all, &logits, &p);
        let squared: Vec<f64> = p.iter().map(|p| p * p / 0.275).collect();
        let cold = Sampling {
            temperature: 0.5,
            ..all
        };
        assert_distribution(cold, &logits, &squared);
        let top = |top_k, top_p, min_p| Sampling {
            top_k,
            top_p,
            min_p,
            ..all
        };
        let two = [0.0, 0.4 / 0.65, 0.0, 0.25 / 0.65, 0.0];
        let three = [0.0, 0.4 / 0.85, 0.2 / 0.85, 0.25 / 0.85, 0.0];
        assert_distribution(top(Some(2), 1.0, 0.0), &logits, &two);
        assert_distribution(top(None, 0.65, 0.0), &logits, &two);
        assert_distribution(top(None, 0.66, 0.0), &logits, &three);
        assert_distribution(top(None, 1.0, 0.5), &logits, &three);
        // After top_k, 0.4 is 0.4/0.65 = 0.62 of what is left.
        assert_distribution(top(Some(2), 0.6, 0.0), &logits, &[0.0, 1.0, 0.0, 0.0, 0.0]);
        assert_distribution(top(Some(99), 1.0, 0.0), &logits, &p);
    }

    #[test]
    fn filters_at_their_edges() {
        let kept = |sampling: Sampling, logits: &[f32]| -> BTreeSet<usize> {
            let counts = frequencies(sampling, logits);
            (0..logits.len())
                .filter(|&token| counts[token].0 > 0.0)
                .collect()
        };
        let all = Sampling::default();
        let top_k = |k| Sampling {
            top_k: Some(k),
            ..all
        };
        let top_p = |top_p| Sampling { top_p, ..all };
        let uniform = [0.5; 4];
        assert_eq!(kept(top_p(0.5), &uniform), [0, 1].into());
        assert_eq!(kept(top_p(0.500_01), &uniform), [0, 1, 2].into());
        assert_eq!(kept(top_p(1e-9), &uniform), [0].into());
        assert_eq!(kept(top_k(1), &[1.0, 3.0, 3.0]), [1].into());
        assert_eq!(kept(top_k(2), &[3.0, 1.0, 3.0, 3.0]), [0, 2].into());
        assert_eq!(
            kept(Sampling { min_p: 1.0, ..all }, &[3.0, 1.0, 3.0]),
            [0, 2].into()
        );
        let masked = [f32::NEG_INFINITY, 0.0, f32::NEG_INFINITY, 0.0];
        for sampling in [
            all,
            top_k(3),
            top_p(0.999),
            Sampling {
                temperature: 9.0,
                ..all
            },
        ] {
            assert_eq!(kept(sampling, &masked), [1, 3].into(), "{sampling:?}");
        }
        let frozen = Sampling {
            temperature: 1e-30,
            ..all
        };
        assert_eq!(kept(frozen, &[5.0, 5.1, 4.0]), [1].into());
    }

    /// More tokens than a block, in the first block, at its edge, in the last and unfinished one.
    #[test]
    fn large_vocabularies_are_drawn_from_in_proportion() {
        let size = 2 * BLOCK + 100;
        let mut expected = vec![0.0; size];
        for (token, p) in [(0, 0.2), (BLOCK - 1, 0.3), (BLOCK, 0.1), (size - 1, 0.4)] {
            expected[token] = p;
        }
        let logits = logs(&expected);
        assert_distribution(Sampling::default(), &logits, &expected);
        let flat = vec![0.0; size];
        let mean = |sampling: Sampling| {
            let counts = frequencies(sampling, &flat);
            let mean = counts
                .iter()
                .enumerate()
                .map(|(token, (f, _))| token as f64 * f);
            mean.sum::<f64>()
        };
        // The mean of a uniform draw, to five standard deviations.
        let deviation = size as f64 / (12.0 * DRAWS as f64).sqrt();
        assert!((mean(Sampling::default()) - (size - 1) as f64 / 2.0).abs() < 5.0 * deviation);
        let half = Sampling {
            top_p: 0.5,
            ..Sampling::default()
        };
        assert!((mean(half) - (size / 2 - 1) as f64 / 2.0).abs() < 5.0 * deviation);
    }

    #[test]
    fn greedy_takes_the_first_of_equals_and_no_random_number() {
        let (mut used, mut fresh) = (random_stream(1, "greedy"), random_stream(1, "greedy"));
        let drawn = Sampling::greedy()
            .draw(&[0.0, 2.0, 2.0], &mut used)
            .unwrap();
        assert_eq!((drawn.token_id, drawn.sampling_logp), (1, 0.0));
        assert_eq!(used.random::<u64>(), fresh.random::<u64>());
    }

    #[test]
    fn logits_that_are_no_distribution_are_refused() {
        let mut stream = random_stream(1, "refused");
        let one = Sampling {
            top_k: Some(1),
            ..Sampling::default()
        };
        for sampling in [Sampling::greedy(), Sampling::default(), one] {
            for logits in [
                &[0.0, f32::NAN, 1.0][..],
                &[f32::NAN],
                &[f32::INFINITY, 0.0],
                &[f32::NEG_INFINITY; 3],
                &[],
            ] {
                let error = sampling.draw(logits, &mut stream).unwrap_err();
                assert!(
                    matches!(error, Error::NotFinite { .. }),
                    "{logits:?}: {error}"
                );
            }
        }
        for (sampling, field) in [
            (
                Sampling {
                    temperature: -1.0,
                    ..one
                },
                "temperature",
            ),
            (
                Sampling {
                    temperature: f64::NAN,
                    ..one
                },
                "temperature",
            ),
            (
                Sampling {
                    top_k: Some(0),
                    ..one
                },
                "top_k",
            ),
            (Sampling { top_p: 0.0, ..one }, "top_p"),
            (Sampling { top_p: 1.1, ..one }, "top_p"),
            (
                Sampling {
                    min_p: f64::NAN,
                    ..one
                },
                "min_p",
            ),
        ] {
            let error = sampling.draw(&[0.0], &mut stream).unwrap_err().to_string();
            assert!(error.contains(field), "{error}");
        }
    }
}
