//! Cut rules: where segments begin (METHOD, section 4). Each is a state machine that streams in O(1) memory, one token
//! at a time, without allocating; `push` says whether that token begins a segment. The first token always does.

use pivotal_core::Sign;
use serde::{Deserialize, Serialize};

use crate::{Between, SchmittTrigger, Width};

/// A cut rule with its parameters.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Cut {
    /// Never: the response is one segment.
    Sequence,
    /// At every token.
    Token,
    /// Every so many tokens.
    Fixed(usize),
    /// After a token whose text ends in one of these characters.
    Punctuation(String),
    /// Where the signal moves by more than this from one token to the next.
    Jump(Width),
    /// Where a Schmitt trigger around the baseline changes its state.
    Schmitt(Between),
    /// At a token drawn from a reference distribution of more than this entropy, in nats; that is, after the token whose
    /// successor is so open (Yin et al. 2025, arXiv:2501.02790).
    Entropy(f32),
    /// At improbable tokens (Guo et al. 2025, arXiv:2505.23564).
    Improbable {
        /// A token is improbable if the policy that sampled it gave it less than this.
        probability: f64,
        /// One in so many of them begins a segment.
        every: usize,
    },
    /// At offsets given with the data.
    External,
}

/// Cuts every `every` tokens.
#[derive(Clone, Copy, Debug)]
pub struct FixedCutter {
    every: usize,
    since: usize,
}

impl FixedCutter {
    /// Segments of `every` ≥ 1 tokens; 0 counts as 1.
    pub fn new(every: usize) -> Self {
        let every = every.max(1);
        Self {
            every,
            since: every,
        }
    }

    /// Takes the next token.
    #[inline]
    pub fn push(&mut self) -> bool {
        let cut = self.since == self.every;
        self.since = if cut { 1 } else { self.since + 1 };
        cut
    }
}

/// Cuts where the signal moves by more than a threshold.
#[derive(Clone, Copy, Debug)]
pub struct JumpCutter {
    threshold: f32,
    previous: Option<f32>,
}

impl JumpCutter {
    /// Cuts where |r_t − r_{t−1}| is above `threshold`, in the signal's unit.
    pub fn new(threshold: f32) -> Self {
        Self {
            threshold,
            previous: None,
        }
    }

    /// Takes the next token's signal.
    #[inline]
    pub fn push(&mut self, reward: f32) -> bool {
        match self.previous.replace(reward) {
            Some(previous) => (reward - previous).abs() > self.threshold,
            None => true,
        }
    }
}

/// Cuts after a token whose text ends in one of a set of characters.
#[derive(Clone, Copy, Debug)]
pub struct PunctuationCutter<'a> {
    marks: &'a str,
    ended: bool,
}

impl<'a> PunctuationCutter<'a> {
    /// Cuts after any character of `marks`.
    pub fn new(marks: &'a str) -> Self {
        Self { marks, ended: true }
    }

    /// Takes the next token's text.
    #[inline]
    pub fn push(&mut self, text: &str) -> bool {
        let ends = text
            .chars()
            .next_back()
            .is_some_and(|last| self.marks.contains(last));
        std::mem::replace(&mut self.ended, ends)
    }
}

/// Cuts at ascending offsets.
#[derive(Clone, Copy, Debug)]
pub struct OffsetCutter<'a> {
    offsets: &'a [usize],
    position: usize,
}

impl<'a> OffsetCutter<'a> {
    /// Cuts at `offsets`, strictly ascending; 0 may be left out.
    pub fn new(offsets: &'a [usize]) -> Self {
        Self {
            offsets,
            position: 0,
        }
    }

    /// Takes the next token.
    #[inline]
    pub fn push(&mut self) -> bool {
        let listed = self.offsets.first() == Some(&self.position);
        if listed {
            self.offsets = &self.offsets[1..];
        }
        let cut = listed || self.position == 0;
        self.position += 1;
        cut
    }
}

/// Cuts at tokens drawn from a distribution of high entropy.
#[derive(Clone, Copy, Debug)]
pub struct EntropyCutter<'a> {
    entropies: &'a [f32],
    threshold: f32,
    started: bool,
}

impl<'a> EntropyCutter<'a> {
    /// Cuts where `entropies`, one a token, is above `threshold`, both in nats.
    pub fn new(entropies: &'a [f32], threshold: f32) -> Self {
        Self {
            entropies,
            threshold,
            started: false,
        }
    }

    /// Takes the next token.
    #[inline]
    pub fn push(&mut self) -> bool {
        let high = self
            .entropies
            .split_off_first()
            .is_some_and(|&entropy| entropy > self.threshold);
        !std::mem::replace(&mut self.started, true) || high
    }
}

/// Cuts at one in so many improbable tokens, counted from the response's first.
#[derive(Clone, Copy, Debug)]
pub struct ImprobableCutter<'a> {
    token_logps: &'a [f32],
    threshold: f64,
    every: usize,
    seen: usize,
    started: bool,
}

