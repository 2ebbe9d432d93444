//! What is counted along a run: what the masks keep, how good the signal is, what it costs.

use pivotal_core::statistics::auc;
use pivotal_core::{Sign, TokenMask};
use pivotal_credit::{Agreement, AgreementCounts};

use crate::arm::DECISIVE_PROBABILITY;

/// Tokens through a decoder.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Cost {
    forward: u64,
    backward: u64,
}

impl Cost {
    /// Tokens sampled or scored.
    pub(crate) fn score(&mut self, tokens: usize) {
        self.forward += tokens as u64;
    }

    /// Tokens of a pass with gradients.
    pub(crate) fn train(&mut self, tokens: usize) {
        self.forward += tokens as u64;
        self.backward += tokens as u64;
    }

    pub(crate) fn add(&mut self, other: Self) {
        self.forward += other.forward;
        self.backward += other.backward;
    }

    /// In forward passes of a token: a backward pass is as much work as two forward ones.
    pub(crate) fn tokens(self) -> u64 {
        self.forward + 2 * self.backward
    }
}

/// Sums over the samples of a run.
#[derive(Clone, Debug, Default)]
pub(crate) struct Tally {
    agreement: AgreementCounts,
    /// Tokens kept, and all tokens, of responses with a positive sign and of those with a negative one.
    kept: [u64; 2],
    tokens: [u64; 2],
    signal: Vec<f32>,
    right: Vec<bool>,
    pub(crate) cost: Cost,
}

/// What masks did over a run.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct RunMasks {
    pub(crate) agreement: Agreement,
    /// Kept share of the tokens of positive and of negative responses, where there were any.
    pub(crate) kept: [Option<f64>; 2],
}

impl Tally {
    /// Counts a response's mask. One without a sign is pushed nowhere, and counts nowhere.
    pub(crate) fn mask(&mut self, keep: &TokenMask, right: &[bool], sign: Sign, logps: &[f32]) {
        let side = match sign {
            Sign::Positive => 0,
            Sign::Negative => 1,
            Sign::Neutral => return,
        };
        self.kept[side] += keep.kept() as u64;
        self.tokens[side] += keep.len() as u64;
        for ((&keep, &right), &logp) in keep.as_slice().iter().zip(right).zip(logps) {
            let probability = Some(f64::from(logp).exp());
            let wanted = right == (side == 0);
            self.agreement
                .push(keep, wanted, probability, DECISIVE_PROBABILITY);
        }
    }

    /// Counts a response's signal.
    pub(crate) fn signal(&mut self, values: &[f32], right: &[bool]) {
        self.signal.extend_from_slice(values);
        self.right.extend_from_slice(right);
    }

    pub(crate) fn masks(&self) -> RunMasks {
        let share = |side: usize| {
            let tokens = self.tokens[side];
            (tokens > 0).then(|| self.kept[side] as f64 / tokens as f64)
        };
        RunMasks {
            agreement: self.agreement.agreement(),
            kept: [share(0), share(1)],
        }
    }

    /// The probability that a right token's signal is above a wrong one's; none without a signal.
    pub(crate) fn token_auc(&self) -> Option<f64> {
        auc(&self.signal, &self.right)
    }
}
