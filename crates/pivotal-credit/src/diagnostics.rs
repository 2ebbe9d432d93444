//! What credit did to a batch, in numbers (METHOD, section 9).

use pivotal_core::Sign;
use pivotal_core::statistics::quantile_of_sorted;
use serde::{Deserialize, Serialize};

use crate::select::{POSITION_BINS, relative_bin};
use crate::{Agreement, AgreementCounts, Error, ResponseCredit, Result};

/// Collects the diagnostics of a step, a run or a data set, response by response.
///
/// # Examples
/// ```
/// use pivotal_core::Sign;
/// use pivotal_credit::{Credit, CreditConfig, Diagnostics, Response};
/// let mut credit = Credit::new(CreditConfig::default().resolve()?, 1);
/// let signal = [0.5, 0.5, -0.5, 0.5];
/// let given = credit.assign(&[Response::new(1, 0, &signal, Sign::Positive)])?;
/// let mut diagnostics = Diagnostics::default();
/// diagnostics.observe(&given[0], None, None)?;
/// let report = diagnostics.report();
/// assert_eq!((report.segments, report.flips, report.segments_per_100_tokens), (3, 2, 75.0));
/// assert_eq!((report.kept_fraction, report.opposing_fraction), (0.75, 1.0 / 3.0));
/// # Ok::<(), pivotal_credit::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Diagnostics {
    decisive_probability: f64,
    positive: Side,
    neutral: Side,
    negative: Side,
    segment_tokens: Vec<u32>,
    flips: u64,
    single_segment: u64,
    all: AgreementCounts,
    has_truth: bool,
}

#[derive(Clone, Copy, Debug, Default)]
struct Side {
    responses: u64,
    tokens: [u64; POSITION_BINS],
    kept: [u64; POSITION_BINS],
    empty: u64,
    segments: u64,
    opposing: u64,
    agreement: AgreementCounts,
}

/// The diagnostics of what was observed. Fractions of nothing are 0; counts say so.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiagnosticsReport {
    /// Responses observed.
    pub responses: u64,
    /// Their own tokens.
    pub tokens: u64,
    /// Their segments; as many pivots.
    pub segments: u64,
    /// Segments a hundred tokens.
    pub segments_per_100_tokens: f64,
    /// The 10 % quantile of segment lengths, in tokens.
    pub segment_tokens_p10: f64,
    /// The median.
    pub segment_tokens_median: f64,
    /// The 90 % quantile.
    pub segment_tokens_p90: f64,
    /// Changes from positive to negative or back, neutral segments between them aside.
    pub flips: u64,
    /// Fraction of responses that are one segment.
    pub single_segment_fraction: f64,
    /// Fraction of own tokens kept.
    pub kept_fraction: f64,
    /// Fraction of responses of which nothing is kept.
    pub empty_mask_fraction: f64,
    /// Fraction of segments whose sign is opposite to their response's.
    pub opposing_fraction: f64,
    /// Of the positive responses: chosen, accepted.
    pub positive: Option<SideReport>,
    /// Of the negative responses: rejected.
    pub negative: Option<SideReport>,
    /// Agreement with ground truth, where it was given.
    pub agreement: Option<Agreement>,
}

/// The same of the responses of one sign.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SideReport {
    /// Responses observed.
    pub responses: u64,
    /// Their own tokens.
    pub tokens: u64,
    /// Fraction of own tokens kept.
    pub kept_fraction: f64,
    /// The same in each tenth of the response; `None` where no token fell.
    pub kept_fraction_by_position: [Option<f64>; POSITION_BINS],
    /// Fraction of responses of which nothing is kept.
    pub empty_mask_fraction: f64,
    /// Fraction of segments whose sign is opposite to their response's.
    pub opposing_fraction: f64,
    /// Agreement with ground truth, where it was given.
    pub agreement: Option<Agreement>,
}

impl Default for Diagnostics {
    /// Decisive tokens are those to which the policy gives less than 0.9.
    fn default() -> Self {
        Self::new(0.9)
    }
}

impl Diagnostics {
    /// Nothing observed; tokens of policy probability below `decisive_probability` are decisive.
    pub fn new(decisive_probability: f64) -> Self {
        Self {
            decisive_probability,
            positive: Side::default(),
            neutral: Side::default(),
            negative: Side::default(),
            segment_tokens: Vec::new(),
            flips: 0,
            single_segment: 0,
            all: AgreementCounts::default(),
            has_truth: false,
        }
    }

    /// Takes one response in, with its ground truth (true: the token is right) and its log-probabilities under the policy, in
    /// nats, where they are known.
    ///
    /// # Errors
    /// [`Error::Length`] if a column is not one value a token; nothing was taken in.
    pub fn observe(
        &mut self,
        credit: &ResponseCredit,
        truth: Option<&[bool]>,
        token_logps: Option<&[f32]>,
    ) -> Result<()> {
        let tokens = credit.signal.len();
        let lengths = [
            ("truth", truth.map(<[_]>::len)),
            ("token_logps", token_logps.map(<[_]>::len)),
        ];
        for (column, found) in lengths {
            if let Some(found) = found.filter(|&found| found != tokens) {
                return Err(Error::Length {
                    column,
                    id: 0,
                    expected: tokens,
                    found,
                });
            }
        }
        self.observe_segments(credit);
        self.observe_tokens(credit, truth, token_logps);
        Ok(())
    }

