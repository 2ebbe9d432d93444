//! Which of a prompt's samples are accepted: numbers and texts in, one verdict a response out.

use std::collections::{BTreeMap, HashMap};

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

/// Which responses to one prompt count as the same.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub enum Dedupe {
    /// None: the same response may be accepted more than once.
    None,
    /// Those of the same token ids.
    #[default]
    Tokens,
    /// Those of the same text, all white space taken for one space and that at the ends for none.
    Text,
}

/// How many of a prompt's samples are accepted, and which.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AcceptRule {
    /// At most so many a prompt.
    pub best: usize,
    /// None that scores below; `None` asks nothing.
    pub min_score: Option<f64>,
    /// Which of them count as the same.
    pub dedupe: Dedupe,
}

/// A sampled response, as the choice sees it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Candidate<'a> {
    /// What it answers: responses with the same number compete.
    pub prompt: u64,
    /// Its score.
    pub score: f32,
    /// Its tokens.
    pub token_ids: &'a [u32],
    /// Its text.
    pub text: &'a str,
}

/// What became of a sampled response.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It is learnt from.
    Accepted {
        /// Its place among the prompt's accepted responses, from 1: the best.
        rank: usize,
    },
    /// It has no text, or white space alone.
    Empty,
    /// A response to the same prompt that ranks before it is the same.
    Duplicate {
        /// Index of that response among the candidates.
        of: usize,
    },
    /// It scores below the minimum.
    BelowMinimum,
    /// Enough responses to the same prompt rank before it.
    Outranked,
}

impl Verdict {
    /// Whether it is learnt from.
    pub const fn is_accepted(self) -> bool {
        matches!(self, Self::Accepted { .. })
    }

    /// Its name in records: accepted, empty, duplicate, below_minimum or outranked.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Accepted { .. } => "accepted",
            Self::Empty => "empty",
            Self::Duplicate { .. } => "duplicate",
            Self::BelowMinimum => "below_minimum",
            Self::Outranked => "outranked",
        }
    }
}

