//! Chat templates: Jinja as transformers renders it.

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, ValueKind};
use minijinja::{AutoEscape, Environment, Error, ErrorKind, Value};

use crate::date::Date;
use crate::error::{DataError, Result};
use crate::sample::Message;

/// Work a template may do in one rendering, in minijinja's fuel: a template is data from a checkpoint, and must end.
const FUEL: u64 = 5_000_000;

/// The name inside the engine; the one that errors show is the user's.
const ENTRY: &str = "chat_template";

/// A compiled chat template.
///
/// Blocks are trimmed as transformers trims them (`trim_blocks`, `lstrip_blocks`); `raise_exception`, `tojson` with
/// Python's spacing and no HTML escapes, Python's string and list methods, `break` and `continue` are there, and
/// `{% generation %}` is accepted and has no effect: assistant spans are found without it. `strftime_now` is defined only
/// after [`ChatTemplate::with_date`], so that a rendering does not depend on the day; templates that test for it fall back
/// to a date of their own.
pub struct ChatTemplate {
    name: String,
    source: String,
    environment: Environment<'static>,
    bos_text: Value,
    eos_text: Value,
    date: Option<Date>,
}

impl ChatTemplate {
    /// Compiles a template; errors call it `name`. `bos_text` and `eos_text` are the texts of the model's tokens.
    ///
    /// # Errors
    /// [`DataError::Template`] with the line of a syntax error.
    ///
    /// # Examples
    /// ```
    /// use pivotal_data::{ChatTemplate, Message};
    /// let source = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{{ eos_token }}{% endfor %}";
    /// let template = ChatTemplate::new("example", source, None, Some("</s>"))?;
    /// let hello = Message { role: "user".into(), content: "hi".into() };
    /// assert_eq!(template.render(&[hello], false)?, "[user] hi</s>");
    /// # Ok::<(), pivotal_data::DataError>(())
    /// ```
    pub fn new(
        name: &str,
        source: &str,
        bos_text: Option<&str>,
        eos_text: Option<&str>,
    ) -> Result<Self> {
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder()
            .trim_blocks(true)
            .lstrip_blocks(true)
            .build()
            .map_err(|error| template_error(name, None, &error))?;
        environment.set_syntax(syntax);
        environment.set_fuel(Some(FUEL));
        // Or only debug builds would name the variable that is undefined.
        environment.set_debug(true);
        environment.set_auto_escape_callback(|_| AutoEscape::None);
        environment
            .set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", raise_exception);
        environment.add_filter("tojson", to_json);
        environment
            .add_template_owned(ENTRY, without_generation_tags(source))
            .map_err(|error| template_error(name, None, &error))?;
        Ok(Self {
            name: name.to_owned(),
            source: source.to_owned(),
            environment,
            bos_text: bos_text.map_or(Value::UNDEFINED, Value::from),
            eos_text: eos_text.map_or(Value::UNDEFINED, Value::from),
            date: None,
        })
    }

    /// Defines `strftime_now`, with this date at midnight.
    pub fn with_date(mut self, date: Date) -> Self {
        self.environment
            .add_function("strftime_now", move |format: String| {
                date.format(&format).ok_or_else(|| {
                    let detail = format!("`strftime_now` does not know the format `{format}`");
                    Error::new(ErrorKind::InvalidOperation, detail)
                })
            });
        self.date = Some(date);
        self
    }

    /// The name that errors show.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What decides a rendering beside the messages: part of the key of cached log-probabilities.
    pub fn identity(&self) -> String {
        let Self {
            source,
            bos_text,
            eos_text,
            date,
            ..
        } = self;
        format!("{source}\n{bos_text:?} {eos_text:?} {date:?}")
    }

