//! A tokenizer from `tokenizer.json` or a GGUF vocabulary, without the parts that add tokens behind one's back.

use pivotal_core::{TokenizerSource, content_hash};
use tokenizers::DecoderWrapper;

use crate::error::{DataError, Result};
use crate::pre_tokenizer::tokenizer_json;
use crate::text_offsets::{byte_of, piece_offsets};

/// The tokens that begin and end a sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SpecialTokens {
    /// Beginning of sequence, where the model has one.
    pub bos: Option<u32>,
    /// End of sequence: what generation stops at.
    pub eos: u32,
    /// Whether plain text starts with BOS (`add_bos_token`); `None` asks the `tokenizer.json`'s own post-processor.
    pub add_bos: Option<bool>,
}

/// A tokenizer that adds no token by itself: BOS and EOS are placed by [`crate::tokenize_pairs`] and its siblings, once.
///
/// Truncation, padding and the post-processor of a `tokenizer.json` are set aside. Special tokens written out in a text
/// are recognised, as in transformers: chat templates depend on it. A byte that the vocabulary lacks vanishes, as in
/// transformers (SmolLM2's lacks six control characters).
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    json: Vec<u8>,
    bos: Option<u32>,
    eos: u32,
    add_bos: bool,
    id_limit: u32,
}

impl Tokenizer {
    /// Builds the tokenizer of a checkpoint.
    ///
    /// # Errors
    /// [`DataError::TokenizerFormat`], [`DataError::Vocabulary`], [`DataError::PreTokenizer`]; [`DataError::TokenId`] if
    /// BOS or EOS is not a token.
    pub fn new(source: &TokenizerSource, special: SpecialTokens) -> Result<Self> {
        let json = match source {
            TokenizerSource::Json(bytes) => bytes.clone(),
            TokenizerSource::Bpe(vocabulary) => tokenizer_json(vocabulary)?,
            _ => {
                return Err(DataError::TokenizerFormat {
                    detail: "expected a `tokenizer.json` or a byte-level BPE vocabulary".into(),
                });
            }
        };
        let format = |error: tokenizers::Error| DataError::TokenizerFormat {
            detail: error.to_string(),
        };
        let mut inner = tokenizers::Tokenizer::from_bytes(&json).map_err(format)?;
        inner.with_truncation(None).map_err(format)?;
        inner.with_padding(None);
        let add_bos = match (special.add_bos, special.bos) {
            (_, None) => false,
            (Some(add), Some(_)) => add,
            (None, Some(bos)) => {
                let start = inner.encode_fast("a", true).map_err(format)?;
                start.get_ids().first() == Some(&bos)
            }
        };
        // It would trim offsets, and with the special tokens set aside does nothing else.
        inner.with_post_processor(None::<tokenizers::PostProcessorWrapper>);
        let id_limit = inner
            .get_vocab(true)
            .into_values()
            .max()
            .map_or(0, |id| id + 1);
        let tokenizer = Self {
            inner,
            json,
            bos: special.bos,
            eos: special.eos,
            add_bos,
            id_limit,
        };
        for id in special.bos.into_iter().chain([special.eos]) {
            tokenizer.token_text(id)?;
        }
        Ok(tokenizer)
    }

    /// The token ids of `text`, nothing added.
    ///
    /// # Errors
    /// [`DataError::Encode`] if the tokenizer library refuses the text.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        let encoding = self.inner.encode_fast(text, false).map_err(encode_error)?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The token ids of `text` and their byte offsets in it, half-open, nothing added.
    ///
    /// # Errors
    /// [`DataError::Encode`] if the tokenizer library refuses the text.
    pub fn encode_with_offsets(&self, text: &str) -> Result<(Vec<u32>, Vec<[usize; 2]>)> {
        let encoding = self.inner.encode(text, false).map_err(encode_error)?;
        let offsets = encoding
            .get_offsets()
            .iter()
            .map(|&(start, end)| [start, end]);
        Ok((encoding.get_ids().to_vec(), offsets.collect()))
    }

