//! Generalised advantage estimation over response tokens.
//!
//! Schulman et al. 2015, arXiv:1506.02438, Eq. 11 to 16, with V_t the value of the state before token t:
//!
//! ```text
//! δ_t = r_t + γ·V_{t+1} − V_t          Â_t = δ_t + γλ·Â_{t+1}          return_t = Â_t + V_t
//! ```
//!
//! t + 1 is the next token *of the model's own*: an observation between two of them (a tool's answer) is no action, takes no
//! step of discount, and its value and reward are never read, as in verl's `compute_gae_advantage_return`.
//!
//! Differs: after the last token of a response cut at its length limit, TRL, OpenRLHF and verl put V = 0 there as after an
//! EOS; to bootstrap from the value model is [`AfterTruncation::Value`].

use crate::check::{domain, finite, finite_number, length};
use crate::named::named_enum;
use crate::reward::Ending;
use crate::{Error, Result};

named_enum! {
    /// The value of the state after the last token of a response that reached its length limit.
    pub enum AfterTruncation {
        /// 0, as after an EOS: TRL, OpenRLHF, verl.
        Zero = "zero",
        /// The value model's there: the response would have gone on.
        Value = "value",
    }
}

impl AfterTruncation {
    /// What [`Gae::advantages`] takes as `final_value`; `value_after` is the value model's after the last token. An episode
    /// that ended has nothing to come.
    ///
    /// # Examples
    /// ```
    /// use pivotal_credit::{AfterTruncation, Ending};
    /// assert_eq!(AfterTruncation::Value.final_value(Ending::Truncated, 0.75), 0.75);
    /// assert_eq!(AfterTruncation::Value.final_value(Ending::Eos, 0.75), 0.0);
    /// assert_eq!(AfterTruncation::Zero.final_value(Ending::Truncated, 0.75), 0.0);
    /// ```
    pub fn final_value(self, ending: Ending, value_after: f32) -> f32 {
        match (self, ending) {
            (Self::Value, Ending::Truncated) => value_after,
            _ => 0.0,
        }
    }
}

/// The two discounts. PPO on language usually has γ = 1 and λ = 0.95.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Gae {
    gamma: f64,
    gae_lambda: f64,
}

/// What [`Gae::advantages`] finds for each token.
#[derive(Clone, Debug, PartialEq)]
pub struct GaeTerms {
    /// Â_t, `[tokens]`; 0 where the token is not the model's own.
    pub advantages: Vec<f32>,
    /// Â_t + V_t, what the value model learns, `[tokens]`; where the token is not the model's own, the return that it would
    /// have been given: that of the next one that is, or `final_value` after the last.
    pub returns: Vec<f32>,
}

impl Gae {
    /// Discounts γ and λ, each from 0 to 1.
    ///
    /// # Errors
    /// [`Error::Value`] outside.
    pub fn new(gamma: f64, gae_lambda: f64) -> Result<Self> {
        for (key, value) in [("gamma", gamma), ("gae_lambda", gae_lambda)] {
            let inside = (0.0..=1.0).contains(&value);
            domain(key, inside, "a number from 0 to 1", value)?;
        }
        Ok(Self { gamma, gae_lambda })
    }

    /// Advantages and returns of one response.
    ///
    /// A keep mask has no place here: a dropped token is an action that was taken, and its mask belongs to the policy loss
    /// alone.
    ///
    /// # Shapes
    /// `rewards`, `values` (of the state before each token), `response_mask`: `[tokens]`. `final_value` is the value after
    /// the last of the model's own tokens: [`AfterTruncation::final_value`].
    ///
    /// # Errors
    /// [`Error::Unequal`] for lengths; [`Error::NotFiniteColumn`] for a number that is read and is not finite.
    ///
    /// # Examples
    /// ```
    /// use pivotal_credit::Gae;
    /// // An observation between two tokens of the model's own takes no step of discount.
    /// let found = Gae::new(0.5, 1.0)?.advantages(&[0.0, 0.0, 1.0], &[0.0; 3], &[true, false, true], 0.0)?;
    /// assert_eq!(found.returns, [0.5, 1.0, 1.0]);
    /// assert_eq!(found.advantages, [0.5, 0.0, 1.0]);
    /// # Ok::<(), pivotal_credit::Error>(())
    /// ```
    pub fn advantages(
        &self,
        rewards: &[f32],
        values: &[f32],
        response_mask: &[bool],
        final_value: f32,
    ) -> Result<GaeTerms> {
        let tokens = rewards.len();
        length("values", tokens, values.len())?;
        length("response_mask", tokens, response_mask.len())?;
        finite("rewards", rewards, response_mask)?;
        finite("values", values, response_mask)?;
        finite_number("final_value", f64::from(final_value))?;
        let mut advantages = vec![0.0; tokens];
        let mut returns = vec![0.0; tokens];
        let mut advantage = 0.0_f64;
        let mut next_value = f64::from(final_value);
        let mut next_return = next_value;
        for index in (0..tokens).rev() {
            if response_mask[index] {
                let value = f64::from(values[index]);
                let error = f64::from(rewards[index]) + self.gamma * next_value - value;
                advantage = error + self.gamma * self.gae_lambda * advantage;
                next_value = value;
                next_return = advantage + value;
                advantages[index] = advantage as f32;
            }
            returns[index] = next_return as f32;
        }
        Ok(GaeTerms {
            advantages,
            returns,
        })
    }
}

/// The discounted returns of one response without a value model, as REINFORCE++ takes them: GAE with V = 0 and λ = 1.
///
/// # Errors
/// As [`Gae::new`] and [`Gae::advantages`].
pub fn discounted_returns(
    rewards: &[f32],
    response_mask: &[bool],
    gamma: f64,
) -> Result<Vec<f32>, Error> {
    let values = vec![0.0; rewards.len()];
    let found = Gae::new(gamma, 1.0)?.advantages(rewards, &values, response_mask, 0.0)?;
    Ok(found.returns)
}
