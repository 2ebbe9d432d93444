//! What goes into credit and what comes out, one response each.

use pivotal_core::{CreditRecord, SCHEMA_VERSION, SegmentRecord, Side, Sign, TokenMask};

use crate::{Signal, TokenColumns};

/// One response to be given credit. `[tokens]` is its length, EOS included.
#[derive(Clone, Copy, Debug)]
pub struct Response<'a> {
    /// Its prompt's id: the data set's row; responses of one prompt share it.
    pub id: u64,
    /// Which response of the prompt: 0 for chosen and 1 for rejected, or the number of the sample.
    pub sample: u32,
    /// The signal, `[tokens]`.
    pub signal: &'a [f32],
    /// The whole response's sign: the label in pairs, positive in rejection sampling.
    pub sequence_sign: Sign,
    /// The text of each token, `[tokens]`; the punctuation rule reads it.
    pub texts: Option<&'a [&'a str]>,
    /// Whether each token is right, `[tokens]`; the selection `truth` reads it.
    pub truth: Option<&'a [bool]>,
    /// Ascending offsets where segments begin; the external cut rule reads it.
    pub cuts: Option<&'a [usize]>,
    /// Which tokens are the model's own, `[tokens]`; all, if absent. The others are in no statistic, cut no segment, and are
    /// never kept.
    pub response_mask: Option<&'a [bool]>,
    /// Further numbers of each token, for the rules that read them.
    pub columns: TokenColumns<'a>,
}

impl<'a> Response<'a> {
    /// A response of which only the signal and the sign are known.
    pub const fn new(id: u64, sample: u32, signal: &'a [f32], sequence_sign: Sign) -> Self {
        Self {
            id,
            sample,
            signal,
            sequence_sign,
            texts: None,
            truth: None,
            cuts: None,
            response_mask: None,
            columns: TokenColumns {
                advantages: None,
                reference_entropies: None,
                policy_entropies: None,
                old_token_logps: None,
                token_logps: None,
                reference_token_logps: None,
            },
        }
    }
}

/// The credit of one response.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct ResponseCredit {
    /// Which signal.
    pub signal_name: Signal,
    /// The signal as it was cut: moved back by `signal_delay`, `[tokens]`.
    pub signal: Vec<f32>,
    /// The baseline b used: one number, or `[tokens]` where it depends on the position. In the latter case a segment's sign is
    /// its score's around [`Score::baseline_of`](crate::Score::baseline_of).
    pub baseline: Vec<f32>,
    /// The offset δ used.
    pub offset: f32,
    /// The jump threshold τ used, by the cut rule `jump`.
    pub jump: Option<f32>,
    /// The segments; they tile the response.
    pub segments: Vec<SegmentRecord>,
    /// The whole response's sign.
    pub sequence_sign: Sign,
    /// Each token's own sign, `[tokens]`, neutral where it is not the model's own; `None`: the response's.
    pub token_signs: Option<Vec<Sign>>,
    /// Which of the model's own tokens the loss uses, `[tokens]`.
    pub keep: TokenMask,
    /// Soft weights in 0 to 1, `[tokens]`, 0 where not kept; `None` for hard masks.
    pub weights: Option<Vec<f32>>,
    /// Which tokens are the model's own, `[tokens]`; `None`: all.
    pub response_mask: Option<TokenMask>,
}

/// What a record says of a response besides its credit.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RecordSample {
    /// The data set's row.
    pub id: u64,
    /// Which response of a pair.
    pub side: Option<Side>,
    /// Token ids of the prompt.
    pub prompt_token_ids: Vec<u32>,
    /// Token ids of the response, `[tokens]`.
    pub token_ids: Vec<u32>,
    /// Text of each token, `[tokens]`.
    pub token_texts: Vec<String>,
    /// Byte offsets of each token in the response's text, `[tokens]` or empty.
    pub text_offsets: Vec<[usize; 2]>,
    /// Whether each token is right, where known.
    pub truth: Option<Vec<bool>>,
    /// Log-probabilities under the policy, in nats.
    pub token_logps: Option<Vec<f32>>,
    /// The same under the reference.
    pub reference_token_logps: Option<Vec<f32>>,
}

impl ResponseCredit {
    /// The record to write: [`CreditRecord::validate`] checks that `sample` fits.
    pub fn into_record(self, sample: RecordSample) -> CreditRecord {
        CreditRecord {
            schema_version: SCHEMA_VERSION,
            id: sample.id,
            side: sample.side,
            prompt_token_ids: sample.prompt_token_ids,
            token_ids: sample.token_ids,
            token_texts: sample.token_texts,
            text_offsets: sample.text_offsets,
            signal_name: self.signal_name.name().to_owned(),
            signal: self.signal,
            baseline: self.baseline,
            offset: self.offset,
            jump: self.jump,
            segments: self.segments,
            sequence_sign: self.sequence_sign,
            keep: self.keep.as_slice().to_vec(),
            truth: sample.truth,
            token_logps: sample.token_logps,
            reference_token_logps: sample.reference_token_logps,
        }
    }

    /// Whether token `index` is the model's own.
    pub(crate) fn is_own(&self, index: usize) -> bool {
        self.response_mask
            .as_ref()
            .is_none_or(|mask| mask.as_slice()[index])
    }
}
