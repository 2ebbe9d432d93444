//! What a response must bring for the rule that judges it.

use pivotal_core::SegmentRecord;

use super::{Own, Widths};
use crate::{Credit, Cut, Error, Response, Result, TokenColumn, check_finite};

impl Credit {
    /// Refuses a response that lacks what the rule reads, or has it in another length.
    pub(super) fn check(&self, response: &Response<'_>) -> Result<()> {
        let (id, tokens) = (response.id, response.signal.len());
        check_finite(self.rule.signal, id, response.signal)?;
        let lengths = [
            ("texts", response.texts.map(<[_]>::len)),
            ("truth", response.truth.map(<[_]>::len)),
            ("response_mask", response.response_mask.map(<[_]>::len)),
        ];
        for (column, found) in lengths {
            if let Some(found) = found.filter(|&found| found != tokens) {
                return Err(Error::Length {
                    column,
                    id,
                    expected: tokens,
                    found,
                });
            }
        }
        let missing = |column, needed_by| Error::Missing {
            column,
            id,
            needed_by,
        };
        match self.rule.cut {
            Cut::Punctuation(_) if response.texts.is_none() => {
                return Err(missing("texts", "cut = punctuation"));
            }
            Cut::External => {
                let cuts = response
                    .cuts
                    .ok_or_else(|| missing("cuts", "cut = external"))?;
                let fault = (0..cuts.len())
                    .find(|&i| cuts[i] >= tokens || (i > 0 && cuts[i] <= cuts[i - 1]));
                if let Some(index) = fault {
                    return Err(Error::Offset {
                        id,
                        index,
                        found: cuts[index],
                        tokens,
                    });
                }
            }
            _ => {}
        }
        for &column in TokenColumn::ALL {
            if let Some(values) = response.columns.get(column)
                && values.len() != tokens
            {
                return Err(Error::Length {
                    column: column.name(),
                    id,
                    expected: tokens,
                    found: values.len(),
                });
            }
        }
        let is_own = |index: usize| response.response_mask.is_none_or(|mask| mask[index]);
        for (column, needed_by) in self.rule.needed_columns() {
            let column_name = column.name();
            let values = response
                .columns
                .get(column)
                .ok_or_else(|| missing(column_name, needed_by))?;
            let bad = (0..tokens).find(|&index| is_own(index) && !values[index].is_finite());
            if let Some(index) = bad {
                return Err(Error::NotFiniteToken {
                    column: column_name,
                    id,
                    index,
                    value: values[index],
                });
            }
        }
        if self.rule.needs_truth() && response.truth.is_none() {
            return Err(missing("truth", "selection = truth"));
        }
        Ok(())
    }

    /// Refuses an offset or a jump that f32 does not hold: the response with the largest signal is the one to look at.
    pub(super) fn check_widths(
        &self,
        batch: &[Response<'_>],
        owns: &[Own],
        Widths { offset, jump }: Widths,
    ) -> Result<()> {
        let widths = [("offset", offset), ("jump", jump)];
        let Some((column, value)) = widths.into_iter().find(|(_, value)| !value.is_finite()) else {
            return Ok(());
        };
        let largest = |own: &Own| {
            own.signal
                .iter()
                .fold(0.0, |most: f32, r| most.max(r.abs()))
        };
        let each = batch.iter().zip(owns);
        let widest = each.max_by(|(_, one), (_, other)| largest(one).total_cmp(&largest(other)));
        Err(Error::Overflow {
            column,
            signal: self.rule.signal,
            id: widest.map_or(0, |(response, _)| response.id),
            value,
        })
    }

    /// Refuses a segment whose score f32 does not hold, though it holds every token's signal.
    pub(super) fn check_scores(&self, id: u64, segments: &[SegmentRecord]) -> Result<()> {
        match segments.iter().find(|segment| !segment.score.is_finite()) {
            None => Ok(()),
            Some(segment) => Err(Error::Overflow {
                column: "segments.score",
                signal: self.rule.signal,
                id,
                value: segment.score,
            }),
        }
    }
}
