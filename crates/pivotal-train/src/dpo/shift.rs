//! How probable the tokens of a step are: kept and dropped ones, of chosen and of rejected responses.
//!
//! The kept tokens' log-probabilities are those that the loss takes. Those of the dropped ones cost what follows the last kept token,
//! the last layer where no kept token is predicted, and a pass through the head, that nothing else needs, so they are measured now and
//! then ([`super::DpoObjective::dropped_every`]), off the tape, from the same hidden states.

use burn::tensor::Tensor;
use pivotal_core::{Gather, Pack};
use pivotal_model::Decoder;

use super::{DpoItem, DpoMetrics};
use crate::score::values;

/// Sums over a step, `[chosen, rejected]`.
#[derive(Default)]
pub(super) struct Shifts {
    kept: [TokenSum; 2],
    dropped: [TokenSum; 2],
}

/// Of log-probabilities and of their changes since the reference, in nats.
#[derive(Clone, Copy, Default)]
struct TokenSum {
    tokens: usize,
    logp: f64,
    shift: f64,
}

impl Shifts {
    /// Takes in the kept tokens of a micro-batch.
    pub(super) fn add_kept(&mut self, items: &[&DpoItem], gathers: &[Gather], logps: &[f32]) {
        add(&mut self.kept, items, gathers, logps);
    }

    /// Measures the dropped tokens of a micro-batch whose hidden states are known.
    pub(super) fn measure_dropped(
        &mut self,
        policy: &Decoder,
        items: &[&DpoItem],
        pack: &Pack,
        hidden: &Tensor<2>,
    ) {
        let gathers = pack.gather(|response, position| {
            !items[response / 2].keep[response % 2].as_slice()[position]
        });
        if gathers.is_empty() {
            return;
        }
        let hidden = hidden.clone().without_autodiff();
        let logps = values(policy.detached().token_logps(&hidden, &gathers));
        add(&mut self.dropped, items, &gathers, &logps);
    }

    /// Puts the means in `metrics`.
    pub(super) fn report(&self, metrics: &mut DpoMetrics, with_reference: bool) {
        let [chosen, rejected] = self.kept.map(|sum| sum.logp());
        (metrics.chosen_kept_logp, metrics.rejected_kept_logp) = (chosen, rejected);
        let [chosen, rejected] = self.dropped.map(|sum| sum.logp());
        (metrics.chosen_dropped_logp, metrics.rejected_dropped_logp) = (chosen, rejected);
        if with_reference {
            let [chosen, rejected] = self.kept.map(|sum| sum.shift());
            (metrics.chosen_kept_shift, metrics.rejected_kept_shift) = (chosen, rejected);
            let [chosen, rejected] = self.dropped.map(|sum| sum.shift());
            (metrics.chosen_dropped_shift, metrics.rejected_dropped_shift) = (chosen, rejected);
        }
    }
}

impl TokenSum {
    fn logp(&self) -> Option<f64> {
        self.mean(self.logp)
    }

    fn shift(&self) -> Option<f64> {
        self.mean(self.shift)
    }

    /// A dropped token may be impossible: it has no part in the loss, and its mean is not known.
    fn mean(&self, sum: f64) -> Option<f64> {
        (self.tokens > 0 && sum.is_finite()).then(|| sum / self.tokens as f64)
    }
}

fn add(sums: &mut [TokenSum; 2], items: &[&DpoItem], gathers: &[Gather], logps: &[f32]) {
    for (gather, &logp) in gathers.iter().zip(logps) {
        let (item, side) = (items[gather.response / 2], gather.response % 2);
        let sum = &mut sums[side];
        sum.tokens += 1;
        sum.logp += f64::from(logp);
        if let Some(reference) = item.reference_logps[side].get(gather.position) {
            sum.shift += f64::from(logp - reference);
        }
    }
}
