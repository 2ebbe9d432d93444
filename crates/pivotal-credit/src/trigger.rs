//! The Schmitt trigger (METHOD, section 4).

use pivotal_core::Sign;

use crate::named::named_enum;

named_enum! {
    /// What a signal between the two thresholds does.
    pub enum Between {
        /// Keeps the last state: hysteresis, so that noise inside the band cuts nothing.
        Hold = "hysteresis",
        /// Is neutral, a dead zone: neither reinforced nor suppressed.
        Neutral = "dead_zone",
    }
}

/// A Schmitt trigger: it turns positive above `baseline + offset`, negative below `baseline − offset`, and between the
/// two it stays as it was or is neutral. It starts neutral.
///
/// # Examples
/// ```
/// use pivotal_core::Sign::{Negative, Neutral, Positive};
/// use pivotal_credit::{Between, SchmittTrigger};
/// let signal = [0.1, 0.9, 0.2, -0.2, -0.9, 0.3];
/// let states = |between| signal.map({
///     let mut trigger = SchmittTrigger::new(0.0, 0.5, between);
///     move |reward| trigger.push(reward)
/// });
/// assert_eq!(states(Between::Hold), [Neutral, Positive, Positive, Positive, Negative, Negative]);
/// assert_eq!(states(Between::Neutral), [Neutral, Positive, Neutral, Neutral, Negative, Neutral]);
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SchmittTrigger {
    pub(crate) high: f32,
    pub(crate) low: f32,
    pub(crate) between: Between,
    state: Sign,
}

impl SchmittTrigger {
    /// A trigger around `baseline`, `offset` ≥ 0 to either side.
    pub fn new(baseline: f32, offset: f32, between: Between) -> Self {
        Self {
            high: baseline + offset,
            low: baseline - offset,
            between,
            state: Sign::Neutral,
        }
    }

    /// Takes the next token's signal and returns the state with that token included.
    #[inline]
    pub fn push(&mut self, reward: f32) -> Sign {
        let between = match self.between {
            Between::Hold => self.state,
            Between::Neutral => Sign::Neutral,
        };
        self.state = if reward > self.high {
            Sign::Positive
        } else if reward < self.low {
            Sign::Negative
        } else {
            between
        };
        self.state
    }

    /// The state after the tokens so far.
    pub const fn state(&self) -> Sign {
        self.state
    }
}