    /// The text of `ids`, special tokens written out.
    ///
    /// # Errors
    /// [`DataError::TokenId`] for an id out of the vocabulary, which the library would skip in silence.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        if self.is_byte_level() {
            return Ok(String::from_utf8_lossy(&self.pieces(ids)?.concat()).into_owned());
        }
        self.decode_with(ids, false)
    }

    /// The text of `ids` without special tokens: what a reader sees.
    ///
    /// # Errors
    /// [`DataError::TokenId`] for an id out of the vocabulary.
    pub fn decode_plain(&self, ids: &[u32]) -> Result<String> {
        self.decode_with(ids, true)
    }

    /// The text of each token, `[tokens]`; tokens that are parts of one character show replacement characters.
    ///
    /// # Errors
    /// [`DataError::TokenId`] for an id out of the vocabulary.
    pub fn token_texts(&self, ids: &[u32]) -> Result<Vec<String>> {
        if self.is_byte_level() {
            let pieces = self.pieces(ids)?;
            let texts = pieces
                .iter()
                .map(|piece| String::from_utf8_lossy(piece).into_owned());
            return Ok(texts.collect());
        }
        let text = self.decode(ids)?;
        let offsets = self.text_offsets(ids)?;
        Ok(offsets
            .into_iter()
            .map(|[start, end]| text[start..end].to_owned())
            .collect())
    }

    /// The byte offsets of each token in [`Tokenizer::decode`] of all of them, half-open, `[tokens]`.
    ///
    /// Tokens that are parts of one character share it. Outside byte-level vocabularies a character spread over several
    /// tokens belongs to the last of them.
    ///
    /// # Errors
    /// [`DataError::TokenId`] for an id out of the vocabulary.
    pub fn text_offsets(&self, ids: &[u32]) -> Result<Vec<[usize; 2]>> {
        if self.is_byte_level() {
            return Ok(piece_offsets(&self.pieces(ids)?));
        }
        let whole = self.decode(ids)?;
        let mut start = 0;
        let mut offsets = Vec::with_capacity(ids.len());
        for count in 1..=ids.len() {
            let text = self.decode(&ids[..count])?;
            let agreed = text.bytes().zip(whole.bytes()).take_while(|(a, b)| a == b);
            let mut end = agreed.count().max(start);
            while !whole.is_char_boundary(end) {
                end -= 1;
            }
            offsets.push([start, end]);
            start = end;
        }
        Ok(offsets)
    }

    /// The vocabulary's own spelling of a token (`Ġthe`, `<|im_end|>`).
    ///
    /// # Errors
    /// [`DataError::TokenId`] for an id out of the vocabulary.
    pub fn token_text(&self, id: u32) -> Result<String> {
        self.inner.id_to_token(id).ok_or(DataError::TokenId {
            id,
            vocabulary_size: self.vocabulary_size(),
        })
    }

    /// The id of a token by the vocabulary's own spelling.
    pub fn token_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// One more than the highest token id. A model's embedding may have more rows.
    pub fn vocabulary_size(&self) -> usize {
        self.id_limit as usize
    }

    /// True of tokens that stand for something instead of text: `<|im_start|>`, EOS.
    pub fn is_special(&self, id: u32) -> bool {
        let added = self.inner.get_added_vocabulary().get_added_tokens_decoder();
        id == self.eos || self.bos == Some(id) || added.get(&id).is_some_and(|token| token.special)
    }

    /// Beginning of sequence, where the model has one.
    pub fn bos(&self) -> Option<u32> {
        self.bos
    }

    /// End of sequence.
    pub fn eos(&self) -> u32 {
        self.eos
    }

    /// Whether plain text starts with BOS.
    pub fn adds_bos(&self) -> bool {
        self.add_bos
    }

    /// The `tokenizer.json`: the one given, or the one a GGUF's vocabulary says.
    pub fn to_json(&self) -> &[u8] {
        &self.json
    }

    /// BLAKE3 of all that decides the ids of a text: part of the key of cached log-probabilities.
    pub fn hash(&self) -> String {
        let mut bytes = self.json.clone();
        bytes.extend(format!("{:?} {} {}", self.bos, self.eos, self.add_bos).into_bytes());
        content_hash(&bytes)
    }

    fn is_byte_level(&self) -> bool {
        matches!(self.inner.get_decoder(), Some(DecoderWrapper::ByteLevel(_)))
    }

    fn pieces(&self, ids: &[u32]) -> Result<Vec<Vec<u8>>> {
        let added = self.inner.get_added_vocabulary().get_added_tokens_decoder();
        let piece = |&id: &u32| {
            let token = self.token_text(id)?;
            let literal = || token.clone().into_bytes();
            if added.contains_key(&id) {
                return Ok(literal());
            }
            let bytes: Option<Vec<u8>> = token.chars().map(byte_of).collect();
            Ok(bytes.unwrap_or_else(literal))
        };
        ids.iter().map(piece).collect()
    }

    fn decode_with(&self, ids: &[u32], skip_special: bool) -> Result<String> {
        for &id in ids {
            self.token_text(id)?;
        }
        self.inner.decode(ids, skip_special).map_err(encode_error)
    }
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("Tokenizer")
            .field("vocabulary_size", &self.vocabulary_size())
            .field("bos", &self.bos)
            .field("eos", &self.eos)
            .field("add_bos", &self.add_bos)
            .finish_non_exhaustive()
    }
}

fn encode_error(error: tokenizers::Error) -> DataError {
    DataError::Encode {
        detail: error.to_string(),
    }
}
