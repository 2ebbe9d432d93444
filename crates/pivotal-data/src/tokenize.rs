//! From rows to token ids: one prefix law, one BOS, one EOS, one rule for lengths.
//!
//! - The prompt's ids are a prefix of the ids of prompt + response ([`Prefix`] says what happens where they are not).
//! - Plain text starts with BOS if the tokenizer says so; a chat template writes its own. Two are an error.
//! - A response ends with EOS, once. Plain text gets it appended as an id; in a chat the template's own end of turn must
//!   be the EOS, and what the template writes after it (often a newline) is cut off, as generation never gets there.
//! - A prompt over its limit loses its beginning (a BOS stays), a response over its limit loses its end and so has no EOS.
//!   The limit on the total shortens the response only. A row whose response is cut to nothing is dropped and counted.

use std::path::Path;

use pivotal_core::{TokenizedPair, TokenizedPrompt, TokenizedResponse};

use crate::chat::ChatTemplate;
use crate::conversation::tokenize_conversation;
use crate::data_set::DataSet;
use crate::error::{DataError, Result, RowFault};
use crate::sample::{Content, External, Row, Sample};
use crate::tokenizer::Tokenizer;

/// What happens where the prompt's ids are not a prefix of the ids of prompt + response.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Prefix {
    /// The row is refused, naming the first token that differs.
    #[default]
    Error,
    /// Prompt and response are tokenised apart, so that the law holds by construction; ids near the boundary may differ
    /// from those of the joint text.
    Parts,
}

/// The longest sequences kept, in tokens; `None` does not limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// A longer prompt loses its beginning.
    pub max_prompt_tokens: Option<usize>,
    /// A longer response, EOS counted, loses its end.
    pub max_response_tokens: Option<usize>,
    /// Prompt and response together; the response loses its end.
    pub max_total_tokens: Option<usize>,
}

/// How rows become token ids.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TokenizeOptions {
    /// The prefix law.
    pub prefix: Prefix,
    /// The length limits.
    pub limits: Limits,
    /// Rows of the model's embedding: ids from there on are refused. `None` takes the tokenizer's own size.
    pub vocabulary_size: Option<usize>,
}

/// Tokenised rows, and what the limits did to them.
#[derive(Clone, Debug, PartialEq)]
pub struct Tokenized<T> {
    /// The rows that are left, in file order; at least one.
    pub items: Vec<T>,
    /// What the rows say about their responses' tokens, `[items][responses of an item]`: chosen before rejected.
    pub external: Vec<Vec<External>>,
    /// Rows dropped, because a limit left no token of a response.
    pub dropped: usize,
    /// Prompts that lost their beginning, among the items.
    pub truncated_prompts: usize,
    /// Responses that lost their end, among the items.
    pub truncated_responses: usize,
}

/// Tokenises preferences.
///
/// # Errors
/// [`DataError::Row`] naming row and column, [`DataError::WrongShape`] if the data set is not of preferences,
/// [`DataError::AllDropped`].
pub fn tokenize_pairs(
    data: &DataSet,
    tokenizer: &Tokenizer,
    template: Option<&ChatTemplate>,
    options: &TokenizeOptions,
) -> Result<Tokenized<TokenizedPair>> {
    let context = Context::new(tokenizer, template, options)?;
    let sequences = tokenize_rows(data, "preferences", |row| match &row.sample {
        Sample::Preference {
            prompt,
            chosen,
            rejected,
            chosen_external,
            rejected_external,
        } => {
            let responses = [
                ("chosen", chosen, chosen_external),
                ("rejected", rejected, rejected_external),
            ];
            context.sequences(prompt, &responses).map(Some)
        }
        _ => Ok(None),
    })?;
    sequences.map(|row, mut responses| {
        let rejected = responses.pop().unwrap_or_default();
        let chosen = responses.pop().unwrap_or_default();
        TokenizedPair {
            id: row,
            prompt: chosen.prompt,
            chosen: chosen.response,
            rejected: rejected.response,
        }
    })
}

