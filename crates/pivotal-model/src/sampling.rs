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
    /// Its log-probability at the temperature it was drawn with, over every token, in nats: what the ratio of a policy gradient
    /// compares. The model's own for a greedy choice.
    pub tempered_logp: f32,
    /// Its log-probability under the distribution it was drawn from, filters included, in nats; 0 for a greedy choice.
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
        // Logits are divided in 32 bits, in which a smaller number is 0 and a larger one infinite.
        let divides = |temperature: f32| temperature > 0.0 && temperature.is_finite();
        if self.temperature != 0.0 && !divides(self.temperature as f32) {
            let expected = "0, or a number from 1e-45 to 3e38";
            return domain("temperature", expected, self.temperature);
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
        let own = Distribution::new(logits);
        if !own.normaliser.is_finite() {
            return Err(Error::NotFinite {
                what: "logits".into(),
            });
        }
        let (index, tempered_logp, sampling_logp) = if self.temperature == 0.0 {
            let index = argmax(logits).expect("some logit is finite");
            (index, own.logp(index), 0.0)
        } else if *self == Self::default() {
            let index = own.draw(stream.random());
            (index, own.logp(index), own.logp(index))
        } else {
            self.draw_filtered(&own, stream.random())
        };
        Ok(Drawn {
            token_id: index as u32,
            token_logp: own.logp(index),
            tempered_logp,
            sampling_logp,
        })
    }

    /// The index, its log-probability at this temperature, and that under all filters.
    fn draw_filtered(&self, own: &Distribution<'_>, uniform: f64) -> (usize, f32, f32) {
        let scaled: Vec<f32>;
        let tempered = if self.temperature == 1.0 {
            own
        } else {
            let temperature = self.temperature as f32;
            let largest = own.blocks.iter().map(|block| block.largest);
            let largest = largest.fold(f32::NEG_INFINITY, f32::max);
            // The largest is 0, so that no temperature overflows.
            scaled = own
                .logits
                .iter()
                .map(|logit| (logit - largest) / temperature)
                .collect();
            &Distribution::new(&scaled)
        };
        if self.top_k.is_none() && self.top_p == 1.0 && self.min_p == 0.0 {
            let index = tempered.draw(uniform);
            return (index, tempered.logp(index), tempered.logp(index));
        }
        let kept = self.kept(tempered);
        let weight = |&index: &usize| weight(tempered.logp(index));
        let total: f64 = kept.iter().map(weight).sum();
        let index = kept[position(kept.iter().map(weight), uniform * total)];
        let logp = f64::from(tempered.logp(index)) - total.ln();
        (index, tempered.logp(index), logp as f32)
    }

    /// The tokens that pass every filter, the most probable first.
    fn kept(&self, of: &Distribution<'_>) -> Vec<usize> {
        let largest = of.blocks.iter().map(|block| block.largest);
        let largest = largest.fold(f32::NEG_INFINITY, f32::max);
        // `ln` of 0 is -inf, which keeps all.
        let min_p_floor = largest + (self.min_p as f32).ln();
        let mut kept = match self.top_k {
            Some(top_k) => of.above(of.top_k_floor(top_k)),
            None if self.top_p < 1.0 => {
                // All tokens below this have less than 1 - top_p together: they need not be sorted.
                let rest = (1.0 - self.top_p) / of.logits.len() as f64 * (1.0 - 1e-3);
                of.above(min_p_floor.max(of.normaliser + rest.ln() as f32))
            }
            None => of.above(min_p_floor),
        };
        let by_weight =
            |a: &usize, b: &usize| of.logits[*b].total_cmp(&of.logits[*a]).then(a.cmp(b));
        if let Some(top_k) = self.top_k.filter(|&top_k| top_k < kept.len()) {
            kept.select_nth_unstable_by(top_k - 1, by_weight);
            kept.truncate(top_k);
        }
        kept.sort_unstable_by(by_weight);
        if self.top_p < 1.0 {
            let total: f64 = match self.top_k {
                None => 1.0,
                Some(_) => kept.iter().map(|&index| weight(of.logp(index))).sum(),
            };
            let enough = self.top_p * total * (1.0 - SUM_TOLERANCE);
            let mut sum = 0.0;
            let fewest = kept.iter().take_while(|&&index| {
                let before = sum;
                sum += weight(of.logp(index));
                before < enough
            });
            let fewest = fewest.count();
            kept.truncate(fewest);
        }
        let probable = kept.partition_point(|&index| of.logits[index] >= min_p_floor);
        kept.truncate(probable);
        kept
    }
}

/// A row of logits, looked at in blocks.
struct Distribution<'a> {
    logits: &'a [f32],
    blocks: Vec<Block>,
    /// `ln Σ e^logit`.
    normaliser: f32,
}

