//! The `[credit]` table of every recipe: one list of fields gives the struct, its defaults, strict TOML, the literal flags
//! and their help.

use serde::{Deserialize, Serialize};

use crate::named::named_enum;
use crate::{
    Between, Error, Neutral, Positions, Result, Score, Selection, SequenceSign, Signal, Weighting,
};

mod resolve;

named_enum! {
    /// The baseline rule (METHOD, section 3).
    pub enum BaselineRule {
        /// `baseline_value`.
        Fixed = "fixed",
        /// The batch's mean.
        BatchMean = "batch_mean",
        /// The mean over the responses to one prompt.
        PromptMean = "prompt_mean",
        /// The mean over all batches, fading by `baseline_decay`.
        RunningMean = "running_mean",
        /// `baseline_quantile` over the last `baseline_window` tokens.
        Quantile = "quantile",
        /// The mean at the same position, fading by `baseline_decay`.
        PositionMean = "position_mean",
        /// The threshold that best separates positive from negative responses on `baseline_calibration` of the prompts.
        Calibrated = "calibrated",
    }
}

named_enum! {
    /// The cut rule (METHOD, section 4).
    pub enum CutRule {
        /// One segment.
        Sequence = "sequence",
        /// One segment a token.
        Token = "token",
        /// Every `cut_tokens` tokens.
        Fixed = "fixed",
        /// After one of `punctuation`.
        Punctuation = "punctuation",
        /// Where the signal moves by more than `jump`, `jump_std` or `jump_mad`.
        Jump = "jump",
        /// Where a Schmitt trigger changes its state.
        Schmitt = "schmitt",
        /// At a token drawn from a reference distribution of more than `cut_entropy_nats`.
        Entropy = "entropy",
        /// At each `cut_every`-th token sampled with less than `cut_probability`.
        Improbable = "improbable",
        /// At offsets in the data.
        External = "external",
    }
}

/// A value that one flag can carry.
pub(crate) trait FromFlag: Sized {
    fn from_flag(text: &str) -> Option<Self>;
    fn expected() -> String;
}

macro_rules! number_flags {
    ($($number:ty: $expected:literal),+ $(,)?) => {$(
        impl FromFlag for $number {
            fn from_flag(text: &str) -> Option<Self> {
                text.parse().ok()
            }
            fn expected() -> String {
                $expected.to_owned()
            }
        }
    )+};
}

number_flags!(f32: "a number", f64: "a number", usize: "a whole number", String: "text");

impl<T: FromFlag> FromFlag for Option<T> {
    fn from_flag(text: &str) -> Option<Self> {
        T::from_flag(text).map(Some)
    }
    fn expected() -> String {
        T::expected()
    }
}

/// One key of the table, as help and flag parsers need it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Field {
    /// The key in the `[credit]` table.
    pub key: &'static str,
    /// The command-line flag, without the dashes.
    pub flag: &'static str,
    /// What it does.
    pub help: &'static str,
}

