//! Credit records on disk, and the signals that masks are made of.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use pivotal_core::{CreditRecord, Side, Sign, TokenMask, TokenizedPair, read_file, write_atomic};
use pivotal_credit::{
    Credit, CreditConfig, CreditRule, Diagnostics, DiagnosticsReport, RecordSample, Response,
    ResponseCredit, Selection, Signal, Thresholds, Weighting,
};
use pivotal_data::{External, Tokenizer};
use pivotal_kernels::account::{Part, time};

use crate::error::{Error, Result};

/// Tokens of at most this probability under the reference count as decisive in diagnostics.
pub(crate) const DECISIVE_PROBABILITY: f64 = 0.9;

/// The two sides of a pair, in the order of every array of two in this crate.
pub const SIDES: [Side; 2] = [Side::Chosen, Side::Rejected];

/// What is known of a pair's tokens besides their ids, `[chosen, rejected]`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct PairSignals {
    /// The signal, `[tokens]`.
    pub signal: [Option<Vec<f32>>; 2],
    /// Offsets where segments begin.
    pub cuts: [Option<Vec<usize>>; 2],
    /// Whether each token is right, `[tokens]`.
    pub truth: [Option<Vec<bool>>; 2],
}

/// The masks of a data set, with what credit did to get them.
pub struct PairCredit {
    /// Masks of each pair, chosen then rejected.
    pub keep: Vec<[TokenMask; 2]>,
    /// What credit made of each response, chosen then rejected; empty if the selection needs no signal.
    pub given: Vec<[ResponseCredit; 2]>,
    /// Diagnostics over the data set, if a signal was segmented.
    pub report: Option<DiagnosticsReport>,
    /// Warnings about the masks, in words.
    pub warnings: Vec<String>,
}

/// The signals in the data set's own columns.
pub fn from_columns(external: &[Vec<External>]) -> Vec<PairSignals> {
    let of = |row: &Vec<External>| PairSignals {
        signal: [0, 1].map(|side| row.get(side).and_then(|external| external.signal.clone())),
        cuts: [0, 1].map(|side| row.get(side).and_then(|external| external.cuts.clone())),
        truth: [None, None],
    };
    external.iter().map(of).collect()
}

/// The signals in a file of credit records, matched to pairs by row and side.
///
/// # Errors
/// [`Error::Record`] with file and line; [`Error::NoRecord`] or [`Error::OtherTokens`] for a pair that the records do not
/// fit.
pub fn from_records(path: &Path, pairs: &[TokenizedPair]) -> Result<(Vec<PairSignals>, Signal)> {
    let mut records = RecordsByResponse::read(path, true)?;
    let mut signals = Vec::with_capacity(pairs.len());
    for pair in pairs {
        let mut found = PairSignals::default();
        for (index, side) in SIDES.into_iter().enumerate() {
            let record = records.take(pair.id, Some(side), (&pair.prompt, pair.response(side)))?;
            found.signal[index] = Some(record.signal);
            found.truth[index] = record.truth;
        }
        signals.push(found);
    }
    Ok((signals, records.signal))
}

/// A file of credit records, by the response that each is of.
pub(crate) struct RecordsByResponse<'a> {
    path: &'a Path,
    records: BTreeMap<(u64, Option<Side>), CreditRecord>,
    /// The signal that all of them hold.
    pub(crate) signal: Signal,
}

