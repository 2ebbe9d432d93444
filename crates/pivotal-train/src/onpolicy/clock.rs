//! Where a step's time goes. Kept apart from the metrics, which are the same bytes on every run.

use std::path::Path;
use std::time::{Duration, Instant};

use serde::Serialize;

use super::record::StepLog;
use crate::error::Result;

/// Seconds of one step, or of a run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Timings {
    /// Sampling responses.
    pub generation_seconds: f64,
    /// Scoring them: checks, reward model, reference, credit.
    pub scoring_seconds: f64,
    /// Old log-probabilities, gradients and optimizer.
    pub update_seconds: f64,
    /// Share of the three that sampling took.
    pub generation_share: f64,
    /// Share that scoring took.
    pub scoring_share: f64,
    /// Share that the update took.
    pub update_share: f64,
    /// Tokens sampled.
    pub sampled_tokens: u64,
}

/// A stopwatch over the parts of a step; its lines go to `timings.jsonl`.
#[derive(Debug)]
pub struct Clock {
    log: StepLog,
    step: [Duration; 3],
    total: [Duration; 3],
    tokens: u64,
    last: Timings,
}

impl Clock {
    /// Opens `timings.jsonl` of a run; a resumed run goes on with it.
    ///
    /// # Errors
    /// [`crate::Error::File`].
    pub fn open(run: &Path) -> Result<Self> {
        Ok(Self {
            // Steps that are taken again are timed again.
            log: StepLog::open(run, "timings.jsonl", u64::MAX)?,
            step: [Duration::ZERO; 3],
            total: [Duration::ZERO; 3],
            tokens: 0,
            last: Timings::default(),
        })
    }

    /// Times sampling.
    pub fn generation<T>(&mut self, body: impl FnOnce() -> T) -> T {
        self.part(0, body)
    }

    /// Times scoring.
    pub fn scoring<T>(&mut self, body: impl FnOnce() -> T) -> T {
        self.part(1, body)
    }

    /// Times the update.
    pub fn update<T>(&mut self, body: impl FnOnce() -> T) -> T {
        self.part(2, body)
    }

    fn part<T>(&mut self, part: usize, body: impl FnOnce() -> T) -> T {
        let begin = Instant::now();
        let result = body();
        self.step[part] += begin.elapsed();
        result
    }

    /// Writes the step's line and begins the next.
    ///
    /// # Errors
    /// [`crate::Error::File`].
    pub fn lap(&mut self, step: u64, sampled_tokens: usize) -> Result<Timings> {
        #[derive(Serialize)]
        struct Line {
            step: u64,
            #[serde(flatten)]
            timings: Timings,
        }
        let timings = shares(self.step, sampled_tokens as u64);
        for (total, part) in self.total.iter_mut().zip(&mut self.step) {
            *total += std::mem::take(part);
        }
        self.tokens += sampled_tokens as u64;
        self.last = timings;
        self.log.write([Line { step, timings }])?;
        Ok(timings)
    }

    /// Of the last step.
    pub fn last(&self) -> Timings {
        self.last
    }

    /// Of all steps that this process took.
    pub fn total(&self) -> Timings {
        shares(self.total, self.tokens)
    }
}

fn shares(parts: [Duration; 3], sampled_tokens: u64) -> Timings {
    let [generation, scoring, update] = parts.map(|part| part.as_secs_f64());
    let all = (generation + scoring + update).max(f64::MIN_POSITIVE);
    Timings {
        generation_seconds: generation,
        scoring_seconds: scoring,
        update_seconds: update,
        generation_share: generation / all,
        scoring_share: scoring / all,
        update_share: update / all,
        sampled_tokens,
    }
}
