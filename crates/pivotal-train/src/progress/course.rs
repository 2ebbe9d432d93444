//! What is known of a run so far.

use std::collections::VecDeque;
use std::ops::Range;
use std::time::Duration;

use super::REPEAT;
use crate::onpolicy::Timings;

/// One step's numbers, as far as a recipe has them.
#[derive(Clone, Debug, Default)]
pub(crate) struct StepNumbers {
    /// The loss.
    pub(crate) loss: f64,
    /// Pairs ranked right.
    pub(crate) accuracy: Option<f64>,
    /// Mean score of the responses.
    pub(crate) score: Option<f64>,
    /// How far the policy is from its reference, in nats a token.
    pub(crate) kl: Option<f64>,
    /// Share of response tokens that the loss uses.
    pub(crate) kept_fraction: Option<f64>,
    /// Segments a hundred tokens.
    pub(crate) segments_per_100_tokens: Option<f64>,
    /// Norm of the gradient.
    pub(crate) grad_norm: f64,
    /// Learning rate.
    pub(crate) lr: f64,
    /// Tokens trained on, or sampled.
    pub(crate) tokens: usize,
    /// Where the step's time went, where it is measured.
    pub(crate) timings: Option<Timings>,
}

impl StepNumbers {
    /// Of a step that sampled its tokens.
    pub(crate) fn sampled(timings: Timings) -> Self {
        Self {
            tokens: timings.sampled_tokens as usize,
            timings: Some(timings),
            ..Self::default()
        }
    }
}

/// A run so far.
pub(super) struct Course {
    pub(super) recipe: &'static str,
    start: u64,
    steps: u64,
    pub(super) step: u64,
    pub(super) phase: Option<&'static str>,
    pub(super) numbers: Option<StepNumbers>,
    pub(super) loss: Trace,
    /// Of the score, or of the accuracy where there is no score.
    pub(super) score: Trace,
    /// When each of the last steps ended, and its tokens.
    ends: VecDeque<(Duration, usize)>,
    /// Seconds of the last steps in each part.
    parts: VecDeque<[f64; 3]>,
    pub(super) notices: Vec<Notice>,
}

/// A warning that has fired.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Notice {
    /// What it says now; its name stands before the first colon.
    pub(super) text: String,
    /// The step that fired it last.
    pub(super) step: u64,
    /// How often it has.
    pub(super) count: u64,
    said: Duration,
}

/// Speed is taken over so many steps.
const RECENT_STEPS: usize = 20;

impl Course {
    pub(super) fn new(recipe: &'static str, range: Range<u64>) -> Self {
        Self {
            recipe,
            start: range.start,
            steps: range.end,
            step: range.start,
            phase: None,
            numbers: None,
            loss: Trace::default(),
            score: Trace::default(),
            ends: VecDeque::from([(Duration::ZERO, 0)]),
            parts: VecDeque::new(),
            notices: Vec::new(),
        }
    }

    pub(super) fn steps(&self) -> u64 {
        self.steps
    }

    /// The share of the run that is done.
    pub(super) fn done(&self) -> f64 {
        match self.steps {
            0 => 1.0,
            steps => (self.step as f64 / steps as f64).min(1.0),
        }
    }

    pub(super) fn step(&mut self, step: u64, now: Duration, numbers: StepNumbers) {
        self.step = step;
        self.phase = None;
        self.loss.push(numbers.loss);
        if let Some(score) = numbers.score.or(numbers.accuracy) {
            self.score.push(score);
        }
        self.ends.push_back((now, numbers.tokens));
        if self.ends.len() > RECENT_STEPS + 1 {
            self.ends.pop_front();
        }
        if let Some(timings) = &numbers.timings {
            self.parts.push_back([
                timings.generation_seconds,
                timings.scoring_seconds,
                timings.update_seconds,
            ]);
            if self.parts.len() > RECENT_STEPS {
                self.parts.pop_front();
            }
        }
        self.numbers = Some(numbers);
    }

