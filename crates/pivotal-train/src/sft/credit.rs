//! The responses that `sft` learns from, and which of their tokens it keeps.
//!
//! Every response that is learnt is positive (METHOD, section 6). Of a preference the chosen one is learnt; the rejected one, where
//! its signal is known, takes part in what credit finds out over the whole data set (baseline, offset, jump threshold, strata of
//! a random selection), so that the chosen one's mask is the one that [`crate::dpo`] gives.

use std::path::Path;

use pivotal_core::{CreditRecord, Side, Sign, TokenizedResponse};
use pivotal_credit::{
    Credit, CreditRule, Diagnostics, DiagnosticsReport, RecordSample, Response, ResponseCredit,
    Selection,
};
use pivotal_data::{
    DataSet, External, Shape, TokenizeOptions, Tokenizer, tokenize_pairs, tokenize_responses,
};
use pivotal_kernels::account::{Part, time};

use crate::error::{Error, Result};
use crate::signals::{DECISIVE_PROBABILITY, RecordsByResponse, borrowed, side_name, warnings};
use crate::workspace::Workspace;

/// What is known of a response's tokens besides their ids, each `[tokens]` but the cuts.
#[derive(Clone, Debug, Default, PartialEq)]
struct Known {
    signal: Option<Vec<f32>>,
    /// Offsets where segments begin.
    cuts: Option<Vec<usize>>,
    truth: Option<Vec<bool>>,
    /// In nats.
    reference_logps: Option<Vec<f32>>,
}

impl Known {
    fn from_columns(external: &External) -> Self {
        Self {
            signal: external.signal.clone(),
            cuts: external.cuts.clone(),
            ..Self::default()
        }
    }

    fn from_record(record: CreditRecord) -> Self {
        Self {
            signal: Some(record.signal),
            cuts: None,
            truth: record.truth,
            reference_logps: record.reference_token_logps,
        }
    }
}

/// The response that a chosen one was preferred to.
struct Rejected {
    ids: Vec<u32>,
    known: Known,
}

/// The responses of a data set, tokenised.
pub(super) struct Responses {
    /// Those to learn from.
    pub items: Vec<TokenizedResponse>,
    /// Rows dropped because the length limits left nothing of a response.
    pub dropped: usize,
    /// Responses that lost their end to the length limits.
    pub truncated: usize,
    known: Vec<Known>,
    /// One for each of `items`; empty outside preferences.
    rejected: Vec<Rejected>,
}

/// What credit made of the responses to learn from, in their order.
pub(super) struct SftCreditGiven {
    /// Empty if no signal was segmented: every token is kept then.
    pub given: Vec<ResponseCredit>,
    /// Diagnostics of each.
    pub diagnostics: Vec<Diagnostics>,
    /// Over all of them, if a signal was segmented.
    pub report: Option<DiagnosticsReport>,
    /// About the masks, in words.
    pub warnings: Vec<String>,
}

impl Responses {
    /// Reads the rows of `data`, with the signals in their own columns.
    ///
    /// # Errors
    /// [`Error::Data`], naming the row.
    pub(super) fn of(
        data: &DataSet,
        workspace: &Workspace,
        options: &TokenizeOptions,
    ) -> Result<Self> {
        let (tokenizer, template) = (&workspace.tokenizer, workspace.template.as_ref());
        let column = |row: &[External], response: usize| {
            row.get(response)
                .map(Known::from_columns)
                .unwrap_or_default()
        };
        Ok(match data.shape() {
            Shape::PreferenceText
            | Shape::ImplicitPreferenceText
            | Shape::PreferenceChat
            | Shape::ImplicitPreferenceChat => {
                let pairs = tokenize_pairs(data, tokenizer, template, options)?;
                let external = &pairs.external;
                let known = external.iter().map(|row| column(row, 0)).collect();
                let of_rejected: Vec<Known> = external.iter().map(|row| column(row, 1)).collect();
                let (items, rejected) = pairs
                    .items
                    .into_iter()
                    .zip(of_rejected)
                    .map(|(pair, known)| {
                        let chosen = TokenizedResponse {
                            id: pair.id,
                            prompt: pair.prompt,
                            response_mask: vec![true; pair.chosen.len()],
                            response: pair.chosen,
                        };
                        let ids = pair.rejected;
                        (chosen, Rejected { ids, known })
                    })
                    .unzip();
                Self {
                    items,
                    dropped: pairs.dropped,
                    truncated: pairs.truncated_responses,
                    known,
                    rejected,
                }
            }
            _ => {
                let responses = tokenize_responses(data, tokenizer, template, options)?;
                let rows = responses.external.iter();
                Self {
                    known: rows.map(|row| column(row, 0)).collect(),
                    items: responses.items,
                    dropped: responses.dropped,
                    truncated: responses.truncated_responses,
                    rejected: vec![],
                }
            }
        })
    }

