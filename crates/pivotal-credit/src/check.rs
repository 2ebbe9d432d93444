//! Checks that the advantage and reward functions share: lengths, finite numbers, domains.

use crate::{Error, Result};

/// `column` has `expected` values.
pub(crate) fn length(column: &'static str, expected: usize, found: usize) -> Result<()> {
    match expected == found {
        true => Ok(()),
        false => Err(Error::Unequal {
            column,
            expected,
            found,
        }),
    }
}

/// Every value of `column` where `mask` is true is finite.
pub(crate) fn finite(column: &'static str, values: &[f32], mask: &[bool]) -> Result<()> {
    let bad = (0..values.len()).find(|&index| mask[index] && !values[index].is_finite());
    match bad {
        Some(index) => Err(Error::NotFiniteColumn {
            column,
            index,
            value: f64::from(values[index]),
        }),
        None => Ok(()),
    }
}

/// One finite number.
pub(crate) fn finite_number(column: &'static str, value: f64) -> Result<()> {
    match value.is_finite() {
        true => Ok(()),
        false => Err(Error::NotFiniteColumn {
            column,
            index: 0,
            value,
        }),
    }
}

/// A setting inside its domain.
pub(crate) fn domain(
    key: &'static str,
    inside: bool,
    expected: &str,
    found: impl ToString,
) -> Result<()> {
    match inside {
        true => Ok(()),
        false => Err(Error::Value {
            key,
            expected: expected.to_owned(),
            found: found.to_string(),
        }),
    }
}
