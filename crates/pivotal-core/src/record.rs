//! The credit record: one JSON line a response, with everything that decided its mask.

use serde::{Deserialize, Serialize};

use crate::{Side, Sign};

/// Version of the record schema; a reader refuses another major number.
pub const SCHEMA_VERSION: u32 = 1;

/// One segment of a response: half-open, in tokens of the response.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SegmentRecord {
    /// First token: the pivot.
    pub start: usize,
    /// One past the last token.
    pub end: usize,
    /// The segment's aggregated signal.
    pub score: f32,
    /// Its sign.
    pub sign: Sign,
}

/// What credit made of one response. Absent (`null`) is not zero: a response that was not scored has no signal.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CreditRecord {
    /// [`SCHEMA_VERSION`].
    pub schema_version: u32,
    /// The sample: the 1-based row of the data set, or a generator's index.
    pub id: u64,
    /// Which response of a pair; absent outside pairs.
    pub side: Option<Side>,
    /// Token ids of the prompt.
    pub prompt_token_ids: Vec<u32>,
    /// Token ids of the response, `[tokens]`.
    pub token_ids: Vec<u32>,
    /// Text of each token, `[tokens]`; several tokens of one character share it as replacement characters.
    pub token_texts: Vec<String>,
    /// Byte offsets of each token in the response's text, half-open, `[tokens]`; empty where the text is not known.
    #[serde(default)]
    pub text_offsets: Vec<[usize; 2]>,
    /// Name of the signal: `level`, `log_ratio`, …
    pub signal_name: String,
    /// The signal, `[tokens]`, in the signal's own unit.
    pub signal: Vec<f32>,
    /// The baseline b used, one number, or one a token where it depends on the position.
    pub baseline: Vec<f32>,
    /// The offset δ used.
    pub offset: f32,
    /// The jump threshold τ used, by the cut rule `jump`; absent by any other.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub jump: Option<f32>,
    /// The segments; they tile the response.
    pub segments: Vec<SegmentRecord>,
    /// The whole response's sign.
    pub sequence_sign: Sign,
    /// Which tokens the loss uses, `[tokens]`.
    pub keep: Vec<bool>,
    /// Ground truth where it exists, `[tokens]`: true, the token is right.
    pub truth: Option<Vec<bool>>,
    /// Log-probability of each token under the policy, in nats, `[tokens]`, where known.
    pub token_logps: Option<Vec<f32>>,
    /// The same under the reference.
    pub reference_token_logps: Option<Vec<f32>>,
}

/// A record that contradicts itself.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum RecordError {
    /// Another schema.
    #[error("record schema is version {found}, expected {SCHEMA_VERSION}")]
    Schema {
        /// The version met.
        found: u32,
    },
    /// A column that is not one value a token.
    #[error("`{column}` has {found} values, expected {expected}, one a token")]
    Length {
        /// Name of the column.
        column: &'static str,
        /// Tokens of the response.
        expected: usize,
        /// Values found.
        found: usize,
    },
    /// A value that is not finite.
    #[error("`{column}` is not finite at token {index}")]
    NotFinite {
        /// Name of the column.
        column: &'static str,
        /// Which token.
        index: usize,
    },
    /// Segments with a gap, an overlap or an empty one.
    #[error(
        "segment {index} starts at token {found}, expected {expected}; segments must tile the response"
    )]
    Tiling {
        /// Which segment.
        index: usize,
        /// Where it should start.
        expected: usize,
        /// Where it starts.
        found: usize,
    },
}

impl CreditRecord {
    /// Checks the lengths, the tiling and that every number is finite.
    ///
    /// # Errors
    /// [`RecordError`], naming the column and the token.
    pub fn validate(&self) -> Result<(), RecordError> {
        if self.schema_version != SCHEMA_VERSION {
            return Err(RecordError::Schema {
                found: self.schema_version,
            });
        }
        let tokens = self.token_ids.len();
        let length = |column, found| match found == tokens {
            true => Ok(()),
            false => Err(RecordError::Length {
                column,
                expected: tokens,
                found,
            }),
        };
        length("token_texts", self.token_texts.len())?;
        length("signal", self.signal.len())?;
        length("keep", self.keep.len())?;
        if !self.text_offsets.is_empty() {
            length("text_offsets", self.text_offsets.len())?;
        }
        if self.baseline.len() != 1 {
            length("baseline", self.baseline.len())?;
        }
        if let Some(truth) = &self.truth {
            length("truth", truth.len())?;
        }
        for (column, values) in [
            ("token_logps", &self.token_logps),
            ("reference_token_logps", &self.reference_token_logps),
        ] {
            if let Some(values) = values {
                length(column, values.len())?;
                finite(column, values)?;
            }
        }
        finite("signal", &self.signal)?;
        finite("baseline", &self.baseline)?;
        finite("offset", &[self.offset])?;
        finite("jump", self.jump.as_slice())?;
        self.tiles()
    }

