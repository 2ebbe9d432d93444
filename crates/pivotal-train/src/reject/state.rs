//! Where a run of `pivotal reject` stands: in which round, with which accepted responses, how many steps into them.

use pivotal_core::TokenMask;
use serde::{Deserialize, Serialize};

use super::AcceptedResponse;
use super::round::RoundNumbers;
use crate::error::{Error, Result};
use crate::onpolicy::{Prompt, from_state_text, state_text};

/// What a checkpoint keeps besides parameters and moments. A round's responses cannot be sampled again once the policy has moved.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct State {
    /// The round that is under way, from 1; the rounds before it are done, held-out prompts included.
    pub round: u64,
    /// Optimizer steps taken of it.
    pub taken: u64,
    /// Steps of the run in which nothing was kept.
    pub empty_steps: u64,
    /// Responses accepted in all.
    pub accepted: u64,
    /// The state of [`crate::onpolicy::RolloutCredit`].
    pub credit: String,
    /// What the round sampled; `None` before it has.
    pub sampled: Option<SampledRound>,
}

/// A round's accepted responses.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct SampledRound {
    /// As JSON text, which has a null where TOML has none.
    #[serde(with = "as_json")]
    pub numbers: RoundNumbers,
    pub accepted: Vec<Stored>,
}

/// An accepted response without its prompt, which the data has.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Stored {
    id: u64,
    token_ids: Vec<u32>,
    /// Empty if every token is kept.
    keep: Vec<bool>,
}

mod as_json {
    use serde::{Deserialize, Deserializer, Serialize, Serializer, de, ser};

    use super::RoundNumbers;

    pub(super) fn serialize<S: Serializer>(
        numbers: &RoundNumbers,
        to: S,
    ) -> Result<S::Ok, S::Error> {
        let text = serde_json::to_string(numbers).map_err(ser::Error::custom)?;
        text.serialize(to)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(
        from: D,
    ) -> Result<RoundNumbers, D::Error> {
        let text = String::deserialize(from)?;
        serde_json::from_str(&text).map_err(de::Error::custom)
    }
}

impl Stored {
    pub(super) fn new(accepted: &AcceptedResponse) -> Self {
        let all = accepted.keep.kept() == accepted.keep.len();
        Self {
            id: accepted.id,
            token_ids: accepted.response.clone(),
            keep: match all {
                true => Vec::new(),
                false => accepted.keep.as_slice().to_vec(),
            },
        }
    }

    /// The response, behind its prompt.
    pub(super) fn restore(&self, prompts: &[Prompt]) -> Result<AcceptedResponse> {
        let lacking = |what: &str| Error::Checkpoint {
            what: format!("{what} of row {}", self.id),
        };
        // Rows are in order of their ids.
        let place = prompts.binary_search_by_key(&self.id, |prompt| prompt.id);
        let prompt = &prompts[place.map_err(|_| lacking("the prompt"))?];
        let tokens = self.token_ids.len();
        let keep = match self.keep.is_empty() {
            true => TokenMask::all(tokens),
            false => TokenMask::from(self.keep.clone()),
        };
        match keep.len() == tokens {
            true => Ok(AcceptedResponse {
                id: self.id,
                prompt: prompt.token_ids.clone(),
                response: self.token_ids.clone(),
                keep,
            }),
            false => Err(lacking("a mask of the response's length")),
        }
    }
}

impl State {
    /// Before `round`.
    pub(super) fn before(round: u64) -> Self {
        Self {
            round,
            taken: 0,
            empty_steps: 0,
            accepted: 0,
            credit: String::new(),
            sampled: None,
        }
    }

    /// The round is done: the next one begins.
    pub(super) fn close(&mut self) {
        self.round += 1;
        self.taken = 0;
        self.sampled = None;
    }

    /// The last round whose responses were sampled.
    pub(super) fn last_sampled(&self) -> u64 {
        match self.sampled {
            Some(_) => self.round,
            None => self.round - 1,
        }
    }

    pub(super) fn to_text(&self) -> Result<String> {
        state_text(self)
    }

    /// What [`State::to_text`] wrote; the start of a run for an empty text.
    pub(super) fn from_text(text: &str) -> Result<Self> {
        let state = from_state_text(text)?.unwrap_or_else(|| Self::before(1));
        match state.round {
            0 => Err(Error::Checkpoint {
                what: "a round that is under way".to_owned(),
            }),
            _ => Ok(state),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_checkpoint_keeps_comes_back() {
        let prompts: Vec<Prompt> = [2_u64, 5]
            .map(|id| Prompt {
                id,
                token_ids: vec![id as u32],
                checks: vec![],
                reference: serde_json::Value::Null,
            })
            .into();
        let accepted = |id: u64, keep: Vec<bool>| AcceptedResponse {
            id,
            prompt: vec![id as u32],
            response: (0..keep.len() as u32).collect(),
            keep: keep.into(),
        };
        let all = [
            accepted(5, vec![true, true]),
            accepted(2, vec![false, false, false]),
            accepted(2, vec![true, false]),
        ];
        let state = State {
            round: 3,
            taken: 2,
            empty_steps: 1,
            accepted: 7,
            credit: "x = 1\n[y]\nz = [1.5]\n".to_owned(),
            sampled: Some(SampledRound {
                numbers: RoundNumbers {
                    score: 0.1 + 0.2,
                    accepted_score: Some(1.0 / 3.0),
                    ..RoundNumbers::default()
                },
                accepted: all.iter().map(Stored::new).collect(),
            }),
        };
        let again = State::from_text(&state.to_text().unwrap()).unwrap();
        assert_eq!(again, state);
        assert_eq!(again.last_sampled(), 3);
        let restored = again.sampled.unwrap().accepted;
        let restored: Vec<_> = restored
            .iter()
            .map(|one| one.restore(&prompts).unwrap())
            .collect();
        assert_eq!(restored, all);
        let missing = Stored::new(&accepted(4, vec![true])).restore(&prompts);
        assert!(missing.unwrap_err().to_string().contains("row 4"));

        let mut state = State::from_text("").unwrap();
        assert_eq!((state.round, state.last_sampled()), (1, 0));
        state.close();
        assert_eq!((state.round, state.last_sampled()), (2, 1));
        let nothing = SampledRound {
            numbers: RoundNumbers::default(),
            accepted: vec![],
        };
        state.sampled = Some(nothing);
        assert_eq!(State::from_text(&state.to_text().unwrap()).unwrap(), state);
    }
}
