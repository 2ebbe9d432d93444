//! The golden vocabulary, as a tokenizer.

use std::path::Path;

use pivotal_core::{BpeVocabulary, TokenKind, TokenizerSource};
use pivotal_data::{SpecialTokens, Tokenizer};
use serde_json::Value;

/// The golden file, made by `scripts/golden/bpe_vocabulary.py`.
pub(crate) fn golden() -> Value {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/bpe_vocabulary.json");
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

/// A list of strings.
pub(crate) fn strings(value: &Value) -> Vec<String> {
    serde_json::from_value(value.clone()).unwrap()
}

/// The golden vocabulary under a pre-tokenizer's name.
pub(crate) fn vocabulary(pre_tokenizer: &str) -> BpeVocabulary {
    let golden = golden();
    let tokens = strings(&golden["tokens"]);
    let (control, user) = (
        strings(&golden["control"]),
        strings(&golden["user_defined"]),
    );
    let kind = |token: &String| match token {
        token if control.contains(token) => TokenKind::Control,
        token if user.contains(token) => TokenKind::UserDefined,
        _ => TokenKind::Normal,
    };
    BpeVocabulary {
        kinds: tokens.iter().map(kind).collect(),
        tokens,
        merges: strings(&golden["merges"]),
        pre_tokenizer: pre_tokenizer.into(),
    }
}

/// SmolLM2's rule; `<|im_start|>` (1) is BOS, `<|im_end|>` (2) is EOS.
pub(crate) fn tokenizer(pre_tokenizer: &str, add_bos: bool) -> Tokenizer {
    let special = SpecialTokens {
        bos: Some(1),
        eos: 2,
        add_bos: Some(add_bos),
    };
    Tokenizer::new(&TokenizerSource::Bpe(vocabulary(pre_tokenizer)), special).unwrap()
}