/// Tokenises `prompt`/`completion`, `messages` or `text` for supervised fine-tuning.
///
/// In a conversation the prompt ends where the assistant first speaks, and the response mask holds the assistant's own
/// tokens with their EOS. Plain `text` has BOS for its prompt, or, without one, its first token.
///
/// # Errors
/// [`DataError::Row`] naming row and column, [`DataError::WrongShape`] for preferences and bare prompts,
/// [`DataError::AllDropped`].
pub fn tokenize_responses(
    data: &DataSet,
    tokenizer: &Tokenizer,
    template: Option<&ChatTemplate>,
    options: &TokenizeOptions,
) -> Result<Tokenized<TokenizedResponse>> {
    let context = Context::new(tokenizer, template, options)?;
    let expected = "`prompt`/`completion`, `messages` or `text`";
    let sequences = tokenize_rows(data, expected, |row| match &row.sample {
        Sample::Completion {
            prompt,
            completion,
            external,
        } => context
            .sequences(prompt, &[("completion", completion, external)])
            .map(Some),
        Sample::Messages { messages } => {
            let template = context.template("messages")?;
            let sequence = tokenize_conversation(messages, tokenizer, template)?;
            Ok(Some(vec![context.limited("messages", sequence)?]))
        }
        Sample::Text { text } => {
            let sequence = context.whole_text(text)?;
            Ok(Some(vec![context.limited("text", sequence)?]))
        }
        _ => Ok(None),
    })?;
    sequences.map(|row, mut responses| {
        let only = responses.pop().unwrap_or_default();
        TokenizedResponse {
            id: row,
            prompt: only.prompt,
            response: only.response,
            response_mask: only.response_mask,
        }
    })
}

/// Tokenises the prompts of a data set of any shape but `messages` and `text`, ready to be continued.
///
/// # Errors
/// [`DataError::Row`] naming row and column, [`DataError::WrongShape`].
pub fn tokenize_prompts(
    data: &DataSet,
    tokenizer: &Tokenizer,
    template: Option<&ChatTemplate>,
    options: &TokenizeOptions,
) -> Result<Tokenized<TokenizedPrompt>> {
    let context = Context::new(tokenizer, template, options)?;
    let sequences = tokenize_rows(data, "one with prompts", |row| match &row.sample {
        Sample::Prompt { prompt }
        | Sample::Completion { prompt, .. }
        | Sample::Preference { prompt, .. } => {
            let text = context.prompt_text("prompt", prompt)?;
            let sequence = Sequence::new(context.prompt_ids(&text)?, vec![], vec![]);
            Ok(Some(vec![context.limited("prompt", sequence)?]))
        }
        _ => Ok(None),
    })?;
    sequences.map(|row, mut responses| TokenizedPrompt {
        id: row,
        prompt: responses.pop().unwrap_or_default().prompt,
    })
}

/// A prompt and one response, on their way.
#[derive(Clone, Debug, Default)]
pub(crate) struct Sequence {
    prompt: Vec<u32>,
    response: Vec<u32>,
    response_mask: Vec<bool>,
    external: External,
    prompt_truncated: bool,
    response_truncated: bool,
    dropped: bool,
}

impl Sequence {
    pub(crate) fn new(prompt: Vec<u32>, response: Vec<u32>, response_mask: Vec<bool>) -> Self {
        Self {
            prompt,
            response,
            response_mask,
            ..Self::default()
        }
    }
}

struct Sequences<'a> {
    path: &'a Path,
    rows: Vec<(u64, Vec<Sequence>)>,
    dropped: usize,
}

