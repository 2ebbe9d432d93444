//! `pivotal annotate`: a signal for every token of a file of preferences, segmented and masked, one record a response.

use std::path::PathBuf;

use pivotal_core::{FileHash, check_writable, is_stream, same_file};
use pivotal_credit::{CreditConfig, DiagnosticsReport, increment, log_ratio};
use pivotal_data::{DataSet, ReadOptions, tokenize_pairs};
use pivotal_model::{Decoder, RewardModel};
use serde::Serialize;

use crate::error::{Error, Result};
use crate::progress;
use crate::run::{check_files, manifest, write_beside};
use crate::score::{Group, token_logps_told, token_values_told};
use crate::settings::{
    AnnotateFlags, AnnotateSettings, AnnotatedSignal, CreditFlags, DataFlags, DataSettings,
    ModelFlags, ModelSettings,
};
use crate::signals::{self, PairSignals};
use crate::table::recipe;
use crate::workspace::Workspace;

recipe! {
    /// The configuration of `pivotal annotate`.
    pub struct AnnotateConfig, AnnotateRunFlags {
        /// `[model]`
        model: ModelSettings, ModelFlags;
        /// `[data]`
        data: DataSettings, DataFlags;
        /// `[annotate]`
        annotate: AnnotateSettings, AnnotateFlags;
        /// `[credit]`
        credit: CreditConfig, CreditFlags;
    }
}

/// What was annotated.
#[derive(Clone, Debug, Serialize)]
pub struct Summary {
    /// The file of records.
    pub records: PathBuf,
    /// Pairs annotated.
    pub pairs: usize,
    /// Pairs dropped because the length limits left nothing of a response.
    pub dropped: usize,
    /// Pairs whose chosen response has the higher mean signal; a tie counts half. It says nothing about single tokens.
    pub pair_accuracy: f64,
    /// What credit did.
    pub credit: Option<DiagnosticsReport>,
    /// Warnings about the masks.
    pub warnings: Vec<String>,
}

/// Runs the recipe.
///
/// # Errors
/// [`Error`]: its kind says whose fault it is. The resolved configuration and a manifest are written beside the records. An existing file of records is refused unless `overwrite`.
pub fn annotate(config: &AnnotateConfig, overwrite: bool) -> Result<Summary> {
    let path = &config.annotate.records;
    check_records(config, overwrite)?;
    config.annotate.check()?;
    check_files(&[&config.data.path])?;
    let data = DataSet::read(&config.data.path, ReadOptions::default())?;
    let workspace = match config.annotate.signal {
        AnnotatedSignal::LogRatio => Workspace::load_packed(&config.model)?,
        AnnotatedSignal::Level | AnnotatedSignal::Increment => {
            Workspace::load_below_reward_model(&config.model)?
        }
    };
    let options = config
        .data
        .tokenize_options(workspace.decoder.config().vocab_size);
    let tokenized = tokenize_pairs(
        &data,
        &workspace.tokenizer,
        workspace.template.as_ref(),
        &options,
    )?;
    let pairs = tokenized.items;
    workspace.check_pairs(&config.data.path, &pairs)?;
    let groups: Vec<_> = pairs.iter().map(Group::of_pair).collect();

    let scorer;
    let (signal, reference_logps) = match config.annotate.signal {
        AnnotatedSignal::LogRatio => {
            let oracle = oracle(config, &workspace)?;
            scorer = Workspace::decoder_hash(&oracle, config.model.precision);
            let (signal, reference) = log_ratios(config, &workspace, &oracle, &groups)?;
            (signal, Some(reference))
        }
        kind => {
            let path = &config.annotate.reward_model;
            require("reward-model", path)?;
            let model = workspace.reward_model("reward-model", path, config.model.precision)?;
            scorer = Workspace::reward_model_hash(&model, config.model.precision);
            (levels(kind, &model, &groups, &config.annotate)?, None)
        }
    };
    let known: Vec<PairSignals> = signal
        .iter()
        .map(|[chosen, rejected]| PairSignals {
            signal: [Some(chosen.clone()), Some(rejected.clone())],
            ..PairSignals::default()
        })
        .collect();
    let mut credit = config.credit.clone();
    credit.signal = match config.annotate.signal {
        AnnotatedSignal::LogRatio => pivotal_credit::Signal::LogRatio,
        AnnotatedSignal::Level => pivotal_credit::Signal::Level,
        AnnotatedSignal::Increment => pivotal_credit::Signal::Increment,
    };
    let given = signals::assign(
        &pairs,
        &known,
        Some(&workspace.tokenizer),
        &credit,
        config.annotate.seed,
    )?;
    let (report, warnings) = (given.report.clone(), given.warnings.clone());
    let logps = reference_logps.as_deref();
    let records = signals::records(&pairs, &known, given, logps, &workspace.tokenizer)?;
    let scorer = FileHash {
        path: config.annotate.scorer().display().to_string(),
        blake3: scorer,
    };
    let weights = [workspace.weights(config.model.precision), scorer];
    let seed = config.annotate.seed;
    let manifest = manifest(
        "annotate",
        seed,
        workspace.decoder.device(),
        &[&config.data.path],
        &weights,
    )?;
    write_beside(path, config, &manifest)?;
    signals::write_records(path, &records)?;
    Ok(Summary {
        records: path.clone(),
        pairs: pairs.len(),
        dropped: tokenized.dropped,
        pair_accuracy: pair_accuracy(&signal),
        credit: report,
        warnings,
    })
}

