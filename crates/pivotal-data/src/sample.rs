//! The shapes of TRL's data sets, and one row of them.

use std::fmt;

use crate::error::RowFault;
use crate::json::Json;

/// What the columns of a data set are, in TRL's terms.
///
/// "Text" shapes hold strings, "chat" shapes lists of `{"role", "content"}` messages. A row with `chosen` and `rejected`
/// is a preference whatever else it has; then `prompt` + `completion`, `messages`, `text` and `prompt` are looked for, in
/// this order. Other columns are ignored, except `tools` and `chat_template_kwargs`, which would change the rendering and
/// are refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Shape {
    /// `prompt`, `chosen`, `rejected`, all strings.
    PreferenceText,
    /// `chosen`, `rejected`: strings that begin with the same prompt.
    ///
    /// The prompt is their longest common prefix, in characters, less one trailing space (TRL's `extract_prompt`). Unlike
    /// there, a response that this leaves empty is an error.
    ImplicitPreferenceText,
    /// `prompt`, `chosen`, `rejected`, all message lists; each response is one assistant message.
    PreferenceChat,
    /// `chosen`, `rejected`: message lists that begin with the same prompt, their longest common prefix.
    ///
    /// A `prompt` column that is a string beside them is ignored, as TRL does: it repeats the first message.
    ImplicitPreferenceChat,
    /// `prompt`, `completion`, strings.
    CompletionText,
    /// `prompt`, `completion`, message lists; the completion is one assistant message.
    CompletionChat,
    /// `messages`: a conversation with at least one assistant message.
    Messages,
    /// `text`: plain text to continue.
    Text,
    /// `prompt`, a string.
    PromptText,
    /// `prompt`, a message list.
    PromptChat,
}

impl fmt::Display for Shape {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::PreferenceText => "`prompt`/`chosen`/`rejected` strings",
            Self::ImplicitPreferenceText => "`chosen`/`rejected` strings",
            Self::PreferenceChat => "`prompt`/`chosen`/`rejected` messages",
            Self::ImplicitPreferenceChat => "`chosen`/`rejected` messages",
            Self::CompletionText => "`prompt`/`completion` strings",
            Self::CompletionChat => "`prompt`/`completion` messages",
            Self::Messages => "`messages`",
            Self::Text => "`text`",
            Self::PromptText => "`prompt` string",
            Self::PromptChat => "`prompt` messages",
        })
    }
}

/// One message of a conversation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    /// `system`, `user`, `assistant`, or what else the template knows.
    pub role: String,
    /// Its text.
    pub content: String,
}

/// A prompt or a response: plain text, or messages for the chat template.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Content {
    /// Plain text, tokenised as it stands.
    Text(String),
    /// Messages, rendered by the chat template first.
    Chat(Vec<Message>),
}

/// What an annotator outside Pivotal says about a response's tokens; all `None` where the row says nothing.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct External {
    /// One value for each token, EOS included: `chosen_signal`, `rejected_signal`, `completion_signal`.
    pub signal: Option<Vec<f32>>,
    /// Where segments start after the first, in tokens, increasing: `chosen_cuts`, `rejected_cuts`, `completion_cuts`.
    pub cuts: Option<Vec<usize>>,
}

/// What a row holds.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum Sample {
    /// A prompt with a chosen and a rejected response.
    Preference {
        /// The prompt.
        prompt: Content,
        /// The preferred response.
        chosen: Content,
        /// The other response.
        rejected: Content,
        /// What the row says about the chosen response's tokens.
        chosen_external: External,
        /// What the row says about the rejected response's tokens.
        rejected_external: External,
    },
    /// A prompt with one response.
    Completion {
        /// The prompt.
        prompt: Content,
        /// The response.
        completion: Content,
        /// What the row says about the response's tokens.
        external: External,
    },
    /// A conversation; the assistant's messages are learnt.
    Messages {
        /// The messages, in order.
        messages: Vec<Message>,
    },
    /// Plain text; all of it is learnt.
    Text {
        /// The text.
        text: String,
    },
    /// A prompt alone.
    Prompt {
        /// The prompt.
        prompt: Content,
    },
}

