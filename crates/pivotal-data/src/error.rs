//! What can be wrong with data, a tokenizer or a template.

use std::path::PathBuf;

use pivotal_core::{ErrorKind, FileError, HasKind, PackError};

use crate::sample::Shape;

/// The result of this crate's functions.
pub type Result<T, E = DataError> = std::result::Result<T, E>;

/// A data set, tokenizer or template that cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DataError {
    /// A file could not be read.
    #[error(transparent)]
    File(#[from] FileError),
    /// A row is at fault.
    #[error("`{}`, row {row}: {fault}", path.display())]
    Row {
        /// The data set.
        path: PathBuf,
        /// The line of the file, from 1.
        row: u64,
        /// What is wrong there.
        fault: RowFault,
    },
    /// A data set without any row.
    #[error("`{}` holds no rows", path.display())]
    NoRows {
        /// The data set.
        path: PathBuf,
    },
    /// The data set's shape is not what a recipe needs.
    #[error("`{}` has the shape {found}, expected {expected}", path.display())]
    WrongShape {
        /// The data set.
        path: PathBuf,
        /// The shapes that would do.
        expected: &'static str,
        /// The shape it has.
        found: Shape,
    },
    /// Nothing is left within the length limits.
    #[error(
        "`{}`: all {dropped} rows were dropped, the length limits leave no response token; \
         raise the limit on the total length or lower the one on the prompt",
        path.display()
    )]
    AllDropped {
        /// The data set.
        path: PathBuf,
        /// Rows dropped.
        dropped: usize,
    },
    /// A length limit, a batch size or a token budget of zero.
    #[error("`{name}` is 0, expected at least 1")]
    Zero {
        /// Name of the setting.
        name: &'static str,
    },
    /// A chat template that does not compile, or fails on a conversation.
    #[error(
        "chat template `{name}`{}{}: {detail}",
        line.map_or_else(String::new, |line| format!(", line {line}")),
        message.map_or_else(String::new, |index| format!(", message {index}")),
    )]
    Template {
        /// Where the template comes from.
        name: String,
        /// Line in the template, from 1, where known.
        line: Option<usize>,
        /// Index from 0 of the message it fails on, where there is one.
        message: Option<usize>,
        /// What the template engine, or the template itself, said.
        detail: String,
    },
    /// A tokenizer that cannot be built.
    #[error("the tokenizer cannot be read: {detail}")]
    TokenizerFormat {
        /// What the tokenizer library said.
        detail: String,
    },
    /// A text that the tokenizer refuses.
    #[error("the tokenizer failed: {detail}")]
    Encode {
        /// What the tokenizer library said.
        detail: String,
    },
    /// A vocabulary that contradicts itself.
    #[error("tokenizer vocabulary: `{field}` entry {index}: expected {expected}, got `{found}`")]
    Vocabulary {
        /// `tokens`, `kinds` or `merges`.
        field: &'static str,
        /// Which entry, from 0.
        index: usize,
        /// What should stand there.
        expected: &'static str,
        /// What stands there.
        found: String,
    },
    /// A pre-tokenizer name we have no rule for.
    #[error(
        "unknown pre-tokenizer `{name}`, expected one of {}; or give a `tokenizer.json`",
        known.join(", ")
    )]
    PreTokenizer {
        /// The name met.
        name: String,
        /// The names known.
        known: Vec<&'static str>,
    },
    /// A token id that the vocabulary does not have.
    #[error("token id {id} is out of the vocabulary of {vocabulary_size} tokens")]
    TokenId {
        /// The id.
        id: u32,
        /// Tokens in the vocabulary.
        vocabulary_size: usize,
    },
    /// A sequence that cannot be packed.
    #[error(transparent)]
    Pack(#[from] PackError),
    /// Masks that are not one flag a token of the packed responses.
    #[error("the masks cover {found} {unit}, expected {expected}")]
    MaskLength {
        /// `responses` or `tokens`.
        unit: &'static str,
        /// Responses, or tokens of the response.
        expected: usize,
        /// Masks, or flags in the mask.
        found: usize,
    },
    /// A cursor beyond the end of its epoch.
    #[error(
        "the data cursor stands at batch {batch} of an epoch of {batches} batches; \
         the data set or the batch size changed since it was saved"
    )]
    CursorRange {
        /// Where the cursor stands.
        batch: usize,
        /// Batches in an epoch.
        batches: usize,
    },
}

