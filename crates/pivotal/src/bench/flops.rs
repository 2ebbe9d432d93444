//! How much arithmetic a model needs, counted from its shape: what it must multiply, not what a program happens to.
//!
//! A product of `[m, k]` and `[k, n]` is `2·m·k·n` operations. Nothing is counted for norms, activations, the softmax or
//! the optimizer, and nothing for what is computed twice to save memory.

use pivotal_core::TokenizedPair;
use pivotal_model::DecoderConfig;

/// What a batch asks of the model.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Work {
    /// Tokens through the layers, each prompt once.
    pub(crate) tokens: u64,
    /// Those of them whose last hidden state nobody reads: what follows the last layer's attention is not needed for them.
    /// Neither are their query and what it attends to, a tenth of a layer, which are counted all the same.
    pub(crate) unread: u64,
    /// Positions at which the vocabulary is looked at.
    pub(crate) kept: u64,
    /// Queries times the keys each may see.
    pub(crate) attended: u64,
}

impl Work {
    /// Adds a prompt with the responses that share it, of whose tokens those before the last kept one go through the layers: the
    /// log-probabilities of the kept ones need no more.
    pub(crate) fn add_kept(&mut self, prompt: usize, responses: &[&[bool]]) {
        let needed = |mask: &&[bool]| {
            let kept = mask.iter().filter(|&&kept| kept).count();
            (mask.iter().rposition(|&kept| kept).unwrap_or(0), kept)
        };
        // The prompt's last token is read for every response's first.
        let firsts = responses.iter().filter(|mask| mask.first() == Some(&true));
        let firsts = firsts.count() as u64;
        let responses: Vec<_> = responses.iter().map(needed).collect();
        let kept: usize = responses.iter().map(|&(_, kept)| kept).sum();
        let before = self.tokens;
        self.add(if kept > 0 { prompt } else { 0 }, &responses);
        let read = kept as u64 - firsts + firsts.min(1);
        self.unread += self.tokens - before - read;
    }

    /// [`Work::add_kept`] of a pair whose every response token is kept.
    pub(crate) fn add_scored(&mut self, pair: &TokenizedPair) {
        let sides = [&pair.chosen, &pair.rejected].map(|ids| vec![true; ids.len()]);
        self.add_kept(pair.prompt.len(), &[&sides[0], &sides[1]]);
    }

    /// Adds a prompt with the responses that share it, `(tokens, kept)` each.
    pub(crate) fn add(&mut self, prompt: usize, responses: &[(usize, usize)]) {
        let causal = |tokens: u64| tokens * (tokens + 1) / 2;
        let prompt = prompt as u64;
        self.tokens += prompt;
        self.attended += causal(prompt);
        for &(tokens, kept) in responses {
            let tokens = tokens as u64;
            self.tokens += tokens;
            self.kept += kept as u64;
            self.attended += tokens * prompt + causal(tokens);
        }
    }
}

/// Which way the work goes through the model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Pass {
    /// Values alone.
    Forward,
    /// Values and gradients: of every parameter, or of adapters alone where there are any.
    Training,
}

/// What the kept positions are projected on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Head {
    /// Every token id.
    Vocabulary,
    /// One number, as a reward model does.
    Value,
}

/// Operations by kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub(crate) struct Flops {
    pub(crate) linear: u64,
    pub(crate) lora: u64,
    pub(crate) head: u64,
    /// The quadratic part: scores and mixtures of values.
    pub(crate) attention: u64,
}

impl Flops {
    pub(crate) fn total(self) -> u64 {
        self.linear + self.lora + self.head + self.attention
    }
}

impl std::ops::Add for Flops {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            linear: self.linear + other.linear,
            lora: self.lora + other.lora,
            head: self.head + other.head,
            attention: self.attention + other.attention,
        }
    }
}