struct Block {
    normaliser: f32,
    largest: f32,
}

impl<'a> Distribution<'a> {
    fn new(logits: &'a [f32]) -> Self {
        let blocks: Vec<Block> = logits
            .chunks(BLOCK)
            .map(|block| Block {
                normaliser: log_sum_exp(block),
                largest: largest(block),
            })
            .collect();
        let normalisers: Vec<f32> = blocks.iter().map(|block| block.normaliser).collect();
        Self {
            logits,
            blocks,
            normaliser: log_sum_exp(&normalisers),
        }
    }

    fn logp(&self, index: usize) -> f32 {
        self.logits[index] - self.normaliser
    }

    /// An index with its probability, from a number in [0, 1): first the block, then the token in it.
    fn draw(&self, uniform: f64) -> usize {
        let weights = self
            .blocks
            .iter()
            .map(|block| weight(block.normaliser - self.normaliser));
        let total: f64 = weights.clone().sum();
        let mut left = uniform * total;
        let block = position(weights.clone(), left);
        left -= weights.clone().take(block).sum::<f64>();
        let normaliser = self.blocks[block].normaliser;
        let share = left / weight(normaliser - self.normaliser);
        let weights = self.block(block).map(|logit| weight(logit - normaliser));
        let total: f64 = weights.clone().sum();
        block * BLOCK + position(weights, share * total)
    }

    fn block(&self, block: usize) -> impl Iterator<Item = f32> + Clone {
        let start = block * BLOCK;
        let end = (start + BLOCK).min(self.logits.len());
        self.logits[start..end].iter().copied()
    }

    /// The indices of logits of at least `floor`; blocks without one cost nothing.
    fn above(&self, floor: f32) -> Vec<usize> {
        let mut found = Vec::new();
        let blocks = self.blocks.iter().enumerate();
        for (block, _) in blocks.filter(|(_, block)| block.largest >= floor) {
            let tokens = self.block(block).enumerate();
            let tokens = tokens.filter(|&(_, x)| x >= floor && x > f32::NEG_INFINITY);
            found.extend(tokens.map(|(at, _)| block * BLOCK + at));
        }
        found
    }

    /// A logit that at least `top_k` tokens reach, close to the smallest of them: so many parts of the row have one as large.
    fn top_k_floor(&self, top_k: usize) -> f32 {
        const PART: usize = 64;
        let mut parts: Vec<f32> = self.logits.chunks(PART).map(largest).collect();
        if top_k > parts.len() {
            return f32::NEG_INFINITY;
        }
        *parts
            .select_nth_unstable_by(top_k - 1, |a, b| b.total_cmp(a))
            .1
    }
}

fn largest(x: &[f32]) -> f32 {
    let mut best = [f32::NEG_INFINITY; 16];
    let (blocks, rest) = x.as_chunks::<16>();
    for block in blocks {
        for (best, &x) in best.iter_mut().zip(block) {
            *best = if x > *best { x } else { *best };
        }
    }
    best.iter()
        .chain(rest)
        .fold(f32::NEG_INFINITY, |best, &x| best.max(x))
}

fn weight(scaled: f32) -> f64 {
    f64::from(scaled).exp()
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
        // top_p is of what top_k left, min_p not yet applied: 0.51 of 0.85 needs two.
        let filters = top(Some(3), 0.6, 0.6);
        assert_distribution(filters, &logits, &two);
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

    /// Parts and blocks are shortcuts: they must not change who is kept.
    #[test]
    fn filters_of_a_large_vocabulary_keep_what_sorting_keeps() {
        let mut stream = random_stream(3, "large");
        let logits: Vec<f32> = (0..3 * BLOCK + 77)
            .map(|_| stream.random_range(-8.0f32..8.0).round() / 2.0)
            .collect();
        let mut sorted: Vec<usize> = (0..logits.len()).collect();
        sorted.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]).then(a.cmp(&b)));
        let of = Distribution::new(&logits);
        for top_k in [1, 2, 30, 49, 50, 400, logits.len()] {
            let sampling = Sampling {
                top_k: Some(top_k),
                ..Sampling::default()
            };
            assert_eq!(sampling.kept(&of), sorted[..top_k]);
        }
        for top_p in [0.01, 0.5, 0.99] {
            let sampling = Sampling {
                top_p,
                ..Sampling::default()
            };
            let mut sum = 0.0;
            let expected = sorted.iter().take_while(|&&index| {
                let before = sum;
                sum += f64::from(of.logp(index)).exp();
                before < top_p
            });
            let (found, expected) = (sampling.kept(&of).len(), expected.count());
            assert!(found.abs_diff(expected) <= 1, "{found} for {expected}");
        }
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