impl<'a> RecordsByResponse<'a> {
    /// Reads a file whose records are of pairs, or of responses that are in none.
    ///
    /// # Errors
    /// [`Error::Record`] with file and line, [`Error::NoRecords`], [`Error::File`].
    pub(crate) fn read(path: &'a Path, paired: bool) -> Result<Self> {
        let mut records: BTreeMap<(u64, Option<Side>), CreditRecord> = BTreeMap::new();
        let mut names = BTreeSet::new();
        for (index, record) in read_records(path)?.into_iter().enumerate() {
            let fault = |what: &str| Error::Record {
                path: path.into(),
                line: index + 1,
                what: what.to_owned(),
            };
            match (record.side.is_some(), paired) {
                (false, true) => return Err(fault("`side` is null, expected chosen or rejected")),
                (true, false) => {
                    return Err(fault(
                        "`side` is that of a pair, expected null: a row of the data has one response",
                    ));
                }
                _ => {}
            }
            names.insert(record.signal_name.clone());
            if names.len() > 1 {
                return Err(fault("`signal_name` differs from the records before"));
            }
            if records.insert((record.id, record.side), record).is_some() {
                return Err(fault("this response has a record already"));
            }
        }
        let name = names.pop_first();
        let name = name.ok_or_else(|| Error::NoRecords { path: path.into() })?;
        let signal = Signal::ALL
            .iter()
            .copied()
            .find(|signal| signal.name() == name);
        let signal = signal.ok_or_else(|| Error::Record {
            path: path.into(),
            line: 1,
            what: format!("`signal_name` is `{name}`, expected a signal of this version"),
        })?;
        Ok(Self {
            path,
            records,
            signal,
        })
    }

    /// Whether there is a record of this response, not taken yet.
    pub(crate) fn has(&self, row: u64, side: Option<Side>) -> bool {
        self.records.contains_key(&(row, side))
    }

    /// Takes the record of this response out.
    ///
    /// A token's signal is that of the token after all before it, a prompt that the length limits cut included. A record that
    /// says no prompt is taken at its response.
    ///
    /// # Errors
    /// [`Error::NoRecord`]; [`Error::OtherTokens`] if it is of another prompt or another response.
    pub(crate) fn take(
        &mut self,
        row: u64,
        side: Option<Side>,
        (prompt, response): (&[u32], &[u32]),
    ) -> Result<CreditRecord> {
        let (path, name) = (self.path, side_name(side));
        let record = self
            .records
            .remove(&(row, side))
            .ok_or_else(|| Error::NoRecord {
                path: path.into(),
                row,
                side: name,
            })?;
        let of_prompt = record.prompt_token_ids.is_empty() || record.prompt_token_ids == prompt;
        match of_prompt && record.token_ids == response {
            true => Ok(record),
            false => Err(Error::OtherTokens {
                path: path.into(),
                row,
                side: name,
            }),
        }
    }
}

/// The credit rule's configuration for signals that say themselves which they are.
///
/// # Errors
/// [`Error::Setting`] if `config` asks for another signal: the run's configuration would be untrue of it.
pub(crate) fn of_signal(config: &CreditConfig, signal: Signal) -> Result<CreditConfig> {
    let asked = config.signal;
    match asked == signal || asked == CreditConfig::default().signal {
        true => Ok(CreditConfig {
            signal,
            ..config.clone()
        }),
        false => Err(Error::Setting {
            key: "credit-signal",
            found: format!("{asked} with records of {signal}"),
            expected: "left out with `--signals`: the records say which signal they hold",
        }),
    }
}

