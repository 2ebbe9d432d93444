//! Numbers of a saved state, as text: JSON readers may be off by the last bit of an f64 (serde_json is, without its
//! `float_roundtrip`), and a resumed run must not be.

use serde::{Deserialize, Deserializer, Serializer};

pub(crate) fn serialize<S: Serializer>(value: &f64, serializer: S) -> Result<S::Ok, S::Error> {
    // The shortest decimal that reads back as the same f64.
    serializer.serialize_str(&value.to_string())
}

pub(crate) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
    let text = String::deserialize(deserializer)?;
    text.parse()
        .map_err(|_| serde::de::Error::custom(format!("`{text}`, expected a number")))
}
