//! The world's characters as a tokenizer, so that the recipes' own sampling and credit run here too.

use pivotal_core::TokenizerSource;
use pivotal_data::{SpecialTokens, Tokenizer};

use super::vocabulary::{BEGIN, CHARACTERS, END};
use crate::error::Result;

/// One character, one token; `$` ends a response. Prompts begin with `^` themselves, so nothing is added.
///
/// # Errors
/// Never for this vocabulary.
///
/// # Examples
/// ```
/// use pivotal_lab::world::{tokenizer, vocabulary};
/// let tokenizer = tokenizer()?;
/// assert_eq!(tokenizer.encode("^A-60=25;").unwrap(), vocabulary::encode("^A-60=25;")?);
/// assert_eq!(tokenizer.decode_plain(&vocabulary::encode("25A-60=64;$")?).unwrap(), "25A-60=64;$");
/// # Ok::<(), pivotal_lab::Error>(())
/// ```
pub fn tokenizer() -> Result<Tokenizer> {
    // None of the characters needs an escape in JSON.
    let vocabulary: Vec<String> = CHARACTERS
        .chars()
        .enumerate()
        .map(|(id, character)| format!("\"{character}\":{id}"))
        .collect();
    let json = format!(
        r#"{{"version":"1.0","truncation":null,"padding":null,"added_tokens":[],"normalizer":null,"pre_tokenizer":null,
"post_processor":null,"decoder":{{"type":"Fuse"}},"model":{{"type":"BPE","dropout":null,"unk_token":null,
"continuing_subword_prefix":null,"end_of_word_suffix":null,"fuse_unk":false,"byte_fallback":false,
"vocab":{{{}}},"merges":[]}}}}"#,
        vocabulary.join(",")
    );
    let special = SpecialTokens {
        bos: Some(BEGIN),
        eos: END,
        add_bos: Some(false),
    };
    Ok(Tokenizer::new(
        &TokenizerSource::Json(json.into_bytes()),
        special,
    )?)
}
