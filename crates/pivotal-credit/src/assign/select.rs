//! The selections other than `agree` (METHOD, section 7).

use pivotal_core::{Sign, random_stream};

use super::{Own, Scored};
use crate::select::{shuffle, shuffle_within_positions};
use crate::{Credit, Neutral, Response, Selection, agree, random_subset, top_percent};

impl Credit {
    /// From `agree`'s masks to the selection's.
    pub(super) fn select(&self, batch: &[Response<'_>], owns: &[Own], scored: &mut [Scored]) {
        let percent = self.rule.selection_percent.unwrap_or(100.0);
        match self.rule.selection {
            Selection::Agree => {}
            Selection::All => scored.iter_mut().for_each(|one| one.keep.fill(true)),
            Selection::Disagree => {
                scored
                    .iter_mut()
                    .flat_map(|one| &mut one.keep)
                    .for_each(|keep| *keep = !*keep);
            }
            Selection::Random => {
                for (response, one) in batch.iter().zip(scored) {
                    // By response, not by batch: the same response draws the same mask in every epoch, as `agree` would.
                    let name = format!("credit/random/{}/{}", response.id, response.sample);
                    let mut random = random_stream(self.seed, &name);
                    match self.rule.random_fraction {
                        Some(fraction) => {
                            one.keep = random_subset(one.keep.len(), fraction, &mut random);
                        }
                        None => shuffle(&mut one.keep, &mut random),
                    }
                }
            }
            Selection::RandomPosition => {
                let name = format!("credit/random_position/{}", self.state.batches);
                let signs: Vec<Sign> = batch
                    .iter()
                    .map(|response| response.sequence_sign)
                    .collect();
                let mut keep: Vec<Vec<bool>> = scored
                    .iter_mut()
                    .map(|one| std::mem::take(&mut one.keep))
                    .collect();
                shuffle_within_positions(&mut keep, &signs, &mut random_stream(self.seed, &name));
                scored
                    .iter_mut()
                    .zip(keep)
                    .for_each(|(one, keep)| one.keep = keep);
            }
            Selection::Truth => {
                for ((response, own), one) in batch.iter().zip(owns).zip(scored) {
                    let Some(truth) = response.truth else {
                        continue;
                    };
                    for (index, keep) in one.keep.iter_mut().enumerate() {
                        let sign = match truth[own.index(index)] {
                            true => Sign::Positive,
                            false => Sign::Negative,
                        };
                        let sequence = match &one.token_signs {
                            Some(signs) => signs[index],
                            None => response.sequence_sign,
                        };
                        *keep = agree(sign, sequence, Neutral::Drop);
                    }
                }
            }
            Selection::Quota => {
                for ((response, own), one) in batch.iter().zip(owns).zip(scored) {
                    let toward = f64::from(response.sequence_sign.as_i8());
                    match response.sequence_sign {
                        Sign::Neutral => one.keep.fill(false),
                        _ => {
                            let signal = own.signal.iter().map(|&r| toward * f64::from(r));
                            one.keep = top_percent(&signal.collect::<Vec<_>>(), percent);
                        }
                    }
                }
            }
            Selection::ExcessLoss => {
                let excess = |response: &Response<'_>, index: usize| {
                    let of = |column: Option<&[f32]>| column.map_or(0.0, |c| f64::from(c[index]));
                    of(response.columns.reference_token_logps) - of(response.columns.token_logps)
                };
                keep_top(batch, owns, scored, percent, excess);
            }
            Selection::EntropyTop => {
                let entropy = |response: &Response<'_>, index: usize| {
                    let column = response.columns.policy_entropies;
                    column.map_or(0.0, |entropies| f64::from(entropies[index]))
                };
                keep_top(batch, owns, scored, percent, entropy);
            }
        }
    }
}

/// Keeps the `percent` % largest of `value`, of a response's token, over the whole batch's own tokens.
fn keep_top(
    batch: &[Response<'_>],
    owns: &[Own],
    scored: &mut [Scored],
    percent: f64,
    value: impl Fn(&Response<'_>, usize) -> f64,
) {
    let each = batch.iter().zip(owns).flat_map(|(response, own)| {
        let value = &value;
        (0..own.signal.len()).map(move |token| value(response, own.index(token)))
    });
    let top = top_percent(&each.collect::<Vec<_>>(), percent);
    let places = scored.iter_mut().flat_map(|one| &mut one.keep);
    places.zip(top).for_each(|(keep, top)| *keep = top);
}