impl Sequences<'_> {
    fn map<T>(self, build: impl Fn(u64, Vec<Sequence>) -> T) -> Result<Tokenized<T>> {
        if self.rows.is_empty() {
            return Err(DataError::AllDropped {
                path: self.path.into(),
                dropped: self.dropped,
            });
        }
        let mut tokenized = Tokenized {
            items: Vec::with_capacity(self.rows.len()),
            external: Vec::with_capacity(self.rows.len()),
            dropped: self.dropped,
            truncated_prompts: 0,
            truncated_responses: 0,
        };
        for (row, mut sequences) in self.rows {
            tokenized.truncated_prompts +=
                usize::from(sequences.iter().any(|s| s.prompt_truncated));
            let cut = sequences.iter().filter(|s| s.response_truncated);
            tokenized.truncated_responses += cut.count();
            let external = sequences
                .iter_mut()
                .map(|s| std::mem::take(&mut s.external));
            tokenized.external.push(external.collect());
            tokenized.items.push(build(row, sequences));
        }
        Ok(tokenized)
    }
}

/// Runs `tokenize` over the rows; `Ok(None)` says that the shape does not fit.
fn tokenize_rows<'a>(
    data: &'a DataSet,
    expected: &'static str,
    tokenize: impl Fn(&Row) -> Result<Option<Vec<Sequence>>, RowFault>,
) -> Result<Sequences<'a>> {
    let mut rows = Vec::with_capacity(data.rows().len());
    let mut dropped = 0;
    for row in data.rows() {
        let sequences = tokenize(row)
            .map_err(|fault| DataError::Row {
                path: data.path().into(),
                row: row.row,
                fault,
            })?
            .ok_or_else(|| DataError::WrongShape {
                path: data.path().into(),
                expected,
                found: data.shape(),
            })?;
        match sequences.iter().any(|sequence| sequence.dropped) {
            true => dropped += 1,
            false => rows.push((row.row, sequences)),
        }
    }
    Ok(Sequences {
        path: data.path(),
        rows,
        dropped,
    })
}

struct Context<'a> {
    tokenizer: &'a Tokenizer,
    template: Option<&'a ChatTemplate>,
    options: TokenizeOptions,
    vocabulary_size: usize,
}

impl<'a> Context<'a> {
    fn new(
        tokenizer: &'a Tokenizer,
        template: Option<&'a ChatTemplate>,
        options: &TokenizeOptions,
    ) -> Result<Self> {
        let Limits {
            max_prompt_tokens,
            max_response_tokens,
            max_total_tokens,
        } = options.limits;
        for (name, limit) in [
            ("max_prompt_tokens", max_prompt_tokens),
            ("max_response_tokens", max_response_tokens),
            ("max_total_tokens", max_total_tokens),
        ] {
            if limit == Some(0) {
                return Err(DataError::Zero { name });
            }
        }
        let own_size = tokenizer.vocabulary_size();
        Ok(Self {
            tokenizer,
            template,
            options: *options,
            vocabulary_size: options.vocabulary_size.unwrap_or(own_size),
        })
    }

