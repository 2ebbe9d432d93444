//! The `[sft]` table, and the `[credit]` table as `sft` has it.

use std::path::PathBuf;

use clap::{ArgMatches, Command};
use pivotal_credit::{CreditConfig, Selection};
use serde::{Deserialize, Deserializer, Serialize};

use crate::error::Result;
use crate::settings::{CreditFlags, Overlay, credit_arguments, overlay};
use crate::table::table;

table! {
    /// Supervised fine-tuning.
    pub struct SftSettings, SftTableFlags {
        /// Credit records of `annotate`, whose signals the `[credit]` table segments; the data's own columns if empty.
        "signals" signals: PathBuf = PathBuf::new(),
    }
}

overlay! {
    SftTableFlags => SftSettings,
}

/// The `[credit]` table of every recipe, of which `sft` keeps every token unless `selection` says otherwise.
///
/// # Examples
/// ```
/// use pivotal_credit::Selection;
/// use pivotal_train::sft::SftCredit;
/// let credit: SftCredit = toml::from_str("cut = \"token\"").unwrap();
/// assert_eq!(credit.0.selection, Selection::All);
/// let credit: SftCredit = toml::from_str("selection = \"agree\"").unwrap();
/// assert_eq!(credit.0.selection, Selection::Agree);
/// ```
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(transparent)]
pub struct SftCredit(pub CreditConfig);

impl Default for SftCredit {
    fn default() -> Self {
        Self(CreditConfig {
            selection: Selection::All,
            ..CreditConfig::default()
        })
    }
}

impl<'de> Deserialize<'de> for SftCredit {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let mut table = toml::Table::deserialize(deserializer)?;
        let default = Self::default().0.selection.to_string();
        table
            .entry("selection")
            .or_insert(toml::Value::String(default));
        let config = table.try_into();
        config
            .map(Self)
            .map_err(|error: toml::de::Error| serde::de::Error::custom(error.message()))
    }
}

/// The flags that lie over [`SftCredit`].
#[derive(Clone, Debug, Default)]
pub struct SftCreditFlags(CreditFlags);

impl clap::Args for SftCreditFlags {
    fn augment_args(command: Command) -> Command {
        credit_arguments(command, &SftCredit::default().0)
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

impl clap::FromArgMatches for SftCreditFlags {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        CreditFlags::from_arg_matches(matches).map(Self)
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        self.0.update_from_arg_matches(matches)
    }
}

impl Overlay<SftCredit> for SftCreditFlags {
    fn lay(self, settings: &mut SftCredit) -> Result<()> {
        self.0.lay(&mut settings.0)
    }
}
