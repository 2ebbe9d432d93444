//! The reference's log-probabilities of every response token, cached on disk.
//!
//! One number a token, not a sum: the masks are then free to change. The key hashes everything that decides a
//! log-probability: the weights, the configuration, the precision and the token ids (and so the tokenizer, the template
//! and the limits).

use std::collections::BTreeMap;
use std::path::Path;

use pivotal_core::{TokenizedPair, content_hash, write_checked};
use pivotal_model::{Decoder, HostTensor, read_tensors, tensors_to_bytes};

use crate::error::Result;
use crate::progress::{self, ProgressMode};
use crate::run::write_error;
use crate::score::{Group, token_logps_told};

/// The reference's log-probabilities of each pair's responses, in nats, chosen then rejected; from `cache` if they are
/// there.
///
/// `decoder_hash` is [`crate::workspace::Workspace::decoder_hash`] of `reference`. A cache that is damaged, or of another
/// shape, is computed anew.
///
/// # Errors
/// If a sequence does not fit the model, or the cache cannot be written.
pub fn pair_logps(
    reference: &Decoder,
    pairs: &[TokenizedPair],
    micro_batch_tokens: usize,
    cache: &Path,
    decoder_hash: &str,
    progress: ProgressMode,
) -> Result<Vec<[Vec<f32>; 2]>> {
    let path = cache.join(format!("{}.safetensors", key(pairs, decoder_hash)));
    if let Some(logps) = read(&path, pairs) {
        return Ok(logps);
    }
    let groups: Vec<_> = pairs.iter().map(Group::of_pair).collect();
    let mut done = progress::scoring("reference", groups.len(), progress);
    let scored = token_logps_told(reference, &groups, micro_batch_tokens, &mut done)?;
    let logps: Vec<[Vec<f32>; 2]> = scored
        .into_iter()
        .map(|mut sides| {
            let rejected = sides.pop().unwrap_or_default();
            [sides.pop().unwrap_or_default(), rejected]
        })
        .collect();
    std::fs::create_dir_all(cache).map_err(|source| write_error(cache, source))?;
    let flat: Vec<f32> = logps.iter().flatten().flatten().copied().collect();
    let tensor = HostTensor::new(vec![flat.len()], flat)?;
    let file = BTreeMap::from([("token_logps".to_owned(), tensor)]);
    write_checked(&path, &tensors_to_bytes(&file)?)?;
    Ok(logps)
}

fn key(pairs: &[TokenizedPair], decoder_hash: &str) -> String {
    let mut bytes = decoder_hash.as_bytes().to_vec();
    for pair in pairs {
        for ids in [&pair.prompt, &pair.chosen, &pair.rejected] {
            bytes.extend((ids.len() as u64).to_le_bytes());
            bytes.extend(ids.iter().flat_map(|id| id.to_le_bytes()));
        }
    }
    content_hash(&bytes)
}

fn read(path: &Path, pairs: &[TokenizedPair]) -> Option<Vec<[Vec<f32>; 2]>> {
    // A missing or damaged cache costs a forward pass, nothing else: it is not an error.
    let tensors = read_tensors(path).ok()?;
    let mut rest = tensors.get("token_logps")?.values();
    let tokens: usize = pairs
        .iter()
        .map(|pair| pair.chosen.len() + pair.rejected.len())
        .sum();
    if rest.len() != tokens {
        return None;
    }
    let mut take = |count: usize| {
        let (head, tail) = rest.split_at(count);
        rest = tail;
        head.to_vec()
    };
    Some(
        pairs
            .iter()
            .map(|pair| [take(pair.chosen.len()), take(pair.rejected.len())])
            .collect(),
    )
}
