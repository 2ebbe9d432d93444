//! Checks that a program can make of a response: right or not, without a model.

use regex::Regex;
use serde::{Deserialize, Serialize};

/// What a response must be. An empty response passes no check.
///
/// # Examples
/// ```
/// use pivotal_train::onpolicy::Check;
/// let check: Check = serde_json::from_str(r#"{"kind": "bullets", "count": 2}"#).unwrap();
/// assert!(check.holds("Two:\n- one\n- two"));
/// assert!(!check.holds("- only one"));
/// ```
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
#[non_exhaustive]
pub enum Check {
    /// This text and no other, white space around it aside.
    Exact {
        /// The text.
        answer: String,
    },
    /// The last number in it is this one; signs, decimal points and commas between thousands are read.
    Number {
        /// The number.
        value: f64,
    },
    /// It has a match of this regular expression.
    Regex {
        /// The expression, in the syntax of the `regex` crate.
        pattern: Pattern,
    },
    /// It has letters, none of them upper case.
    LowerCase {},
    /// Exactly so many lines begin with `-`, `*` or `•` and a space.
    Bullets {
        /// How many.
        count: usize,
    },
    /// It ends with this, white space after it aside.
    EndsWith {
        /// The phrase.
        phrase: String,
    },
    /// It has this word, in upper or lower case.
    Contains {
        /// One word of letters and digits.
        word: Word,
    },
    /// It does not have this word.
    Omits {
        /// One word of letters and digits.
        word: Word,
    },
    /// It has at most so many words.
    MaxWords {
        /// How many.
        count: usize,
    },
}

/// A regular expression that has been compiled.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Pattern(Regex);

impl Pattern {
    /// Compiles it, or says why it cannot.
    pub(crate) fn new(text: &str) -> Result<Self, String> {
        // Its own message is several lines with a caret under the fault; the last one says what it is.
        let why = |error: regex::Error| {
            let error = error.to_string();
            let why = error.lines().last().unwrap_or_default();
            why.trim_start_matches("error: ").to_owned()
        };
        Regex::new(text).map(Self).map_err(why)
    }
}

impl TryFrom<String> for Pattern {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        Self::new(&text).map_err(|why| format!("`{text}` is no regular expression: {why}"))
    }
}

impl From<Pattern> for String {
    fn from(pattern: Pattern) -> Self {
        pattern.0.as_str().to_owned()
    }
}

/// A word of letters and digits alone.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Word(String);

impl TryFrom<String> for Word {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        match !text.is_empty() && text.chars().all(char::is_alphanumeric) {
            true => Ok(Self(text.to_lowercase())),
            false => Err(format!("`{text}` is not one word of letters and digits")),
        }
    }
}

impl From<Word> for String {
    fn from(word: Word) -> Self {
        word.0
    }
}

impl Check {
    /// Whether it holds of `response`.
    pub fn holds(&self, response: &str) -> bool {
        if response.trim().is_empty() {
            return false;
        }
        match self {
            Self::Exact { answer } => response.trim() == answer.trim(),
            Self::Number { value } => last_number(response)
                .is_some_and(|found| (found - value).abs() <= 1e-9 * value.abs().max(1.0)),
            Self::Regex { pattern } => pattern.0.is_match(response),
            Self::LowerCase {} => {
                response.chars().any(char::is_lowercase)
                    && !response.chars().any(char::is_uppercase)
            }
            Self::Bullets { count } => {
                response.lines().filter(|line| bullet(line)).count() == *count
            }
            Self::EndsWith { phrase } => response.trim_end().ends_with(phrase.trim_end()),
            Self::Contains { word } => has_word(response, &word.0),
            Self::Omits { word } => !has_word(response, &word.0),
            Self::MaxWords { count } => response.split_whitespace().count() <= *count,
        }
    }
}

fn bullet(line: &str) -> bool {
    let mut characters = line.trim_start().chars();
    matches!(characters.next(), Some('-' | '*' | '•'))
        && characters.next().is_some_and(char::is_whitespace)
}

