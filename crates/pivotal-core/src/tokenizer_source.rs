//! What a checkpoint says about its tokenizer, before anyone builds one.

/// Where a tokenizer comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum TokenizerSource {
    /// The bytes of a Hugging Face `tokenizer.json`.
    Json(Vec<u8>),
    /// A byte-level BPE vocabulary, as GGUF files carry it (`tokenizer.ggml.model = "gpt2"`).
    Bpe(BpeVocabulary),
}

/// A byte-level BPE vocabulary.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BpeVocabulary {
    /// Token texts in the byte-level alphabet; a token's id is its index.
    pub tokens: Vec<String>,
    /// What each token is, `[tokens]`.
    pub kinds: Vec<TokenKind>,
    /// Merges in order of rank, each two token texts with a space between.
    pub merges: Vec<String>,
    /// The name of the pre-tokenizer (`tokenizer.ggml.pre`): `smollm`, `llama-bpe`, `qwen2`, …
    pub pre_tokenizer: String,
}

/// What a token of a vocabulary is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TokenKind {
    /// Made by merges.
    #[default]
    Normal,
    /// Stands for something: `<|im_start|>`, EOS.
    Control,
    /// Added by the user; matched in text before the merges.
    UserDefined,
    /// The unknown token.
    Unknown,
    /// A slot without use.
    Unused,
    /// A single byte.
    Byte,
}
