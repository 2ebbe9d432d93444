//! From a GGUF's byte-level BPE vocabulary to the `tokenizer.json` that says the same.

use std::collections::HashMap;

use pivotal_core::{BpeVocabulary, TokenKind};
use serde_json::{Value, json};

use crate::error::{DataError, Result};

/// How text is split before the merges; the names are those of `tokenizer.ggml.pre`, as llama.cpp's converter writes them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Rule {
    /// GPT-2's pattern, inside the byte-level step itself.
    Gpt2,
    /// Every digit alone, then GPT-2's pattern.
    DigitsThenGpt2,
    /// Llama 3's pattern: numbers in groups of up to three digits.
    Llama3,
    /// Qwen 2's pattern: every digit alone; the text is brought to NFC first.
    Qwen2,
}

/// An absent name and `default` mean GPT-2's rule, as transformers reads such files.
const NAMES: [(&str, Rule); 16] = [
    ("", Rule::Gpt2),
    ("default", Rule::Gpt2),
    ("gpt-2", Rule::Gpt2),
    ("phi-2", Rule::Gpt2),
    ("mpt", Rule::Gpt2),
    ("olmo", Rule::Gpt2),
    ("jais", Rule::Gpt2),
    ("smollm", Rule::DigitsThenGpt2),
    ("starcoder", Rule::DigitsThenGpt2),
    ("refact", Rule::DigitsThenGpt2),
    ("codeshell", Rule::DigitsThenGpt2),
    ("llama-bpe", Rule::Llama3),
    ("llama3", Rule::Llama3),
    ("llama-v3", Rule::Llama3),
    ("qwen2", Rule::Qwen2),
    ("deepseek-r1-qwen", Rule::Qwen2),
];

/// The pattern of the `tokenizer.json` of Llama 3 and Qwen 2, which differ in how many digits stay together.
fn split_pattern(digits: &str) -> String {
    [
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        digits,
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
    .join("|")
}

impl Rule {
    fn named(name: &str) -> Result<Self> {
        match NAMES.iter().find(|(known, _)| *known == name) {
            Some((_, rule)) => Ok(*rule),
            None => Err(DataError::PreTokenizer {
                name: name.to_owned(),
                known: NAMES[1..].iter().map(|(known, _)| *known).collect(),
            }),
        }
    }

    fn pre_tokenizer(self) -> Value {
        let byte_level = |use_regex: bool| json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": use_regex});
        let split_by = |digits: &str| {
            json!({"type": "Sequence", "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": split_pattern(digits)}, "behavior": "Isolated", "invert": false},
                byte_level(false),
            ]})
        };
        match self {
            Self::Gpt2 => byte_level(true),
            Self::DigitsThenGpt2 => json!({"type": "Sequence", "pretokenizers": [
                {"type": "Digits", "individual_digits": true},
                byte_level(true),
            ]}),
            Self::Llama3 => split_by(r"\p{N}{1,3}"),
            Self::Qwen2 => split_by(r"\p{N}"),
        }
    }
}

/// The `tokenizer.json` of a byte-level BPE vocabulary.
///
/// Control, unknown and user-defined tokens become added tokens: they are found in text before the merges.
pub(crate) fn tokenizer_json(vocabulary: &BpeVocabulary) -> Result<Vec<u8>> {
    let rule = Rule::named(&vocabulary.pre_tokenizer)?;
    let ids = token_ids(vocabulary)?;
    let merges = merge_pairs(vocabulary, &ids)?;
    let added: Vec<Value> = (0u32..)
        .zip(vocabulary.tokens.iter().zip(&vocabulary.kinds))
        .filter_map(|(id, (content, kind))| {
            let special = match kind {
                TokenKind::Control | TokenKind::Unknown => true,
                TokenKind::UserDefined => false,
                TokenKind::Normal | TokenKind::Unused | TokenKind::Byte => return None,
            };
            Some(
                json!({"id": id, "content": content, "single_word": false, "lstrip": false,
                "rstrip": false, "normalized": false, "special": special}),
            )
        })
        .collect();
    let normalizer = match rule {
        Rule::Qwen2 => json!({"type": "NFC"}),
        _ => Value::Null,
    };
    let document = json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added,
        "normalizer": normalizer,
        "pre_tokenizer": rule.pre_tokenizer(),
        "post_processor": null,
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": {
            "type": "BPE",
            "dropout": null,
            "unk_token": null,
            "continuing_subword_prefix": null,
            "end_of_word_suffix": null,
            "fuse_unk": false,
            "byte_fallback": false,
            "ignore_merges": rule == Rule::Llama3,
            "vocab": ids,
            "merges": merges,
        },
    });
    Ok(document.to_string().into_bytes())
}

fn token_ids(vocabulary: &BpeVocabulary) -> Result<HashMap<&str, u32>> {
    if vocabulary.kinds.len() != vocabulary.tokens.len() {
        return Err(DataError::Vocabulary {
            field: "kinds",
            index: vocabulary.kinds.len().min(vocabulary.tokens.len()),
            expected: "one kind a token",
            found: format!(
                "{} kinds for {} tokens",
                vocabulary.kinds.len(),
                vocabulary.tokens.len()
            ),
        });
    }
    let mut ids = HashMap::with_capacity(vocabulary.tokens.len());
    for (id, token) in vocabulary.tokens.iter().enumerate() {
        let fault = |expected| DataError::Vocabulary {
            field: "tokens",
            index: id,
            expected,
            found: token.clone(),
        };
        if token.is_empty() {
            return Err(fault("a text that is not empty"));
        }
        if ids.insert(token.as_str(), id as u32).is_some() {
            return Err(fault("a text no other token has"));
        }
    }
    Ok(ids)
}

fn merge_pairs<'a>(
    vocabulary: &'a BpeVocabulary,
    ids: &HashMap<&str, u32>,
) -> Result<Vec<[&'a str; 2]>> {
    let merge = |(index, merge): (usize, &'a String)| {
        let fault = |expected| DataError::Vocabulary {
            field: "merges",
            index,
            expected,
            found: merge.clone(),
        };
        let (left, right) = merge
            .split_once(' ')
            .ok_or_else(|| fault("two tokens with a space between"))?;
        let known = |text: &str| ids.contains_key(text);
        match known(left) && known(right) && known(&format!("{left}{right}")) {
            true => Ok([left, right]),
            false => Err(fault("two tokens whose union is a token too")),
        }
    };
    vocabulary.merges.iter().enumerate().map(merge).collect()
}