    /// Which response of a row is learnt.
    fn side(&self) -> Option<Side> {
        (!self.rejected.is_empty()).then_some(Side::Chosen)
    }

    /// Takes signals, truth and the reference's log-probabilities from a file of credit records in place of the columns, and
    /// says which signal it is. A rejected response need not be in it.
    ///
    /// # Errors
    /// [`Error::Record`] with file and line; [`Error::NoRecord`] or [`Error::OtherTokens`] for a response that the records do
    /// not fit.
    pub(super) fn read_signals(&mut self, path: &Path) -> Result<pivotal_credit::Signal> {
        let side = self.side();
        let mut records = RecordsByResponse::read(path, side.is_some())?;
        for (item, known) in self.items.iter().zip(&mut self.known) {
            let ids = (&item.prompt[..], &item.response[..]);
            *known = Known::from_record(records.take(item.id, side, ids)?);
        }
        for (item, rejected) in self.items.iter().zip(&mut self.rejected) {
            let (row, side) = (item.id, Some(Side::Rejected));
            let ids = (&item.prompt[..], &rejected.ids[..]);
            rejected.known = match records.has(row, side) {
                true => Known::from_record(records.take(row, side, ids)?),
                false => Known::default(),
            };
        }
        Ok(records.signal)
    }

    /// Gives credit under `rule`, and takes what is not kept out of the masks of [`Responses::items`].
    ///
    /// `all` needs no signal. Baselines and offsets that depend on a batch are resolved over the whole data set.
    ///
    /// # Errors
    /// [`Error::NoSignal`] naming the selection, [`Error::PartialSignal`] naming the first response without; [`Error::Credit`]
    /// for a signal that does not hold up.
    pub(super) fn give_credit(
        &mut self,
        rule: &CreditRule,
        tokenizer: &Tokenizer,
        seed: u64,
    ) -> Result<SftCreditGiven> {
        if let Some(row) = self.first_without_signal() {
            self.require_no_signal(rule, row)?;
            return Ok(SftCreditGiven {
                given: vec![],
                diagnostics: vec![],
                report: None,
                warnings: vec![],
            });
        }
        let given = self.assign(rule, tokenizer, seed)?;
        let mut all = Diagnostics::new(DECISIVE_PROBABILITY);
        let mut diagnostics = Vec::with_capacity(given.len());
        for (credit, known) in given.iter().zip(&self.known) {
            let mut own = Diagnostics::new(DECISIVE_PROBABILITY);
            own.observe(
                credit,
                known.truth.as_deref(),
                known.reference_logps.as_deref(),
            )?;
            all.merge(&own);
            diagnostics.push(own);
        }
        for (item, credit) in self.items.iter_mut().zip(&given) {
            item.response_mask = credit.keep.as_slice().to_vec();
        }
        let report = all.report();
        let warnings = warnings(&report, rule);
        Ok(SftCreditGiven {
            given,
            diagnostics,
            report: Some(report),
            warnings,
        })
    }