/// Refuses a file of records that could not be written after the work, or whose writing would destroy an input.
fn check_records(config: &AnnotateConfig, overwrite: bool) -> Result<()> {
    let path = &config.annotate.records;
    let setting = |found: String, expected| {
        Err(Error::Setting {
            key: "records",
            found,
            expected,
        })
    };
    if path.as_os_str().is_empty() {
        return setting("empty".into(), "the file of credit records to write");
    }
    let name = path.display().to_string();
    if path.is_dir() || is_stream(path) {
        let expected = "a regular file: what it was made of is written beside it";
        return setting(name, expected);
    }
    if path.exists() && !overwrite {
        return Err(Error::FileExists { path: path.clone() });
    }
    let model = &config.model;
    let inputs = [&config.data.path, &model.path, &model.adapter];
    let scorer = config.annotate.scorer();
    let mut inputs = inputs.into_iter().map(PathBuf::as_path).chain([scorer]);
    if let Some(input) = inputs.find(|input| same_file(input, path)) {
        return Err(Error::InputReplaced {
            path: path.clone(),
            input: input.into(),
        });
    }
    let directory = path
        .parent()
        .filter(|parent| !parent.as_os_str().is_empty());
    if directory.is_some_and(|directory| !directory.is_dir()) {
        return setting(name, "a file in a directory that exists");
    }
    Ok(check_writable(path)?)
}

type Signals = Vec<[Vec<f32>; 2]>;

fn oracle(config: &AnnotateConfig, workspace: &Workspace) -> Result<Decoder> {
    let path = &config.annotate.oracle;
    require("oracle", path)?;
    let oracle = workspace.other_policy(path, config.model.precision)?;
    if oracle.config().vocab_size != workspace.decoder.config().vocab_size {
        return Err(Error::Setting {
            key: "oracle",
            found: format!("a model with {} token ids", oracle.config().vocab_size),
            expected: "a model with the vocabulary of `model`",
        });
    }
    Ok(oracle)
}

fn log_ratios(
    config: &AnnotateConfig,
    workspace: &Workspace,
    oracle: &Decoder,
    groups: &[Group<'_>],
) -> Result<(Signals, Signals)> {
    let settings = &config.annotate;
    let budget = settings.micro_batch_tokens;
    let reference = &workspace.decoder;
    let mut done = progress::scoring("reference", groups.len(), config.annotate.progress);
    let reference = token_logps_told(reference, groups, budget, &mut done)?;
    let mut done = progress::scoring("oracle", groups.len(), config.annotate.progress);
    let oracle = token_logps_told(oracle, groups, budget, &mut done)?;
    let signals = oracle
        .iter()
        .zip(&reference)
        .map(|(oracle, reference)| {
            let side = |side: usize| {
                log_ratio(settings.signal_beta as f32, &oracle[side], &reference[side])
            };
            Ok([side(0)?, side(1)?])
        })
        .collect::<Result<_>>()?;
    Ok((signals, reference.into_iter().map(two).collect()))
}

fn levels(
    kind: AnnotatedSignal,
    model: &RewardModel,
    groups: &[Group<'_>],
    settings: &AnnotateSettings,
) -> Result<Signals> {
    let mut done = progress::scoring("reward model", groups.len(), settings.progress);
    let budget = settings.micro_batch_tokens;
    let values = token_values_told(model, groups, budget, &mut done)?;
    let signal = |group: Vec<crate::score::ResponseValues>| {
        let responses = group.into_iter().map(|values| match kind {
            AnnotatedSignal::Increment => increment(values.prompt_value, &values.levels),
            _ => values.levels,
        });
        two(responses.collect())
    };
    Ok(values.into_iter().map(signal).collect())
}

fn two(mut sides: Vec<Vec<f32>>) -> [Vec<f32>; 2] {
    let rejected = sides.pop().unwrap_or_default();
    [sides.pop().unwrap_or_default(), rejected]
}

fn require(key: &'static str, path: &std::path::Path) -> Result<()> {
    match path.as_os_str().is_empty() {
        true => Err(Error::Setting {
            key,
            found: "empty".into(),
            expected: "a run, adapter or model directory",
        }),
        false => Ok(()),
    }
}

/// The share of pairs whose chosen response has the higher mean signal.
pub fn pair_accuracy(signals: &[[Vec<f32>; 2]]) -> f64 {
    let mean = |values: &[f32]| {
        values.iter().map(|&value| f64::from(value)).sum::<f64>() / values.len().max(1) as f64
    };
    let right = signals.iter().map(|[chosen, rejected]| {
        let (chosen, rejected) = (mean(chosen), mean(rejected));
        if chosen == rejected {
            0.5
        } else {
            f64::from(u8::from(chosen > rejected))
        }
    });
    right.sum::<f64>() / signals.len().max(1) as f64
}
