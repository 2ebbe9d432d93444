//! The front door: a batch of responses in, their segments, signs and keep masks out.

use std::borrow::Cow;

use pivotal_core::{SegmentRecord, Sign, TokenMask, random_stream};
use serde::{Deserialize, Serialize};

use crate::select::{shuffle, shuffle_within_positions};
use crate::{
    BaselineState, CreditRule, Cut, Cutter, Error, FixedCutter, JumpCutter, Neutral, OffsetCutter,
    PunctuationCutter, ResolvedBaseline, Response, ResponseCredit, Result, SchmittTrigger, Segment,
    Selection, Weighting, advance, agree, check_finite, merge_short, random_subset, soft_weight,
};

/// Gives credit batch by batch under one rule.
///
/// # Examples
/// ```
/// use pivotal_core::Sign;
/// use pivotal_credit::{Credit, CreditConfig, Response};
/// let mut credit = Credit::new(CreditConfig::default().resolve()?, 1);
/// let batch = [
///     Response::new(1, 0, &[0.4, 0.3, -0.9], Sign::Positive),
///     Response::new(1, 1, &[0.2, -0.5, -0.1], Sign::Negative),
/// ];
/// let given = credit.assign(&batch)?;
/// assert_eq!(given[0].keep.as_slice(), [true, true, false]);
/// assert_eq!(given[1].keep.as_slice(), [false, true, true]);
/// # Ok::<(), pivotal_credit::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Credit {
    rule: CreditRule,
    seed: u64,
    state: CreditState,
}

/// What credit remembers between batches; serialised into checkpoints.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CreditState {
    baseline: BaselineState,
    batches: u64,
}

/// A response's own tokens, the only ones that credit looks at.
struct Own {
    /// Where they stand in the response; `None`: everywhere.
    indices: Option<Vec<usize>>,
    signal: Vec<f32>,
}

/// Numbers that are the same for the whole batch.
#[derive(Clone, Copy)]
struct Widths {
    offset: f32,
    jump: f32,
}

/// One response after cutting, in its own tokens.
struct Scored {
    segments: Vec<SegmentRecord>,
    keep: Vec<bool>,
    weights: Option<Vec<f32>>,
}

impl Credit {
    /// Credit under `rule`; `seed` decides what the random selections draw.
    pub fn new(rule: CreditRule, seed: u64) -> Self {
        let state = CreditState {
            baseline: BaselineState::new(rule.baseline),
            batches: 0,
        };
        Self { rule, seed, state }
    }

    /// Credit that continues from a checkpoint's state.
    ///
    /// # Errors
    /// [`Error::State`] if the state belongs to another baseline.
    pub fn resume(rule: CreditRule, seed: u64, state: CreditState) -> Result<Self> {
        let baseline = state.baseline.expect(rule.baseline)?;
        Ok(Self {
            rule,
            seed,
            state: CreditState { baseline, ..state },
        })
    }

    /// The rule.
    pub const fn rule(&self) -> &CreditRule {
        &self.rule
    }

    /// What must be saved to resume.
    pub const fn state(&self) -> &CreditState {
        &self.state
    }

