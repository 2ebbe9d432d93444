//! Text from strangers made fit to show, measured and wrapped in terminal cells.

use unicode_width::UnicodeWidthStr;

/// What stands for a character that would steer the reader's terminal or page instead of being seen.
const REPLACEMENT: char = '\u{FFFD}';

/// True of characters that act instead of showing: control codes, and the marks that reorder text.
fn acts(character: char) -> bool {
    character.is_control()
        || matches!(character,
            '\u{200E}' | '\u{200F}' | '\u{061C}' | '\u{2028}' | '\u{2029}'
            | '\u{202A}'..='\u{202E}' | '\u{2066}'..='\u{2069}' | '\u{FFFE}' | '\u{FFFF}')
}

/// `text` on one line: white space becomes a space, and what acts instead of showing is replaced.
pub(crate) fn line(text: &str) -> String {
    let seen = |character: char| match character {
        '\n' | '\r' | '\t' => ' ',
        _ if acts(character) => REPLACEMENT,
        _ => character,
    };
    text.chars().map(seen).collect()
}

/// `text` with its line breaks and tabs, the rest as [`line`].
pub(crate) fn block(text: &str) -> String {
    let seen = |character: char| match character {
        '\n' | '\t' => character,
        _ if acts(character) => REPLACEMENT,
        _ => character,
    };
    text.replace("\r\n", "\n").chars().map(seen).collect()
}

/// How a token shows its white space.
pub(crate) struct Blanks {
    /// A space inside or in front of a word.
    pub(crate) space: &'static str,
    /// A space in a token of nothing else.
    pub(crate) lone_space: &'static str,
    /// A line break.
    pub(crate) line_break: &'static str,
    /// A tab.
    pub(crate) tab: &'static str,
    /// A token without text.
    pub(crate) nothing: &'static str,
}

/// A token's text with its white space visible; never empty.
pub(crate) fn token(text: &str, blanks: &Blanks) -> String {
    if text.is_empty() {
        return blanks.nothing.into();
    }
    let space = match text.chars().all(|character| character == ' ') {
        true => blanks.lone_space,
        false => blanks.space,
    };
    let mut shown = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            ' ' => shown.push_str(space),
            '\n' => shown.push_str(blanks.line_break),
            '\t' => shown.push_str(blanks.tab),
            _ if acts(character) => shown.push(REPLACEMENT),
            _ => shown.push(character),
        }
    }
    shown
}

/// Terminal cells of `text`.
pub(crate) fn width(text: &str) -> usize {
    UnicodeWidthStr::width(text)
}

/// `text` broken between words into lines of at most `limit` cells; a longer word is broken inside.
pub(crate) fn wrap(text: &str, limit: usize) -> Vec<String> {
    let limit = limit.max(1);
    let mut lines = vec![String::new()];
    for word in text.split_ascii_whitespace() {
        let last = lines.last().map_or(0, |line| width(line));
        if last > 0 && last + 1 + width(word) > limit {
            lines.push(String::new());
        } else if last > 0 {
            push(&mut lines, ' ');
        }
        for character in word.chars() {
            let mut buffer = [0; 4];
            let cells = width(character.encode_utf8(&mut buffer));
            if lines.last().map_or(0, |line| width(line)) + cells > limit {
                lines.push(String::new());
            }
            push(&mut lines, character);
        }
    }
    lines
}

fn push(lines: &mut [String], character: char) {
    if let Some(line) = lines.last_mut() {
        line.push(character);
    }
}

/// `text` fit for markup: element content and quoted attributes both.
pub(crate) fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\'' => escaped.push_str("&#39;"),
            _ => escaped.push(character),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn escape_sequences_lose_their_escape() {
        assert_eq!(line("a\u{1b}[31m\nb\u{202E}"), "a\u{FFFD}[31m b\u{FFFD}");
        assert_eq!(block("a\r\nb\0"), "a\nb\u{FFFD}");
    }

    #[test]
    fn wrapping_keeps_words_whole_where_it_can() {
        assert_eq!(wrap("one two three", 7), ["one two", "three"]);
        assert_eq!(wrap("abcdef", 4), ["abcd", "ef"]);
        assert_eq!(wrap("算式 算式", 5), ["算式", "算式"]);
        assert_eq!(wrap("", 5), [""]);
    }
}
