//! Which tokens count.

use serde::{Deserialize, Serialize};

/// One flag a token; true: the token counts.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct TokenMask(Vec<bool>);

/// Two sequences that must be one token for one token are not.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("expected {expected} tokens, got {found}")]
pub struct LengthMismatch {
    /// The length asked for.
    pub expected: usize,
    /// The length met.
    pub found: usize,
}

impl TokenMask {
    /// A mask of `len` tokens that all count.
    pub fn all(len: usize) -> Self {
        Self(vec![true; len])
    }

    /// A mask of `len` tokens of which none counts.
    pub fn none(len: usize) -> Self {
        Self(vec![false; len])
    }

    /// Tokens in the mask, counting or not.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// True of a mask over no token at all.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// How many tokens count.
    ///
    /// # Examples
    /// ```
    /// let mask = pivotal_core::TokenMask::from(vec![true, false, true]);
    /// assert_eq!(mask.kept(), 2);
    /// ```
    pub fn kept(&self) -> usize {
        self.0.iter().filter(|&&keep| keep).count()
    }

    /// The flags.
    pub fn as_slice(&self) -> &[bool] {
        &self.0
    }

    /// The tokens that count here and in `other`.
    ///
    /// # Errors
    /// [`LengthMismatch`] if the two are not of one length.
    pub fn and(&self, other: &Self) -> Result<Self, LengthMismatch> {
        if self.len() != other.len() {
            return Err(LengthMismatch {
                expected: self.len(),
                found: other.len(),
            });
        }
        Ok(Self(
            self.0.iter().zip(&other.0).map(|(&a, &b)| a && b).collect(),
        ))
    }

    /// The tokens that do not count here.
    pub fn inverted(&self) -> Self {
        Self(self.0.iter().map(|&keep| !keep).collect())
    }
}

impl From<Vec<bool>> for TokenMask {
    fn from(flags: Vec<bool>) -> Self {
        Self(flags)
    }
}
