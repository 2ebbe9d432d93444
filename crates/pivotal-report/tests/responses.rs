//! The text view of one response.

#[allow(dead_code, reason = "the other tests use the rest of it")]
mod sample;

use pivotal_core::Side;
use pivotal_report::{Glyphs, render_response, render_responses};
use proptest::prelude::*;

#[test]
fn tokens_segments_and_marks_stand_under_one_another() {
    let record = sample::record("52-06=56;\n60", &[6], Side::Rejected, 0.0);
    insta::assert_snapshot!(render_response(&record, Glyphs::Unicode, 80), @"
    sample 12, rejected, sign −: 12 tokens in 4 segments, 3 kept; log_ratio with b = 0, δ = 0.5
    signal from −3.683 (▁) to 1.217 (█)
    signal   ▆▇▇███▁▇▇█
    segment  0  +──−──+
    token    52-06=56;↵
    keep           ^^^
    wrong          x
    signal   ██
    segment  ──
    token    60
    keep
    wrong
    ");
    insta::assert_snapshot!(render_response(&record, Glyphs::Ascii, 80), @r#"
    sample 12, rejected, sign -: 12 tokens in 4 segments, 3 kept; log_ratio with b = 0, delta = 0.5
    signal from -3.683 (0) to 1.217 (9)
    signal   77889907888
    segment  0  +==-==+=
    token    52-06=56;\n
    keep           ^^^
    wrong          x
    signal   99
    segment  ==
    token    60
    keep
    wrong
    "#);
}

#[test]
fn records_are_set_apart_by_a_blank_line() {
    let record = sample::record("ab", &[], Side::Chosen, 0.0);
    let both = render_responses(&[record.clone(), record], Glyphs::Ascii, 80);
    assert_eq!(both.matches("\n\n").count(), 1);
    assert_eq!(both.matches("sample 12").count(), 2);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_token_text_is_shown_without_control_codes(
        texts in prop::collection::vec(any::<String>(), 1..12),
        columns in 20usize..100,
    ) {
        let mut record = sample::record(&"x".repeat(texts.len()), &[0], Side::Chosen, 0.0);
        record.token_texts = texts;
        let ascii = render_response(&record, Glyphs::Ascii, columns);
        prop_assert!(ascii.chars().all(|c| c == '\n' || (c.is_ascii() && !c.is_control())));
        let unicode = render_response(&record, Glyphs::Unicode, columns);
        prop_assert!(unicode.chars().all(|c| c == '\n' || !c.is_control()));
        let tokens = unicode.lines().filter(|line| line.starts_with("token")).count();
        prop_assert_eq!(unicode.lines().filter(|line| line.starts_with("keep")).count(), tokens);
    }
}