/// A sample and where it stands.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    /// The line of the file, from 1.
    pub row: u64,
    /// What the line holds.
    pub sample: Sample,
}

/// Finds the shape of a row and checks its columns.
pub(crate) fn parse_sample(columns: Vec<(String, Json)>) -> Result<(Shape, Sample), RowFault> {
    let mut columns = Columns(columns);
    for unsupported in ["tools", "chat_template_kwargs"] {
        if let Some(value) = columns.take(unsupported) {
            return Err(column_fault(
                unsupported,
                "no such column (not supported)",
                &value,
            ));
        }
    }
    match (columns.has("chosen"), columns.has("rejected")) {
        (true, true) => return preference(columns),
        (true, false) => return Err(missing("rejected", "a string or a list of messages")),
        (false, true) => return Err(missing("chosen", "a string or a list of messages")),
        (false, false) => {}
    }
    if columns.has("completion") {
        return completion(columns);
    }
    if let Some(value) = columns.take("messages") {
        let messages = messages("messages", value)?;
        if !messages.iter().any(|message| message.role == "assistant") {
            return Err(RowFault::Column {
                column: "messages".into(),
                expected: "at least one message of the role `assistant`",
                found: "none".into(),
            });
        }
        return Ok((Shape::Messages, Sample::Messages { messages }));
    }
    if let Some(value) = columns.take("text") {
        let Json::Text(text) = value else {
            return Err(column_fault("text", "a string", &value));
        };
        if text.trim().is_empty() {
            return Err(RowFault::EmptyResponse { column: "text" });
        }
        return Ok((Shape::Text, Sample::Text { text }));
    }
    if let Some(value) = columns.take("prompt") {
        let prompt = prompt_content(value)?;
        let shape = match prompt {
            Content::Text(_) => Shape::PromptText,
            Content::Chat(_) => Shape::PromptChat,
        };
        return Ok((shape, Sample::Prompt { prompt }));
    }
    Err(RowFault::NoShape {
        found: columns.0.into_iter().map(|(name, _)| name).collect(),
    })
}

fn preference(mut columns: Columns) -> Result<(Shape, Sample), RowFault> {
    let chosen_external = columns.external("chosen")?;
    let rejected_external = columns.external("rejected")?;
    let chosen = content("chosen", columns.take("chosen").unwrap_or(Json::Null))?;
    let rejected = content("rejected", columns.take("rejected").unwrap_or(Json::Null))?;
    let prompt = match columns.take("prompt") {
        // A string prompt beside conversations repeats their first message: TRL ignores it too.
        Some(Json::Text(_)) if matches!(chosen, Content::Chat(_)) => None,
        Some(value) => Some(prompt_content(value)?),
        None => None,
    };
    let (shape, prompt, chosen, rejected) = match (prompt, chosen, rejected) {
        (Some(Content::Text(prompt)), Content::Text(chosen), Content::Text(rejected)) => (
            Shape::PreferenceText,
            Content::Text(prompt),
            Content::Text(chosen),
            Content::Text(rejected),
        ),
        (None, Content::Text(chosen), Content::Text(rejected)) => {
            let end = common_text(&chosen, &rejected);
            (
                Shape::ImplicitPreferenceText,
                Content::Text(chosen[..end].to_owned()),
                Content::Text(chosen[end..].to_owned()),
                Content::Text(rejected[end..].to_owned()),
            )
        }
        (Some(Content::Chat(prompt)), Content::Chat(chosen), Content::Chat(rejected)) => (
            Shape::PreferenceChat,
            Content::Chat(prompt),
            Content::Chat(chosen),
            Content::Chat(rejected),
        ),
        (None, Content::Chat(mut chosen), Content::Chat(mut rejected)) => {
            let pairs = chosen.iter().zip(&rejected);
            let end = pairs.take_while(|(a, b)| a == b).count();
            let prompt: Vec<Message> = chosen.drain(..end).collect();
            rejected.drain(..end);
            check_prompt("chosen", &prompt)?;
            (
                Shape::ImplicitPreferenceChat,
                Content::Chat(prompt),
                Content::Chat(chosen),
                Content::Chat(rejected),
            )
        }
        (_, Content::Text(_), Content::Chat(_)) => {
            return Err(mistyped("rejected", "a string, as `chosen` is", "a list"));
        }
        (_, Content::Chat(_), Content::Text(_)) => {
            return Err(mistyped("rejected", "messages, as `chosen` is", "a string"));
        }
        (Some(Content::Chat(_)), Content::Text(_), Content::Text(_)) => {
            return Err(mistyped("chosen", "messages, as `prompt` is", "a string"));
        }
        (Some(Content::Text(_)), Content::Chat(_), Content::Chat(_)) => {
            unreachable!("a string prompt beside conversations was set aside above")
        }
    };
    check_response("chosen", &chosen)?;
    check_response("rejected", &rejected)?;
    let sample = Sample::Preference {
        prompt,
        chosen,
        rejected,
        chosen_external,
        rejected_external,
    };
    Ok((shape, sample))
}

