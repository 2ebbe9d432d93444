//! The front door: a batch of responses in, their segments, signs and keep masks out.

use std::borrow::Cow;

use pivotal_core::{SegmentRecord, Sign, TokenMask, random_stream};
use rand::Rng;
use serde::{Deserialize, Serialize};

use crate::{
    BaselineState, CreditRule, Cut, Cutter, EntropyCutter, FixedCutter, ImprobableCutter,
    JumpCutter, OffsetCutter, PunctuationCutter, ResolvedBaseline, Response, ResponseCredit,
    Result, SchmittTrigger, Segment, SequenceSign, TokenColumn, Weighting, advance, agree,
    merge_short, soft_weight,
};

mod check;
mod select;

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
    token_signs: Option<Vec<Sign>>,
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
    /// [`crate::Error::State`] if the state belongs to another baseline.
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
    /// [`crate::Error::NotFinite`], [`crate::Error::Length`], [`crate::Error::Missing`], [`crate::Error::Offset`] or
    /// [`crate::Error::Overflow`], naming the response; then nothing was learnt from the batch.
    pub fn assign(&mut self, batch: &[Response<'_>]) -> Result<Vec<ResponseCredit>> {
        let before = self.state.clone();
        let given = self.assign_next(batch);
        if given.is_err() {
            self.state = before;
        }
        given
    }

    fn assign_next(&mut self, batch: &[Response<'_>]) -> Result<Vec<ResponseCredit>> {
        batch.iter().try_for_each(|response| self.check(response))?;
        let owns: Vec<Own> = batch.iter().map(|response| self.own(response)).collect();
        let signals: Vec<(u64, &[f32])> = batch
            .iter()
            .zip(&owns)
            .map(|(response, own)| (response.id, &own.signal[..]))
            .collect();
        self.calibrate(batch, &owns)?;
        let baselines = self.state.baseline.resolve(&signals);
        let widths = self.widths(&owns);
        self.check_widths(batch, &owns, widths)?;

        let mut scored: Vec<Scored> = batch
            .iter()
            .zip(&owns)
            .zip(&baselines)
            .map(|((response, own), baseline)| self.score(response, own, baseline, widths))
            .collect();
        for (response, scored) in batch.iter().zip(&scored) {
            self.check_scores(response.id, &scored.segments)?;
        }
        self.select(batch, &owns, &mut scored);
        self.state.batches += 1;

        let parts = batch.iter().zip(owns).zip(baselines).zip(scored);
        Ok(parts
            .map(|(((response, own), baseline), scored)| {
                self.finish(response, own, baseline, scored, widths)
            })
            .collect())
    }

    /// Finds a calibrated baseline's threshold, once, on a part of this batch's prompts: the same for the same seed and ids.
    fn calibrate(&mut self, batch: &[Response<'_>], owns: &[Own]) -> Result<()> {
        let Some(fraction) = self.state.baseline.calibration_fraction() else {
            return Ok(());
        };
        let (mut positive, mut negative) = (Vec::new(), Vec::new());
        for (response, own) in batch.iter().zip(owns) {
            let name = format!("credit/calibration/{}", response.id);
            let draw = random_stream(self.seed, &name).next_u64() >> 11;
            if draw as f64 / (1_u64 << 53) as f64 >= fraction {
                continue;
            }
            match response.sequence_sign {
                Sign::Positive => positive.extend_from_slice(&own.signal),
                Sign::Negative => negative.extend_from_slice(&own.signal),
                Sign::Neutral => {}
            }
        }
        self.state.baseline.calibrate(&positive, &negative)
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
        let signal = &own.signal[..];
        let constant = match baseline {
            ResolvedBaseline::Constant(baseline) => *baseline,
            ResolvedBaseline::PerToken(_) => 0.0,
        };
        // A trigger that knows one baseline is given what is left after each token's own.
        let triggered: Cow<'_, [f32]> = match (baseline, &self.rule.cut) {
            (ResolvedBaseline::PerToken(baselines), Cut::Schmitt(_)) => {
                signal.iter().zip(baselines).map(|(r, b)| r - b).collect()
            }
            _ => Cow::Borrowed(signal),
        };
        let cuts: Vec<usize> = match (&self.rule.cut, response.cuts) {
            (Cut::External, Some(cuts)) => own.offsets(cuts),
            _ => Vec::new(),
        };
        let column = |column: TokenColumn| own.column(response.columns.get(column));
        let entropies = column(TokenColumn::ReferenceEntropies);
        let old_token_logps = column(TokenColumn::OldTokenLogps);
        let cutter = match &self.rule.cut {
            Cut::Sequence => Cutter::sequence(),
            Cut::Token => Cutter::Token,
            Cut::Fixed(tokens) => Cutter::Fixed(FixedCutter::new(*tokens)),
            Cut::Punctuation(marks) => Cutter::Punctuation(PunctuationCutter::new(marks)),
            Cut::Jump(_) => Cutter::Jump(JumpCutter::new(jump)),
            Cut::Schmitt(between) => {
                Cutter::schmitt(SchmittTrigger::new(constant, offset, *between))
            }
            Cut::Entropy(nats) => Cutter::Entropy(EntropyCutter::new(&entropies, *nats)),
            Cut::Improbable { probability, every } => {
                let cutter = ImprobableCutter::new(&old_token_logps, *probability, *every);
                Cutter::Improbable(cutter)
            }
            Cut::External => Cutter::External(OffsetCutter::new(&cuts)),
        };
        let text = |index: usize| response.texts.map_or("", |texts| texts[own.index(index)]);
        let (mut segments, mut signs) = cut(cutter, &triggered, text);
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
        let token_signs: Option<Vec<Sign>> = match self.rule.sequence_sign {
            SequenceSign::Response => None,
            SequenceSign::Advantage => {
                let advantages = column(TokenColumn::Advantages);
                Some(advantages.iter().map(|&a| Sign::of(a, 0.0, 0.0)).collect())
            }
        };
        let record = |(index, segment): (usize, &Segment)| {
            let tokens = segment.start..segment.end;
            let score = self.rule.score.of_part(signal, tokens.clone());
            let baseline = match baseline {
                ResolvedBaseline::Constant(_) => constant,
                ResolvedBaseline::PerToken(baselines) => {
                    let (signal, baselines) = (&signal[tokens.clone()], &baselines[tokens.clone()]);
                    self.rule.score.baseline_of(signal, baselines)
                }
            };
            let sign = match from_cut {
                true => signs[index],
                false => Sign::of(score, baseline, offset),
            };
            let count = |sequence: Sign| match soft {
                true => soft_weight(score, baseline, offset, sequence),
                false => f32::from(u8::from(agree(sign, sequence, self.rule.neutral))),
            };
            match &token_signs {
                None => {
                    let weight = count(response.sequence_sign);
                    keep[tokens.clone()].fill(weight > 0.0);
                    if let Some(weights) = &mut weights {
                        weights[tokens].fill(weight);
                    }
                }
                Some(signs) => {
                    for token in tokens {
                        let weight = count(signs[token]);
                        keep[token] = weight > 0.0;
                        if let Some(weights) = &mut weights {
                            weights[token] = weight;
                        }
                    }
                }
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
            token_signs,
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
            token_signs,
        } = scored;
        let token_signs = token_signs.map(|signs| match &own.indices {
            None => signs,
            Some(indices) => {
                let mut whole = vec![Sign::Neutral; tokens];
                let places = indices.iter().zip(signs);
                places.for_each(|(&index, sign)| whole[index] = sign);
                whole
            }
        });
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
            token_signs,
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

    /// A column of the response in the own tokens; empty where it is not known.
    fn column<'c>(&self, column: Option<&'c [f32]>) -> Cow<'c, [f32]> {
        let column = column.unwrap_or_default();
        match &self.indices {
            Some(indices) if !column.is_empty() => {
                Cow::Owned(indices.iter().map(|&index| column[index]).collect())
            }
            _ => Cow::Borrowed(column),
        }
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