/// What is wrong with one row.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum RowFault {
    /// A line longer than the limit; it is not read to its end.
    #[error("the line is longer than {limit_bytes} bytes")]
    LineTooLong {
        /// The limit.
        limit_bytes: usize,
    },
    /// Bytes that are not UTF-8.
    #[error("not UTF-8 at byte {byte} of the line")]
    NotUtf8 {
        /// The first bad byte, from 1.
        byte: usize,
    },
    /// Text that is not one JSON object.
    #[error("malformed JSON at byte {byte} of the line: {detail}")]
    Json {
        /// Where, from 1.
        byte: usize,
        /// What the parser said.
        detail: String,
    },
    /// A column that is missing or of another type.
    #[error("column `{column}`: expected {expected}, got {found}")]
    Column {
        /// The column, with the path inside it.
        column: String,
        /// What should stand there.
        expected: &'static str,
        /// What stands there.
        found: String,
    },
    /// Columns that fit no shape.
    #[error(
        "no known shape has the columns {}; expected `chosen` and `rejected` (with or without \
         `prompt`), `prompt` and `completion`, `messages`, `text`, or `prompt`",
        found.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ")
    )]
    NoShape {
        /// The columns met.
        found: Vec<String>,
    },
    /// Another shape than the rows before.
    #[error("the shape is {found}, expected {expected} as in the rows before")]
    MixedShapes {
        /// The shape of the first row.
        expected: Shape,
        /// The shape of this row.
        found: Shape,
    },
    /// A response without text.
    #[error("column `{column}`: the response is empty")]
    EmptyResponse {
        /// The column.
        column: &'static str,
    },
    /// A text whose only token is the prompt, where the model has no BOS to start from.
    #[error(
        "column `{column}`: the text has one token, which is the prompt; a response needs at least one after it"
    )]
    OneToken {
        /// The column.
        column: &'static str,
    },
    /// A prompt without a token, where the model has no BOS to start from.
    #[error("column `{column}`: the prompt has no token; a response needs at least one before it")]
    EmptyPrompt {
        /// The column.
        column: &'static str,
    },
    /// Messages, and no template to render them.
    #[error("column `{column}` holds messages, but the model has no chat template")]
    NoTemplate {
        /// The column.
        column: &'static str,
    },
    /// A template that refuses the conversation, or a tokenizer that refuses the text.
    #[error("column `{column}`: {detail}")]
    Render {
        /// The column.
        column: &'static str,
        /// The template's or the tokenizer's message.
        detail: String,
    },
    /// A template that renders a prompt differently when a response follows.
    #[error(
        "column `{column}`: chat template `{template}` renders the conversation before message \
         {message} differently when that message follows (they part at byte {byte})"
    )]
    TemplatePrefix {
        /// The column.
        column: &'static str,
        /// The template's name.
        template: String,
        /// Index of the first message that is not in the prefix.
        message: usize,
        /// Where the two renderings part.
        byte: usize,
    },
    /// A prompt that is not a token prefix of prompt + response.
    #[error(
        "column `{column}`: the prompt is not a token prefix of prompt + response: token {index} is \
         {} in the prompt alone and {} in the joint text; end the prompt on a token boundary \
         (a trailing space belongs to the response), or set `prefix` to `parts`",
        quoted(prompt_token),
        quoted(joint_token)
    )]
    TokenPrefix {
        /// The column of the response.
        column: &'static str,
        /// The first token that differs, from 0.
        index: usize,
        /// Its text in the prompt.
        prompt_token: Option<String>,
        /// Its text in prompt + response.
        joint_token: Option<String>,
    },
    /// A BOS token where none belongs.
    #[error("column `{column}`: two BOS tokens at the start of the prompt, expected one")]
    DoubleBos {
        /// The column.
        column: &'static str,
    },
    /// An EOS token before the end of a response.
    #[error(
        "column `{column}`: the response holds the end-of-sequence token `{eos}` at token {index}, \
         before its end"
    )]
    EosInside {
        /// The column.
        column: &'static str,
        /// The text of the EOS token.
        eos: String,
        /// Where it stands, from 0.
        index: usize,
    },
    /// A template that ends the assistant's turn with another special token than EOS.
    #[error(
        "column `{column}`: chat template `{template}` ends the assistant's turn with `{found}`, \
         but EOS is `{eos}`: generation would never stop there; set EOS to `{found}`"
    )]
    EndOfTurn {
        /// The column.
        column: &'static str,
        /// The template's name.
        template: String,
        /// The text of the EOS token.
        eos: String,
        /// What the template writes.
        found: String,
    },
    /// A token id beyond the model's vocabulary.
    #[error(
        "column `{column}`: token id {id} is out of the model's vocabulary of {vocabulary_size}"
    )]
    TokenId {
        /// The column.
        column: &'static str,
        /// The id.
        id: u32,
        /// Rows of the model's embedding.
        vocabulary_size: usize,
    },
    /// A per-token column of another length than the response.
    #[error(
        "column `{column}`: {found} values, expected {expected}, one for each token of the response \
         with its EOS"
    )]
    SignalLength {
        /// The column.
        column: String,
        /// Tokens of the response, before any limit.
        expected: usize,
        /// Values found.
        found: usize,
    },
    /// Cuts that are not increasing token indices inside the response.
    #[error(
        "column `{column}`: cut {index} is {found}, expected a token index above {after} and below \
         {tokens}"
    )]
    Cut {
        /// The column.
        column: String,
        /// Which cut, from 0.
        index: usize,
        /// The cut.
        found: usize,
        /// The cut before it, or 0.
        after: usize,
        /// Tokens of the response.
        tokens: usize,
    },
}

impl HasKind for DataError {
    fn kind(&self) -> ErrorKind {
        match self {
            Self::File(error) => error.kind(),
            _ => ErrorKind::Input,
        }
    }
}

fn quoted(token: &Option<String>) -> String {
    token
        .as_ref()
        .map_or_else(|| "missing".to_owned(), |text| format!("{text:?}"))
}
