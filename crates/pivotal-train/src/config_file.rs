//! Configuration files: strict TOML in, resolved TOML out.

use std::path::Path;

use pivotal_core::read_file;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::error::{Error, Result};

/// Reads a configuration; keys that do not exist are errors with their line.
///
/// # Errors
/// [`Error::Config`], [`Error::File`].
pub fn read_config<T: DeserializeOwned>(path: &Path) -> Result<T> {
    let text = String::from_utf8_lossy(&read_file(path)?).into_owned();
    toml::from_str(&text).map_err(|source| Error::Config {
        path: path.into(),
        source,
    })
}

/// A resolved configuration as TOML: every key, with the value in force.
///
/// # Panics
/// If a path in it is not UTF-8: neither a file nor a flag ([`path_value`](crate::settings::path_value)) gives one.
pub fn show_config(config: &impl Serialize) -> String {
    toml::to_string(config).expect("settings are numbers, texts and tables")
}