fn completion(mut columns: Columns) -> Result<(Shape, Sample), RowFault> {
    let external = columns.external("completion")?;
    let value = columns.take("prompt");
    let prompt =
        prompt_content(value.ok_or_else(|| missing("prompt", "a string or a list of messages"))?)?;
    let value = columns.take("completion").unwrap_or(Json::Null);
    let completion = content("completion", value)?;
    let shape = match (&prompt, &completion) {
        (Content::Text(_), Content::Text(_)) => Shape::CompletionText,
        (Content::Chat(_), Content::Chat(_)) => Shape::CompletionChat,
        (Content::Text(_), Content::Chat(_)) => {
            return Err(mistyped("completion", "a string, as `prompt` is", "a list"));
        }
        (Content::Chat(_), Content::Text(_)) => {
            return Err(mistyped(
                "completion",
                "messages, as `prompt` is",
                "a string",
            ));
        }
    };
    check_response("completion", &completion)?;
    let sample = Sample::Completion {
        prompt,
        completion,
        external,
    };
    Ok((shape, sample))
}

/// The columns of a row; null is the same as absent, as exports of tables write it.
struct Columns(Vec<(String, Json)>);

impl Columns {
    fn has(&self, name: &str) -> bool {
        self.0
            .iter()
            .any(|(key, value)| key == name && *value != Json::Null)
    }

    fn take(&mut self, name: &str) -> Option<Json> {
        let index = self.0.iter().position(|(key, _)| key == name)?;
        match self.0.swap_remove(index).1 {
            Json::Null => None,
            value => Some(value),
        }
    }

    fn external(&mut self, side: &str) -> Result<External, RowFault> {
        let (signal, cuts) = (format!("{side}_signal"), format!("{side}_cuts"));
        Ok(External {
            signal: self.numbers(&signal, "a finite number", |value| {
                Some(value as f32).filter(|value| value.is_finite())
            })?,
            cuts: self.numbers(&cuts, "a token index", |value| {
                (value >= 0.0 && value.fract() == 0.0 && value <= f64::from(u32::MAX))
                    .then_some(value as usize)
            })?,
        })
    }

    fn numbers<T>(
        &mut self,
        column: &str,
        expected: &'static str,
        convert: impl Fn(f64) -> Option<T>,
    ) -> Result<Option<Vec<T>>, RowFault> {
        let Some(value) = self.take(column) else {
            return Ok(None);
        };
        let Json::List(items) = value else {
            return Err(column_fault(column, "a list of numbers", &value));
        };
        let convert = |(index, item): (usize, Json)| {
            let fault = |found: String| RowFault::Column {
                column: format!("{column}[{index}]"),
                expected,
                found,
            };
            match item {
                Json::Number(number) => convert(number).ok_or_else(|| fault(shortest(number))),
                other => Err(fault(other.type_name().into())),
            }
        };
        let numbers: Result<Vec<T>, RowFault> =
            items.into_iter().enumerate().map(convert).collect();
        numbers.map(Some)
    }
}

/// 1e300 as it was written, not its three hundred digits.
fn shortest(number: f64) -> String {
    let (plain, scientific) = (number.to_string(), format!("{number:e}"));
    if plain.len() <= scientific.len() {
        plain
    } else {
        scientific
    }
}