/// Masks for every pair under `config`, with diagnostics.
///
/// Baselines and offsets that depend on a batch are resolved over the whole data set. `all` needs no signal.
///
/// # Errors
/// [`Error::NoSignal`] naming the selection, [`Error::PartialSignal`] naming the first response without; [`Error::Credit`] for a rule or a signal that does not hold up.
pub fn assign(
    pairs: &[TokenizedPair],
    signals: &[PairSignals],
    tokenizer: Option<&Tokenizer>,
    config: &CreditConfig,
    seed: u64,
) -> Result<PairCredit> {
    let rule = hard_rule(config)?;
    if let Some((row, side)) = first_without_signal(pairs, signals) {
        let any = signals
            .iter()
            .flat_map(|pair| &pair.signal)
            .any(Option::is_some);
        let selection = rule.selection.to_string();
        match (rule.selection, any) {
            (Selection::All, _) => {}
            (_, true) => {
                return Err(Error::PartialSignal {
                    row,
                    side: side_name(Some(side)),
                    selection,
                });
            }
            (_, false) => {
                return Err(Error::NoSignal {
                    selection,
                    columns: "`chosen_signal` and `rejected_signal` columns",
                    plain: "DPO",
                });
            }
        }
        let keep = |pair: &TokenizedPair| {
            [
                TokenMask::all(pair.chosen.len()),
                TokenMask::all(pair.rejected.len()),
            ]
        };
        let keep = pairs.iter().map(keep).collect();
        return Ok(PairCredit {
            keep,
            given: vec![],
            report: None,
            warnings: vec![],
        });
    }
    let texts = tokenizer
        .map(|tokenizer| texts(pairs, tokenizer))
        .transpose()?;
    let texts: Option<Vec<Vec<&str>>> = texts.as_ref().map(|texts| borrowed(texts));
    let mut batch = Vec::with_capacity(2 * pairs.len());
    for (index, (pair, known)) in pairs.iter().zip(signals).enumerate() {
        for (side, sign) in [Sign::Positive, Sign::Negative].into_iter().enumerate() {
            let signal = known.signal[side].as_deref().unwrap_or_default();
            let mut response = Response::new(pair.id, side as u32, signal, sign);
            response.texts = texts.as_ref().map(|texts| &texts[2 * index + side][..]);
            response.truth = known.truth[side].as_deref();
            response.cuts = known.cuts[side].as_deref();
            batch.push(response);
        }
    }
    let given = time(Part::Credit, || {
        Credit::new(rule.clone(), seed).assign(&batch)
    })?;
    let mut diagnostics = Diagnostics::new(DECISIVE_PROBABILITY);
    for (response, credit) in batch.iter().zip(&given) {
        diagnostics.observe(credit, response.truth, None)?;
    }
    let report = diagnostics.report();
    let warnings = warnings(&report, &rule);
    let mut given = given.into_iter();
    let given: Vec<[ResponseCredit; 2]> =
        std::iter::from_fn(|| Some([given.next()?, given.next()?])).collect();
    Ok(PairCredit {
        keep: given
            .iter()
            .map(|[chosen, rejected]| [chosen.keep.clone(), rejected.keep.clone()])
            .collect(),
        given,
        report: Some(report),
        warnings,
    })
}

/// The rule of `config`, for a loss that takes masks.
///
/// # Errors
/// [`Error::Setting`] for soft weights, [`Error::Credit`] for a rule that does not hold up.
pub(crate) fn hard_rule(config: &CreditConfig) -> Result<CreditRule> {
    let rule = config.resolve()?;
    match rule.weighting {
        Weighting::Hard => Ok(rule),
        Weighting::Soft => Err(Error::Setting {
            key: "credit-weighting",
            found: "soft".into(),
            expected: "hard: the losses of these recipes take masks, not weights",
        }),
    }
}

/// What is to be said of a data set's masks before the first step.
pub(crate) fn warnings(report: &DiagnosticsReport, rule: &CreditRule) -> Vec<String> {
    let warnings = Thresholds::default().warnings(report, rule);
    warnings.iter().map(ToString::to_string).collect()
}

/// The texts of responses' tokens, as credit reads them.
pub(crate) fn borrowed(texts: &[Vec<String>]) -> Vec<Vec<&str>> {
    texts
        .iter()
        .map(|texts| texts.iter().map(String::as_str).collect())
        .collect()
}

/// The diagnostics of each pair that has been given credit, for sums over batches; empty if no signal was segmented. With
/// `reference_logps`, chosen then rejected, decisive tokens are those that the reference is not sure of.
///
/// # Errors
/// [`Error::Credit`] if a column is not one value a token.
pub fn diagnostics(
    credit: &PairCredit,
    signals: &[PairSignals],
    reference_logps: Option<&[[Vec<f32>; 2]]>,
) -> Result<Vec<Diagnostics>> {
    let pairs = credit.given.iter().enumerate();
    pairs
        .map(|(index, given)| {
            let mut diagnostics = Diagnostics::new(DECISIVE_PROBABILITY);
            for (side, credit) in given.iter().enumerate() {
                let truth = signals[index].truth[side].as_deref();
                let logps = reference_logps.map(|logps| &logps[index][side][..]);
                diagnostics.observe(credit, truth, logps)?;
            }
            Ok(diagnostics)
        })
        .collect()
}