impl<'a> ImprobableCutter<'a> {
    /// Cuts at the `every`-th token, and each `every`-th after it, of those to which `token_logps`, in nats, one a token,
    /// gives less than `probability`.
    pub fn new(token_logps: &'a [f32], probability: f64, every: usize) -> Self {
        Self {
            token_logps,
            threshold: probability.ln(),
            every: every.max(1),
            seen: 0,
            started: false,
        }
    }

    /// Takes the next token.
    #[inline]
    pub fn push(&mut self) -> bool {
        let improbable = self
            .token_logps
            .split_off_first()
            .is_some_and(|&logp| f64::from(logp) < self.threshold);
        self.seen += usize::from(improbable);
        let cut = improbable && self.seen.is_multiple_of(self.every);
        !std::mem::replace(&mut self.started, true) || cut
    }
}

/// Any cut rule, its parameters resolved to numbers.
#[derive(Clone, Copy, Debug)]
pub enum Cutter<'a> {
    /// One segment; true until its first token was pushed.
    Sequence(bool),
    /// Every token.
    Token,
    /// Every so many tokens.
    Fixed(FixedCutter),
    /// After punctuation.
    Punctuation(PunctuationCutter<'a>),
    /// At jumps of the signal.
    Jump(JumpCutter),
    /// At a trigger's changes; false until its first token was pushed.
    Schmitt(SchmittTrigger, bool),
    /// At tokens drawn from a distribution of high entropy.
    Entropy(EntropyCutter<'a>),
    /// At improbable tokens.
    Improbable(ImprobableCutter<'a>),
    /// At given offsets.
    External(OffsetCutter<'a>),
}

impl<'a> Cutter<'a> {
    /// One segment.
    pub const fn sequence() -> Self {
        Self::Sequence(true)
    }

    /// Cuts where `trigger`, fresh, changes its state.
    pub const fn schmitt(trigger: SchmittTrigger) -> Self {
        Self::Schmitt(trigger, false)
    }

    /// Takes the next token, its signal and its text (read by punctuation only), and says whether it begins a segment.
    #[inline]
    pub fn push(&mut self, reward: f32, text: &str) -> bool {
        match self {
            Self::Sequence(first) => std::mem::replace(first, false),
            Self::Token => true,
            Self::Fixed(cutter) => cutter.push(),
            Self::Punctuation(cutter) => cutter.push(text),
            Self::Jump(cutter) => cutter.push(reward),
            Self::Schmitt(trigger, started) => {
                let before = trigger.state();
                let after = trigger.push(reward);
                !std::mem::replace(started, true) || after != before
            }
            Self::Entropy(cutter) => cutter.push(),
            Self::Improbable(cutter) => cutter.push(),
            Self::External(cutter) => cutter.push(),
        }
    }

    /// The sign that the rule itself gives to the segment of the last token pushed: a trigger's state.
    pub fn sign(&self) -> Option<Sign> {
        match self {
            Self::Schmitt(trigger, _) => Some(trigger.state()),
            _ => None,
        }
    }
}

/// Marks each token that begins a segment, for a whole response at once; the same as pushing token by token.
///
/// `texts` is read by punctuation only and may be empty otherwise.
///
/// # Panics
/// If `cuts` and `signal` differ in length, or `cutter` reads texts and they are not one a token.
///
/// # Examples
/// ```
/// use pivotal_credit::{Cutter, JumpCutter, mark_cuts};
/// let mut cuts = [false; 4];
/// mark_cuts(Cutter::Jump(JumpCutter::new(1.0)), &[0.0, 0.5, 2.0, 1.0], &[], &mut cuts);
/// assert_eq!(cuts, [true, false, true, false]);
/// ```
pub fn mark_cuts(cutter: Cutter<'_>, signal: &[f32], texts: &[&str], cuts: &mut [bool]) {
    assert_eq!(signal.len(), cuts.len(), "one mark a token");
    match cutter {
        Cutter::Sequence(first) => {
            cuts.fill(false);
            if let Some(cut) = cuts.first_mut() {
                *cut = first;
            }
        }
        Cutter::Token => cuts.fill(true),
        Cutter::Fixed(mut cutter) => cuts.fill_with(|| cutter.push()),
        Cutter::Punctuation(mut cutter) => {
            assert_eq!(texts.len(), cuts.len(), "one text a token");
            cuts.iter_mut()
                .zip(texts)
                .for_each(|(cut, text)| *cut = cutter.push(text));
        }
        Cutter::Jump(mut cutter) => {
            cuts.iter_mut()
                .zip(signal)
                .for_each(|(cut, &reward)| *cut = cutter.push(reward));
        }
        mut cutter @ Cutter::Schmitt(..) => {
            cuts.iter_mut()
                .zip(signal)
                .for_each(|(cut, &reward)| *cut = cutter.push(reward, ""));
        }
        Cutter::Entropy(mut cutter) => cuts.fill_with(|| cutter.push()),
        Cutter::Improbable(mut cutter) => cuts.fill_with(|| cutter.push()),
        Cutter::External(mut cutter) => cuts.fill_with(|| cutter.push()),
    }
}
