//! Numbers of each token besides its signal, which some rules read.

use crate::named::named_enum;

named_enum! {
    /// Which number.
    pub enum TokenColumn {
        /// The advantage Â_t of the policy update.
        Advantages = "advantages",
        /// Entropy of the reference's distribution that the token was drawn from, in nats.
        ReferenceEntropies = "reference_entropies",
        /// The same of the policy.
        PolicyEntropies = "policy_entropies",
        /// Log-probability under the policy that sampled the token, in nats.
        OldTokenLogps = "old_token_logps",
        /// The same under the policy as it is now.
        TokenLogps = "token_logps",
        /// The same under the reference.
        ReferenceTokenLogps = "reference_token_logps",
    }
}

/// The columns of one response, each `[tokens]`; [`CreditRule::needed_columns`](crate::CreditRule::needed_columns) says which
/// a rule reads.
///
/// All look at the distribution that the token itself was drawn from: the one after the token before it. Codes that index
/// entropies by the row of the logits have the same number one token earlier.
#[derive(Clone, Copy, Debug, Default)]
pub struct TokenColumns<'a> {
    /// [`TokenColumn::Advantages`].
    pub advantages: Option<&'a [f32]>,
    /// [`TokenColumn::ReferenceEntropies`].
    pub reference_entropies: Option<&'a [f32]>,
    /// [`TokenColumn::PolicyEntropies`].
    pub policy_entropies: Option<&'a [f32]>,
    /// [`TokenColumn::OldTokenLogps`].
    pub old_token_logps: Option<&'a [f32]>,
    /// [`TokenColumn::TokenLogps`].
    pub token_logps: Option<&'a [f32]>,
    /// [`TokenColumn::ReferenceTokenLogps`].
    pub reference_token_logps: Option<&'a [f32]>,
}

impl<'a> TokenColumns<'a> {
    /// One column, where it is known.
    pub const fn get(&self, column: TokenColumn) -> Option<&'a [f32]> {
        match column {
            TokenColumn::Advantages => self.advantages,
            TokenColumn::ReferenceEntropies => self.reference_entropies,
            TokenColumn::PolicyEntropies => self.policy_entropies,
            TokenColumn::OldTokenLogps => self.old_token_logps,
            TokenColumn::TokenLogps => self.token_logps,
            TokenColumn::ReferenceTokenLogps => self.reference_token_logps,
        }
    }
}