    fn observe_segments(&mut self, credit: &ResponseCredit) {
        let opposite = match credit.sequence_sign {
            Sign::Positive => Some(Sign::Negative),
            Sign::Negative => Some(Sign::Positive),
            Sign::Neutral => None,
        };
        let opposing = credit
            .segments
            .iter()
            .filter(|segment| Some(segment.sign) == opposite)
            .count();
        let side = self.side(credit.sequence_sign);
        side.responses += 1;
        side.segments += credit.segments.len() as u64;
        side.opposing += opposing as u64;
        side.empty += u64::from(credit.keep.kept() == 0);
        self.single_segment += u64::from(credit.segments.len() == 1);
        self.segment_tokens
            .extend(credit.segments.iter().map(|s| (s.end - s.start) as u32));
        let signed: Vec<Sign> = credit
            .segments
            .iter()
            .map(|segment| segment.sign)
            .filter(|&sign| sign != Sign::Neutral)
            .collect();
        self.flips += signed.windows(2).filter(|pair| pair[0] != pair[1]).count() as u64;
    }

    fn observe_tokens(
        &mut self,
        credit: &ResponseCredit,
        truth: Option<&[bool]>,
        token_logps: Option<&[f32]>,
    ) {
        let decisive = self.decisive_probability;
        let mut agreement = self.all;
        let side = self.side(credit.sequence_sign);
        let keep = credit.keep.as_slice();
        for (index, &kept) in keep
            .iter()
            .enumerate()
            .filter(|&(index, _)| credit.is_own(index))
        {
            let bin = relative_bin(index, keep.len(), POSITION_BINS);
            side.tokens[bin] += 1;
            side.kept[bin] += u64::from(kept);
            if let Some(truth) = truth {
                let sign = match &credit.token_signs {
                    Some(signs) => signs[index],
                    None => credit.sequence_sign,
                };
                let wanted = match sign {
                    Sign::Positive => truth[index],
                    Sign::Negative => !truth[index],
                    Sign::Neutral => false,
                };
                let probability = token_logps.map(|logps| f64::from(logps[index]).exp());
                side.agreement.push(kept, wanted, probability, decisive);
                agreement.push(kept, wanted, probability, decisive);
            }
        }
        self.all = agreement;
        self.has_truth |= truth.is_some();
    }

    fn side(&mut self, sign: Sign) -> &mut Side {
        match sign {
            Sign::Positive => &mut self.positive,
            Sign::Neutral => &mut self.neutral,
            Sign::Negative => &mut self.negative,
        }
    }

    /// Takes in what `other` observed, as if it had been observed here.
    pub fn merge(&mut self, other: &Self) {
        self.positive.merge(&other.positive);
        self.neutral.merge(&other.neutral);
        self.negative.merge(&other.negative);
        self.segment_tokens.extend(&other.segment_tokens);
        self.flips += other.flips;
        self.single_segment += other.single_segment;
        self.all.merge(&other.all);
        self.has_truth |= other.has_truth;
    }

    /// The numbers so far.
    pub fn report(&self) -> DiagnosticsReport {
        let sides = [&self.positive, &self.neutral, &self.negative];
        let total = |count: fn(&Side) -> u64| sides.iter().map(|side| count(side)).sum::<u64>();
        let responses = total(|side| side.responses);
        let tokens = total(|side| side.tokens.iter().sum());
        let segments = total(|side| side.segments);
        let mut lengths = self.segment_tokens.clone();
        lengths.sort_unstable();
        let length = |q| quantile_of_sorted(&lengths, q).unwrap_or(0.0);
        let side = |side: &Side| (side.responses > 0).then(|| side.report(self.has_truth));
        DiagnosticsReport {
            responses,
            tokens,
            segments,
            segments_per_100_tokens: 100.0 * fraction(segments, tokens),
            segment_tokens_p10: length(0.1),
            segment_tokens_median: length(0.5),
            segment_tokens_p90: length(0.9),
            flips: self.flips,
            single_segment_fraction: fraction(self.single_segment, responses),
            kept_fraction: fraction(total(|side| side.kept.iter().sum()), tokens),
            empty_mask_fraction: fraction(total(|side| side.empty), responses),
            opposing_fraction: fraction(total(|side| side.opposing), segments),
            positive: side(&self.positive),
            negative: side(&self.negative),
            agreement: self.has_truth.then(|| self.all.agreement()),
        }
    }
}

impl Side {
    fn merge(&mut self, other: &Self) {
        self.responses += other.responses;
        for bin in 0..POSITION_BINS {
            self.tokens[bin] += other.tokens[bin];
            self.kept[bin] += other.kept[bin];
        }
        self.empty += other.empty;
        self.segments += other.segments;
        self.opposing += other.opposing;
        self.agreement.merge(&other.agreement);
    }

    fn report(&self, has_truth: bool) -> SideReport {
        let tokens = self.tokens.iter().sum();
        let mut by_position = [None; POSITION_BINS];
        for (bin, share) in by_position.iter_mut().enumerate() {
            *share = (self.tokens[bin] > 0).then(|| fraction(self.kept[bin], self.tokens[bin]));
        }
        SideReport {
            responses: self.responses,
            tokens,
            kept_fraction: fraction(self.kept.iter().sum(), tokens),
            kept_fraction_by_position: by_position,
            empty_mask_fraction: fraction(self.empty, self.responses),
            opposing_fraction: fraction(self.opposing, self.segments),
            agreement: has_truth.then(|| self.agreement.agreement()),
        }
    }
}

fn fraction(part: u64, whole: u64) -> f64 {
    part as f64 / whole.max(1) as f64
}