macro_rules! credit_config {
    ($( $(#[doc = $doc:literal])+ $key:ident: $kind:ty = $default:expr, $flag:literal; )+) => {
        /// Credit as a file or the command line says it. Every key is optional; [`resolve`](Self::resolve) checks it.
        ///
        /// # Examples
        /// ```
        /// use pivotal_credit::{CreditConfig, Width};
        /// let config: CreditConfig = toml::from_str("cut = \"schmitt\"\noffset_std = 0.5").unwrap();
        /// assert_eq!(config.resolve()?.offset, Width::Std(0.5));
        /// # Ok::<(), pivotal_credit::Error>(())
        /// ```
        #[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
        #[serde(default, deny_unknown_fields)]
        pub struct CreditConfig {
            $( $(#[doc = $doc])+ #[serde(skip_serializing_if = "is_absent")] pub $key: $kind, )+
        }

        impl Default for CreditConfig {
            fn default() -> Self {
                Self { $( $key: $default, )+ }
            }
        }

        impl CreditConfig {
            /// Every key with its flag and help, in order.
            pub const FIELDS: &'static [Field] = &[
                $( Field { key: stringify!($key), flag: $flag, help: concat!($($doc),+).trim_ascii() }, )+
            ];

            fn set(&mut self, key: &str, value: &str) -> Result<()> {
                match key {
                    $( stringify!($key) => {
                        self.$key = FromFlag::from_flag(value).ok_or_else(|| Error::Value {
                            key: stringify!($key),
                            expected: <$kind as FromFlag>::expected(),
                            found: value.to_owned(),
                        })?;
                        Ok(())
                    } )+
                    _ => Err(unknown_key(key)),
                }
            }
        }
    };
}

credit_config! {
    /// The token signal: level, increment, log_ratio, critic (ppo), advantage (grpo, ppo) or external (the data's columns).
    signal: Signal = Signal::LogRatio, "credit-signal";
    /// How many tokens late the signal reacts; it is moved back by as many.
    signal_delay: usize = 0, "credit-signal-delay";
    /// The baseline: fixed, batch_mean, prompt_mean, running_mean, quantile, position_mean or calibrated.
    baseline: BaselineRule = BaselineRule::Fixed, "credit-baseline";
    /// With fixed: the baseline itself (0).
    baseline_value: Option<f32> = None, "credit-baseline-value";
    /// With running_mean and position_mean: how much of its weight a batch keeps with each later one (0.99).
    baseline_decay: Option<f64> = None, "credit-baseline-decay";
    /// With quantile: which one, 0 to 1 (0.5).
    baseline_quantile: Option<f64> = None, "credit-baseline-quantile";
    /// With quantile: how many of the last tokens it is taken over (65536).
    baseline_window: Option<usize> = None, "credit-baseline-window";
    /// With position_mean: absolute or relative positions (relative).
    baseline_positions: Option<Positions> = None, "credit-baseline-positions";
    /// With relative positions: into how many parts a response is divided (10).
    baseline_bins: Option<usize> = None, "credit-baseline-bins";
    /// With calibrated: the part of the prompts that it is found on (0.2).
    baseline_calibration: Option<f64> = None, "credit-baseline-calibration";
    /// The offset around the baseline, in the signal's unit (0).
    offset: Option<f32> = None, "credit-offset";
    /// The same, times the standard deviation of the batch's signal.
    offset_std: Option<f32> = None, "credit-offset-std";
    /// The same, times the median absolute deviation of the batch's signal.
    offset_mad: Option<f32> = None, "credit-offset-mad";
    /// Where segments begin: sequence, token, fixed, punctuation, jump, schmitt, improbable (sampled responses only), external
    /// (cuts in the data) or entropy (of the library: no recipe computes it).
    cut: CutRule = CutRule::Schmitt, "credit-cut";
    /// With schmitt: what happens between the thresholds, hysteresis or dead_zone (hysteresis).
    between: Option<Between> = None, "credit-between";
    /// With fixed cuts: tokens a segment.
    cut_tokens: Option<usize> = None, "credit-cut-tokens";
    /// With punctuation: the characters that end a segment (`.,;:!?` and the line break).
    punctuation: Option<String> = None, "credit-punctuation";
    /// With jump: the change that cuts, in the signal's unit.
    jump: Option<f32> = None, "credit-jump";
    /// The same, times the standard deviation of the batch's token-to-token changes.
    jump_std: Option<f32> = None, "credit-jump-std";
    /// The same, times their median absolute deviation.
    jump_mad: Option<f32> = None, "credit-jump-mad";
    /// With entropy: cut at tokens drawn from a reference distribution of more than this many nats.
    cut_entropy_nats: Option<f32> = None, "credit-cut-entropy-nats";
    /// With improbable: tokens sampled with less than this probability are (0.9).
    cut_probability: Option<f64> = None, "credit-cut-probability";
    /// With improbable: every so many of them begin a segment (5).
    cut_every: Option<usize> = None, "credit-cut-every";
    /// Segments of fewer tokens are merged into the one before.
    min_len: usize = 1, "credit-min-len";
    /// A segment's score: mean, sum, last or max_abs of its signal.
    score: Score = Score::Mean, "credit-score";
    /// The sign that segments are compared with: response (its label or score) or advantage (each token's own).
    sequence_sign: SequenceSign = SequenceSign::Response, "credit-sequence-sign";
    /// Which tokens are kept: agree, all, disagree, random, random_position, quota, truth (records with labels), excess_loss
    /// (sampled responses only) or entropy_top (of the library: no recipe computes it).
    selection: Selection = Selection::Agree, "credit-selection";
    /// With quota (30), excess_loss (60) and entropy_top (20): how many percent of the tokens are kept.
    selection_percent: Option<f64> = None, "credit-selection-percent";
    /// What becomes of neutral segments: drop or keep.
    neutral: Neutral = Neutral::Drop, "credit-neutral";
    /// How kept tokens count: hard, or soft (of the library: the recipes take masks).
    weighting: Weighting = Weighting::Hard, "credit-weighting";
    /// With random: the fraction to keep, in place of the one agree would.
    random_fraction: Option<f64> = None, "credit-random-fraction";
}

/// Keys of which a flag replaces the file's others, so that `--credit-offset 1` overrides `offset_std` in the file.
const GROUPS: [&[&str]; 2] = [
    &["offset", "offset_std", "offset_mad"],
    &["jump", "jump_std", "jump_mad"],
];

/// Parameters of a rule, which a flag that changes the rule takes out of force.
const PARAMETERS: [(&str, &[&str]); 3] = [
    (
        "baseline",
        &[
            "baseline_value",
            "baseline_decay",
            "baseline_quantile",
            "baseline_window",
            "baseline_positions",
            "baseline_bins",
            "baseline_calibration",
        ],
    ),
    (
        "cut",
        &[
            "between",
            "cut_tokens",
            "punctuation",
            "jump",
            "jump_std",
            "jump_mad",
            "cut_entropy_nats",
            "cut_probability",
            "cut_every",
        ],
    ),
    ("selection", &["random_fraction", "selection_percent"]),
];

impl CreditConfig {
    /// Sets keys from flags, `(key, value)`, over what a file said. A flag that changes a rule forgets the parameters that
    /// the file gave to the old one.
    ///
    /// # Errors
    /// [`Error::Key`] for a key that does not exist, [`Error::Value`] for a value that its key cannot take.
    ///
    /// # Examples
    /// ```
    /// use pivotal_credit::{CreditConfig, CutRule};
    /// let mut config: CreditConfig = toml::from_str("cut = \"jump\"\njump_std = 2.0").unwrap();
    /// config.apply([("cut", "fixed"), ("cut_tokens", "8")])?;
    /// assert_eq!((config.cut, config.cut_tokens, config.jump_std), (CutRule::Fixed, Some(8), None));
    /// # Ok::<(), pivotal_credit::Error>(())
    /// ```
    pub fn apply<'a>(&mut self, flags: impl IntoIterator<Item = (&'a str, &'a str)>) -> Result<()> {
        let flags: Vec<(&str, &str)> = flags.into_iter().collect();
        let before = (self.baseline, self.cut, self.selection);
        for (key, value) in &flags {
            self.set(key, value)?;
        }
        let changed = |rule| match rule {
            "baseline" => before.0 != self.baseline,
            "cut" => before.1 != self.cut,
            _ => before.2 != self.selection,
        };
        let given = |key: &str| flags.iter().any(|(flag, _)| *flag == key);
        let forgotten: Vec<&str> = PARAMETERS
            .iter()
            .filter(|(rule, _)| changed(rule))
            .flat_map(|(_, keys)| keys.iter())
            .chain(
                GROUPS
                    .iter()
                    .filter(|keys| keys.iter().any(|key| given(key)))
                    .flat_map(|keys| keys.iter()),
            )
            .copied()
            .filter(|key| !given(key))
            .collect();
        forgotten.into_iter().for_each(|key| self.forget(key));
        Ok(())
    }

    fn forget(&mut self, key: &str) {
        match key {
            "baseline_value" => self.baseline_value = None,
            "baseline_decay" => self.baseline_decay = None,
            "baseline_quantile" => self.baseline_quantile = None,
            "baseline_window" => self.baseline_window = None,
            "baseline_positions" => self.baseline_positions = None,
            "baseline_bins" => self.baseline_bins = None,
            "offset" => self.offset = None,
            "offset_std" => self.offset_std = None,
            "offset_mad" => self.offset_mad = None,
            "between" => self.between = None,
            "cut_tokens" => self.cut_tokens = None,
            "punctuation" => self.punctuation = None,
            "jump" => self.jump = None,
            "jump_std" => self.jump_std = None,
            "jump_mad" => self.jump_mad = None,
            "baseline_calibration" => self.baseline_calibration = None,
            "cut_entropy_nats" => self.cut_entropy_nats = None,
            "cut_probability" => self.cut_probability = None,
            "cut_every" => self.cut_every = None,
            "selection_percent" => self.selection_percent = None,
            "random_fraction" => self.random_fraction = None,
            other => unreachable!("`{other}` is no parameter"),
        }
    }
}

/// Absent keys are not written: TOML has no null.
fn is_absent<T: Serialize + std::any::Any>(value: &T) -> bool {
    let value: &dyn std::any::Any = value;
    macro_rules! none_of {
        ($($kind:ty),+) => {
            $( value.downcast_ref::<Option<$kind>>().is_some_and(Option::is_none) )||+
        };
    }
    none_of!(f32, f64, usize, String, Positions, Between)
}

fn unknown_key(key: &str) -> Error {
    let keys: Vec<&str> = CreditConfig::FIELDS.iter().map(|field| field.key).collect();
    Error::Key {
        key: key.to_owned(),
        expected: keys.join(", "),
    }
}
