//! The two models that PPO trains, in one place for its optimizer and its checkpoints.

use std::path::Path;

use pivotal_core::random_stream;
use pivotal_model::{Decoder, Parameters, RewardModel, Visitor};
use rand::Rng;

use super::settings::PpoSettings;
use crate::error::Result;
use crate::settings::{LoraSettings, Precision};
use crate::workspace::Workspace;

/// The policy's name in checkpoints.
pub(crate) const POLICY: &str = "policy";
/// The value model's.
pub(crate) const VALUE: &str = "value";

/// Policy and value model. With adapters both lie on one copy of the base, as do the reference and a reward model that is an
/// adapter: a role costs its adapter, not another model.
pub struct Models {
    /// The policy.
    pub policy: Decoder,
    /// The value model: its value *at* token t − 1, or at the prompt's last, is that of the state before token t.
    pub value: RewardModel,
}

impl Models {
    /// Both as a run begins.
    ///
    /// # Errors
    /// If an adapter does not fit, or `value-model` has no value head.
    pub fn new(
        workspace: &mut Workspace,
        lora: &LoraSettings,
        settings: &PpoSettings,
        precision: Precision,
        seed: u64,
    ) -> Result<Self> {
        // Adapters drawn from one seed would begin alike.
        let value_seed = random_stream(seed, "value model").next_u64();
        let fresh = |base: Decoder| match lora.spec() {
            Some(spec) => base.with_lora(&spec, value_seed),
            None => Ok(base.trainable()),
        };
        let base = workspace.decoder.base();
        let value = match settings.value_model.as_path() {
            path if path == Path::new("") => {
                RewardModel::new(fresh(base)?, settings.head_init.into(), value_seed)?
            }
            path => {
                let mut scored = workspace.reward_model("value-model", path, precision)?;
                let decoder = match scored.decoder.adapter(None) {
                    Some(adapter) => base.with_adapter(&adapter)?,
                    None => fresh(scored.decoder.clone())?,
                };
                RewardModel::with_head(decoder, &scored.head())?
            }
        };
        let policy = workspace.trainable(lora, seed)?;
        Ok(Self { policy, value })
    }
}

impl Parameters for Models {
    fn visit_parameters(&mut self, visit: &mut Visitor<'_>) {
        self.policy.visit_parameters(&mut |name, parameter| {
            visit(&format!("{POLICY}.{name}"), parameter);
        });
        self.value.visit_parameters(&mut |name, parameter| {
            visit(&format!("{VALUE}.{name}"), parameter);
        });
    }
}