/// The verdict on each of `candidates`, in their order.
///
/// The responses to one prompt are ranked by score, the highest first; of equal scores the one that stands first among the
/// candidates, which is the one that was sampled first: chance decides, not length. In that order each is empty, a duplicate of one
/// before it, below the minimum, outranked by [`AcceptRule::best`] others, or accepted; the first of these that holds is the
/// verdict. Of duplicates with different scores the best represents them all. A score that is not a number ranks last and is below
/// every minimum, also below none.
///
/// # Examples
/// ```
/// use pivotal_train::reject::{AcceptRule, Candidate, Dedupe, Verdict, choose_accepted};
/// let candidate = |score, text| Candidate { prompt: 1, score, token_ids: &[], text };
/// let rule = AcceptRule { best: 2, min_score: Some(0.5), dedupe: Dedupe::Text };
/// let verdicts = choose_accepted(
///     &[candidate(0.5, "b"), candidate(1.0, "a"), candidate(1.0, " a "), candidate(0.0, "c"), candidate(0.5, "d")],
///     rule,
/// );
/// assert_eq!(
///     verdicts,
///     [
///         Verdict::Accepted { rank: 2 },
///         Verdict::Accepted { rank: 1 },
///         Verdict::Duplicate { of: 1 },
///         Verdict::BelowMinimum,
///         Verdict::Outranked,
///     ]
/// );
/// ```
pub fn choose_accepted(candidates: &[Candidate<'_>], rule: AcceptRule) -> Vec<Verdict> {
    let mut prompts: BTreeMap<u64, Vec<usize>> = BTreeMap::new();
    for (index, candidate) in candidates.iter().enumerate() {
        prompts.entry(candidate.prompt).or_default().push(index);
    }
    let mut verdicts = vec![Verdict::Outranked; candidates.len()];
    for mut ranked in prompts.into_values() {
        // Stable: equal scores stay in the order of sampling.
        ranked.sort_by(|&a, &b| rank(candidates[b].score).total_cmp(&rank(candidates[a].score)));
        let mut known: HashMap<Identity, usize> = HashMap::new();
        let mut accepted = 0;
        for index in ranked {
            let candidate = &candidates[index];
            let same = identity(candidate, rule.dedupe)
                .map(|identity| *known.entry(identity).or_insert(index));
            verdicts[index] = match same {
                _ if candidate.text.trim().is_empty() => Verdict::Empty,
                Some(first) if first != index => Verdict::Duplicate { of: first },
                _ if is_below(candidate.score, rule.min_score) => Verdict::BelowMinimum,
                _ if accepted == rule.best => Verdict::Outranked,
                _ => {
                    accepted += 1;
                    Verdict::Accepted { rank: accepted }
                }
            };
        }
    }
    verdicts
}

/// What a score is ranked by: 0 and -0 are equal, what is not a number is last.
fn rank(score: f32) -> f32 {
    match score.is_nan() {
        true => f32::NEG_INFINITY,
        false => score + 0.0,
    }
}

fn is_below(score: f32, minimum: Option<f64>) -> bool {
    score.is_nan() || minimum.is_some_and(|minimum| f64::from(score) < minimum)
}

#[derive(PartialEq, Eq, Hash)]
enum Identity {
    Tokens(Vec<u32>),
    Text(String),
}

fn identity(candidate: &Candidate<'_>, dedupe: Dedupe) -> Option<Identity> {
    match dedupe {
        Dedupe::None => None,
        Dedupe::Tokens => Some(Identity::Tokens(candidate.token_ids.to_vec())),
        Dedupe::Text => {
            let words: Vec<&str> = candidate.text.split_whitespace().collect();
            Some(Identity::Text(words.join(" ")))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RULE: AcceptRule = AcceptRule {
        best: 1,
        min_score: None,
        dedupe: Dedupe::Tokens,
    };

    /// One prompt's samples, told apart by their tokens.
    fn scored(scores: &[f32]) -> Vec<(u64, f32, Vec<u32>, String)> {
        let one =
            |(index, &score): (usize, &f32)| (7, score, vec![index as u32], format!("r{index}"));
        scores.iter().enumerate().map(one).collect()
    }

    fn chosen(samples: &[(u64, f32, Vec<u32>, String)], rule: AcceptRule) -> Vec<Verdict> {
        let candidates: Vec<Candidate<'_>> = samples
            .iter()
            .map(|(prompt, score, token_ids, text)| Candidate {
                prompt: *prompt,
                score: *score,
                token_ids,
                text,
            })
            .collect();
        choose_accepted(&candidates, rule)
    }

    fn accepted(verdicts: &[Verdict]) -> Vec<usize> {
        let mut ranked: Vec<(usize, usize)> = verdicts
            .iter()
            .enumerate()
            .filter_map(|(index, verdict)| match verdict {
                Verdict::Accepted { rank } => Some((*rank, index)),
                _ => None,
            })
            .collect();
        ranked.sort_unstable();
        assert!(
            ranked
                .iter()
                .enumerate()
                .all(|(place, (rank, _))| place + 1 == *rank)
        );
        ranked.into_iter().map(|(_, index)| index).collect()
    }

    #[test]
    fn the_best_of_each_prompt_are_accepted_the_first_of_equals_before_the_others() {
        let samples = scored(&[0.25, 1.0, 0.5, 1.0, -3.0]);
        for (best, expected) in [
            (1, &[1][..]),
            (2, &[1, 3]),
            (3, &[1, 3, 2]),
            (9, &[1, 3, 2, 0, 4]),
        ] {
            let verdicts = chosen(&samples, AcceptRule { best, ..RULE });
            assert_eq!(accepted(&verdicts), expected, "best {best}");
        }
        // Another prompt's scores do not compete.
        let mut two = samples.clone();
        two[4].0 = 8;
        assert_eq!(accepted(&chosen(&two[..4], RULE)), [1]);
        assert_eq!(chosen(&two, RULE)[4], Verdict::Accepted { rank: 1 });
        // Nor does it matter that prompts are mixed.
        two.reverse();
        assert_eq!(chosen(&two, RULE)[0], Verdict::Accepted { rank: 1 });
        let zeros = scored(&[-0.0, 0.0, 0.0]);
        assert_eq!(accepted(&chosen(&zeros, RULE)), [0], "0 and -0 are equal");
    }

    #[test]
    fn a_minimum_may_accept_none_and_equality_meets_it() {
        let samples = scored(&[0.25, 0.5, f32::NAN]);
        let rule = |min_score| AcceptRule {
            best: 3,
            min_score: Some(min_score),
            ..RULE
        };
        assert_eq!(accepted(&chosen(&samples, rule(0.5))), [1]);
        let none = chosen(&samples, rule(0.6));
        assert_eq!(none, [Verdict::BelowMinimum; 3]);
        // Not a number is never accepted, whatever is asked.
        let best = AcceptRule { best: 3, ..RULE };
        assert_eq!(accepted(&chosen(&samples, best)), [1, 0]);
        let last = scored(&[f32::NAN, f32::NEG_INFINITY]);
        assert_eq!(accepted(&chosen(&last, RULE)), [1]);
        assert_eq!(chosen(&[], RULE), []);
    }

    #[test]
    fn the_same_response_is_accepted_once_under_each_notion_of_the_same() {
        let samples = vec![
            (1, 0.5, vec![1, 2], "a  b".to_owned()),
            (1, 1.0, vec![1, 2], "a  b".to_owned()),
            (1, 1.0, vec![1, 3], " a b\n".to_owned()),
            (1, 0.0, vec![4], "A b".to_owned()),
            (2, 0.0, vec![1, 2], "a  b".to_owned()),
        ];
        let rule = |dedupe| AcceptRule {
            best: 9,
            dedupe,
            ..RULE
        };
        let with = |dedupe| accepted(&chosen(&samples[..4], rule(dedupe)));
        assert_eq!(with(Dedupe::None), [1, 2, 0, 3]);
        assert_eq!(with(Dedupe::Tokens), [1, 2, 3]);
        assert_eq!(with(Dedupe::Text), [1, 3]);
        // The best of them stands for all, and another prompt may say the same.
        let verdicts = chosen(&samples, rule(Dedupe::Tokens));
        assert_eq!(verdicts[0], Verdict::Duplicate { of: 1 });
        assert!(verdicts[4].is_accepted());
        // A duplicate takes no place, and is counted even where the response itself is below the minimum.
        let strict = AcceptRule {
            min_score: Some(2.0),
            ..rule(Dedupe::Tokens)
        };
        assert_eq!(chosen(&samples, strict)[0], Verdict::Duplicate { of: 1 });
        assert_eq!(chosen(&samples, strict)[1], Verdict::BelowMinimum);
    }

    #[test]
    fn a_response_without_text_is_not_accepted() {
        let mut samples = scored(&[1.0, 0.0]);
        samples[0].3 = " \n".to_owned();
        let verdicts = chosen(&samples, RULE);
        assert_eq!(verdicts, [Verdict::Empty, Verdict::Accepted { rank: 1 }]);
    }
}
