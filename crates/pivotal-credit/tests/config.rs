//! The `[credit]` table: strict, checked once, and the same from a file and from flags.

use pivotal_credit::{CreditConfig, CutRule, Error, Width};

fn error(toml: &str) -> String {
    toml::from_str::<CreditConfig>(toml)
        .unwrap()
        .resolve()
        .unwrap_err()
        .to_string()
}

#[test]
fn every_fault_names_its_key() {
    for (toml, want) in [
        (
            "offset = 1.0\noffset_std = 0.5",
            "`offset` and `offset_std` are both set; set one of them",
        ),
        (
            "cut = 'jump'\njump = 1.0\njump_mad = 0.5",
            "`jump` and `jump_mad` are both set; set one of them",
        ),
        (
            "cut = 'jump'",
            "`cut = jump` needs one of `jump`, `jump_std` and `jump_mad`",
        ),
        ("cut = 'fixed'", "`cut = fixed` needs `cut_tokens`"),
        (
            "cut = 'fixed'\ncut_tokens = 0",
            "`cut_tokens` is 0, expected at least 1",
        ),
        ("min_len = 0", "`min_len` is 0, expected at least 1"),
        (
            "offset = -0.5",
            "`offset` is -0.5, expected a finite number of at least 0",
        ),
        (
            "offset_mad = nan",
            "`offset_mad` is NaN, expected a finite number of at least 0",
        ),
        (
            "baseline_value = inf",
            "`baseline_value` is inf, expected a finite number",
        ),
        (
            "baseline = 'quantile'\nbaseline_quantile = 1.5",
            "`baseline_quantile` is 1.5, expected a number from 0 to 1",
        ),
        (
            "baseline = 'running_mean'\nbaseline_decay = nan",
            "`baseline_decay` is NaN, expected a number from 0 to 1",
        ),
        (
            "baseline = 'position_mean'\nbaseline_bins = 0",
            "`baseline_bins` is 0, expected at least 1",
        ),
        (
            "selection = 'random'\nrandom_fraction = 2.0",
            "`random_fraction` is 2, expected a number from 0 to 1",
        ),
        (
            "cut = 'punctuation'\npunctuation = ''",
            "`punctuation` is empty, expected at least one character",
        ),
        (
            "cut = 'token'\nbetween = 'dead_zone'",
            unused("between", "cut = token").as_str(),
        ),
        ("jump = 1.0", unused("jump", "cut = schmitt").as_str()),
        (
            "cut_tokens = 4",
            unused("cut_tokens", "cut = schmitt").as_str(),
        ),
        (
            "baseline_decay = 0.5",
            unused("baseline_decay", "baseline = fixed").as_str(),
        ),
        (
            "baseline = 'batch_mean'\nbaseline_value = 0.5",
            unused("baseline_value", "baseline = batch_mean").as_str(),
        ),
        (
            "baseline = 'position_mean'\nbaseline_positions = 'absolute'\nbaseline_bins = 4",
            unused("baseline_bins", "baseline_positions = absolute").as_str(),
        ),
        (
            "random_fraction = 0.5",
            unused("random_fraction", "selection = agree").as_str(),
        ),
        (
            "weighting = 'soft'\nselection = 'random'",
            unused("weighting", "selection = random").as_str(),
        ),
        (
            "weighting = 'soft'\nneutral = 'keep'",
            unused("neutral", "weighting = soft").as_str(),
        ),
        (
            "cut = 'entropy'",
            "`cut = entropy` needs `cut_entropy_nats`",
        ),
        (
            "cut = 'entropy'\ncut_entropy_nats = -1.0",
            "`cut_entropy_nats` is -1, expected a finite number of at least 0",
        ),
        (
            "cut = 'improbable'\ncut_probability = 0.0",
            "`cut_probability` is 0, expected a number above 0, up to 1",
        ),
        (
            "baseline = 'position_mean'\nbaseline_bins = 65537",
            "`baseline_bins` is 65537, expected at most 65536",
        ),
        (
            "cut = 'improbable'\ncut_every = 0",
            "`cut_every` is 0, expected at least 1",
        ),
        (
            "selection = 'quota'\nselection_percent = 101.0",
            "`selection_percent` is 101, expected a number above 0, up to 100",
        ),
        (
            "baseline = 'calibrated'\nbaseline_calibration = nan",
            "`baseline_calibration` is NaN, expected a number above 0, up to 1",
        ),
        (
            "cut_entropy_nats = 1.0",
            unused("cut_entropy_nats", "cut = schmitt").as_str(),
        ),
        (
            "cut_probability = 0.5",
            unused("cut_probability", "cut = schmitt").as_str(),
        ),
        (
            "cut = 'entropy'\ncut_entropy_nats = 1.0\ncut_every = 2",
            unused("cut_every", "cut = entropy").as_str(),
        ),
        (
            "baseline_calibration = 0.5",
            unused("baseline_calibration", "baseline = fixed").as_str(),
        ),
        (
            "selection_percent = 10.0",
            unused("selection_percent", "selection = agree").as_str(),
        ),
        (
            "sequence_sign = 'advantage'\nselection = 'quota'",
            unused("sequence_sign", "selection = quota").as_str(),
        ),
        (
            "sequence_sign = 'advantage'\nselection = 'random'\nrandom_fraction = 0.5",
            unused("sequence_sign", "random_fraction").as_str(),
        ),
    ] {
        assert_eq!(error(toml), want, "{toml}");
    }
}

