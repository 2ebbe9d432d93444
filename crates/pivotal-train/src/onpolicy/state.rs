//! What a recipe remembers between steps, as text that gives every bit back.

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::error::{Error, Result};

/// `state` as TOML, whose numbers come back as they went.
///
/// # Errors
/// [`Error::Checkpoint`] if it cannot be written as TOML.
pub fn state_text(state: &impl Serialize) -> Result<String> {
    toml::to_string(state).map_err(|error| Error::Checkpoint {
        what: format!("a state that can be written: {error}"),
    })
}

/// What [`state_text`] wrote; `None` of an empty text.
///
/// # Errors
/// [`Error::Checkpoint`] if it is something else.
pub fn from_state_text<T: DeserializeOwned>(text: &str) -> Result<Option<T>> {
    if text.is_empty() {
        return Ok(None);
    }
    let state = toml::from_str(text).map_err(|error| Error::Checkpoint {
        what: format!("a readable state: {}", error.message()),
    })?;
    Ok(Some(state))
}

#[cfg(test)]
mod tests {
    use super::*;
    use pivotal_credit::Drift;

    #[test]
    fn every_bit_comes_back() {
        // Numbers whose last bit a short decimal loses.
        let mut drift = Drift::new(3);
        for value in [0.1 + 0.2, 1.0 / 3.0, f64::MIN_POSITIVE, 1e300 / 7.0] {
            drift.push(value);
            let text = state_text(&drift).unwrap();
            assert_eq!(from_state_text(&text).unwrap(), Some(drift.clone()));
        }
        assert_eq!(from_state_text::<Drift>("").unwrap(), None);
        let damaged = from_state_text::<Drift>("window = \"x\"").unwrap_err();
        assert!(damaged.to_string().contains("readable state"), "{damaged}");
    }
}
