//! One advantage a response, from the scores of the responses to its prompt.
//!
//! ```text
//! group_normalised:  (R_i − mean_group) / (std_group + ε)     Shao et al. 2024, arXiv:2402.03300 (GRPO)
//! batch_normalised:  (R_i − mean_group) / (std_batch + ε)     TRL's `scale_rewards = "batch"`
//! mean_only:          R_i − mean_group                        Liu et al. 2025, arXiv:2503.20783 (Dr. GRPO)
//! leave_one_out:      R_i − mean of the group's others        Ahmadian et al. 2024, arXiv:2402.14740 (RLOO)
//! ```
//!
//! Differs: the standard deviation is Bessel's in TRL and verl and biased in numpy codes (open-instruct); ε is 1e-4 in TRL and
//! 1e-6 in verl. A group of one gives 0 here; `torch.std` gives NaN.

use std::collections::HashMap;

use pivotal_core::Sign;

use super::Variance;
use super::whiten::moments;
use crate::Result;
use crate::check::{domain, finite, length};
use crate::named::named_enum;

named_enum! {
    /// How the scores of a group become advantages.
    pub enum GroupAdvantage {
        /// Less the group's mean, over the group's standard deviation: GRPO.
        GroupNormalised = "group_normalised",
        /// Less the group's mean, over the whole batch's standard deviation.
        BatchNormalised = "batch_normalised",
        /// Less the group's mean: Dr. GRPO.
        MeanOnly = "mean_only",
        /// Less the mean of the group's other scores: RLOO.
        LeaveOneOut = "leave_one_out",
    }
}

named_enum! {
    /// The baseline of a score's sign (METHOD, section 6).
    pub enum ScoreBaseline {
        /// The mean over the responses to the same prompt.
        Group = "group",
        /// The mean over the batch.
        Batch = "batch",
    }
}

/// What [`group_advantages`] finds.
#[derive(Clone, Debug, PartialEq)]
pub struct GroupAdvantages {
    /// Each response's advantage, `[responses]`.
    pub advantages: Vec<f32>,
    /// Prompts in the batch.
    pub groups: usize,
    /// Those whose scores are all alike, groups of one included: they train nothing.
    pub flat_groups: usize,
}

/// Indices of the responses to each prompt, prompts in the order of their first response.
fn groups_of(prompts: &[u64]) -> Vec<Vec<usize>> {
    let mut places: HashMap<u64, usize> = HashMap::new();
    let mut groups: Vec<Vec<usize>> = Vec::new();
    for (index, &prompt) in prompts.iter().enumerate() {
        let place = *places.entry(prompt).or_insert(groups.len());
        if place == groups.len() {
            groups.push(Vec::new());
        }
        groups[place].push(index);
    }
    groups
}

fn check(prompts: &[u64], scores: &[f32]) -> Result<()> {
    length("scores", prompts.len(), scores.len())?;
    finite("scores", scores, &vec![true; scores.len()])
}

/// The advantage of each response; `prompts` says which belong together, in any order.
///
/// `epsilon` is added to the standard deviation; `variance` says which one. Both are read by the normalised two only.
///
/// # Shapes
/// `prompts`, `scores`: `[responses]`.
///
/// # Errors
/// [`Error::Unequal`](crate::Error::Unequal), [`Error::NotFiniteColumn`](crate::Error::NotFiniteColumn), or
/// [`Error::Value`](crate::Error::Value) for an `epsilon` that is negative or not finite.
///
/// # Examples
/// ```
/// use pivotal_credit::{GroupAdvantage, Variance, group_advantages};
/// let found = group_advantages(
///     &[7, 7, 7, 8], &[1.0, 2.0, 6.0, 5.0], GroupAdvantage::LeaveOneOut, Variance::Bessel, 1e-4,
/// )?;
/// // 1 − (2 + 6)/2, 2 − (1 + 6)/2, 6 − (1 + 2)/2; the last has nobody to compare with.
/// assert_eq!(found.advantages, [-3.0, -1.5, 4.5, 0.0]);
/// assert_eq!((found.groups, found.flat_groups), (2, 1));
/// # Ok::<(), pivotal_credit::Error>(())
/// ```
pub fn group_advantages(
    prompts: &[u64],
    scores: &[f32],
    kind: GroupAdvantage,
    variance: Variance,
    epsilon: f64,
) -> Result<GroupAdvantages> {
    check(prompts, scores)?;
    let inside = epsilon.is_finite() && epsilon >= 0.0;
    domain("epsilon", inside, "a finite number of at least 0", epsilon)?;
    let batch_std = moments(scores.iter().copied(), variance).variance.sqrt();
    let groups = groups_of(prompts);
    let mut advantages = vec![0.0_f32; scores.len()];
    let mut flat_groups = 0;
    for group in &groups {
        let first = scores[group[0]];
        if group.iter().all(|&index| scores[index] == first) {
            flat_groups += 1;
            continue;
        }
        let found = moments(group.iter().map(|&index| scores[index]), variance);
        let count = group.len() as f64;
        let scale = match kind {
            GroupAdvantage::GroupNormalised => 1.0 / (found.variance.sqrt() + epsilon),
            GroupAdvantage::BatchNormalised => 1.0 / (batch_std + epsilon),
            GroupAdvantage::MeanOnly => 1.0,
            // R − (Σ − R)/(n − 1) = (R − Σ/n)·n/(n − 1).
            GroupAdvantage::LeaveOneOut => count / (count - 1.0),
        };
        for &index in group {
            advantages[index] = ((f64::from(scores[index]) - found.mean) * scale) as f32;
        }
    }
    Ok(GroupAdvantages {
        advantages,
        groups: groups.len(),
        flat_groups,
    })
}

/// The sequence sign of each response, of its score less a baseline; neutral where the two are equal.
///
/// # Shapes
/// `prompts`, `scores` and the result: `[responses]`.
///
/// # Errors
/// [`Error::Unequal`](crate::Error::Unequal) or [`Error::NotFiniteColumn`](crate::Error::NotFiniteColumn).
///
/// # Examples
/// ```
/// use pivotal_core::Sign::{Negative, Neutral, Positive};
/// use pivotal_credit::{ScoreBaseline, sequence_signs};
/// let (prompts, scores) = ([1, 1, 2], [3.0, 1.0, 5.0]);
/// assert_eq!(sequence_signs(&prompts, &scores, ScoreBaseline::Group)?, [Positive, Negative, Neutral]);
/// assert_eq!(sequence_signs(&prompts, &scores, ScoreBaseline::Batch)?, [Neutral, Negative, Positive]);
/// # Ok::<(), pivotal_credit::Error>(())
/// ```
pub fn sequence_signs(
    prompts: &[u64],
    scores: &[f32],
    baseline: ScoreBaseline,
) -> Result<Vec<Sign>> {
    check(prompts, scores)?;
    let groups = match baseline {
        ScoreBaseline::Group => groups_of(prompts),
        ScoreBaseline::Batch => vec![(0..scores.len()).collect()],
    };
    let mut signs = vec![Sign::Neutral; scores.len()];
    for group in groups {
        let mean = moments(group.iter().map(|&index| scores[index]), Variance::Biased).mean;
        for index in group {
            // In f64: the mean of equal f32 numbers is then exactly that number.
            signs[index] = match f64::from(scores[index]).partial_cmp(&mean) {
                Some(std::cmp::Ordering::Greater) => Sign::Positive,
                Some(std::cmp::Ordering::Less) => Sign::Negative,
                _ => Sign::Neutral,
            };
        }
    }
    Ok(signs)
}