    fn tiles(&self) -> Result<(), RecordError> {
        let mut expected = 0;
        for (index, segment) in self.segments.iter().enumerate() {
            if segment.start != expected || segment.end <= segment.start {
                return Err(RecordError::Tiling {
                    index,
                    expected,
                    found: segment.start,
                });
            }
            finite("segments.score", &[segment.score])?;
            expected = segment.end;
        }
        if expected != self.token_ids.len() {
            let index = self.segments.len();
            return Err(RecordError::Tiling {
                index,
                expected,
                found: self.token_ids.len(),
            });
        }
        Ok(())
    }
}

fn finite(column: &'static str, values: &[f32]) -> Result<(), RecordError> {
    match values.iter().position(|value| !value.is_finite()) {
        Some(index) => Err(RecordError::NotFinite { column, index }),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record() -> CreditRecord {
        CreditRecord {
            schema_version: SCHEMA_VERSION,
            id: 1,
            side: Some(Side::Chosen),
            prompt_token_ids: vec![9],
            token_ids: vec![1, 2, 3],
            token_texts: ["a", "b", "c"].map(String::from).to_vec(),
            text_offsets: vec![],
            signal_name: "level".into(),
            signal: vec![0.5, -0.5, 0.5],
            baseline: vec![0.0],
            offset: 0.1,
            jump: None,
            segments: vec![
                SegmentRecord {
                    start: 0,
                    end: 1,
                    score: 0.5,
                    sign: Sign::Positive,
                },
                SegmentRecord {
                    start: 1,
                    end: 3,
                    score: 0.0,
                    sign: Sign::Neutral,
                },
            ],
            sequence_sign: Sign::Positive,
            keep: vec![true, false, false],
            truth: None,
            token_logps: None,
            reference_token_logps: None,
        }
    }

    #[test]
    fn a_record_survives_json() {
        let line = serde_json::to_string(&record()).unwrap();
        let back: CreditRecord = serde_json::from_str(&line).unwrap();
        assert_eq!(back, record());
        back.validate().unwrap();
    }

    #[test]
    fn a_record_without_a_jump_is_one_of_before_there_were_any() {
        let line = serde_json::to_string(&record()).unwrap();
        assert!(!line.contains("jump"), "{line}");
        let mut jumping = record();
        jumping.jump = Some(0.25);
        let line = serde_json::to_string(&jumping).unwrap();
        assert!(line.contains("\"offset\":0.1,\"jump\":0.25,"), "{line}");
        assert_eq!(
            serde_json::from_str::<CreditRecord>(&line).unwrap(),
            jumping
        );
        jumping.jump = Some(f32::INFINITY);
        let error = jumping.validate().unwrap_err().to_string();
        assert_eq!(error, "`jump` is not finite at token 0");
    }

    #[test]
    fn faults_name_the_column_and_the_token() {
        let mut short = record();
        short.keep.pop();
        let error = short.validate().unwrap_err().to_string();
        assert_eq!(error, "`keep` has 2 values, expected 3, one a token");

        let mut nan = record();
        nan.signal[1] = f32::NAN;
        assert_eq!(
            nan.validate().unwrap_err().to_string(),
            "`signal` is not finite at token 1"
        );

        let mut gap = record();
        gap.segments[1].start = 2;
        assert!(matches!(
            gap.validate(),
            Err(RecordError::Tiling {
                index: 1,
                expected: 1,
                found: 2
            })
        ));

        let mut cut = record();
        cut.segments.pop();
        assert!(matches!(
            cut.validate(),
            Err(RecordError::Tiling { index: 1, .. })
        ));
    }
}