fn content(column: &str, value: Json) -> Result<Content, RowFault> {
    match value {
        Json::Text(text) => Ok(Content::Text(text)),
        Json::List(_) => Ok(Content::Chat(messages(column, value)?)),
        other => Err(column_fault(
            column,
            "a string or a list of messages",
            &other,
        )),
    }
}

fn prompt_content(value: Json) -> Result<Content, RowFault> {
    let content = content("prompt", value)?;
    if let Content::Chat(messages) = &content {
        check_prompt("prompt", messages)?;
    }
    Ok(content)
}

fn check_prompt(column: &str, messages: &[Message]) -> Result<(), RowFault> {
    match messages.last() {
        Some(last) if last.role != "assistant" => Ok(()),
        Some(_) => Err(mistyped(
            column,
            "a prompt that ends before the assistant's turn",
            "a prompt that ends with an `assistant` message",
        )),
        None => Err(mistyped(
            column,
            "at least one message before the response",
            "none",
        )),
    }
}

fn messages(column: &str, value: Json) -> Result<Vec<Message>, RowFault> {
    let Json::List(items) = value else {
        return Err(column_fault(column, "a list of messages", &value));
    };
    if items.is_empty() {
        return Err(mistyped(column, "at least one message", "an empty list"));
    }
    let items = items.into_iter().enumerate();
    items
        .map(|(index, item)| message(&format!("{column}[{index}]"), item))
        .collect()
}

fn message(column: &str, value: Json) -> Result<Message, RowFault> {
    let Json::Object(entries) = value else {
        return Err(column_fault(column, "a message object", &value));
    };
    let (mut role, mut content) = (None, None);
    for (key, value) in entries {
        let place = format!("{column}.{key}");
        match (key.as_str(), value) {
            ("role", Json::Text(text)) if !text.is_empty() => role = Some(text),
            ("content", Json::Text(text)) => content = Some(text),
            ("role" | "content", other) => {
                let found = match other {
                    Json::Text(_) => "an empty string".into(),
                    other => other.type_name().to_owned(),
                };
                return Err(RowFault::Column {
                    column: place,
                    expected: "a string",
                    found,
                });
            }
            (_, Json::Null) => {}
            // Dropping a tool call or a hidden reasoning would change what the template renders.
            (_, other) => {
                return Err(column_fault(&place, "only `role` and `content`", &other));
            }
        }
    }
    let part = |name: &str, value: Option<String>| {
        value.ok_or_else(|| missing(&format!("{column}.{name}"), "a string"))
    };
    Ok(Message {
        role: part("role", role)?,
        content: part("content", content)?,
    })
}

fn check_response(column: &'static str, response: &Content) -> Result<(), RowFault> {
    let text = match response {
        Content::Text(text) => text,
        Content::Chat(messages) => match messages.as_slice() {
            [] => return Err(RowFault::EmptyResponse { column }),
            [only] if only.role == "assistant" => &only.content,
            [only] => {
                return Err(RowFault::Column {
                    column: column.into(),
                    expected: "one `assistant` message after the prompt",
                    found: format!("one `{}` message", only.role),
                });
            }
            many => {
                return Err(RowFault::Column {
                    column: column.into(),
                    expected: "one `assistant` message after the prompt",
                    found: format!("{} messages", many.len()),
                });
            }
        },
    };
    match text.trim().is_empty() {
        true => Err(RowFault::EmptyResponse { column }),
        false => Ok(()),
    }
}

/// Bytes of the longest common prefix in characters, less one trailing space: TRL's `extract_prompt`, so that the space
/// belongs to the response's first token.
fn common_text(a: &str, b: &str) -> usize {
    let pairs = a.chars().zip(b.chars());
    let end: usize = pairs
        .take_while(|(a, b)| a == b)
        .map(|(a, _)| a.len_utf8())
        .sum();
    end - usize::from(a[..end].ends_with(' '))
}

fn missing(column: &str, expected: &'static str) -> RowFault {
    mistyped(column, expected, "nothing")
}

fn mistyped(column: &str, expected: &'static str, found: &str) -> RowFault {
    RowFault::Column {
        column: column.into(),
        expected,
        found: found.into(),
    }
}

fn column_fault(column: &str, expected: &'static str, value: &Json) -> RowFault {
    mistyped(column, expected, value.type_name())
}
