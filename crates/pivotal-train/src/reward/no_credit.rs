//! Why `reward` has no `[credit]` table, said where one is given.

use clap::{Arg, ArgMatches, Command};
use pivotal_credit::CreditConfig;
use serde::{Deserialize, Deserializer, Serialize, de};

use crate::error::{Error, Result};
use crate::settings::Overlay;

/// A reward model learns which of two responses is better: its loss has a score a response and no term a token that a mask could
/// drop (METHOD, section 2). A score over kept tokens alone would be learnt under a mask made of a signal that is trusted already.
const REASON: &str = "no `[credit]` table in `reward`: its loss compares the scores of two whole responses, which no token can be left \
                      out of; its values are a signal that masks are made of in the recipes that train a policy";

/// The place of a `[credit]` table, which this recipe refuses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct NoCredit {}

impl NoCredit {
    /// Always: there is nothing to write.
    pub(super) const fn is_absent(&self) -> bool {
        true
    }
}

impl<'de> Deserialize<'de> for NoCredit {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        de::IgnoredAny::deserialize(deserializer)?;
        Err(de::Error::custom(format_args!("expected {REASON}")))
    }
}

/// The flags of `[credit]`, hidden from help and refused.
#[derive(Clone, Debug, Default)]
pub struct NoCreditFlags(Option<&'static str>);

impl clap::Args for NoCreditFlags {
    fn augment_args(command: Command) -> Command {
        let flags = CreditConfig::FIELDS.iter().map(|field| field.flag);
        flags.fold(command, |command, flag| {
            command.arg(
                Arg::new(flag)
                    .long(flag)
                    .hide(true)
                    .allow_negative_numbers(true),
            )
        })
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

impl clap::FromArgMatches for NoCreditFlags {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let mut flags = CreditConfig::FIELDS.iter().map(|field| field.flag);
        Ok(Self(flags.find(|flag| matches.contains_id(flag))))
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

impl Overlay<NoCredit> for NoCreditFlags {
    fn lay(self, _: &mut NoCredit) -> Result<()> {
        match self.0 {
            None => Ok(()),
            Some(key) => Err(Error::Setting {
                key,
                found: "given".into(),
                expected: REASON,
            }),
        }
    }
}
