//! Credit records on disk, and the signals that masks are made of.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use pivotal_core::{CreditRecord, Side, Sign, TokenMask, TokenizedPair, read_file, write_atomic};
use pivotal_credit::{
    Credit, CreditConfig, Diagnostics, DiagnosticsReport, RecordSample, Response, ResponseCredit,
    Selection, Signal, Thresholds, Weighting,
};
use pivotal_data::{External, Tokenizer};
use pivotal_kernels::account::{Part, time};

use crate::error::{Error, Result};

/// Tokens of at most this probability under the reference count as decisive in diagnostics.
const DECISIVE_PROBABILITY: f64 = 0.9;

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
    let mut records: BTreeMap<(u64, Side), CreditRecord> = BTreeMap::new();
    let mut names = BTreeSet::new();
    for (index, record) in read_records(path)?.into_iter().enumerate() {
        let fault = |what: &str| Error::Record {
            path: path.into(),
            line: index + 1,
            what: what.to_owned(),
        };
        let side = record
            .side
            .ok_or_else(|| fault("`side` is null, expected chosen or rejected"))?;
        names.insert(record.signal_name.clone());
        if names.len() > 1 {
            return Err(fault("`signal_name` differs from the records before"));
        }
        if records.insert((record.id, side), record).is_some() {
            return Err(fault("this response has a record already"));
        }
    }
    let name = names.pop_first().unwrap_or_default();
    let signal = Signal::ALL
        .iter()
        .copied()
        .find(|signal| signal.name() == name);
    let signal = signal.ok_or_else(|| Error::Record {
        path: path.into(),
        line: 1,
        what: format!("`signal_name` is `{name}`, expected a signal of this version"),
    })?;
    let mut signals = Vec::with_capacity(pairs.len());
    for pair in pairs {
        let mut found = PairSignals::default();
        for (index, side) in SIDES.into_iter().enumerate() {
            let name = side_name(side);
            let record = records
                .remove(&(pair.id, side))
                .ok_or_else(|| Error::NoRecord {
                    path: path.into(),
                    row: pair.id,
                    side: name,
                })?;
            if record.token_ids != pair.response(side) {
                return Err(Error::OtherTokens {
                    path: path.into(),
                    row: pair.id,
                    side: name,
                });
            }
            found.signal[index] = Some(record.signal);
            found.truth[index] = record.truth;
        }
        signals.push(found);
    }
    Ok((signals, signal))
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
    let rule = config.resolve()?;
    if rule.weighting == Weighting::Soft {
        return Err(Error::Setting {
            key: "credit-weighting",
            found: "soft".into(),
            expected: "hard: the losses of these recipes take masks, not weights",
        });
    }
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
                    side: side_name(side),
                    selection,
                });
            }
            (_, false) => return Err(Error::NoSignal { selection }),
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
    let texts: Option<Vec<Vec<&str>>> = texts.as_ref().map(|all| {
        all.iter()
            .map(|texts| texts.iter().map(String::as_str).collect())
            .collect()
    });
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
    let warnings = Thresholds::default().warnings(&report, &rule);
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
        warnings: warnings.iter().map(ToString::to_string).collect(),
    })
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

fn side_name(side: Side) -> &'static str {
    match side {
        Side::Chosen => "chosen",
        Side::Rejected => "rejected",
    }
}
