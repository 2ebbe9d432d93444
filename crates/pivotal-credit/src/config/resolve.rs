//! From the `[credit]` table to a checked rule: domains, conflicts, keys without effect.

use super::{BaselineRule, CreditConfig, CutRule};
use crate::{
    Baseline, Between, CreditRule, Cut, Error, Neutral, Positions, Result, Selection, SequenceSign,
    Weighting, Width,
};

/// A mean is kept for every bin; more than a response has tokens tell no more positions apart.
const MOST_BINS: usize = 65_536;

impl CreditConfig {
    /// Checks every key and fills in the defaults of the rules chosen.
    ///
    /// # Errors
    /// [`Error::Value`] outside a domain, [`Error::Conflict`] for two widths at once, [`Error::Unused`] for a key that the
    /// chosen rule ignores, [`Error::Needs`] for one that it lacks.
    pub fn resolve(&self) -> Result<CreditRule> {
        self.no_unused()?;
        let offset = one_width([
            ("offset", self.offset),
            ("offset_std", self.offset_std),
            ("offset_mad", self.offset_mad),
        ])?;
        let rule = CreditRule {
            signal: self.signal,
            signal_delay: self.signal_delay,
            baseline: self.resolve_baseline()?,
            offset: offset.unwrap_or(Width::Absolute(0.0)),
            cut: self.resolve_cut()?,
            min_len: at_least_one("min_len", self.min_len)?,
            score: self.score,
            sequence_sign: self.sequence_sign,
            selection: self.selection,
            selection_percent: self.resolve_percent()?,
            neutral: self.neutral,
            weighting: self.weighting,
            random_fraction: self
                .random_fraction
                .map(|fraction| unit("random_fraction", fraction))
                .transpose()?,
        };
        if rule.weighting == Weighting::Soft && rule.selection != Selection::Agree {
            return Err(Error::Unused {
                key: "weighting",
                with: format!("selection = {}", rule.selection),
            });
        }
        if rule.weighting == Weighting::Soft && rule.neutral == Neutral::Keep {
            return Err(Error::Unused {
                key: "neutral",
                with: "weighting = soft".to_owned(),
            });
        }
        Ok(rule)
    }

    fn resolve_baseline(&self) -> Result<Baseline> {
        let decay = || unit("baseline_decay", self.baseline_decay.unwrap_or(0.99));
        Ok(match self.baseline {
            BaselineRule::Fixed => {
                let value = self.baseline_value.unwrap_or(0.0);
                if !value.is_finite() {
                    return Err(domain("baseline_value", "a finite number", value));
                }
                Baseline::Fixed(value)
            }
            BaselineRule::BatchMean => Baseline::BatchMean,
            BaselineRule::PromptMean => Baseline::PromptMean,
            BaselineRule::RunningMean => Baseline::RunningMean { decay: decay()? },
            BaselineRule::Quantile => Baseline::Quantile {
                q: unit("baseline_quantile", self.baseline_quantile.unwrap_or(0.5))?,
                window: at_least_one("baseline_window", self.baseline_window.unwrap_or(65_536))?,
            },
            BaselineRule::Calibrated => Baseline::Calibrated {
                fraction: above_zero(
                    "baseline_calibration",
                    self.baseline_calibration.unwrap_or(0.2),
                    1.0,
                )?,
            },
            BaselineRule::PositionMean => Baseline::PositionMean {
                positions: self.baseline_positions.unwrap_or(Positions::Relative),
                bins: self.resolve_bins()?,
                decay: decay()?,
            },
        })
    }

    fn resolve_bins(&self) -> Result<usize> {
        match at_least_one("baseline_bins", self.baseline_bins.unwrap_or(10))? {
            bins if bins > MOST_BINS => Err(domain("baseline_bins", "at most 65536", bins)),
            bins => Ok(bins),
        }
    }

    fn resolve_cut(&self) -> Result<Cut> {
        Ok(match self.cut {
            CutRule::Sequence => Cut::Sequence,
            CutRule::Token => Cut::Token,
            CutRule::Fixed => Cut::Fixed(at_least_one(
                "cut_tokens",
                self.cut_tokens.ok_or(Error::Needs {
                    with: "cut = fixed",
                    needs: "`cut_tokens`",
                })?,
            )?),
            CutRule::Punctuation => {
                let marks = self
                    .punctuation
                    .clone()
                    .unwrap_or_else(|| ".,;:!?\n".to_owned());
                if marks.is_empty() {
                    return Err(domain("punctuation", "at least one character", "empty"));
                }
                Cut::Punctuation(marks)
            }
            CutRule::Jump => Cut::Jump(
                one_width([
                    ("jump", self.jump),
                    ("jump_std", self.jump_std),
                    ("jump_mad", self.jump_mad),
                ])?
                .ok_or(Error::Needs {
                    with: "cut = jump",
                    needs: "one of `jump`, `jump_std` and `jump_mad`",
                })?,
            ),
            CutRule::Schmitt => Cut::Schmitt(self.between.unwrap_or(Between::Hold)),
            CutRule::Entropy => {
                let nats = self.cut_entropy_nats.ok_or(Error::Needs {
                    with: "cut = entropy",
                    needs: "`cut_entropy_nats`",
                })?;
                if !(nats.is_finite() && nats >= 0.0) {
                    return Err(domain(
                        "cut_entropy_nats",
                        "a finite number of at least 0",
                        nats,
                    ));
                }
                Cut::Entropy(nats)
            }
            CutRule::Improbable => Cut::Improbable {
                probability: above_zero(
                    "cut_probability",
                    self.cut_probability.unwrap_or(0.9),
                    1.0,
                )?,
                every: at_least_one("cut_every", self.cut_every.unwrap_or(5))?,
            },
            CutRule::External => Cut::External,
        })
    }

