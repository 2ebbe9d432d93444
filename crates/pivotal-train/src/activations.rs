//! How much of a forward pass is kept for its backward pass.

use std::fmt;
use std::str::FromStr;

use pivotal_model::Decoder;
use serde::{Deserialize, Serialize};

/// How much of a forward pass is kept for its backward pass: time against memory, with the same gradients.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Activations {
    /// All of it.
    #[default]
    Keep,
    /// The input of each layer alone; the layers are computed again.
    Recompute,
    /// At most so many MiB of the layers' activations; the layers that do not fit are computed again.
    Within(usize),
}

const MIB: usize = 1 << 20;

impl Activations {
    /// How many of `decoder`'s layers are computed again for a micro-batch of so many tokens.
    pub fn recomputed_layers(self, decoder: &Decoder, tokens: usize) -> usize {
        match self {
            Self::Keep => 0,
            Self::Recompute => decoder.config().layers,
            Self::Within(mib) => decoder.recomputed_layers(tokens, mib.saturating_mul(MIB)),
        }
    }
}

impl fmt::Display for Activations {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Keep => formatter.write_str("keep"),
            Self::Recompute => formatter.write_str("recompute"),
            Self::Within(mib) => write!(formatter, "{mib}MiB"),
        }
    }
}

impl From<Activations> for String {
    fn from(activations: Activations) -> Self {
        activations.to_string()
    }
}

impl FromStr for Activations {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "keep" => Ok(Self::Keep),
            "recompute" => Ok(Self::Recompute),
            _ => text
                .strip_suffix("MiB")
                .and_then(|mib| mib.trim_end().parse().ok())
                .map(Self::Within)
                .ok_or_else(|| {
                    format!("expected keep, recompute or a size such as 512MiB, found `{text}`")
                }),
        }
    }
}

impl TryFrom<String> for Activations {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

#[cfg(test)]
mod tests {
    use super::Activations;

    #[test]
    fn each_reads_back_as_it_is_written_and_nothing_else_is_read() {
        for activations in [
            Activations::Keep,
            Activations::Recompute,
            Activations::Within(512),
        ] {
            assert_eq!(activations.to_string().parse(), Ok(activations));
            let json = serde_json::to_string(&activations).unwrap();
            assert_eq!(
                serde_json::from_str::<Activations>(&json).unwrap(),
                activations
            );
        }
        assert_eq!("64 MiB".parse(), Ok(Activations::Within(64)));
        for text in ["", "none", "MiB", "-1MiB", "1.5MiB", "512", "512MB"] {
            assert!(text.parse::<Activations>().is_err(), "{text}");
        }
    }
}
