//! The two models that PPO trains, in one place for checkpoints.

use pivotal_model::{Decoder, Parameters, RewardModel, Visitor};

/// Policy and value model. With adapters both lie on one copy of the base, as do the reference and a reward model that is an
/// adapter: a role costs its adapter, not another model.
pub struct Models {
    /// The policy.
    pub policy: Decoder,
    /// The value model: its value *at* token t − 1, or at the prompt's last, is the state's before token t.
    pub value: RewardModel,
}

impl Parameters for Models {
    fn visit_parameters(&mut self, visit: &mut Visitor<'_>) {
        let prefixed = |prefix: &'static str, visit: &mut Visitor<'_>, model: &mut dyn Parameters| {
            model.visit_parameters(&mut |name, parameter| {
                visit(&format!("{prefix}.{name}"), parameter);
            });
        };
        prefixed("policy", visit, &mut self.policy);
        prefixed("value", visit, &mut self.value);
    }
}
