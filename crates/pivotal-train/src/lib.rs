//! Recipes that align a language model with segment-level credit.
//!
//! Each recipe is a function that reads top to bottom: load, tokenise, give credit, step, write. [`dpo`], [`sft`] and
//! [`reward`] train; [`annotate`] scores every token of a data set. What they share are functions: the [`optimizer`]
//! over named parameters, the [`run`] directory, [`score`] for everything that needs no gradient.

mod activations;
pub mod annotate;
mod checkpoint;
mod config_file;
pub mod dpo;
mod error;
mod event_file;
pub mod grpo;
pub mod onpolicy;
pub mod optimizer;
pub mod ppo;
mod progress;
pub mod reference;
pub mod reject;
pub mod reward;
pub mod run;
mod schedule;
pub mod score;
pub mod settings;
pub mod sft;
pub mod signals;
mod table;
pub mod workspace;

pub use activations::Activations;
pub use config_file::{read_config, show_config};
pub use error::{Error, Result};
pub use run::StartMode;
pub use schedule::Schedule;
