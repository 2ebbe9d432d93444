//! The pairs of one seed, with what every arm needs of them: truth, reference log-probabilities, order.

use pivotal_core::{RandomStream, Side, TokenizedPair, random_stream};
use pivotal_model::Decoder;
use pivotal_train::score::{Group, token_logps};
use rand::Rng;

use crate::error::Result;
use crate::world::pairs::{PairSettings, WorldPair, preference_pairs};

/// Tokens of a forward pass without gradient.
pub(crate) const SCORING_TOKENS: usize = 4096;

/// Both sides of a pair, chosen first.
pub(crate) const SIDES: [Side; 2] = [Side::Chosen, Side::Rejected];

/// The pairs of one seed.
#[derive(Clone, Debug)]
pub(crate) struct TrainingPairs {
    pub(crate) pairs: Vec<WorldPair>,
    pub(crate) tokenized: Vec<TokenizedPair>,
    /// Whether each token is right, chosen then rejected.
    pub(crate) right: Vec<[Vec<bool>; 2]>,
    /// The start policy's log-probabilities in nats, chosen then rejected.
    pub(crate) reference_logps: Vec<[Vec<f32>; 2]>,
}

impl TrainingPairs {
    pub(crate) fn draw(
        settings: &PairSettings,
        seed: u64,
        count: usize,
        start: &Decoder,
    ) -> Result<Self> {
        let pairs = preference_pairs(settings, seed, count)?;
        let tokenized: Vec<TokenizedPair> = (1..)
            .zip(&pairs)
            .map(|(id, pair)| pair.tokenized(id))
            .collect();
        let right = pairs
            .iter()
            .map(|pair| {
                SIDES.map(|side| pair.labels(side).iter().map(|token| token.right).collect())
            })
            .collect();
        let reference_logps = logps(start, &tokenized)?;
        Ok(Self {
            pairs,
            tokenized,
            right,
            reference_logps,
        })
    }

    /// Batches of `size` pairs, each epoch in an order of its own.
    pub(crate) fn batches(&self, seed: u64, size: usize) -> impl Iterator<Item = Vec<usize>> {
        let pairs = self.pairs.len();
        (0_u64..).flat_map(move |epoch| {
            let mut order: Vec<usize> = (0..pairs).collect();
            let mut stream = random_stream(seed, &format!("quickstart/order/{epoch}"));
            shuffle(&mut order, &mut stream);
            // A last batch that is short would weigh its pairs more.
            let whole: Vec<Vec<usize>> = order.chunks_exact(size).map(<[_]>::to_vec).collect();
            whole
        })
    }
}

/// The log-probability of every response token, chosen then rejected.
pub(crate) fn logps(policy: &Decoder, pairs: &[TokenizedPair]) -> Result<Vec<[Vec<f32>; 2]>> {
    let groups: Vec<_> = pairs.iter().map(Group::of_pair).collect();
    let logps = token_logps(policy, &groups, SCORING_TOKENS)?;
    Ok(logps.into_iter().map(two).collect())
}

/// The two entries of a pair.
pub(crate) fn two<T>(entries: Vec<T>) -> [T; 2] {
    entries
        .try_into()
        .unwrap_or_else(|_| unreachable!("a pair has two responses"))
}

/// Fisher–Yates; 64 random bits a draw make the modulo's bias less than 2⁻⁵⁰.
fn shuffle(items: &mut [usize], stream: &mut RandomStream) {
    for last in (1..items.len()).rev() {
        items.swap((stream.next_u64() % (last as u64 + 1)) as usize, last);
    }
}
