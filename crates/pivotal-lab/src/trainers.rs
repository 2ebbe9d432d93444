//! The second study: every trainer with and without segment credit, in the world whose truth is known.

mod arm;
mod grpo;
mod ppo;
mod reject;
mod run;
mod samples;
mod tally;

pub use arm::{TokenRule, Trainer, TrainerArm, TrainerSettings};
