//! The tree-packed batch: sequences end to end without padding, a prompt stored once for all its responses.

/// A run of tokens that attends causally to itself and fully to one prefix: a prompt, or a response on its prompt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// First token in the pack.
    pub start: usize,
    /// Tokens in the run; at least 1, but 0 where [`Pack::needed_by`] left it out.
    pub len: usize,
    /// First token of the prefix in the pack; 0 where there is none.
    pub prefix_start: usize,
    /// Tokens in the prefix; 0 for a prompt.
    pub prefix_len: usize,
}

/// One log-probability to take: of `target`, from the hidden state in row `source`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gather {
    /// The row, among the pack's hidden states, of the token before `target` in its sequence, which predicts it.
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
    /// The tokens whose hidden states are wanted, ascending: they are all that a model makes. `None` if every token's is.
    pub read: Option<Vec<usize>>,
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

const SOME_STATES: &str = "the pack is read at some tokens already";

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
    /// # Panics
    /// If one of them is predicted at a token that is not read.
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
                let target = self.token_ids[span.start + position];
                gathers.push(Gather {
                    source: self.row_of(self.source(response, position)),
                    target,
                    response,
                    position,
                });
            }
        }
        gathers
    }

    /// What the log-probabilities of `gathers` can be computed from: this pack without the tokens after the last of them in each
    /// response, that last one included, and without the prompts that none continues; and of what is left, the tokens whose hidden
    /// states are read. With it, `gathers` for the new pack.
    ///
    /// Attention is causal, so no value and no gradient changes. Spans stay where they are counted, some of them empty.
    ///
    /// # Panics
    /// If `gathers` are not this pack's, or it has [`Pack::read`] already.
    ///
    /// # Examples
    /// ```
    /// let mut pack = pivotal_core::Pack::default();
    /// pack.push(&[7, 8], &[&[1, 2, 3, 4], &[5, 6]]).unwrap();
    /// let kept = pack.gather(|response, position| response == 0 && position == 2);
    /// let (needed, gathers) = pack.needed_by(&kept);
    /// assert_eq!(needed.token_ids, [7, 8, 1, 2]);
    /// assert_eq!(needed.read, Some(vec![3]));
    /// assert_eq!((gathers[0].source, gathers[0].target), (0, 3));
    /// ```
    #[must_use]
    pub fn needed_by(&self, gathers: &[Gather]) -> (Self, Vec<Gather>) {
        assert!(self.read.is_none(), "{SOME_STATES}");
        // A response follows its prompt, with other responses to it between.
        let mut prompts = Vec::with_capacity(self.spans.len());
        for (index, span) in self.spans.iter().enumerate() {
            let prompt = prompts.last().copied().unwrap_or(index);
            prompts.push(if span.prefix_len == 0 { index } else { prompt });
        }
        // How many tokens of each span are needed: a prompt whole or not at all.
        let mut lens = vec![0; self.spans.len()];
        for gather in gathers {
            let response = self.responses[gather.response];
            lens[response] = lens[response].max(gather.position);
            lens[prompts[response]] = self.spans[prompts[response]].len;
        }
        let mut needed = Self {
            responses: self.responses.clone(),
            ..Self::default()
        };
        for (index, span) in self.spans.iter().enumerate() {
            let ids = &self.token_ids[span.start..][..lens[index]];
            match prompts[index] {
                prompt if prompt == index || lens[prompt] == 0 => needed.push_span(ids, 0, 0),
                prompt => needed.push_span(ids, needed.spans[prompt].start, span.prefix_len),
            }
        }
        let source = |gather: &Gather| needed.source(gather.response, gather.position);
        let sources: Vec<usize> = gathers.iter().map(source).collect();
        let needed = needed.reading(sources.clone());
        let moved = |(gather, source): (&Gather, usize)| Gather {
            source: needed.row_of(source),
            ..*gather
        };
        let gathers = gathers.iter().zip(sources).map(moved).collect();
        (needed, gathers)
    }

    /// The same pack, the hidden states of `tokens` alone being read, once each.
    ///
    /// # Panics
    /// If it has [`Pack::read`] already, or no such token.
    #[must_use]
    pub fn reading(self, mut tokens: Vec<usize>) -> Self {
        assert!(self.read.is_none(), "{SOME_STATES}");
        tokens.sort_unstable();
        tokens.dedup();
        assert!(tokens.last().is_none_or(|&last| last < self.len()));
        Self {
            read: Some(tokens),
            ..self
        }
    }

    /// Where the hidden state of `token` is among those that are read.
    ///
    /// # Panics
    /// If it is not read.
    pub fn row_of(&self, token: usize) -> usize {
        match &self.read {
            Some(read) => read.binary_search(&token).expect("a token that is read"),
            None => token,
        }
    }

    /// The tokens of the responses, one response after the other.
    pub fn response_tokens(&self) -> impl Iterator<Item = usize> {
        let spans = self.responses.iter().map(|&response| self.spans[response]);
        spans.flat_map(|span| span.start..span.start + span.len)
    }

    /// The last token of a response's prompt.
    pub fn prompt_end(&self, response: usize) -> usize {
        let span = self.response_span(response);
        span.prefix_start + span.prefix_len - 1
    }

    /// The token whose hidden state predicts token `position` of a response.
    fn source(&self, response: usize, position: usize) -> usize {
        match position {
            0 => self.prompt_end(response),
            _ => self.response_span(response).start + position - 1,
        }
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
    fn what_no_log_probability_needs_is_left_out() {
        let mut pack = Pack::default();
        pack.push(&[10, 11, 12], &[&[1, 2, 3], &[4, 5, 6, 7]])
            .unwrap();
        pack.push(&[20, 21], &[&[8, 9]]).unwrap();
        pack.push(&[30], &[&[1, 2, 3, 4], &[5]]).unwrap();
        let kept = [(1, 0), (1, 2), (3, 1), (4, 0)];
        let gathers = pack.gather(|response, position| kept.contains(&(response, position)));
        let (needed, moved) = pack.needed_by(&gathers);
        // No response to the second prompt is kept; of the fourth response the first token predicts the second.
        assert_eq!(needed.token_ids, [10, 11, 12, 4, 5, 30, 1]);
        assert_eq!(needed.position_ids, [0, 1, 2, 3, 4, 0, 1]);
        let lens: Vec<_> = needed.spans.iter().map(|span| span.len).collect();
        assert_eq!(lens, [3, 0, 2, 0, 0, 1, 1, 0]);
        let read = needed.read.as_ref().unwrap();
        assert_eq!(read, &[2, 4, 5, 6]);
        let sources: Vec<_> = moved.iter().map(|gather| gather.source).collect();
        assert_eq!(sources, [0, 1, 3, 2]);
        for (moved, gather) in moved.iter().zip(&gathers) {
            let of = |pack: &Pack, at: usize, target| {
                (pack.token_ids[at], pack.position_ids[at], target)
            };
            assert_eq!(
                of(&needed, read[moved.source], moved.target),
                of(&pack, gather.source, gather.target)
            );
        }
        let mut end = 0;
        for span in &needed.spans {
            assert_eq!(span.start, end);
            assert!(span.prefix_start + span.prefix_len <= span.start);
            end += span.len;
        }
        assert_eq!(pack.needed_by(&[]).0.read, Some(vec![]));
        assert_eq!(pack.needed_by(&[]).0.len(), 0);
        assert_eq!(
            pack.needed_by(&pack.gather(|_, _| true)).0.len(),
            pack.len() - 5
        );
    }

    #[test]
    fn rows_are_those_of_what_is_read() {
        let mut pack = Pack::default();
        pack.push(&[10, 11, 12], &[&[1, 2], &[4]]).unwrap();
        assert_eq!(pack.response_tokens().collect::<Vec<_>>(), [3, 4, 5]);
        assert_eq!((pack.row_of(4), pack.prompt_end(1)), (4, 2));
        let read = pack.reading(vec![5, 2, 4, 2]);
        assert_eq!(read.read, Some(vec![2, 4, 5]));
        assert_eq!([2, 4, 5].map(|token| read.row_of(token)), [0, 1, 2]);
    }

    #[test]
    #[should_panic(expected = "a token that is read")]
    fn what_is_not_read_has_no_row() {
        let mut pack = Pack::default();
        pack.push(&[10, 11], &[&[1]]).unwrap();
        let _ = pack.reading(vec![1]).row_of(2);
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