    /// Renders a conversation; with `add_generation_prompt`, up to where the assistant begins to speak.
    ///
    /// # Errors
    /// [`DataError::Template`] with the line, and with the message it fails on: the last message of the shortest beginning
    /// of the conversation that fails in the same way.
    pub fn render(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String> {
        self.try_render(messages, add_generation_prompt)
            .map_err(|error| {
                let same = |count: &usize| {
                    let shorter = self.try_render(&messages[..*count], add_generation_prompt);
                    shorter.is_err_and(|other| {
                        other.kind() == error.kind() && other.detail() == error.detail()
                    })
                };
                let message = (1..=messages.len())
                    .find(same)
                    .map(|count| count - 1)
                    .or_else(|| messages.len().checked_sub(1));
                template_error(&self.name, message, &error)
            })
    }

    fn try_render(
        &self,
        messages: &[Message],
        add_generation_prompt: bool,
    ) -> Result<String, Error> {
        let message = |message: &Message| {
            let Message { role, content } = message;
            Value::from_pairs([("role", role.as_str()), ("content", content.as_str())])
        };
        let messages: Vec<Value> = messages.iter().map(message).collect();
        let context = Value::from_pairs([
            ("messages", Value::from(messages)),
            ("add_generation_prompt", Value::from(add_generation_prompt)),
            ("bos_token", self.bos_text.clone()),
            ("eos_token", self.eos_text.clone()),
            ("tools", Value::from(())),
            ("documents", Value::from(())),
        ]);
        self.environment.get_template(ENTRY)?.render(context)
    }
}

impl std::fmt::Debug for ChatTemplate {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("ChatTemplate")
            .field("name", &self.name)
            .finish_non_exhaustive()
    }
}

/// The engine has no `generation` block; `if true` keeps its content and its white-space rules.
fn without_generation_tags(source: &str) -> String {
    let mut text = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{%") {
        let Some(length) = rest[start..].find("%}") else {
            break;
        };
        let inside = &rest[start + 2..start + length];
        let tag = inside.trim_matches(|c: char| c.is_whitespace() || c == '-' || c == '+');
        let replacement = match tag {
            "generation" => inside.replace("generation", "if true"),
            "endgeneration" => inside.replace("endgeneration", "endif"),
            _ => inside.to_owned(),
        };
        text.push_str(&rest[..start + 2]);
        text.push_str(&replacement);
        rest = &rest[start + length..];
    }
    text.push_str(rest);
    text
}

fn template_error(name: &str, message: Option<usize>, error: &Error) -> DataError {
    let mut detail = error
        .detail()
        .map_or_else(|| error.kind().to_string(), str::to_owned);
    if error.kind() == ErrorKind::UnknownFunction && detail.contains("strftime_now") {
        detail.push_str("; give the template a date (`with_date`)");
    }
    DataError::Template {
        name: name.to_owned(),
        line: error.line(),
        message,
        detail,
    }
}

fn raise_exception(detail: String) -> Result<Value, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, detail))
}

/// Python's `json.dumps(value, ensure_ascii=False, indent=indent)`: the engine's own filter escapes HTML.
fn to_json(value: &Value, indent: Option<usize>, options: Kwargs) -> Result<Value, Error> {
    let indent = match indent {
        Some(indent) => Some(indent),
        None => options.get("indent")?,
    };
    options.assert_all_used()?;
    let mut text = String::new();
    write_json(&mut text, value, indent, 0)?;
    Ok(Value::from_safe_string(text))
}

fn write_json(
    text: &mut String,
    value: &Value,
    indent: Option<usize>,
    depth: usize,
) -> Result<(), Error> {
    let fault = |detail: String| Error::new(ErrorKind::InvalidOperation, detail);
    if depth > 64 {
        return Err(fault("`tojson` of a value nested deeper than 64".into()));
    }
    let string =
        |string: &str| serde_json::to_string(string).map_err(|error| fault(error.to_string()));
    let is_map = value.kind() == ValueKind::Map;
    match value.kind() {
        ValueKind::None => text.push_str("null"),
        ValueKind::Bool => text.push_str(if value.is_true() { "true" } else { "false" }),
        ValueKind::Number => text.push_str(&value.to_string()),
        ValueKind::String => text.push_str(&string(value.as_str().unwrap_or_default())?),
        ValueKind::Seq | ValueKind::Iterable | ValueKind::Map => {
            text.push(if is_map { '{' } else { '[' });
            let mut empty = true;
            for item in value.try_iter()? {
                if !empty {
                    text.push_str(if indent.is_some() { "," } else { ", " });
                }
                empty = false;
                new_line(text, indent, depth + 1);
                if is_map {
                    text.push_str(&string(&item.to_string())?);
                    text.push_str(": ");
                    write_json(text, &value.get_item(&item)?, indent, depth + 1)?;
                } else {
                    write_json(text, &item, indent, depth + 1)?;
                }
            }
            if !empty {
                new_line(text, indent, depth);
            }
            text.push(if is_map { '}' } else { ']' });
        }
        other => {
            return Err(fault(format!(
                "`tojson` cannot write a value of type {other}"
            )));
        }
    }
    Ok(())
}

fn new_line(text: &mut String, indent: Option<usize>, depth: usize) {
    if let Some(indent) = indent {
        text.push('\n');
        text.extend(std::iter::repeat_n(' ', indent * depth));
    }
}
