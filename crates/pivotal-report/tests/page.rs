//! The page: sound markup, nothing loaded, nothing lost, nothing escaped from.

mod sample;

use std::collections::BTreeMap;

use pivotal_report::{Report, Study};
use proptest::prelude::*;

fn page(study: &Study) -> String {
    Report::new(study).unwrap().html().unwrap()
}

/// Opening and closing tags in order, read as a browser does: raw text in `style` and `script`, quoted attributes.
fn tags(html: &str) -> Vec<String> {
    let mut tags = Vec::new();
    let mut rest = html;
    while let Some(start) = rest.find('<') {
        rest = &rest[start + 1..];
        if !rest.starts_with(|c: char| c.is_ascii_alphabetic() || c == '/' || c == '!') {
            continue;
        }
        let mut quote = None;
        let end = rest.find(|c: char| match (quote, c) {
            (None, '"' | '\'') => {
                quote = Some(c);
                false
            }
            (Some(open), _) if open == c => {
                quote = None;
                false
            }
            (None, '>') => true,
            _ => false,
        });
        let tag = &rest[..end.expect("a tag without end")];
        rest = &rest[tag.len() + 1..];
        let name = tag
            .split(|c: char| c.is_whitespace() || c == '>')
            .next()
            .unwrap();
        let name = match tag.ends_with('/') {
            true => format!("{}/", name.trim_end_matches('/')),
            false => name.to_owned(),
        };
        if name == "style" || name == "script" {
            rest = &rest[rest
                .find(&format!("</{name}>"))
                .expect("raw text without end")..];
        }
        tags.push(name);
    }
    tags
}

fn balanced(tags: &[String]) -> Result<(), String> {
    let mut open = Vec::new();
    for tag in tags {
        match tag.strip_prefix('/') {
            Some(name) => match open.pop() {
                Some(last) if last == name => {}
                last => return Err(format!("`{name}` closes {last:?}")),
            },
            None if tag.ends_with('/') || ["meta", "br", "!doctype"].contains(&&**tag) => {}
            None => open.push(tag.as_str()),
        }
    }
    match open.is_empty() {
        true => Ok(()),
        false => Err(format!("left open: {open:?}")),
    }
}

/// How often each tag occurs; line breaks follow the tokens' text and are left out.
fn census(html: &str) -> BTreeMap<String, usize> {
    let mut census = BTreeMap::new();
    for tag in tags(html) {
        *census.entry(tag).or_default() += 1;
    }
    census.remove("br");
    census
}

#[test]
fn tags_are_balanced() {
    balanced(&tags(&page(&sample::study()))).unwrap();
    let mut bare = sample::study();
    bare.examples.clear();
    bare.signals.clear();
    bare.comparisons.clear();
    bare.notes.clear();
    bare.versions.clear();
    (bare.machine, bare.date, bare.question) = Default::default();
    let html = page(&bare);
    balanced(&tags(&html)).unwrap();
    assert!(!html.contains("Pairs, token by token"));
}

#[test]
fn nothing_is_loaded() {
    let html = page(&sample::study());
    for trace in [
        "http://", "https://", "src=", "href=", "url(", "@import", "fetch(",
    ] {
        assert!(!html.contains(trace), "{trace}");
    }
    assert!(html.contains("default-src 'none'"));
}

#[test]
fn every_number_and_every_flag_is_on_the_page() {
    let study = sample::study();
    let html = page(&study);
    for arm in &study.arms {
        for metric in &study.metrics {
            for value in arm
                .values
                .get(&metric.key)
                .into_iter()
                .flat_map(|v| v.values())
            {
                let text = format!(
                    "<td class=\"number\">{value:.*}</td>",
                    usize::from(metric.decimals)
                );
                assert!(html.contains(&text), "{} {}: {text}", arm.key, metric.key);
            }
        }
    }
    for row in &study.signals {
        for value in row.values.values().flat_map(|by_seed| by_seed.values()) {
            assert!(html.contains(&format!("<td class=\"number\">{value:.3}</td>")));
        }
    }
    let records = study.examples.iter().flat_map(|pair| &pair.signals);
    let records: Vec<_> = records.flat_map(|s| [&s.chosen, &s.rejected]).collect();
    let flags = || records.iter().flat_map(|record| &record.keep);
    let kept = flags().filter(|&&keep| keep).count();
    assert_eq!(html.matches("<b class=\"kept\">").count(), kept);
    assert_eq!(
        html.matches("<s class=\"dropped\">").count(),
        flags().count() - kept
    );
    let truth = records
        .iter()
        .flat_map(|record| record.truth.as_ref().unwrap());
    let wrong = truth.filter(|&&right| !right).count();
    assert_eq!(html.matches("<em class=\"truth\">✗</em>").count(), wrong);
    let pivots: usize = records.iter().map(|record| record.segments.len()).sum();
    assert_eq!(html.matches(" pivot\" title=").count(), pivots);
}

#[test]
fn markup_in_any_text_is_harmless() {
    const EVIL: &str = "</style></script><script>alert(1)</script>\" onload='x' {{ 7 * 7 }} <!--";
    let mut study = sample::study();
    let clean = census(&page(&study));
    study.title = EVIL.into();
    study.question = EVIL.into();
    study.command = EVIL.into();
    study.machine = EVIL.into();
    study.notes[0] = EVIL.into();
    study.metrics[0].label = EVIL.into();
    study.metrics[0].description = EVIL.into();
    study.arms[1].label = EVIL.into();
    study.arms[1].settings.insert("lr".into(), EVIL.into());
    study.signals[0].label = EVIL.into();
    study.examples[0].prompt = EVIL.into();
    study.examples[0].title = EVIL.into();
    let signal = &mut study.examples[0].signals[0];
    signal.label = EVIL.into();
    signal.chosen.signal_name = EVIL.into();
    signal.chosen.token_texts[1] = EVIL.into();
    let html = page(&study);
    assert_eq!(census(&html), clean);
    assert!(!html.contains("<script>alert"));
    assert!(html.contains("{{ 7 * 7 }}") && !html.contains(" 49 "));
    let svg = Report::new(&study).unwrap().forest_svg("exact").unwrap();
    balanced(&tags(&svg)).unwrap();
    assert!(!svg.contains("<script"));
}

#[test]
fn the_plot_alone_is_a_whole_svg_file() {
    let study = sample::study();
    let report = Report::new(&study).unwrap();
    let svg = report.forest_svg("exact").unwrap();
    assert!(svg.starts_with("<svg xmlns=\"http://www.w3.org/2000/svg\""));
    balanced(&tags(&svg)).unwrap();
    assert_eq!(
        svg.matches("class=\"seed\"").count(),
        15,
        "five arms vary over three seeds"
    );
    assert_eq!(report.forest_svg("no such metric"), None);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn token_texts_never_break_out_of_the_markup(
        texts in prop::collection::vec("[<>&\"'/a-z!\\-= \\n{}%]{0,12}|\\PC{0,6}|.{0,4}", 8),
    ) {
        let mut study = sample::study();
        study.examples = vec![sample::pair("one")];
        study.examples[0].signals.truncate(1);
        let clean = census(&page(&study));
        let chosen = &mut study.examples[0].signals[0].chosen;
        chosen.token_texts.iter_mut().zip(texts).for_each(|(token, text)| *token = text);
        let html = page(&study);
        prop_assert_eq!(census(&html), clean);
        prop_assert!(balanced(&tags(&html)).is_ok());
        prop_assert!(html.chars().all(|c| c == '\n' || !c.is_control()));
    }
}
