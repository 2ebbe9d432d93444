//! Tokenised samples: what a data set becomes before it is packed.

use serde::{Deserialize, Serialize};

/// Which response of a preference pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Side {
    /// The preferred response.
    Chosen,
    /// The other one.
    Rejected,
}

/// A prompt, in token ids, with what the chat template put around it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenizedPrompt {
    /// Where it comes from: the 1-based row of the data set, or a generator's index.
    pub id: u64,
    /// Token ids, BOS included where the model wants one; never empty.
    pub prompt: Vec<u32>,
}

/// A prompt with one response.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenizedResponse {
    /// Where it comes from: the 1-based row of the data set, or a generator's index.
    pub id: u64,
    /// Token ids of the prompt; never empty.
    pub prompt: Vec<u32>,
    /// Token ids of the response, EOS included unless the length limit cut it; never empty.
    pub response: Vec<u32>,
    /// Which of the response's tokens are the model's own (all, except in conversations of several turns).
    pub response_mask: Vec<bool>,
}

/// A prompt with a chosen and a rejected response.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenizedPair {
    /// Where it comes from: the 1-based row of the data set, or a generator's index.
    pub id: u64,
    /// Token ids of the prompt; never empty.
    pub prompt: Vec<u32>,
    /// Token ids of the chosen response, EOS included unless the length limit cut it; never empty.
    pub chosen: Vec<u32>,
    /// The same of the rejected response.
    pub rejected: Vec<u32>,
}

impl TokenizedPair {
    /// The response of one side.
    pub fn response(&self, side: Side) -> &[u32] {
        match side {
            Side::Chosen => &self.chosen,
            Side::Rejected => &self.rejected,
        }
    }
}