    fn first_without_signal(&self) -> Option<u64> {
        let mut each = self.items.iter().zip(&self.known);
        each.find_map(|(item, known)| known.signal.is_none().then_some(item.id))
    }

    fn require_no_signal(&self, rule: &CreditRule, row: u64) -> Result<()> {
        let any = self.known.iter().any(|known| known.signal.is_some());
        let (selection, side) = (rule.selection.to_string(), self.side());
        match (rule.selection, any) {
            (Selection::All, _) => Ok(()),
            (_, true) => Err(Error::PartialSignal {
                row,
                side: side_name(side),
                selection,
            }),
            (_, false) => Err(Error::NoSignal {
                selection,
                columns: match side {
                    Some(_) => "a `chosen_signal` column",
                    None => "`prompt` and `completion` with a `completion_signal` column",
                },
                plain: "fine-tuning",
            }),
        }
    }

    /// The credit of the responses to learn from.
    fn assign(
        &self,
        rule: &CreditRule,
        tokenizer: &Tokenizer,
        seed: u64,
    ) -> Result<Vec<ResponseCredit>> {
        let mut members = Vec::with_capacity(2 * self.items.len());
        for (row, (item, known)) in self.items.iter().zip(&self.known).enumerate() {
            members.push(Member {
                learnt: true,
                id: item.id,
                ids: &item.response,
                response_mask: Some(&item.response_mask),
                known,
            });
            let rejected = self.rejected.get(row);
            if let Some(rejected) = rejected.filter(|rejected| rejected.known.signal.is_some()) {
                members.push(Member {
                    learnt: false,
                    id: item.id,
                    ids: &rejected.ids,
                    response_mask: None,
                    known: &rejected.known,
                });
            }
        }
        let texts = members
            .iter()
            .map(|member| tokenizer.token_texts(member.ids))
            .collect::<Result<Vec<_>, _>>()?;
        let texts = borrowed(&texts);
        let each = members.iter().zip(&texts);
        let batch: Vec<Response<'_>> = each.map(|(member, texts)| member.response(texts)).collect();
        let given = time(Part::Credit, || {
            Credit::new(rule.clone(), seed).assign(&batch)
        })?;
        let given = given.into_iter().zip(&members);
        Ok(given
            .filter_map(|(credit, member)| member.learnt.then_some(credit))
            .collect())
    }

    /// Records of the responses to learn from, in their order; none if no signal was segmented.
    ///
    /// # Errors
    /// If a token's text cannot be made.
    pub(super) fn records(
        &self,
        given: Vec<ResponseCredit>,
        tokenizer: &Tokenizer,
    ) -> Result<Vec<CreditRecord>> {
        let side = self.side();
        let each = given.into_iter().zip(&self.items).zip(&self.known);
        each.map(|((credit, item), known)| {
            Ok(credit.into_record(RecordSample {
                id: item.id,
                side,
                prompt_token_ids: item.prompt.clone(),
                token_ids: item.response.clone(),
                token_texts: tokenizer.token_texts(&item.response)?,
                text_offsets: tokenizer.text_offsets(&item.response)?,
                truth: known.truth.clone(),
                token_logps: None,
                reference_token_logps: known.reference_logps.clone(),
            }))
        })
        .collect()
    }
}

/// A response of the batch that is given credit.
struct Member<'a> {
    learnt: bool,
    id: u64,
    ids: &'a [u32],
    response_mask: Option<&'a [bool]>,
    known: &'a Known,
}

impl<'a> Member<'a> {
    fn response(&self, texts: &'a [&'a str]) -> Response<'a> {
        let signal = self.known.signal.as_deref().unwrap_or_default();
        let mut response = match self.learnt {
            true => Response::new(self.id, 0, signal, Sign::Positive),
            false => Response::new(self.id, 1, signal, Sign::Negative),
        };
        response.texts = Some(texts);
        response.truth = self.known.truth.as_deref();
        response.cuts = self.known.cuts.as_deref();
        response.response_mask = self.response_mask;
        response
    }
}
