//! What every Pivotal crate shares: signs and masks, tokenised samples, the tree-packed batch, records, the run
//! manifest, error kinds, seeded random streams, safe file writes and statistics.
//!
//! Nothing here knows a tensor, a model or a data format; everything is plain data and slices.

mod error;
mod file;
mod manifest;
mod mask;
mod pack;
mod random;
mod record;
mod sample;
mod sign;
pub mod statistics;
mod tokenizer_source;

pub use error::{ErrorKind, FileError, HasKind};
pub use file::{
    ContentHasher, check_writable, content_hash, is_stream, read_checked, read_file,
    remove_temporaries, same_file, sync_directory, write_atomic, write_checked,
};
pub use manifest::{FileHash, Manifest};
pub use mask::{LengthMismatch, TokenMask};
pub use pack::{Gather, Pack, PackError, Span};
pub use random::{RandomStream, random_stream};
pub use record::{CreditRecord, RecordError, SCHEMA_VERSION, SegmentRecord};
pub use sample::{Side, TokenizedPair, TokenizedPrompt, TokenizedResponse};
pub use sign::Sign;
pub use tokenizer_source::{BpeVocabulary, TokenKind, TokenizerSource};
