//! Rejection sampling: fine-tuning on the kept segments of the best of several samples.
//!
//! ```text
//! L = -Σ M·log π / ΣM      over the accepted responses of an optimizer step
//! ```
//!
//! Of n samples of each prompt those of the highest score are accepted, and the policy learns from them as from given responses
//! (best of n: Stiennon et al. 2020, arXiv:2009.01325; RAFT: Dong et al. 2023, arXiv:2304.06767; Llama 2: Touvron et al. 2023,
//! arXiv:2307.09288, section 3.2.3). M is the keep mask of segment credit under a positive sequence sign (METHOD, sections 6 to 8);
//! with `keep` = all this is [`crate::sft`] on the same ids, bit for bit. π is the policy itself: the temperature of sampling has no
//! part in the loss.
//!
//! [`choose_accepted`] and [`gradients`] are pure: a study calls them on what it sampled itself.

use std::collections::HashMap;

use pivotal_core::{TokenMask, TokenizedResponse};
use pivotal_model::Decoder;

use crate::error::Result;
use crate::optimizer::GradientSum;
use crate::settings::OptimizerSettings;
use crate::sft::{self, SftMetrics};

mod choose;
mod settings;

pub use choose::{AcceptRule, Candidate, Dedupe, Verdict, choose_accepted};
pub use settings::{MinScore, RejectFlags, RejectSettings};

/// An accepted response, as the update sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AcceptedResponse {
    /// The row of its prompt: errors name it.
    pub id: u64,
    /// Token ids of the prompt; never empty.
    pub prompt: Vec<u32>,
    /// Token ids of the response, the one that ended it included; never empty.
    pub response: Vec<u32>,
    /// Which of the response's tokens the loss uses, `[tokens]`. All are the model's own: there is no other mask.
    pub keep: TokenMask,
}

/// The gradients and numbers of one optimizer step over `accepted`: `-Σ M·log π / ΣM`, the denominator over all of them, whatever
/// the micro-batches.
///
/// Responses to the same prompt are packed behind one copy of it. Where nothing is kept there is no gradient, the loss is 0 and
/// [`SftMetrics::kept_tokens`] says so: the caller takes no step then.
///
/// # Errors
/// [`crate::Error::NotFinite`] naming the rows of responses whose loss is not finite; [`crate::Error::Pack`] or
/// [`crate::Error::Model`] for a sequence that cannot be packed or does not fit the model.
///
/// # Panics
/// If a mask is not one flag a token.
pub fn gradients(
    policy: &mut Decoder,
    accepted: &[&AcceptedResponse],
    settings: &OptimizerSettings,
    step: u64,
) -> Result<(GradientSum, SftMetrics)> {
    let items: Vec<TokenizedResponse> = by_prompt(accepted)
        .into_iter()
        .map(|one| {
            assert_eq!(
                one.keep.len(),
                one.response.len(),
                "a mask has one flag a token"
            );
            TokenizedResponse {
                id: one.id,
                prompt: one.prompt.clone(),
                response: one.response.clone(),
                response_mask: one.keep.as_slice().to_vec(),
            }
        })
        .collect();
    let items: Vec<&TokenizedResponse> = items.iter().collect();
    sft::gradients(policy, &items, settings, step)
}

/// Each prompt's responses behind the first of them, so that they can share its copy; otherwise the order stays.
fn by_prompt<'a>(accepted: &[&'a AcceptedResponse]) -> Vec<&'a AcceptedResponse> {
    let mut places: HashMap<&[u32], usize> = HashMap::new();
    let mut groups: Vec<Vec<&AcceptedResponse>> = Vec::new();
    for &one in accepted {
        let place = *places.entry(&one.prompt).or_insert(groups.len());
        match groups.get_mut(place) {
            Some(group) => group.push(one),
            None => groups.push(vec![one]),
        }
    }
    groups.into_iter().flatten().collect()
}
