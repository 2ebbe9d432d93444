//! The tree-packed batch: sequences end to end without padding, a prompt stored once for all its responses.

/// A run of tokens that attends causally to itself and fully to one prefix: a prompt, or a response on its prompt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// First token in the pack.
    pub start: usize,
    /// Tokens in the run; at least 1.
    pub len: usize,
    /// First token of the prefix in the pack; 0 where there is none.
    pub prefix_start: usize,
    /// Tokens in the prefix; 0 for a prompt.
    pub prefix_len: usize,
}

/// One log-probability to take: of `target`, from the hidden state of token `source`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gather {
    /// Index in the pack of the token whose hidden state predicts `target`: the one before it in its sequence.
    pub source: usize,
    /// The token id predicted.
    pub target: u32,
    /// Which response of the batch it belongs to.
    pub response: usize,
    /// Which token of that response it is.
    pub position: usize,
}

/// A tree-packed batch of token ids.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pack {
    /// Token ids, `[tokens]`.
    pub token_ids: Vec<u32>,
    /// Position of each token in its own sequence, `[tokens]`.
    pub position_ids: Vec<u32>,
    /// The runs, in order; they tile the pack.
    pub spans: Vec<Span>,
    /// For each response of the batch, its index in `spans`, `[responses]`.
    pub responses: Vec<usize>,
}

/// A sequence that cannot be packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PackError {
    /// A prompt without tokens: nothing would predict the response's first token.
    #[error("a prompt is empty; a response needs at least one token before it")]
    EmptyPrompt,
    /// A response without tokens.
    #[error("response {index} is empty")]
    EmptyResponse {
        /// Which response of the batch.
        index: usize,
    },
}

impl Pack {
    /// Adds a prompt and the responses that share it.
    ///
    /// # Errors
    /// [`PackError`] if the prompt or a response is empty; the pack is then unchanged.
    pub fn push(&mut self, prompt: &[u32], responses: &[&[u32]]) -> Result<(), PackError> {
        if prompt.is_empty() {
            return Err(PackError::EmptyPrompt);
        }
        if let Some(offset) = responses.iter().position(|response| response.is_empty()) {
            return Err(PackError::EmptyResponse {
                index: self.responses.len() + offset,
            });
        }
        let prefix_start = self.token_ids.len();
        self.push_span(prompt, 0, 0);
        for response in responses {
            self.responses.push(self.spans.len());
            self.push_span(response, prefix_start, prompt.len());
        }
        Ok(())
    }

    /// Tokens in the pack.
    pub fn len(&self) -> usize {
        self.token_ids.len()
    }

    /// True of a pack without tokens.
    pub fn is_empty(&self) -> bool {
        self.token_ids.is_empty()
    }

    /// The span of a response.
    pub fn response_span(&self, response: usize) -> Span {
        self.spans[self.responses[response]]
    }

    /// The token ids of a response.
    pub fn response_ids(&self, response: usize) -> &[u32] {
        let span = self.response_span(response);
        &self.token_ids[span.start..span.start + span.len]
    }

    /// The log-probabilities to take for `keep(response, position)`: the others are never computed.
    ///
    /// # Examples
    /// ```
    /// let mut pack = pivotal_core::Pack::default();
    /// pack.push(&[7, 8], &[&[1, 2], &[3]]).unwrap();
    /// let sources: Vec<_> = pack.gather(|_, _| true).iter().map(|g| (g.source, g.target)).collect();
    /// assert_eq!(sources, [(1, 1), (2, 2), (1, 3)]);
    /// ```
    pub fn gather(&self, keep: impl Fn(usize, usize) -> bool) -> Vec<Gather> {
        let mut gathers = Vec::new();
        for response in 0..self.responses.len() {
            let span = self.response_span(response);
            for position in (0..span.len).filter(|&position| keep(response, position)) {
                let source = match position {
                    0 => span.prefix_start + span.prefix_len - 1,
                    _ => span.start + position - 1,
                };
                let target = self.token_ids[span.start + position];
                gathers.push(Gather {
                    source,
                    target,
                    response,
                    position,
                });
            }
        }
        gathers
    }

    fn push_span(&mut self, ids: &[u32], prefix_start: usize, prefix_len: usize) {
        let span = Span {
            start: self.token_ids.len(),
            len: ids.len(),
            prefix_start,
            prefix_len,
        };
        self.token_ids.extend_from_slice(ids);
        self.position_ids
            .extend((prefix_len..prefix_len + ids.len()).map(|p| p as u32));
        self.spans.push(span);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn responses_share_their_prompt_and_continue_its_positions() {
        let mut pack = Pack::default();
        pack.push(&[10, 11, 12], &[&[1, 2], &[3]]).unwrap();
        pack.push(&[20], &[&[4]]).unwrap();
        assert_eq!(pack.token_ids, [10, 11, 12, 1, 2, 3, 20, 4]);
        assert_eq!(pack.position_ids, [0, 1, 2, 3, 4, 3, 0, 1]);
        assert_eq!(
            pack.response_span(1),
            Span {
                start: 5,
                len: 1,
                prefix_start: 0,
                prefix_len: 3
            }
        );
        assert_eq!(pack.response_ids(2), [4]);
        assert_eq!(pack.gather(|_, _| true)[3].source, 6);
    }

    #[test]
    fn empty_sequences_are_refused_and_leave_the_pack_alone() {
        let mut pack = Pack::default();
        assert_eq!(pack.push(&[], &[&[1]]), Err(PackError::EmptyPrompt));
        assert_eq!(
            pack.push(&[1], &[&[2], &[]]),
            Err(PackError::EmptyResponse { index: 1 })
        );
        assert!(pack.is_empty() && pack.spans.is_empty());
    }
}