/// Records of pairs that have been given credit, chosen then rejected, in order.
///
/// # Errors
/// If a token's text cannot be made.
pub fn records(
    pairs: &[TokenizedPair],
    signals: &[PairSignals],
    credit: PairCredit,
    reference_logps: Option<&[[Vec<f32>; 2]]>,
    tokenizer: &Tokenizer,
) -> Result<Vec<CreditRecord>> {
    let mut records = Vec::with_capacity(2 * pairs.len());
    for (index, (pair, given)) in pairs.iter().zip(credit.given).enumerate() {
        for (side, credit) in given.into_iter().enumerate() {
            let ids = pair.response(SIDES[side]);
            records.push(credit.into_record(RecordSample {
                id: pair.id,
                side: Some(SIDES[side]),
                prompt_token_ids: pair.prompt.clone(),
                token_ids: ids.to_vec(),
                token_texts: tokenizer.token_texts(ids)?,
                text_offsets: tokenizer.text_offsets(ids)?,
                truth: signals[index].truth[side].clone(),
                token_logps: None,
                reference_token_logps: reference_logps.map(|logps| logps[index][side].clone()),
            }));
        }
    }
    Ok(records)
}

/// Reads a file of credit records, each checked.
///
/// # Errors
/// [`Error::Record`] with file and line, [`Error::File`].
pub fn read_records(path: &Path) -> Result<Vec<CreditRecord>> {
    let bytes = read_file(path)?;
    let text = std::str::from_utf8(&bytes).map_err(|error| {
        let line = bytes[..error.valid_up_to()]
            .iter()
            .filter(|&&byte| byte == b'\n')
            .count()
            + 1;
        Error::Record {
            path: path.into(),
            line,
            what: "it is not UTF-8".to_owned(),
        }
    })?;
    let lines = text
        .lines()
        .enumerate()
        .filter(|(_, line)| !line.trim().is_empty());
    lines
        .map(|(index, line)| {
            let fault = |what| Error::Record {
                path: path.into(),
                line: index + 1,
                what,
            };
            let record: CreditRecord =
                serde_json::from_str(line).map_err(|error| fault(error.to_string()))?;
            record
                .validate()
                .map_err(|error| fault(error.to_string()))?;
            Ok(record)
        })
        .collect()
}

/// Writes credit records, one a line, whole or not at all.
///
/// # Errors
/// [`Error::File`].
pub fn write_records(path: &Path, records: &[CreditRecord]) -> Result<()> {
    let mut bytes = Vec::new();
    for record in records {
        serde_json::to_writer(&mut bytes, record).expect("a record is plain data in memory");
        bytes.push(b'\n');
    }
    Ok(write_atomic(path, &bytes)?)
}

fn first_without_signal(pairs: &[TokenizedPair], signals: &[PairSignals]) -> Option<(u64, Side)> {
    let mut sides = pairs.iter().zip(signals).flat_map(|(pair, known)| {
        let of = |side: usize| {
            known.signal[side]
                .is_none()
                .then_some((pair.id, SIDES[side]))
        };
        [of(0), of(1)]
    });
    sides.find_map(|side| side)
}

fn texts(pairs: &[TokenizedPair], tokenizer: &Tokenizer) -> Result<Vec<Vec<String>>> {
    let responses = pairs.iter().flat_map(|pair| [&pair.chosen, &pair.rejected]);
    Ok(responses
        .map(|ids| tokenizer.token_texts(ids))
        .collect::<Result<_, _>>()?)
}

/// What the columns and the messages call a response.
pub(crate) fn side_name(side: Option<Side>) -> &'static str {
    match side {
        Some(Side::Chosen) => "chosen",
        Some(Side::Rejected) => "rejected",
        None => "completion",
    }
}