/// Counts the operations of `work`, with adapters of `rank` on every linear layer; without any for 0.
///
/// A backward pass costs a product for the gradient of the input and, where a weight is trained, one for the weight's.
/// Below the first layer's q, k and v nothing is trained beside adapters, so that gradient is not counted.
pub(crate) fn flops(
    config: &DecoderConfig,
    rank: usize,
    work: Work,
    head: Head,
    pass: Pass,
) -> Flops {
    let shapes = config.layer_linears().map(|(_, shape)| shape);
    let weights = |shapes: &[[usize; 2]]| {
        let sizes = shapes.iter().map(|[outputs, inputs]| outputs * inputs);
        sizes.sum::<usize>() as u64
    };
    let factors = |shapes: &[[usize; 2]], side: usize| {
        let sizes = shapes.iter().map(|shape| rank * shape[side]);
        sizes.sum::<usize>() as u64
    };
    // `layer_linears` begins with q, k and v.
    let (first, second) = shapes.split_at(3);
    let layers = config.layers as u64;
    let adapters = |shapes: &[[usize; 2]]| factors(shapes, 1) + factors(shapes, 0);
    let all_but_unread = |all: u64, second: u64| work.tokens * layers * all - work.unread * second;
    let rows = match head {
        Head::Vocabulary => config.vocab_size,
        Head::Value => 1,
    };
    let forward = Flops {
        linear: 2 * all_but_unread(weights(&shapes), weights(second)),
        lora: 2 * all_but_unread(adapters(&shapes), adapters(second)),
        head: 2 * work.kept * (rows * config.hidden_size) as u64,
        attention: 4 * work.attended * layers * config.query_size() as u64,
    };
    match pass {
        Pass::Forward => forward,
        Pass::Training if rank == 0 => {
            let backward = Flops {
                linear: 2 * forward.linear,
                lora: 0,
                head: 2 * forward.head,
                attention: 2 * forward.attention,
            };
            forward + backward
        }
        Pass::Training => {
            let backward = Flops {
                linear: forward.linear - 2 * work.tokens * weights(first),
                lora: 2 * forward.lora - 2 * work.tokens * factors(first, 1),
                head: match head {
                    Head::Vocabulary => forward.head,
                    Head::Value => 2 * forward.head,
                },
                attention: 2 * forward.attention,
            };
            forward + backward
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::subject::smollm2_shape;

    /// One layer of width 2 with one head of 2, a feed-forward width of 3 and 5 token ids.
    fn tiny() -> DecoderConfig {
        DecoderConfig {
            vocab_size: 5,
            hidden_size: 2,
            intermediate_size: 3,
            layers: 1,
            heads: 1,
            kv_heads: 1,
            head_dim: 2,
            ..smollm2_shape()
        }
    }

    #[test]
    fn a_batch_is_counted_by_hand() {
        let mut work = Work::default();
        work.add(3, &[(2, 1), (1, 1)]);
        // Prompt: 1 + 2 + 3 keys. First response: 4 + 5; second: 4.
        let expected = Work {
            tokens: 6,
            unread: 0,
            kept: 2,
            attended: 19,
        };
        assert_eq!(work, expected);
    }

    #[test]
    fn tokens_after_the_last_kept_one_are_no_work() {
        let mut work = Work::default();
        work.add_kept(3, &[&[true, false, true, false], &[true]]);
        work.add_kept(9, &[&[false, false]]);
        let mut expected = Work::default();
        expected.add(3, &[(2, 2), (0, 1)]);
        // Read are the prompt's last token, for both responses, and the first response's second.
        expected.unread = 3;
        assert_eq!(work, expected);
    }

    #[test]
    fn a_forward_pass_is_counted_by_hand() {
        let work = Work {
            tokens: 10,
            unread: 4,
            kept: 7,
            attended: 11,
        };
        // q, k, v and o have 4 weights each, gate, up and down 6 each: 34 together, 22 after the attention.
        let expected = Flops {
            linear: 2 * (10 * 34 - 4 * 22),
            // In: 2 for six layers, 3 for down; out: 2 for q, k, v, o and down, 3 for gate and up. Of q, k and v: 4 each.
            lora: 2 * (10 * (15 + 16) - 4 * (15 + 16 - 12)),
            head: 2 * 7 * 10,
            attention: 4 * 11 * 2,
        };
        let found = flops(&tiny(), 1, work, Head::Vocabulary, Pass::Forward);
        assert_eq!(found, expected);
        assert_eq!(found.total(), 504 + 468 + 140 + 88);
        let value = flops(&tiny(), 0, work, Head::Value, Pass::Forward);
        assert_eq!((value.lora, value.head), (0, 2 * 7 * 2));
    }

    #[test]
    fn a_training_pass_is_counted_by_hand() {
        let work = Work {
            tokens: 1,
            unread: 0,
            kept: 1,
            attended: 1,
        };
        let full = flops(&tiny(), 0, work, Head::Vocabulary, Pass::Training);
        let thrice = Flops {
            linear: 3 * 68,
            lora: 0,
            head: 3 * 20,
            attention: 3 * 8,
        };
        assert_eq!(full, thrice);
        let lora = flops(&tiny(), 1, work, Head::Vocabulary, Pass::Training);
        let expected = Flops {
            // Twice, but for q, k and v of the first layer: 12 weights.
            linear: 2 * 68 - 24,
            // Thrice, but for the same three inputs of 2.
            lora: 3 * 62 - 12,
            head: 2 * 20,
            attention: 3 * 8,
        };
        assert_eq!(lora, expected);
    }

    /// The machine-independent cost of the pairs that are measured: prompt 140, responses 59 and 58, about 0.18 TFLOP with
    /// the reference's pass, attention and adapters not counted.
    #[test]
    fn a_pair_of_smollm2_costs_what_is_said() {
        let config = smollm2_shape();
        let mut work = Work::default();
        work.add(140, &[(59, 59), (58, 58)]);
        let train = flops(&config, 16, work, Head::Vocabulary, Pass::Training);
        let reference = flops(&config, 0, work, Head::Vocabulary, Pass::Forward);
        assert_eq!(reference.linear, 2 * 257 * 106_168_320);
        assert_eq!(reference.head, 2 * 117 * 49_152 * 576);
        let both = train + reference;
        let tera = (both.linear + both.head) as f64 / 1e12;
        assert!((tera - 0.18).abs() < 0.005, "{tera}");
    }
}