    fn resolve_percent(&self) -> Result<Option<f64>> {
        let usual = match self.selection {
            Selection::Quota => 30.0,
            Selection::ExcessLoss => 60.0,
            Selection::EntropyTop => 20.0,
            _ => return Ok(None),
        };
        let percent = self.selection_percent.unwrap_or(usual);
        above_zero("selection_percent", percent, 100.0).map(Some)
    }

    fn no_unused(&self) -> Result<()> {
        use BaselineRule as B;
        use CutRule as C;
        use Selection as S;
        let (baseline, cut, selection) = (self.baseline, self.cut, self.selection);
        let fading = matches!(baseline, B::RunningMean | B::PositionMean);
        let positions = baseline == B::PositionMean;
        let absolute = positions && self.baseline_positions == Some(Positions::Absolute);
        let quantile = baseline == B::Quantile;
        let jump = cut == C::Jump;
        let percent = matches!(selection, S::Quota | S::ExcessLoss | S::EntropyTop);
        let random = selection == S::Random;
        // Whether a segment's sign is compared with the sequence's, token by token.
        let signed = matches!(
            selection,
            S::Agree | S::Disagree | S::RandomPosition | S::Truth
        ) || random && self.random_fraction.is_none();
        let with_baseline = format!("baseline = {baseline}");
        let with_cut = format!("cut = {cut}");
        let with_selection = match random && !signed {
            true => "random_fraction".to_owned(),
            false => format!("selection = {selection}"),
        };
        let with_bins = match absolute {
            true => "baseline_positions = absolute",
            false => &with_baseline,
        };
        let advantage = self.sequence_sign == SequenceSign::Advantage;
        let keys: [(&'static str, bool, bool, &str); 18] = [
            (
                "baseline_value",
                self.baseline_value.is_some(),
                baseline == B::Fixed,
                &with_baseline,
            ),
            (
                "baseline_decay",
                self.baseline_decay.is_some(),
                fading,
                &with_baseline,
            ),
            (
                "baseline_quantile",
                self.baseline_quantile.is_some(),
                quantile,
                &with_baseline,
            ),
            (
                "baseline_window",
                self.baseline_window.is_some(),
                quantile,
                &with_baseline,
            ),
            (
                "baseline_positions",
                self.baseline_positions.is_some(),
                positions,
                &with_baseline,
            ),
            (
                "baseline_bins",
                self.baseline_bins.is_some(),
                positions && !absolute,
                with_bins,
            ),
            (
                "baseline_calibration",
                self.baseline_calibration.is_some(),
                baseline == B::Calibrated,
                &with_baseline,
            ),
            (
                "between",
                self.between.is_some(),
                cut == C::Schmitt,
                &with_cut,
            ),
            (
                "cut_tokens",
                self.cut_tokens.is_some(),
                cut == C::Fixed,
                &with_cut,
            ),
            (
                "punctuation",
                self.punctuation.is_some(),
                cut == C::Punctuation,
                &with_cut,
            ),
            ("jump", self.jump.is_some(), jump, &with_cut),
            ("jump_std", self.jump_std.is_some(), jump, &with_cut),
            ("jump_mad", self.jump_mad.is_some(), jump, &with_cut),
            (
                "cut_entropy_nats",
                self.cut_entropy_nats.is_some(),
                cut == C::Entropy,
                &with_cut,
            ),
            (
                "cut_probability",
                self.cut_probability.is_some(),
                cut == C::Improbable,
                &with_cut,
            ),
            (
                "cut_every",
                self.cut_every.is_some(),
                cut == C::Improbable,
                &with_cut,
            ),
            (
                "selection_percent",
                self.selection_percent.is_some(),
                percent,
                &with_selection,
            ),
            ("sequence_sign", advantage, signed, &with_selection),
        ];
        for (key, set, used, with) in keys {
            if set && !used {
                return Err(Error::Unused {
                    key,
                    with: with.to_owned(),
                });
            }
        }
        if self.random_fraction.is_some() && !random {
            return Err(Error::Unused {
                key: "random_fraction",
                with: with_selection,
            });
        }
        Ok(())
    }
}

fn domain(key: &'static str, expected: &str, found: impl ToString) -> Error {
    Error::Value {
        key,
        expected: expected.to_owned(),
        found: found.to_string(),
    }
}

fn at_least_one(key: &'static str, value: usize) -> Result<usize> {
    if value >= 1 {
        Ok(value)
    } else {
        Err(domain(key, "at least 1", value))
    }
}

fn unit(key: &'static str, value: f64) -> Result<f64> {
    if (0.0..=1.0).contains(&value) {
        Ok(value)
    } else {
        Err(domain(key, "a number from 0 to 1", value))
    }
}

/// The one width set, of three ways to say it: absolute, times std, times mad.
fn one_width(ways: [(&'static str, Option<f32>); 3]) -> Result<Option<Width>> {
    let kinds = [Width::Absolute as fn(f32) -> Width, Width::Std, Width::Mad];
    let mut found: Option<(&'static str, Width)> = None;
    for ((key, value), kind) in ways.into_iter().zip(kinds) {
        let Some(value) = value else { continue };
        if !(value.is_finite() && value >= 0.0) {
            return Err(domain(key, "a finite number of at least 0", value));
        }
        if let Some((first, _)) = found {
            return Err(Error::Conflict { first, second: key });
        }
        found = Some((key, kind(value)));
    }
    Ok(found.map(|(_, width)| width))
}

fn above_zero(key: &'static str, value: f64, largest: f64) -> Result<f64> {
    if value > 0.0 && value <= largest {
        Ok(value)
    } else {
        Err(domain(
            key,
            &format!("a number above 0, up to {largest}"),
            value,
        ))
    }
}
