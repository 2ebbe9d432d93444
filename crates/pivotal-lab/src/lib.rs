//! Worlds in which the truth of every token is known, so that a credit rule can be measured instead of believed.
//!
//! [`world`] is step-by-step column arithmetic, in which a policy forgets carries: it makes token ids, and says which of
//! them are wrong. [`start_policy`] is a small decoder trained on its corpus.

mod error;
pub mod start_policy;
pub mod world;

pub use error::{Error, Result};
