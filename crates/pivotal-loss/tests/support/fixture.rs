//! What every golden file has: cases, and keep masks of 0 and 1.

use pivotal_core::TokenMask;
use serde::Deserialize;

#[derive(Deserialize)]
struct Golden<Case> {
    cases: Vec<Case>,
}

pub(crate) fn cases<Case: for<'de> Deserialize<'de>>(json: &str) -> Vec<Case> {
    let golden: Golden<Case> = serde_json::from_str(json).unwrap();
    assert!(!golden.cases.is_empty());
    golden.cases
}

pub(crate) fn mask(flags: &[u8]) -> TokenMask {
    TokenMask::from(flags.iter().map(|&flag| flag == 1).collect::<Vec<_>>())
}
