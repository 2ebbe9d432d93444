//! A few pairs to look at, token by token.

use pivotal_core::{CreditRecord, Side};
use pivotal_credit::{RecordSample, ResponseCredit};
use pivotal_report::{PairView, SignalPair};

use crate::arm::{ArmKind, credits};
use crate::error::Result;
use crate::experiment::{SeedPairs, SeedSignal};
use crate::training_pairs::{SIDES, TrainingPairs};
use crate::world::pairs::WorldPair;
use crate::world::vocabulary::decode;

/// Views of the first two pairs with a right label and the first two with a flipped one: chosen by place, not by looks.
pub(crate) fn pair_views(
    pairs: &SeedPairs,
    log_ratio: &SeedSignal,
    level: &SeedSignal,
) -> Result<Vec<PairView>> {
    let training = &pairs.training;
    let log_ratios = credits(ArmKind::LogRatio, &log_ratio.signal, training, pairs.seed)?;
    let levels = credits(ArmKind::Level, &level.signal, training, pairs.seed)?;
    let with_label = |flipped: bool| {
        let indices = 0..training.pairs.len();
        indices
            .filter(move |&index| training.pairs[index].flipped == flipped)
            .take(2)
    };
    with_label(false)
        .chain(with_label(true))
        .map(|index| {
            let pair = &training.pairs[index];
            let signal = |label: &str, credits: &[ResponseCredit]| -> Result<SignalPair> {
                Ok(SignalPair {
                    label: label.to_owned(),
                    chosen: record(training, index, Side::Chosen, &credits[2 * index])?,
                    rejected: record(training, index, Side::Rejected, &credits[2 * index + 1])?,
                })
            };
            Ok(PairView {
                title: format!("Pair {} of seed {}", index + 1, pairs.seed),
                note: note(pair),
                prompt: decode(&training.tokenized[index].prompt)?,
                signals: vec![
                    signal("log_ratio of the oracle", &log_ratios)?,
                    signal("level of the reward model", &levels)?,
                ],
            })
        })
        .collect()
}

fn note(pair: &WorldPair) -> String {
    let [chosen, rejected] = SIDES.map(|side| pair.attempt(side).mistakes());
    let label = match pair.flipped {
        true => "The label is flipped",
        false => "The label is right",
    };
    format!(
        "{label}: {chosen} wrong step(s) in the chosen response, {rejected} in the rejected one. Numbers have their units digit first."
    )
}

fn record(
    pairs: &TrainingPairs,
    index: usize,
    side: Side,
    credit: &ResponseCredit,
) -> Result<CreditRecord> {
    let pair = &pairs.tokenized[index];
    let of = usize::from(side == Side::Rejected);
    let text = decode(pair.response(side))?;
    Ok(credit.clone().into_record(RecordSample {
        id: pair.id,
        side: Some(side),
        prompt_token_ids: pair.prompt.clone(),
        token_ids: pair.response(side).to_vec(),
        token_texts: text.chars().map(String::from).collect(),
        text_offsets: (0..text.len()).map(|start| [start, start + 1]).collect(),
        truth: Some(pairs.right[index][of].clone()),
        token_logps: None,
        reference_token_logps: Some(pairs.reference_logps[index][of].clone()),
    }))
}