    /// Takes a warning in; the notice if it is to be said: new, or not said for a while.
    pub(super) fn warn(&mut self, text: &str, now: Duration) -> Option<&Notice> {
        let name = name(text);
        let known = self
            .notices
            .iter()
            .position(|notice| self::name(&notice.text) == name);
        let (index, due) = match known {
            Some(index) => (index, now >= self.notices[index].said + REPEAT),
            None => {
                let text = String::new();
                let (step, count, said) = (0, 0, now);
                self.notices.push(Notice {
                    text,
                    step,
                    count,
                    said,
                });
                (self.notices.len() - 1, true)
            }
        };
        let notice = &mut self.notices[index];
        notice.text = text.to_owned();
        notice.step = self.step;
        notice.count += 1;
        if due {
            notice.said = now;
        }
        due.then_some(notice)
    }

    /// Tokens a second over the last steps.
    pub(super) fn tokens_per_second(&self) -> Option<f64> {
        let tokens: usize = self.ends.iter().skip(1).map(|&(_, tokens)| tokens).sum();
        let seconds = self.recent()?.as_secs_f64();
        (seconds > 0.0 && tokens > 0).then(|| tokens as f64 / seconds)
    }

    /// How long the steps that are left take at the speed of the last ones.
    pub(super) fn eta(&self) -> Option<Duration> {
        let steps = self.ends.len() as u32 - 1;
        let left = self.steps.saturating_sub(self.step);
        let seconds = self.recent()?.as_secs_f64() / f64::from(steps) * left as f64;
        Duration::try_from_secs_f64(seconds).ok()
    }

    /// Shares of generation, scoring and update in the last steps.
    pub(super) fn shares(&self) -> Option<[f64; 3]> {
        let mut sums = [0.0; 3];
        for part in &self.parts {
            sums.iter_mut()
                .zip(part)
                .for_each(|(sum, part)| *sum += part);
        }
        let all: f64 = sums.iter().sum();
        (all > 0.0).then(|| sums.map(|sum| sum / all))
    }

    /// The steps that this process takes begin here.
    pub(super) fn start(&self) -> u64 {
        self.start
    }

    fn recent(&self) -> Option<Duration> {
        let (&(first, _), &(last, _)) = (self.ends.front()?, self.ends.back()?);
        (self.ends.len() > 1).then(|| last.saturating_sub(first))
    }
}

/// Warnings begin with their name and a colon.
fn name(text: &str) -> &str {
    text.split(':').next().unwrap_or(text)
}

/// The course of a number over the run, in at most [`Trace::POINTS`] means of as many steps each.
#[derive(Clone, Debug)]
pub(super) struct Trace {
    points: Vec<f64>,
    steps_per_point: u32,
    sum: f64,
    count: u32,
}

impl Default for Trace {
    fn default() -> Self {
        Self {
            points: Vec::new(),
            steps_per_point: 1,
            sum: 0.0,
            count: 0,
        }
    }
}

impl Trace {
    const POINTS: usize = 512;

    fn push(&mut self, value: f64) {
        if !value.is_finite() {
            return;
        }
        self.sum += value;
        self.count += 1;
        if self.count < self.steps_per_point {
            return;
        }
        self.points.push(self.sum / f64::from(self.count));
        (self.sum, self.count) = (0.0, 0);
        if self.points.len() == Self::POINTS {
            let pairs = self.points.chunks_exact(2);
            self.points = pairs.map(|pair| (pair[0] + pair[1]) / 2.0).collect();
            self.steps_per_point *= 2;
        }
    }

    /// The course in at most `columns` means.
    pub(super) fn columns(&self, columns: usize) -> Vec<f64> {
        if self.points.len() <= columns {
            return self.points.clone();
        }
        let edge = |column: usize| column * self.points.len() / columns;
        let mean = |points: &[f64]| points.iter().sum::<f64>() / points.len() as f64;
        (0..columns)
            .map(|column| mean(&self.points[edge(column)..edge(column + 1)]))
            .collect()
    }

    pub(super) fn ends(&self) -> Option<(f64, f64)> {
        Some((*self.points.first()?, *self.points.last()?))
    }
}
