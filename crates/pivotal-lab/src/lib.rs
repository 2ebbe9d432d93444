//! Worlds in which the truth of every token is known, so that a credit rule can be measured instead of believed.
//!
//! [`world`] is step-by-step column arithmetic, in which a policy forgets carries: it makes token ids, and says which of
//! them are wrong. [`start_policy`] is a small decoder trained on its corpus, [`evaluate`] scores a policy without
//! sampling, [`quickstart()`] compares segment credit with what it must beat, and [`grid()`] tunes each arm beforehand;
//! [`trainers()`] and [`trainers_grid()`] do the same with every trainer.

mod arm;
mod error;
pub mod evaluate;
mod experiment;
mod grid;
mod jobs;
mod quickstart;
mod signal;
pub mod start_policy;
mod study;
mod trainers;
mod training_pairs;
mod views;
pub mod world;

pub use arm::{ArmKind, ArmSettings};
pub use error::{Error, Result};
pub use grid::{BETAS, GridResult, GridRow, GridSettings, LEARNING_RATES, grid, tuned_arms};
pub use quickstart::{QuickstartSettings, quickstart};
pub use trainers::{
    TokenRule, Trainer, TrainerArm, TrainerSettings, TrainersGrid, TrainersGridRow,
    TrainersGridSettings, TrainersStudySettings, trainers, trainers_grid,
};
