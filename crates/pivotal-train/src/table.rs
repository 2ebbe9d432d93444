//! One list of fields gives the struct, its defaults, strict TOML, literal flags and their help.

use std::any::TypeId;
use std::ffi::OsString;
use std::path::PathBuf;

use clap::builder::{OsStringValueParser, TypedValueParser, ValueParser};

/// Declares a table of settings and its flags.
///
/// Each field is `"flag-name" name: Type = default`, under its doc comment, which is rustdoc and `--help` both. The macro
/// makes the struct (serde, unknown keys refused, every key optional in TOML), `Default`, a clap `Args` struct in which
/// every flag is optional, and `apply`, which lays the flags given over the settings.
macro_rules! table {
    (
        $(#[doc = $about:literal])+
        pub struct $name:ident, $flags:ident {
            $( $(#[doc = $doc:literal])+ $flag:literal $field:ident: $type:ty = $default:expr ),+ $(,)?
        }
    ) => {
        $(#[doc = $about])+
        #[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
        #[serde(deny_unknown_fields, default)]
        pub struct $name {
            $( $(#[doc = $doc])+ pub $field: $type, )+
        }

        impl Default for $name {
            fn default() -> Self {
                Self { $( $field: $default, )+ }
            }
        }

        #[doc = concat!("The flags that lie over [`", stringify!($name), "`].")]
        #[derive(Clone, Debug, Default, clap::Args)]
        #[group(skip)]
        pub struct $flags {
            $(
                $(#[doc = $doc])+
                #[arg(
                    id = $flag,
                    long = $flag,
                    value_name = "VALUE",
                    allow_negative_numbers = true,
                    value_parser = crate::table::value_parser::<$type>(clap::value_parser!($type).into()),
                    help = crate::table::help(&[$($doc),+], &$name::default().$field)
                )]
                pub $field: Option<$type>,
            )+
        }

        impl $flags {
            /// Lays the flags that were given over `settings`.
            pub fn apply(self, settings: &mut $name) {
                $( if let Some(value) = self.$field { settings.$field = value; } )+
            }
        }
    };
}

/// How the value of a flag of type `T` is read: a path by [`path_value`], anything else as is `usual`.
pub(crate) fn value_parser<T: 'static>(usual: ValueParser) -> ValueParser {
    match TypeId::of::<T>() == TypeId::of::<PathBuf>() {
        true => path_value(),
        false => usual,
    }
}

/// Reads a path that a configuration can hold: in UTF-8, as all of TOML and JSON is. An empty one is none.
pub fn path_value() -> ValueParser {
    let read = |path: OsString| match path.into_string() {
        Ok(path) => Ok(PathBuf::from(path)),
        Err(_) => Err("expected a path in UTF-8, which a configuration can hold"),
    };
    ValueParser::new(OsStringValueParser::new().try_map(read))
}

/// A flag's help: the field's doc comment, and the default as it would stand in a file.
pub(crate) fn help(doc: &[&str], default: &impl serde::Serialize) -> String {
    let text: String = doc.concat();
    let default = serde_json::to_value(default).expect("settings are numbers and texts");
    match default {
        serde_json::Value::String(default) if default.is_empty() => text.trim().to_owned(),
        serde_json::Value::String(default) => format!("{} [default: {default}]", text.trim()),
        default => format!("{} [default: {default}]", text.trim()),
    }
}

/// Declares the configuration of a recipe: its tables, and the flags of all of them.
macro_rules! recipe {
    (
        $(#[doc = $about:literal])+
        pub struct $name:ident, $flags:ident {
            $( $(#[doc = $doc:literal])+ $(#[serde($serde:meta)])? $field:ident: $table:ty, $table_flags:ty );+ $(;)?
        }
    ) => {
        $(#[doc = $about])+
        #[derive(Clone, Debug, Default, PartialEq, serde::Serialize, serde::Deserialize)]
        #[serde(deny_unknown_fields, default)]
        pub struct $name {
            $( $(#[doc = $doc])+ $(#[serde($serde)])? pub $field: $table, )+
        }

        #[doc = concat!("The flags of [`", stringify!($name), "`].")]
        #[derive(Clone, Debug, Default, clap::Args)]
        #[group(skip)]
        pub struct $flags {
            $( $(#[doc = $doc])+ #[command(flatten)] pub $field: $table_flags, )+
        }

        impl $flags {
            /// Lays the flags that were given over `config`.
            ///
            /// # Errors
            /// If a credit flag has a value that its key cannot take.
            pub fn apply(self, config: &mut $name) -> crate::Result<()> {
                $( crate::settings::Overlay::lay(self.$field, &mut config.$field)?; )+
                Ok(())
            }
        }
    };
}

pub(crate) use recipe;
pub(crate) use table;
