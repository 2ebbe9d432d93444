//! What a configuration of `pivotal reject` must be.

use pivotal_credit::{Baseline, CreditRule, SequenceSign, Signal};

use super::recipe::RejectConfig;
use crate::error::{Error, Result};
use crate::onpolicy::{RolloutCredit, ScoreSettings, SignalSettings};

/// Checks every table before anything is loaded or written: also that none has a key that does nothing here.
///
/// # Errors
/// [`Error::Setting`], naming the flag; [`Error::Credit`] for a rule that does not hold up.
pub(super) fn check(config: &RejectConfig) -> Result<()> {
    config.optimizer.check()?;
    config.rollout.check()?;
    config.score.check()?;
    config.signal.check()?;
    config.warnings.check()?;
    config.reject.check(config.rollout.samples)?;
    RolloutCredit::check(&config.credit, &config.score, &config.signal, false)?;
    let rule = config.credit.resolve()?;
    let advantage = rule.needs_signal() && rule.signal == Signal::Advantage;
    let calibrated = matches!(rule.baseline, Baseline::Calibrated { .. });
    let (optimizer, score, signal) = (&config.optimizer, &config.score, &config.signal);
    let usual = ScoreSettings::default();
    let refused = [
        (
            "credit-signal",
            advantage,
            "log_ratio, level or increment: rejection sampling has no advantages",
        ),
        (
            "credit-sequence-sign",
            rule.sequence_sign == SequenceSign::Advantage,
            "response: rejection sampling has no advantages",
        ),
        (
            "credit-baseline",
            calibrated && rule.needs_signal(),
            "another baseline: all accepted responses are positive, there is nothing to tell them from",
        ),
        (
            "steps",
            optimizer.steps > 0,
            "left out: `--rounds`, `--epochs` and what is accepted say how many steps there are",
        ),
        (
            "oracle",
            !signal.oracle.as_os_str().is_empty() && !needs_log_ratio(&rule),
            "left out: only `--credit-signal log_ratio` reads it, and only for a selection that needs a signal",
        ),
        (
            "signal-beta",
            signal.signal_beta != SignalSettings::default().signal_beta && !needs_log_ratio(&rule),
            "left out: only `--credit-signal log_ratio` reads it, and only for a selection that needs a signal",
        ),
        (
            "reward-weight or reward-aggregation",
            score.reward_model.as_os_str().is_empty()
                && (score.reward_weight != usual.reward_weight
                    || score.reward_aggregation != usual.reward_aggregation),
            "left out, or beside `--reward-model`",
        ),
        (
            "command-seconds",
            score.command.is_empty() && score.command_seconds != usual.command_seconds,
            "left out, or beside `--command`",
        ),
        (
            "eval-every",
            config.eval.path.as_os_str().is_empty() && config.eval.every > 0,
            "left out, or beside `--eval-data`",
        ),
    ];
    match refused.into_iter().find(|(_, holds, _)| *holds) {
        Some((key, _, expected)) => Err(Error::Setting {
            key,
            found: "given".into(),
            expected,
        }),
        None => Ok(()),
    }
}

/// Whether the rule reads an oracle's log-ratio.
pub(super) fn needs_log_ratio(rule: &CreditRule) -> bool {
    rule.needs_signal() && rule.signal == Signal::LogRatio
}