fn unused(key: &str, with: &str) -> String {
    format!("`{key}` has no effect with `{with}`; remove it or choose another rule")
}

#[test]
fn unknown_keys_and_names_are_refused() {
    for (toml, want) in [
        ("ofset = 1.0", "unknown field `ofset`"),
        ("cut = 'smith'", "unknown variant `smith`"),
    ] {
        let error = toml::from_str::<CreditConfig>(toml)
            .unwrap_err()
            .to_string();
        assert!(error.contains(want), "{error}");
    }
    let mut config = CreditConfig::default();
    assert!(matches!(
        config.apply([("ofset", "1")]),
        Err(Error::Key { .. })
    ));
    assert_eq!(
        config.apply([("cut", "smith")]).unwrap_err().to_string(),
        "`cut` is smith, expected one of sequence, token, fixed, punctuation, jump, schmitt, entropy, improbable, external"
    );
    assert_eq!(
        config.apply([("offset", "wide")]).unwrap_err().to_string(),
        "`offset` is wide, expected a number"
    );
}

#[test]
fn flags_override_the_file() {
    let file = "baseline = 'quantile'\nbaseline_quantile = 0.3\noffset_std = 0.5\ncut = 'jump'\njump = 1.0";
    let config = |flags: &[(&str, &str)]| {
        let mut config: CreditConfig = toml::from_str(file).unwrap();
        config.apply(flags.iter().copied()).unwrap();
        config
    };
    let rule = config(&[("offset", "0.1")]).resolve().unwrap();
    assert_eq!(rule.offset, Width::Absolute(0.1));
    let rule = config(&[("jump_std", "2")]).resolve().unwrap();
    assert_eq!(rule.cut, pivotal_credit::Cut::Jump(Width::Std(2.0)));
    config(&[("cut", "schmitt"), ("baseline", "batch_mean")])
        .resolve()
        .unwrap();
    // Saying what the file says changes nothing.
    assert_eq!(
        config(&[("cut", "jump"), ("baseline", "quantile")]),
        config(&[])
    );
    // Two flags that contradict each other are still a conflict.
    let both = config(&[("offset", "0.1"), ("offset_mad", "1")]).resolve();
    assert!(matches!(
        both,
        Err(Error::Conflict {
            first: "offset",
            second: "offset_mad"
        })
    ));
}

#[test]
fn every_key_has_a_flag_that_sets_it() {
    for field in CreditConfig::FIELDS {
        assert_eq!(
            field.flag,
            format!("credit-{}", field.key.replace('_', "-"))
        );
        assert!(
            field.help.ends_with('.') && !field.help.starts_with(' '),
            "{field:?}"
        );
        let values = [
            "1",
            "0.5",
            "level",
            "batch_mean",
            "absolute",
            "token",
            "dead_zone",
            "sum",
            "all",
            "keep",
            "soft",
            "advantage",
        ];
        let set = values.into_iter().any(|value| {
            let mut config = CreditConfig::default();
            config.apply([(field.key, value)]).is_ok() && config != CreditConfig::default()
                || field.key == "min_len" && config.apply([("min_len", "2")]).is_ok()
        });
        assert!(set, "{field:?}");
    }
}

#[test]
fn a_written_config_reads_back() {
    let mut config = CreditConfig::default();
    let flags = [
        ("cut", "punctuation"),
        ("punctuation", ".\n\""),
        ("offset_mad", "0.1"),
        ("baseline_value", "-0.3"),
    ];
    config.apply(flags).unwrap();
    let text = toml::to_string(&config).unwrap();
    let back: CreditConfig = toml::from_str(&text).unwrap();
    assert_eq!(back, config);
    assert_eq!(back.resolve().unwrap(), config.resolve().unwrap());
    assert_eq!(
        toml::from_str::<CreditConfig>("").unwrap().cut,
        CutRule::Schmitt
    );
}
