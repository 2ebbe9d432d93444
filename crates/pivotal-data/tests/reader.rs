//! JSONL rows: shapes, faults and hostile input.

use std::io::Write;
use std::path::Path;

use pivotal_core::{ErrorKind, HasKind};
use pivotal_data::{Content, DataError, DataSet, JsonlReader, ReadOptions, Sample, Shape};
use proptest::prelude::*;

fn read(text: &str) -> Result<DataSet, DataError> {
    DataSet::from_jsonl("data.jsonl", text)
}

fn fault(text: &str) -> String {
    let error = read(text).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Input);
    error.to_string()
}

fn text(content: &Content) -> &str {
    match content {
        Content::Text(text) => text,
        Content::Chat(_) => panic!("expected text"),
    }
}

#[test]
fn every_shape_is_recognised() {
    let u = r#"{"role":"user","content":"q"}"#;
    let a = |text: &str| format!(r#"{{"role":"assistant","content":"{text}"}}"#);
    let table = [
        (
            r#"{"prompt":"p","chosen":"a","rejected":"b"}"#.to_owned(),
            Shape::PreferenceText,
        ),
        (
            r#"{"chosen":"pa","rejected":"pb"}"#.to_owned(),
            Shape::ImplicitPreferenceText,
        ),
        (
            format!(
                r#"{{"prompt":[{u}],"chosen":[{}],"rejected":[{}]}}"#,
                a("x"),
                a("y")
            ),
            Shape::PreferenceChat,
        ),
        (
            format!(
                r#"{{"chosen":[{u},{}],"rejected":[{u},{}]}}"#,
                a("x"),
                a("y")
            ),
            Shape::ImplicitPreferenceChat,
        ),
        // As in ultrafeedback_binarized.
        (
            format!(
                r#"{{"prompt":"q","chosen":[{u},{}],"rejected":[{u},{}],"messages":[{u}],"score_chosen":7.5}}"#,
                a("x"),
                a("y")
            ),
            Shape::ImplicitPreferenceChat,
        ),
        (
            r#"{"prompt":"p","completion":"c"}"#.to_owned(),
            Shape::CompletionText,
        ),
        (
            format!(r#"{{"prompt":[{u}],"completion":[{}]}}"#, a("x")),
            Shape::CompletionChat,
        ),
        (
            format!(r#"{{"messages":[{u},{}]}}"#, a("x")),
            Shape::Messages,
        ),
        (r#"{"text":"once"}"#.to_owned(), Shape::Text),
        (
            r#"{"prompt":"p","tools":null}"#.to_owned(),
            Shape::PromptText,
        ),
        (format!(r#"{{"prompt":[{u}]}}"#), Shape::PromptChat),
    ];
    for (line, shape) in table {
        assert_eq!(read(&line).unwrap().shape(), shape, "{line}");
    }
}

#[test]
fn an_implicit_prompt_is_the_common_prefix_less_a_space() {
    for (chosen, rejected, prompt) in [
        ("The sky is blue.", "The sky is green.", "The sky is"),
        ("Q: é?\nyes", "Q: é?\nno", "Q: é?\n"),
        ("aé", "aè", "a"),
    ] {
        let line = serde_json::json!({"chosen": chosen, "rejected": rejected}).to_string();
        let data = read(&line).unwrap();
        let Sample::Preference {
            prompt: found,
            chosen: a,
            rejected: b,
            ..
        } = &data.rows()[0].sample
        else {
            panic!("a preference");
        };
        assert_eq!(text(found), prompt);
        assert_eq!(format!("{prompt}{}", text(a)), chosen);
        assert_eq!(format!("{prompt}{}", text(b)), rejected);
    }
}

#[test]
fn faults_name_file_row_and_column() {
    let messages = [
        fault("{\"prompt\": \"a\"}\n{\"prompt\": 1}"),
        fault("\n\n{\"prompt\": \"a\", \"chosen\": \"b\"}"),
        fault(r#"{"prompt": "a", "chosen": "b", "rejected": ""}"#),
        fault(r#"{"prompt": "a", "chosen": " \n", "rejected": "c"}"#),
        fault(r#"{"chosen": "same", "rejected": "same"}"#),
        fault(r#"{"chosen": "same", "rejected": "same and more"}"#),
        fault(r#"{"prompt": "a", "completion": [{"role": "assistant", "content": "x"}]}"#),
        fault(r#"{"prompt": [{"role": "user", "content": "x"}], "chosen": "a", "rejected": "b"}"#),
        fault(r#"{"prompt": [{"role": "user"}]}"#),
        fault(r#"{"prompt": [{"role": "user", "content": "x"}, {"role": "", "content": "x"}]}"#),
        fault(r#"{"prompt": [{"role": "user", "content": [{"type": "text"}]}]}"#),
        fault(r#"{"messages": [{"role": "user", "content": "x", "tool_calls": []}]}"#),
        fault(r#"{"messages": [{"role": "user", "content": "x"}]}"#),
        fault(r#"{"messages": []}"#),
        fault(
            r#"{"prompt": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "x"}]}"#,
        ),
        fault(
            r#"{"prompt": [{"role": "user", "content": "x"}], "completion": [{"role": "user", "content": "x"}]}"#,
        ),
        fault(r#"{"prompt": "a", "tools": "[]"}"#),
        fault(r#"{"instruction": "a", "output": "b"}"#),
        fault("{\"prompt\": \"a\"}\n{\"text\": \"a\"}"),
        fault(r#"{"prompt": "a", "chosen": "b", "rejected": "c", "chosen_signal": [1, null]}"#),
        fault(r#"{"prompt": "a", "chosen": "b", "rejected": "c", "rejected_signal": "1"}"#),
        fault(r#"{"prompt": "a", "chosen": "b", "rejected": "c", "chosen_signal": [1e300]}"#),
        fault(r#"{"prompt": "a", "chosen": "b", "rejected": "c", "chosen_cuts": [1.5]}"#),
        fault(r#"{"prompt": "a", "prompt": "b"}"#),
        fault(r#"{"prompt": [{"role": "user", "role": "user", "content": "x"}]}"#),
        fault("[1]"),
        fault("\n \t\r\n"),
    ];
    insta::assert_snapshot!(messages.join("\n"), @r#"
`data.jsonl`, row 2: column `prompt`: expected a string or a list of messages, got a number
`data.jsonl`, row 3: column `rejected`: expected a string or a list of messages, got nothing
`data.jsonl`, row 1: column `rejected`: the response is empty
`data.jsonl`, row 1: column `chosen`: the response is empty
`data.jsonl`, row 1: column `chosen`: the response is empty
`data.jsonl`, row 1: column `chosen`: the response is empty
`data.jsonl`, row 1: column `completion`: expected a string, as `prompt` is, got a list
`data.jsonl`, row 1: column `chosen`: expected messages, as `prompt` is, got a string
`data.jsonl`, row 1: column `prompt[0].content`: expected a string, got nothing
`data.jsonl`, row 1: column `prompt[1].role`: expected a string, got an empty string
`data.jsonl`, row 1: column `prompt[0].content`: expected a string, got a list
`data.jsonl`, row 1: column `messages[0].tool_calls`: expected only `role` and `content`, got a list
`data.jsonl`, row 1: column `messages`: expected at least one message of the role `assistant`, got none
`data.jsonl`, row 1: column `messages`: expected at least one message, got an empty list
`data.jsonl`, row 1: column `prompt`: expected a prompt that ends before the assistant's turn, got a prompt that ends with an `assistant` message
`data.jsonl`, row 1: column `completion`: expected one `assistant` message after the prompt, got one `user` message
`data.jsonl`, row 1: column `tools`: expected no such column (not supported), got a string
`data.jsonl`, row 1: no known shape has the columns `instruction`, `output`; expected `chosen` and `rejected` (with or without `prompt`), `prompt` and `completion`, `messages`, `text`, or `prompt`
`data.jsonl`, row 2: the shape is `text`, expected `prompt` string as in the rows before
`data.jsonl`, row 1: column `chosen_signal[1]`: expected a finite number, got null
`data.jsonl`, row 1: column `rejected_signal`: expected a list of numbers, got a string
`data.jsonl`, row 1: column `chosen_signal[0]`: expected a finite number, got 1e300
`data.jsonl`, row 1: column `chosen_cuts[0]`: expected a token index, got 1.5
`data.jsonl`, row 1: malformed JSON at byte 24 of the line: duplicate key `prompt`
`data.jsonl`, row 1: malformed JSON at byte 35 of the line: duplicate key `role`
`data.jsonl`, row 1: malformed JSON at byte 1 of the line: expected an object, got a list
`data.jsonl` holds no rows
"#);
}

#[test]
fn hostile_lines_are_faults_and_never_panics() {
    let deep = "[".repeat(100_000);
    let messages = [
        fault(&format!("{{\"prompt\": {deep}")),
        fault("{\"prompt\": \"\\ud800\"}"),
        fault("{\"prompt\": \"\\udc00\\ud800\"}"),
        fault("{\"prompt\": 1e999}"),
        fault("{\"prompt\": NaN}"),
        fault("{\"prompt\": \"a\u{0}b\"}"),
        fault("{\"prompt\": \"a\"} trailing"),
        fault("{\"prompt\": \"a\"},"),
        fault("{'prompt': 'a'}"),
        fault("{\"prompt\": \"a"),
        fault("\u{feff}\u{feff}{\"prompt\": \"a\"}"),
        fault("null"),
    ];
    insta::assert_snapshot!(messages.join("\n"), @r#"
`data.jsonl`, row 1: malformed JSON at byte 138 of the line: recursion limit exceeded
`data.jsonl`, row 1: malformed JSON at byte 19 of the line: unexpected end of hex escape
`data.jsonl`, row 1: malformed JSON at byte 18 of the line: lone leading surrogate in hex escape
`data.jsonl`, row 1: malformed JSON at byte 16 of the line: number out of range
`data.jsonl`, row 1: malformed JSON at byte 12 of the line: expected value
`data.jsonl`, row 1: malformed JSON at byte 14 of the line: control character (\u0000-\u001F) found while parsing a string
`data.jsonl`, row 1: malformed JSON at byte 17 of the line: trailing characters
`data.jsonl`, row 1: malformed JSON at byte 16 of the line: trailing characters
`data.jsonl`, row 1: malformed JSON at byte 2 of the line: key must be a string
`data.jsonl`, row 1: malformed JSON at byte 13 of the line: EOF while parsing a string
`data.jsonl`, row 1: malformed JSON at byte 4 of the line: expected value
`data.jsonl`, row 1: malformed JSON at byte 1 of the line: expected an object, got null
"#);
    // An escaped NUL is a character like any other.
    assert!(read("{\"prompt\": \"a\\u0000b\"}").is_ok());
}

#[test]
fn bad_bytes_and_huge_lines_are_faults() {
    let all = |bytes: &[u8], max_line_bytes: usize| {
        let options = ReadOptions {
            max_line_bytes,
            ..ReadOptions::default()
        };
        JsonlReader::new("raw", bytes, options).collect::<Result<Vec<_>, _>>()
    };
    let error = all(b"{\"prompt\": \"ok\"}\n{\"prompt\": \"\xff\"}", 100)
        .unwrap_err()
        .to_string();
    assert_eq!(error, "`raw`, row 2: not UTF-8 at byte 13 of the line");
    let line = b"{\"prompt\": \"12345\"}";
    assert_eq!(all(line, line.len()).unwrap().len(), 1);
    assert_eq!(
        all(&[line.as_slice(), b"\r\n"].concat(), line.len())
            .unwrap()
            .len(),
        1
    );
    let error = all(line, line.len() - 1).unwrap_err().to_string();
    assert_eq!(error, "`raw`, row 1: the line is longer than 18 bytes");
    let endless = std::io::BufReader::new(std::io::repeat(b'x'));
    let options = ReadOptions {
        max_line_bytes: 1000,
        ..ReadOptions::default()
    };
    let mut reader = JsonlReader::new("endless", endless, options);
    assert!(reader.next().unwrap().is_err());
    assert!(
        reader.next().is_none(),
        "the reader ends at the first fault"
    );
}

#[test]
fn a_file_is_read_and_a_missing_one_is_named() {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    write!(
        file,
        "\u{feff}{{\"text\": \"a\"}}\r\n\r\n{{\"text\": \"b\"}}"
    )
    .unwrap();
    let data = DataSet::read(file.path(), ReadOptions::default()).unwrap();
    assert_eq!(
        data.rows().iter().map(|row| row.row).collect::<Vec<_>>(),
        [1, 3]
    );
    let options = ReadOptions {
        max_rows: Some(1),
        ..ReadOptions::default()
    };
    assert_eq!(DataSet::read(file.path(), options).unwrap().rows().len(), 1);
    let missing = DataSet::read(Path::new("no/such.jsonl"), ReadOptions::default()).unwrap_err();
    assert!(missing.to_string().starts_with("`no/such.jsonl`"));
    assert_eq!(missing.kind(), ErrorKind::Input);
}

proptest! {
    #[test]
    fn any_bytes_are_rows_or_one_fault(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        let rows = JsonlReader::new("x", bytes.as_slice(), ReadOptions::default());
        let results: Vec<_> = rows.collect();
        prop_assert!(results.iter().filter(|row| row.is_err()).count() <= 1);
    }

    #[test]
    fn any_cut_of_a_good_line_is_refused(cut in 1usize..70) {
        let line = r#"{"prompt": "What?", "chosen": " Yes, é.", "rejected": " No, \u00e9."}"#;
        prop_assume!(cut < line.len() && line.is_char_boundary(cut));
        prop_assert!(read(&line[..cut]).is_err());
    }
}