    /// The credit of each response of a batch, in its order.
    ///
    /// The baseline, the offset and the jump threshold are resolved to numbers over the whole batch first. A response of no
    /// token has no segment and an empty mask.
    ///
    /// # Errors
    /// [`Error::NotFinite`], [`Error::Length`], [`Error::Missing`] or [`Error::Offset`], naming the response; then nothing
    /// was learnt from the batch.
    pub fn assign(&mut self, batch: &[Response<'_>]) -> Result<Vec<ResponseCredit>> {
        batch.iter().try_for_each(|response| self.check(response))?;
        let owns: Vec<Own> = batch.iter().map(|response| self.own(response)).collect();
        let signals: Vec<(u64, &[f32])> = batch
            .iter()
            .zip(&owns)
            .map(|(response, own)| (response.id, &own.signal[..]))
            .collect();
        let baselines = self.state.baseline.resolve(&signals);
        let widths = self.widths(&owns);

        let mut scored: Vec<Scored> = batch
            .iter()
            .zip(&owns)
            .zip(&baselines)
            .map(|((response, own), baseline)| self.score(response, own, baseline, widths))
            .collect();
        self.select(batch, &owns, &mut scored);
        self.state.batches += 1;

        let parts = batch.iter().zip(owns).zip(baselines).zip(scored);
        Ok(parts
            .map(|(((response, own), baseline), scored)| {
                self.finish(response, own, baseline, scored, widths)
            })
            .collect())
    }

    fn check(&self, response: &Response<'_>) -> Result<()> {
        let (id, tokens) = (response.id, response.signal.len());
        check_finite(self.rule.signal, id, response.signal)?;
        let lengths = [
            ("texts", response.texts.map(<[_]>::len)),
            ("truth", response.truth.map(<[_]>::len)),
            ("response_mask", response.response_mask.map(<[_]>::len)),
        ];
        for (column, found) in lengths {
            if let Some(found) = found.filter(|&found| found != tokens) {
                return Err(Error::Length {
                    column,
                    id,
                    expected: tokens,
                    found,
                });
            }
        }
        let missing = |column, needed_by| Error::Missing {
            column,
            id,
            needed_by,
        };
        match self.rule.cut {
            Cut::Punctuation(_) if response.texts.is_none() => {
                return Err(missing("texts", "cut = punctuation"));
            }
            Cut::External => {
                let cuts = response
                    .cuts
                    .ok_or_else(|| missing("cuts", "cut = external"))?;
                let fault = (0..cuts.len())
                    .find(|&i| cuts[i] >= tokens || (i > 0 && cuts[i] <= cuts[i - 1]));
                if let Some(index) = fault {
                    return Err(Error::Offset {
                        id,
                        index,
                        found: cuts[index],
                        tokens,
                    });
                }
            }
            _ => {}
        }
        if self.rule.needs_truth() && response.truth.is_none() {
            return Err(missing("truth", "selection = truth"));
        }
        Ok(())
    }

    fn own(&self, response: &Response<'_>) -> Own {
        let partial = response.response_mask.filter(|mask| mask.contains(&false));
        let indices: Option<Vec<usize>> =
            partial.map(|mask| (0..mask.len()).filter(|&index| mask[index]).collect());
        let mut signal = match &indices {
            Some(indices) => indices
                .iter()
                .map(|&index| response.signal[index])
                .collect(),
            None => response.signal.to_vec(),
        };
        advance(&mut signal, self.rule.signal_delay);
        Own { indices, signal }
    }

    fn widths(&self, owns: &[Own]) -> Widths {
        let tokens = owns.iter().flat_map(|own| own.signal.iter().copied());
        let steps = owns
            .iter()
            .flat_map(|own| own.signal.windows(2).map(|pair| pair[1] - pair[0]));
        let jump = match self.rule.cut {
            Cut::Jump(width) => width.resolve(steps),
            _ => 0.0,
        };
        Widths {
            offset: self.rule.offset.resolve(tokens),
            jump,
        }
    }

    fn score(
        &self,
        response: &Response<'_>,
        own: &Own,
        baseline: &ResolvedBaseline,
        Widths { offset, jump }: Widths,
    ) -> Scored {
        let (signal, baseline): (Cow<'_, [f32]>, f32) = match baseline {
            ResolvedBaseline::Constant(baseline) => (Cow::Borrowed(&own.signal), *baseline),
            ResolvedBaseline::PerToken(baselines) => (
                own.signal
                    .iter()
                    .zip(baselines)
                    .map(|(r, b)| r - b)
                    .collect(),
                0.0,
            ),
        };
        let cuts: Vec<usize> = match (&self.rule.cut, response.cuts) {
            (Cut::External, Some(cuts)) => own.offsets(cuts),
            _ => Vec::new(),
        };
        let cutter = match &self.rule.cut {
            Cut::Sequence => Cutter::sequence(),
            Cut::Token => Cutter::Token,
            Cut::Fixed(tokens) => Cutter::Fixed(FixedCutter::new(*tokens)),
            Cut::Punctuation(marks) => Cutter::Punctuation(PunctuationCutter::new(marks)),
            Cut::Jump(_) => Cutter::Jump(JumpCutter::new(jump)),
            Cut::Schmitt(between) => {
                Cutter::schmitt(SchmittTrigger::new(baseline, offset, *between))
            }
            Cut::External => Cutter::External(OffsetCutter::new(&cuts)),
        };
        let text = |index: usize| response.texts.map_or("", |texts| texts[own.index(index)]);
        let (mut segments, mut signs) = cut(cutter, &signal, text);
        let from_cut = !signs.is_empty();
        if self.rule.min_len > 1 {
            merge_short(
                &mut segments,
                from_cut.then_some(&mut signs),
                self.rule.min_len,
            );
        }

        let soft = self.rule.weighting == Weighting::Soft;
        let mut keep = vec![false; signal.len()];
        let mut weights = soft.then(|| vec![0.0; signal.len()]);
        let sequence = response.sequence_sign;
        let record = |(index, segment): (usize, &Segment)| {
            let tokens = segment.start..segment.end;
            let score = self.rule.score.of(&signal[tokens.clone()]);
            let sign = match from_cut {
                true => signs[index],
                false => Sign::of(score, baseline, offset),
            };
            match &mut weights {
                Some(weights) => {
                    let weight = soft_weight(score, baseline, offset, sequence);
                    weights[tokens.clone()].fill(weight);
                    keep[tokens].fill(weight > 0.0);
                }
                None => keep[tokens].fill(agree(sign, sequence, self.rule.neutral)),
            }
            SegmentRecord {
                start: segment.start,
                end: segment.end,
                score,
                sign,
            }
        };
        let segments = segments.iter().enumerate().map(record).collect();
        Scored {
            segments,
            keep,
            weights,
        }
    }

    fn select(&self, batch: &[Response<'_>], owns: &[Own], scored: &mut [Scored]) {
        match self.rule.selection {
            Selection::Agree => {}
            Selection::All => scored.iter_mut().for_each(|one| one.keep.fill(true)),
            Selection::Disagree => {
                scored
                    .iter_mut()
                    .flat_map(|one| &mut one.keep)
                    .for_each(|keep| *keep = !*keep);
            }
            Selection::Random => {
                for (response, one) in batch.iter().zip(scored) {
                    // By response, not by batch: the same response draws the same mask in every epoch, as `agree` would.
                    let name = format!("credit/random/{}/{}", response.id, response.sample);
                    let mut random = random_stream(self.seed, &name);
                    match self.rule.random_fraction {
                        Some(fraction) => {
                            one.keep = random_subset(one.keep.len(), fraction, &mut random);
                        }
                        None => shuffle(&mut one.keep, &mut random),
                    }
                }
            }
            Selection::RandomPosition => {
                let name = format!("credit/random_position/{}", self.state.batches);
                let signs: Vec<Sign> = batch
                    .iter()
                    .map(|response| response.sequence_sign)
                    .collect();
                let mut keep: Vec<Vec<bool>> = scored
                    .iter_mut()
                    .map(|one| std::mem::take(&mut one.keep))
                    .collect();
                shuffle_within_positions(&mut keep, &signs, &mut random_stream(self.seed, &name));
                scored
                    .iter_mut()
                    .zip(keep)
                    .for_each(|(one, keep)| one.keep = keep);
            }
            Selection::Truth => {
                for ((response, own), one) in batch.iter().zip(owns).zip(scored) {
                    let Some(truth) = response.truth else {
                        continue;
                    };
                    for (index, keep) in one.keep.iter_mut().enumerate() {
                        let sign = match truth[own.index(index)] {
                            true => Sign::Positive,
                            false => Sign::Negative,
                        };
                        *keep = agree(sign, response.sequence_sign, Neutral::Drop);
                    }
                }
            }
        }
    }

    /// Puts what was found for the own tokens back into the whole response.
    fn finish(
        &self,
        response: &Response<'_>,
        own: Own,
        baseline: ResolvedBaseline,
        scored: Scored,
        Widths { offset, jump }: Widths,
    ) -> ResponseCredit {
        let tokens = response.signal.len();
        let Scored {
            mut segments,
            keep,
            weights,
        } = scored;
        let (signal, baseline, keep, weights) = match &own.indices {
            None => {
                let baseline = match baseline {
                    ResolvedBaseline::Constant(value) => vec![value],
                    ResolvedBaseline::PerToken(values) => values,
                };
                (own.signal, baseline, keep, weights)
            }
            Some(indices) => {
                own.widen(&mut segments, tokens);
                let scatter = |values: &[f32], mut whole: Vec<f32>| {
                    indices
                        .iter()
                        .zip(values)
                        .for_each(|(&index, &value)| whole[index] = value);
                    whole
                };
                let baseline = match baseline {
                    ResolvedBaseline::Constant(value) => vec![value],
                    ResolvedBaseline::PerToken(values) => scatter(&values, vec![0.0; tokens]),
                };
                let mut whole_keep = vec![false; tokens];
                indices
                    .iter()
                    .zip(keep)
                    .for_each(|(&index, keep)| whole_keep[index] = keep);
                (
                    scatter(&own.signal, response.signal.to_vec()),
                    baseline,
                    whole_keep,
                    weights.map(|weights| scatter(&weights, vec![0.0; tokens])),
                )
            }
        };
        ResponseCredit {
            signal_name: self.rule.signal,
            signal,
            baseline,
            offset,
            jump: matches!(self.rule.cut, Cut::Jump(_)).then_some(jump),
            segments,
            sequence_sign: response.sequence_sign,
            keep: TokenMask::from(keep),
            weights,
            response_mask: own
                .indices
                .and(response.response_mask)
                .map(|mask| TokenMask::from(mask.to_vec())),
        }
    }
}

impl Own {
    /// Where own token `index` stands in the response.
    fn index(&self, index: usize) -> usize {
        self.indices
            .as_ref()
            .map_or(index, |indices| indices[index])
    }

    /// Offsets in the response as offsets in the own tokens.
    fn offsets(&self, cuts: &[usize]) -> Vec<usize> {
        let Some(indices) = &self.indices else {
            return cuts.to_vec();
        };
        let place = |&cut: &usize| indices.partition_point(|&index| index < cut);
        let mut own: Vec<usize> = cuts.iter().map(place).collect();
        own.dedup();
        own
    }

    /// Widens segments of own tokens until they tile the response: tokens that are not the model's own join the segment
    /// before them.
    fn widen(&self, segments: &mut Vec<SegmentRecord>, tokens: usize) {
        if segments.is_empty() && tokens > 0 {
            segments.push(SegmentRecord {
                start: 0,
                end: tokens,
                score: 0.0,
                sign: Sign::Neutral,
            });
            return;
        }
        let mut end = tokens;
        for (place, segment) in segments.iter_mut().enumerate().rev() {
            segment.start = if place == 0 {
                0
            } else {
                self.index(segment.start)
            };
            segment.end = std::mem::replace(&mut end, segment.start);
        }
    }
}

/// Runs a cutter over a response: its segments, and their signs where the cutter has an opinion (else none).
fn cut<'t>(
    mut cutter: Cutter<'_>,
    signal: &[f32],
    text: impl Fn(usize) -> &'t str,
) -> (Vec<Segment>, Vec<Sign>) {
    let mut segments: Vec<Segment> = Vec::new();
    let mut signs = Vec::new();
    for (index, &reward) in signal.iter().enumerate() {
        if cutter.push(reward, text(index)) {
            if let Some(last) = segments.last_mut() {
                last.end = index;
            }
            segments.push(Segment {
                start: index,
                end: signal.len(),
            });
            signs.extend(cutter.sign());
        }
    }
    (segments, signs)
}
