//! Rollouts on disk: `rollouts.jsonl`, one line a response.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use pivotal_core::{SegmentRecord, Sign, read_file, write_atomic};
use pivotal_credit::ResponseCredit;
use pivotal_model::Finish;
use serde::Serialize;

use super::sample::Rollout;
use super::score::ResponseScore;
use crate::error::Result;
use crate::run::{count_of, write_error};

/// One line of `rollouts.jsonl`. Lists are `[tokens]`; empty where a recipe did not need the number.
#[derive(Clone, Debug, Default, Serialize)]
pub struct RolloutRecord<'a> {
    /// The step, or round, that it was sampled in.
    pub step: u64,
    /// The prompt's row.
    pub id: u64,
    /// Which of the prompt's samples.
    pub sample: usize,
    /// Its text.
    pub text: &'a str,
    /// Why it ends: eos, stop or length.
    pub finish: &'static str,
    /// Its tokens.
    pub token_ids: &'a [u32],
    /// Its score.
    pub score: f32,
    /// What its checks come to.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub checks: Option<f32>,
    /// The reward model's score.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reward: Option<f32>,
    /// Whether rejection sampling learns from it; absent elsewhere, as is why.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub accepted: Option<bool>,
    /// Why, or why not: accepted, empty, duplicate, below_minimum or outranked.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub verdict: Option<&'static str>,
    /// Its advantage, where it is one number.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub advantage: Option<f32>,
    /// The advantage of each token, where they differ.
    #[serde(skip_serializing_if = "<[f32]>::is_empty")]
    pub advantages: &'a [f32],
    /// Log-probabilities as sampled, in nats.
    pub sampled_logps: &'a [f32],
    /// The same from the training path.
    #[serde(skip_serializing_if = "<[f32]>::is_empty")]
    pub old_logps: &'a [f32],
    /// The same under the reference.
    #[serde(skip_serializing_if = "<[f32]>::is_empty")]
    pub reference_logps: &'a [f32],
    /// The token signal.
    #[serde(skip_serializing_if = "<[f32]>::is_empty")]
    pub signal: &'a [f32],
    /// The numbers that the signal was cut and judged by.
    #[serde(flatten)]
    pub used: Option<UsedNumbers<'a>>,
    /// Its segments.
    #[serde(skip_serializing_if = "<[SegmentRecord]>::is_empty")]
    pub segments: &'a [SegmentRecord],
    /// Which tokens the loss uses.
    #[serde(skip_serializing_if = "<[bool]>::is_empty")]
    pub keep: &'a [bool],
}

/// The numbers that credit used, under the names that a [`pivotal_core::CreditRecord`] has them by.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct UsedNumbers<'a> {
    /// The baseline b: one number, or one a token where it depends on the position.
    pub baseline: &'a [f32],
    /// The offset δ.
    pub offset: f32,
    /// The jump threshold τ, by the cut rule `jump`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub jump: Option<f32>,
    /// The whole response's sign.
    pub sequence_sign: Sign,
}

impl<'a> UsedNumbers<'a> {
    /// Those of one response.
    pub fn of(credit: &'a ResponseCredit) -> Self {
        Self {
            baseline: &credit.baseline,
            offset: credit.offset,
            jump: credit.jump,
            sequence_sign: credit.sequence_sign,
        }
    }
}

impl<'a> RolloutRecord<'a> {
    /// What every recipe knows of a rollout; the rest is empty.
    pub fn new(step: u64, rollout: &'a Rollout, score: &ResponseScore) -> Self {
        Self {
            step,
            id: rollout.id,
            sample: rollout.sample,
            text: &rollout.text,
            finish: finish_name(rollout.finish),
            token_ids: &rollout.token_ids,
            score: score.total,
            checks: score.checks,
            reward: score.reward,
            sampled_logps: &rollout.sampled_logps,
            ..Self::default()
        }
    }

    /// Adds what credit made of it.
    #[must_use]
    pub fn with_credit(mut self, credit: Option<&'a ResponseCredit>) -> Self {
        if let Some(credit) = credit {
            self.signal = &credit.signal;
            self.used = Some(UsedNumbers::of(credit));
            self.segments = &credit.segments;
            self.keep = credit.keep.as_slice();
        }
        self
    }
}

/// Why a response ends, as records name it.
pub(crate) fn finish_name(finish: Finish) -> &'static str {
    match finish {
        Finish::Eos => "eos",
        Finish::Stop => "stop",
        Finish::Length => "length",
    }
}

/// A file of JSON lines that know their step, and that can be taken back to an earlier one.
#[derive(Debug)]
pub struct StepLog {
    path: PathBuf,
    file: File,
}

impl StepLog {
    /// Opens `name` of a run and forgets what came after `step`.
    ///
    /// # Errors
    /// [`crate::Error::File`].
    pub fn open(run: &Path, name: &str, step: u64) -> Result<Self> {
        Self::open_where(run, name, |logged| logged <= step)
    }

    /// [`StepLog::open`] of lines that know their round: it is their `round` that counts.
    ///
    /// # Errors
    /// [`crate::Error::File`].
    pub fn open_rounds(run: &Path, name: &str, round: u64) -> Result<Self> {
        Self::open_counted(run, name, "round", |logged| logged <= round)
    }

    /// Opens `name` of a run and forgets the steps for which `keep` does not say so, and a line that was torn.
    ///
    /// # Errors
    /// [`crate::Error::File`].
    pub fn open_where(run: &Path, name: &str, keep: impl Fn(u64) -> bool) -> Result<Self> {
        Self::open_counted(run, name, "step", keep)
    }

    fn open_counted(run: &Path, name: &str, key: &str, keep: impl Fn(u64) -> bool) -> Result<Self> {
        let path = run.join(name);
        if path.exists() {
            let bytes = read_file(&path)?;
            let text = String::from_utf8_lossy(&bytes);
            let kept: String = text
                .lines()
                .filter(|line| count_of(line, key).is_some_and(&keep))
                .flat_map(|line| [line, "\n"])
                .collect();
            write_atomic(&path, kept.as_bytes())?;
        }
        let file = OpenOptions::new().create(true).append(true).open(&path);
        let file = file.map_err(|source| write_error(&path, source))?;
        Ok(Self { path, file })
    }

    /// Adds lines; each must have the `step`, or `round`, that the file goes by.
    ///
    /// # Errors
    /// [`crate::Error::File`] if the disk is full.
    pub fn write(&mut self, records: impl IntoIterator<Item = impl Serialize>) -> Result<()> {
        let mut lines = Vec::new();
        for record in records {
            serde_json::to_writer(&mut lines, &record).expect("a record is plain data in memory");
            lines.push(b'\n');
        }
        let written = self.file.write_all(&lines);
        written.map_err(|source| write_error(&self.path, source))
    }

    /// The last line, if any.
    ///
    /// # Errors
    /// [`crate::Error::File`].
    pub fn last_line(&self) -> Result<Option<String>> {
        let bytes = read_file(&self.path)?;
        let text = String::from_utf8_lossy(&bytes);
        Ok(text.lines().last().map(str::to_owned))
    }

    /// Writes what was added to the disk: before a checkpoint that counts on it.
    ///
    /// # Errors
    /// [`crate::Error::File`].
    pub fn sync(&self) -> Result<()> {
        let synced = self.file.sync_data();
        synced.map_err(|source| write_error(&self.path, source))
    }
}
