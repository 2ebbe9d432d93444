//! From a file of preferences, prompts or conversations to tree-packed batches of token ids.
//!
//! ```text
//! JSONL ──▶ DataSet ──▶ tokenize_pairs / _responses / _prompts ──▶ Batcher ──▶ pack_pairs ──▶ Pack
//!            shapes       tokenizer, chat template, limits          order        prompt shared
//! ```
//!
//! A data set has one of TRL's shapes ([`Shape`]); every fault names the file, the row and the column. A tokenizer comes
//! from `tokenizer.json` or from the vocabulary of a GGUF file ([`Tokenizer`]). A prompt is a token prefix of prompt +
//! response, or the row is refused ([`Prefix`]).

mod batch;
mod chat;
mod conversation;
mod data_set;
mod date;
mod error;
mod json;
mod jsonl;
mod pack;
mod pre_tokenizer;
mod sample;
mod text_offsets;
mod tokenize;
mod tokenizer;

pub use batch::{Batch, BatchOptions, Batcher, Cursor, Order};
pub use chat::ChatTemplate;
pub use data_set::DataSet;
pub use date::Date;
pub use error::{DataError, Result, RowFault};
pub use jsonl::{JsonlReader, ReadOptions};
pub use pack::{gather_all, gather_kept, micro_batches, pack_pairs, pack_responses, unpack};
pub use sample::{Content, External, Message, Row, Sample, Shape};
pub use tokenize::{
    Limits, Prefix, TokenizeOptions, Tokenized, tokenize_pairs, tokenize_prompts,
    tokenize_responses,
};
pub use tokenizer::{SpecialTokens, Tokenizer};