fn has_word(text: &str, word: &str) -> bool {
    text.split(|character: char| !character.is_alphanumeric())
        .any(|found| found.to_lowercase() == word)
}

/// The last number of a text: digits with commas between thousands, a decimal part, a minus sign that follows no letter, digit or
/// closing bracket.
fn last_number(text: &str) -> Option<f64> {
    let characters: Vec<char> = text.chars().collect();
    let (mut found, mut at) = (None, 0);
    while at < characters.len() {
        if !characters[at].is_ascii_digit() {
            at += 1;
            continue;
        }
        let mut digits = String::new();
        let begin = at;
        while at < characters.len() {
            let digit_at = |index: usize| {
                characters
                    .get(index)
                    .is_some_and(|character: &char| character.is_ascii_digit())
            };
            let thousands = || (1..=3).all(|step| digit_at(at + step)) && !digit_at(at + 4);
            match characters[at] {
                digit if digit.is_ascii_digit() => digits.push(digit),
                '.' if digit_at(at + 1) && !digits.contains('.') => digits.push('.'),
                ',' if !digits.contains('.') && thousands() => {}
                _ => break,
            }
            at += 1;
        }
        let before = |steps: usize| begin.checked_sub(steps).map(|index| characters[index]);
        let minus = matches!(before(1), Some('-' | '−'))
            && !before(2).is_some_and(|c| c.is_alphanumeric() || c == ')');
        if let Ok(value) = digits.parse::<f64>() {
            found = Some(if minus { -value } else { value });
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(json: &str) -> Check {
        serde_json::from_str(json).unwrap()
    }

    #[test]
    fn every_kind_tells_right_from_wrong() {
        let table = [
            (r#"{"kind":"exact","answer":"42"}"#, " 42\n", "42."),
            (
                r#"{"kind":"number","value":-7}"#,
                "3 - 10 = -7.",
                "the answer is 7",
            ),
            (
                r#"{"kind":"number","value":1234.5}"#,
                "It is 1,234.5!",
                "1,234.5 and 3",
            ),
            (r#"{"kind":"number","value":4}"#, "6-2 is 4", "-4"),
            (r#"{"kind":"regex","pattern":"^ab+$"}"#, "abbb", "abc"),
            (r#"{"kind":"lower_case"}"#, "all lower, 3.", "Not all"),
            (r#"{"kind":"bullets","count":2}"#, "x\n - a\n* b", "-a\n- b"),
            (
                r#"{"kind":"ends_with","phrase":"Bye."}"#,
                "So. Bye.\n",
                "Bye. So",
            ),
            (
                r#"{"kind":"contains","word":"Blue"}"#,
                "It is blue.",
                "blueish",
            ),
            (r#"{"kind":"omits","word":"very"}"#, "everyday", "Very good"),
            (
                r#"{"kind":"max_words","count":3}"#,
                "one two three",
                "one two three four",
            ),
        ];
        for (json, right, wrong) in table {
            let check = check(json);
            assert!(check.holds(right), "{json} {right:?}");
            assert!(!check.holds(wrong), "{json} {wrong:?}");
            assert!(!check.holds(" \n"), "{json} holds of nothing");
        }
    }

    #[test]
    fn lower_case_needs_letters() {
        assert!(!check(r#"{"kind":"lower_case"}"#).holds("123"));
    }

    #[test]
    fn a_check_that_cannot_be_is_refused_with_its_reason() {
        for (json, says) in [
            (
                r#"{"kind":"regex","pattern":"a("}"#,
                "`a(` is no regular expression: unclosed group",
            ),
            (
                r#"{"kind":"contains","word":"two words"}"#,
                "is not one word",
            ),
            (
                r#"{"kind":"bullets","count":2,"extra":1}"#,
                "unknown field `extra`",
            ),
            (r#"{"kind":"rhymes"}"#, "unknown variant `rhymes`"),
        ] {
            let error = serde_json::from_str::<Check>(json).unwrap_err().to_string();
            assert!(error.contains(says), "{error}");
        }
    }
}
