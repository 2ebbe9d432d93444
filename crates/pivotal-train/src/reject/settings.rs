//! The `[reject]` table.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::choose::{AcceptRule, Dedupe};
use crate::error::{Error, Result};
use crate::settings::domain;
use crate::settings::overlay;
use crate::table::table;

/// The lowest score that is accepted, or `none`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "MinScoreValue", into = "MinScoreValue")]
pub struct MinScore(pub Option<f64>);

/// As it stands in a file: a number, or `"none"`.
#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum MinScoreValue {
    Number(f64),
    Whole(i64),
    Text(String),
}

impl From<MinScore> for MinScoreValue {
    fn from(score: MinScore) -> Self {
        match score.0 {
            Some(score) => Self::Number(score),
            None => Self::Text("none".to_owned()),
        }
    }
}

impl TryFrom<MinScoreValue> for MinScore {
    type Error = String;

    fn try_from(value: MinScoreValue) -> Result<Self, String> {
        match value {
            MinScoreValue::Number(score) => Ok(Self(Some(score))),
            MinScoreValue::Whole(score) => Ok(Self(Some(score as f64))),
            MinScoreValue::Text(text) => text.parse(),
        }
    }
}

impl FromStr for MinScore {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "none" => Ok(Self(None)),
            _ => match text.parse() {
                Ok(score) => Ok(Self(Some(score))),
                Err(_) => Err(format!("expected a number or none, found `{text}`")),
            },
        }
    }
}

impl fmt::Display for MinScore {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(score) => score.fmt(formatter),
            None => formatter.write_str("none"),
        }
    }
}

table! {
    /// Rejection sampling.
    pub struct RejectSettings, RejectFlags {
        /// Rounds: each samples responses to a set of prompts from the policy as it is, and trains on those it accepts.
        /// 0 takes as many as one pass over the prompts needs.
        "rounds" rounds: u64 = 0,
        /// Responses accepted of each prompt at most: those of the highest score, of equals the first sampled.
        "best" best: usize = 1,
        /// No response that scores less is accepted: a number, or none.
        "min-score" min_score: MinScore = MinScore(None),
        /// Responses to a prompt that are the same are accepted once: the same by tokens, by text (but for white space), or none.
        "dedupe" dedupe: Dedupe = Dedupe::Tokens,
    }
}

overlay! {
    RejectFlags => RejectSettings,
}

impl RejectSettings {
    /// Checks every number's domain; `samples` are the responses to a prompt.
    ///
    /// # Errors
    /// [`Error::Setting`], naming the flag.
    pub fn check(&self, samples: usize) -> Result<()> {
        let best = self.best;
        domain("best", best as f64, "at least 1", best > 0)?;
        if best > samples {
            return Err(Error::Setting {
                key: "best",
                found: best.to_string(),
                expected: "at most `--samples`: a prompt has no more responses",
            });
        }
        match self.min_score.0 {
            Some(score) => domain("min-score", score, "a finite number, or none", true),
            None => Ok(()),
        }
    }

    /// What [`choose_accepted`](super::choose_accepted) is to go by.
    pub fn rule(&self) -> AcceptRule {
        AcceptRule {
            best: self.best,
            min_score: self.min_score.0,
            dedupe: self.dedupe,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_minimum_reads_back_as_it_is_written() {
        for (score, text) in [
            (None, "min_score = \"none\""),
            (Some(0.5), "min_score = 0.5"),
            (Some(-2.0), "min_score = -2.0"),
        ] {
            let settings = RejectSettings {
                min_score: MinScore(score),
                ..RejectSettings::default()
            };
            let written = crate::show_config(&settings);
            assert!(written.contains(text), "{written}");
            assert_eq!(
                toml::from_str::<RejectSettings>(&written).unwrap(),
                settings
            );
            assert_eq!(
                settings.min_score.to_string().parse(),
                Ok(settings.min_score)
            );
        }
        let whole: RejectSettings = toml::from_str("min_score = 1").unwrap();
        assert_eq!(whole.min_score, MinScore(Some(1.0)));
        for bad in ["min_score = \"some\"", "min_score = true"] {
            assert!(toml::from_str::<RejectSettings>(bad).is_err(), "{bad}");
        }
        assert!("1e".parse::<MinScore>().is_err());
    }

    #[test]
    fn more_than_there_are_cannot_be_accepted() {
        let settings = |best, score| RejectSettings {
            best,
            min_score: MinScore(Some(score)),
            ..RejectSettings::default()
        };
        settings(4, 0.5).check(4).unwrap();
        for (settings, says) in [
            (settings(5, 0.5), "--samples"),
            (settings(0, 0.5), "at least 1"),
            (settings(1, f64::NAN), "min-score"),
        ] {
            let error = settings.check(4).unwrap_err().to_string();
            assert!(error.contains(says), "{error}");
        }
    }
}