    fn template(&self, column: &'static str) -> Result<&'a ChatTemplate, RowFault> {
        self.template.ok_or(RowFault::NoTemplate { column })
    }

    fn prompt_text(&self, column: &'static str, prompt: &Content) -> Result<String, RowFault> {
        match prompt {
            Content::Text(text) => Ok(text.clone()),
            Content::Chat(messages) => self
                .template(column)?
                .render(messages, true)
                .map_err(|error| render_fault(column, &error)),
        }
    }

    fn prompt_ids(&self, text: &str) -> Result<Vec<u32>, RowFault> {
        let ids = encode(self.tokenizer, "prompt", text)?;
        with_bos(self.tokenizer, "prompt", ids)
    }

    fn sequences(
        &self,
        prompt: &Content,
        responses: &[(&'static str, &Content, &External)],
    ) -> Result<Vec<Sequence>, RowFault> {
        let prompt_text = self.prompt_text("prompt", prompt)?;
        let prompt_ids = encode(self.tokenizer, "prompt", &prompt_text)?;
        let mut sequences = Vec::with_capacity(responses.len());
        for &(column, response, external) in responses {
            let joint_text = match (prompt, response) {
                (Content::Chat(prompt), Content::Chat(response)) => {
                    let template = self.template(column)?;
                    let joint = [prompt.as_slice(), response].concat();
                    let text = template
                        .render(&joint, false)
                        .map_err(|error| render_fault(column, &error))?;
                    check_text_prefix(column, template, prompt.len(), &prompt_text, &text)?;
                    text
                }
                (_, Content::Text(response)) => format!("{prompt_text}{response}"),
                (Content::Text(_), Content::Chat(_)) => unreachable!("refused when read"),
            };
            let ids = match self.options.prefix {
                Prefix::Error => {
                    let joint = encode(self.tokenizer, column, &joint_text)?;
                    check_token_prefix(self.tokenizer, column, &prompt_ids, &joint)?;
                    joint[prompt_ids.len()..].to_vec()
                }
                Prefix::Parts => encode(self.tokenizer, column, &joint_text[prompt_text.len()..])?,
            };
            let template = match response {
                Content::Text(_) => None,
                Content::Chat(_) => self.template,
            };
            let ids = with_eos(self.tokenizer, column, template, ids)?;
            check_external(column, external, ids.len())?;
            let prompt = with_bos(self.tokenizer, "prompt", prompt_ids.clone())?;
            let mask = vec![true; ids.len()];
            let mut sequence = Sequence::new(prompt, ids, mask);
            sequence.external = external.clone();
            sequences.push(self.limited(column, sequence)?);
        }
        Ok(sequences)
    }

    fn whole_text(&self, text: &str) -> Result<Sequence, RowFault> {
        let ids = encode(self.tokenizer, "text", text)?;
        let mut ids = with_bos(self.tokenizer, "text", ids)?;
        if ids.len() == 1 && !self.tokenizer.adds_bos() {
            return Err(RowFault::OneToken { column: "text" });
        }
        let response = with_eos(self.tokenizer, "text", None, ids.split_off(1))?;
        let mask = vec![true; response.len()];
        Ok(Sequence::new(ids, response, mask))
    }

    fn limited(&self, column: &'static str, mut sequence: Sequence) -> Result<Sequence, RowFault> {
        let mut ids = sequence.prompt.iter().chain(&sequence.response);
        if let Some(&id) = ids.find(|&&id| id as usize >= self.vocabulary_size) {
            return Err(RowFault::TokenId {
                column,
                id,
                vocabulary_size: self.vocabulary_size,
            });
        }
        let limits = self.options.limits;
        let prompt = &mut sequence.prompt;
        if let Some(limit) = limits
            .max_prompt_tokens
            .filter(|&limit| prompt.len() > limit)
        {
            let bos = self
                .tokenizer
                .bos()
                .filter(|&bos| self.tokenizer.adds_bos() && prompt[0] == bos);
            prompt.drain(..prompt.len() - limit);
            if let Some(bos) = bos {
                prompt[0] = bos;
            }
            sequence.prompt_truncated = true;
        }
        let room = limits
            .max_total_tokens
            .map(|limit| limit.saturating_sub(prompt.len()));
        let limit = [limits.max_response_tokens, room]
            .into_iter()
            .flatten()
            .min();
        if let Some(limit) = limit.filter(|&limit| sequence.response.len() > limit) {
            sequence.response.truncate(limit);
            sequence.response_mask.truncate(limit);
            if let Some(signal) = &mut sequence.external.signal {
                signal.truncate(limit);
            }
            if let Some(cuts) = &mut sequence.external.cuts {
                cuts.retain(|&cut| cut < limit);
            }
            sequence.response_truncated = true;
            sequence.dropped = !sequence.response_mask.contains(&true);
        }
        Ok(sequence)
    }
}

pub(crate) fn render_fault(column: &'static str, error: &DataError) -> RowFault {
    RowFault::Render {
        column,
        detail: error.to_string(),
    }
}

pub(crate) fn encode(
    tokenizer: &Tokenizer,
    column: &'static str,
    text: &str,
) -> Result<Vec<u32>, RowFault> {
    tokenizer
        .encode(text)
        .map_err(|error| render_fault(column, &error))
}

/// The template must write the same text before a message whether or not that message is there.
pub(crate) fn check_text_prefix(
    column: &'static str,
    template: &ChatTemplate,
    message: usize,
    prefix: &str,
    text: &str,
) -> Result<(), RowFault> {
    match text.starts_with(prefix) {
        true => Ok(()),
        false => Err(RowFault::TemplatePrefix {
            column,
            template: template.name().to_owned(),
            message,
            byte: text
                .bytes()
                .zip(prefix.bytes())
                .take_while(|(a, b)| a == b)
                .count(),
        }),
    }
}

pub(crate) fn check_token_prefix(
    tokenizer: &Tokenizer,
    column: &'static str,
    prompt: &[u32],
    joint: &[u32],
) -> Result<(), RowFault> {
    if joint.starts_with(prompt) {
        return Ok(());
    }
    let index = prompt.iter().zip(joint).take_while(|(a, b)| a == b).count();
    let text = |ids: &[u32]| {
        let id = ids.get(index)?;
        tokenizer.token_texts(&[*id]).ok()?.pop()
    };
    Err(RowFault::TokenPrefix {
        column,
        index,
        prompt_token: text(prompt),
        joint_token: text(joint),
    })
}

/// A prompt with its BOS, if the model wants one: exactly one.
pub(crate) fn with_bos(
    tokenizer: &Tokenizer,
    column: &'static str,
    mut ids: Vec<u32>,
) -> Result<Vec<u32>, RowFault> {
    if let Some(bos) = tokenizer.bos() {
        if ids.starts_with(&[bos, bos]) {
            return Err(RowFault::DoubleBos { column });
        }
        if tokenizer.adds_bos() && ids.first() != Some(&bos) {
            ids.insert(0, bos);
        }
    }
    match ids.is_empty() {
        true => Err(RowFault::EmptyPrompt { column }),
        false => Ok(ids),
    }
}

/// A response with its EOS at the end, and nowhere else.
pub(crate) fn with_eos(
    tokenizer: &Tokenizer,
    column: &'static str,
    template: Option<&ChatTemplate>,
    mut ids: Vec<u32>,
) -> Result<Vec<u32>, RowFault> {
    let eos = tokenizer.eos();
    let text = |id: u32| tokenizer.token_text(id).unwrap_or_else(|_| id.to_string());
    let blank = |id: u32| {
        tokenizer
            .decode(&[id])
            .is_ok_and(|text| text.trim().is_empty())
    };
    if let Some(template) = template {
        let written = ids.len() - ids.iter().rev().take_while(|&&id| blank(id)).count();
        match ids[..written].last() {
            Some(&last) if last == eos => ids.truncate(written),
            Some(&last) if tokenizer.is_special(last) => {
                return Err(RowFault::EndOfTurn {
                    column,
                    template: template.name().to_owned(),
                    eos: text(eos),
                    found: text(last),
                });
            }
            _ => {}
        }
    }
    if ids.last() != Some(&eos) {
        ids.push(eos);
    }
    match ids.iter().position(|&id| id == eos) {
        Some(index) if index + 1 < ids.len() => Err(RowFault::EosInside {
            column,
            eos: text(eos),
            index,
        }),
        Some(0) => Err(RowFault::EmptyResponse { column }),
        _ => Ok(ids),
    }
}

fn check_external(side: &str, external: &External, tokens: usize) -> Result<(), RowFault> {
    if let Some(signal) = external
        .signal
        .as_ref()
        .filter(|signal| signal.len() != tokens)
    {
        return Err(RowFault::SignalLength {
            column: format!("{side}_signal"),
            expected: tokens,
            found: signal.len(),
        });
    }
    let mut after = 0;
    for (index, &found) in external.cuts.iter().flatten().enumerate() {
        if found <= after || found >= tokens {
            return Err(RowFault::Cut {
                column: format!("{side}_cuts"),
                index,
                found,
                after,
                tokens,
            });
        }
        after = found;
    }
    Ok(())
}
