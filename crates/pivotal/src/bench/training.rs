//! What the suites that train share: which pairs make which step, and how a run of steps is timed.

use std::time::Instant;

use pivotal_data::{BatchOptions, Batcher, Cursor, Order};
use pivotal_kernels::account;
use pivotal_train::settings::OptimizerSettings;

use crate::bench::outcome::Repetition;
use crate::bench::{Bench, Settings};
use crate::failure::Failure;

/// Small enough that hundreds of steps over random pairs stay finite; no time depends on it.
const LR: f64 = 1e-5;

/// The steps to measure: indices into the pairs.
pub(crate) struct Steps {
    pub(crate) batches: Vec<Vec<usize>>,
}

impl Steps {
    /// So many batches in the recipes' own order; one pass over the data for 0.
    pub(crate) fn new(bench: &Bench, steps: usize) -> Result<Self, Failure> {
        let batch = bench.settings.batch;
        let options = BatchOptions {
            seed: 1,
            items_per_batch: batch,
            order: Order::Shuffled,
        };
        let lengths = vec![1; bench.subject.pairs.len()];
        let batcher = Batcher::new(lengths, options, Cursor::default())?;
        let count = match steps {
            0 => batcher.batches_per_epoch(),
            steps => steps,
        };
        let batches = batcher.take(count).map(|batch| batch.items).collect();
        Ok(Self { batches })
    }

    /// Pairs trained on; one that several steps take counts each time.
    pub(crate) fn pairs(&self) -> usize {
        self.indices().count()
    }

    /// Every index, in order, as often as it is taken.
    pub(crate) fn indices(&self) -> impl Iterator<Item = usize> + '_ {
        self.batches.iter().flatten().copied()
    }

    /// Every index once, in ascending order.
    pub(crate) fn distinct(&self) -> Vec<usize> {
        let mut indices: Vec<usize> = self.indices().collect();
        indices.sort_unstable();
        indices.dedup();
        indices
    }
}

/// The recipes' optimizer.
pub(crate) fn optimizer_settings(settings: &Settings) -> OptimizerSettings {
    OptimizerSettings {
        lr: LR,
        batch: settings.batch,
        activations: settings.activations,
        ..OptimizerSettings::default()
    }
}

/// Runs `body` once for warmth with the first batch alone, then `repeat` times with all of them, timed.
///
/// `body` gets batches and the number of the first step, and returns what of its time the reference took.
pub(crate) fn timed(
    steps: &Steps,
    repeat: usize,
    mut body: impl FnMut(&[Vec<usize>], u64) -> Result<Option<f64>, Failure>,
) -> Result<Vec<Repetition>, Failure> {
    body(&steps.batches[..1], 0)?;
    timed_warm(steps, repeat, body)
}

/// [`timed`], of work that has been done before.
pub(crate) fn timed_warm(
    steps: &Steps,
    repeat: usize,
    mut body: impl FnMut(&[Vec<usize>], u64) -> Result<Option<f64>, Failure>,
) -> Result<Vec<Repetition>, Failure> {
    let count = steps.batches.len() as u64;
    let repetition = |index: usize| {
        account::start();
        let begin = Instant::now();
        let outcome = body(&steps.batches, 1 + index as u64 * count);
        let seconds = begin.elapsed().as_secs_f64();
        let parts = account::take();
        Ok(Repetition {
            seconds,
            reference_seconds: outcome?,
            parts,
        })
    };
    (0..repeat).map(repetition).collect()
}
