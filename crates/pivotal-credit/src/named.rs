//! Choices that have one name in files, flags, help and records.

/// An enum without fields whose every variant has one written name.
macro_rules! named_enum {
    (
        $(#[$meta:meta])*
        pub enum $name:ident { $( $(#[$variant_meta:meta])* $variant:ident = $text:literal, )+ }
    ) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
        pub enum $name {
            $( $(#[$variant_meta])* #[serde(rename = $text)] $variant, )+
        }

        impl $name {
            /// Every choice.
            pub const ALL: &'static [Self] = &[$( Self::$variant, )+];

            /// The name in configuration files, flags and records.
            pub const fn name(self) -> &'static str {
                match self {
                    $( Self::$variant => $text, )+
                }
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                formatter.write_str(self.name())
            }
        }

        impl $crate::config::FromFlag for $name {
            fn from_flag(text: &str) -> Option<Self> {
                Self::ALL.iter().copied().find(|choice| choice.name() == text)
            }

            fn expected() -> String {
                let names: Vec<&str> = Self::ALL.iter().map(|choice| choice.name()).collect();
                format!("one of {}", names.join(", "))
            }
        }
    };
}

pub(crate) use named_enum;
