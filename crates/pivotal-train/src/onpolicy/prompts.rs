//! Prompts, and what responses to them are checked against.
//!
//! Each line of the file is an object with `prompt` (a string or messages) and any of: `answer` (a text, or a number that the
//! response's last number must be), `checks` (a list of [`Check`]), `reference` (whatever the command is to see).

use std::path::Path;

use pivotal_core::read_file;
use pivotal_data::{DataSet, Limits, ReadOptions, Shape, TokenizeOptions, tokenize_prompts};
use serde::Deserialize;
use serde_json::Value;

use super::check::Check;
use super::settings::PromptSettings;
use crate::error::{Error, Result};
use crate::workspace::Workspace;

/// A prompt, and what is known of the responses wanted.
#[derive(Clone, Debug)]
pub struct Prompt {
    /// The line of the file, from 1.
    pub id: u64,
    /// Its tokens; never empty.
    pub token_ids: Vec<u32>,
    /// What a response must be.
    pub checks: Vec<Check>,
    /// What the command sees besides the response; null if the row says nothing.
    pub reference: Value,
}

/// The columns of a row that are not the prompt.
#[derive(Deserialize)]
struct Wanted {
    answer: Option<Value>,
    #[serde(default)]
    checks: Vec<Check>,
    #[serde(default)]
    reference: Value,
}

/// Reads and tokenises a file of prompts.
///
/// # Errors
/// [`Error::Data`] naming row and column; [`Error::Record`] for a check that cannot be, or a prompt that leaves no room
/// for a response.
pub fn read_prompts(settings: &PromptSettings, workspace: &Workspace) -> Result<Vec<Prompt>> {
    let path = &settings.path;
    if path.as_os_str().is_empty() {
        return Err(Error::Setting {
            key: "data",
            found: "empty".into(),
            expected: "a JSONL file of prompts",
        });
    }
    let data = DataSet::read(path, ReadOptions::default())?;
    let limit = settings.max_prompt_tokens;
    let options = TokenizeOptions {
        limits: Limits {
            max_prompt_tokens: (limit > 0).then_some(limit),
            ..Limits::default()
        },
        vocabulary_size: Some(workspace.decoder.config().vocab_size),
        ..TokenizeOptions::default()
    };
    let template = workspace.template.as_ref();
    let tokenized = tokenize_prompts(&data, &workspace.tokenizer, template, &options)?.items;
    let bytes = read_file(path)?;
    let lines: Vec<&[u8]> = bytes.split(|&byte| byte == b'\n').collect();
    let prompt = |prompt: pivotal_core::TokenizedPrompt| {
        let (checks, reference) = wanted(path, &lines, prompt.id)?;
        // The response's first token needs a place too.
        let tokens = prompt.prompt.len() + 1;
        let fits = workspace.decoder.config().check_length(tokens);
        fits.map_err(|error| Error::Record {
            path: path.into(),
            line: prompt.id as usize,
            what: format!("with one token of a response, {error}: give `--max-prompt-tokens`"),
        })?;
        Ok(Prompt {
            id: prompt.id,
            token_ids: prompt.prompt,
            checks,
            reference,
        })
    };
    tokenized.into_iter().map(prompt).collect()
}

/// What there is to say of a file of prompts, once and before the first step; each begins with its name.
///
/// # Errors
/// [`Error::Data`] naming the row.
pub(crate) fn prompt_warnings(path: &Path, workspace: &Workspace) -> Result<Vec<String>> {
    if workspace.template.is_none() {
        return Ok(vec![]);
    }
    let data = DataSet::read(path, ReadOptions::default())?;
    let as_text = matches!(
        data.shape(),
        Shape::PromptText
            | Shape::CompletionText
            | Shape::PreferenceText
            | Shape::ImplicitPreferenceText
    );
    let warning = format!(
        "no-chat-template: the prompts of `{}` are strings, which are completed as they stand, and the tokenizer has a chat template; \
         a chat model wants messages: {{\"prompt\": [{{\"role\": \"user\", \"content\": \"…\"}}]}}",
        path.display()
    );
    Ok(as_text.then_some(warning).into_iter().collect())
}

fn wanted(path: &Path, lines: &[&[u8]], row: u64) -> Result<(Vec<Check>, Value)> {
    let line = row as usize;
    let fault = |what: String| Error::Record {
        path: path.into(),
        line,
        what,
    };
    let bytes = lines.get(line - 1).copied().unwrap_or_default();
    let bytes = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes);
    let wanted: Wanted = serde_json::from_slice(bytes).map_err(|error| {
        let text = error.to_string();
        fault(
            text.split(" at line ")
                .next()
                .unwrap_or_default()
                .to_owned(),
        )
    })?;
    let mut checks = wanted.checks;
    match wanted.answer {
        None | Some(Value::Null) => {}
        Some(Value::String(answer)) => checks.insert(0, Check::Exact { answer }),
        Some(Value::Number(value)) => checks.insert(
            0,
            Check::Number {
                value: value.as_f64().unwrap_or(f64::NAN),
            },
        ),
        Some(other) => {
            return Err(fault(format!(
                "`answer` is {other}, expected a text or a number"
            )));
        }
    }
    Ok((checks, wanted.reference))
}
