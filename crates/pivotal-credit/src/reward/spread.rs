//! Where in a response its reward is paid (METHOD, section 8).
//!
//! Whatever the place, the sum over tokens is the sum of what was given: the score, the segments' rewards, or the tokens'.

use pivotal_core::SegmentRecord;

use crate::check::{finite, finite_number, length};
use crate::named::named_enum;
use crate::{Error, Result};

named_enum! {
    /// The places.
    pub enum Spread {
        /// The response's score, at its last token.
        Last = "last",
        /// Each segment's reward, in equal parts on its tokens (Yin et al. 2025, arXiv:2501.02790).
        SegmentEven = "segment_even",
        /// Each segment's reward, at its last token.
        SegmentLast = "segment_last",
        /// Each token's own signal at that token. With the signal `increment` the rewards telescope: their sum is the reward
        /// model's last level less the prompt's; with `level` a response's reward grows with its length.
        Token = "token",
    }
}

/// What can be paid; each [`Spread`] reads one of the three.
#[derive(Clone, Copy, Debug)]
pub struct SpreadParts<'a> {
    /// The whole response's score.
    pub score: f32,
    /// Segments that tile the response; their `score` is the reward.
    pub segments: &'a [SegmentRecord],
    /// The token signal, `[tokens]`.
    pub signal: &'a [f32],
}

/// The task's reward of each token, `[tokens]`; 0 where the token is not the model's own. A response without a token of its
/// own has no place for any reward.
///
/// # Shapes
/// `response_mask` and, for `token`, the signal: `[tokens]`.
///
/// # Errors
/// [`Error::Unequal`] if the signal or the segments do not fit, [`Error::NotFiniteColumn`], or [`Error::NoPlace`] for a
/// segment that has a reward and no token of the model's own.
///
/// # Examples
/// ```
/// use pivotal_core::{SegmentRecord, Sign};
/// use pivotal_credit::{Spread, SpreadParts, spread_reward};
/// let segment = |start, end, score| SegmentRecord { start, end, score, sign: Sign::Neutral };
/// let parts = SpreadParts {
///     score: 2.0,
///     segments: &[segment(0, 2, 1.0), segment(2, 4, -3.0)],
///     signal: &[0.25, 0.75, -1.0, -2.0],
/// };
/// let mask = [true, true, true, false]; // the last token is a tool's
/// let paid = |spread| spread_reward(spread, parts, &mask);
/// assert_eq!(paid(Spread::Last)?, [0.0, 0.0, 2.0, 0.0]);
/// assert_eq!(paid(Spread::SegmentEven)?, [0.5, 0.5, -3.0, 0.0]);
/// assert_eq!(paid(Spread::SegmentLast)?, [0.0, 1.0, -3.0, 0.0]);
/// assert_eq!(paid(Spread::Token)?, [0.25, 0.75, -1.0, 0.0]);
/// # Ok::<(), pivotal_credit::Error>(())
/// ```
pub fn spread_reward(
    spread: Spread,
    parts: SpreadParts<'_>,
    response_mask: &[bool],
) -> Result<Vec<f32>> {
    let tokens = response_mask.len();
    let mut rewards = vec![0.0; tokens];
    let Some(last) = response_mask.iter().rposition(|&own| own) else {
        return Ok(rewards);
    };
    match spread {
        Spread::Last => {
            finite_number("score", f64::from(parts.score))?;
            rewards[last] = parts.score;
        }
        Spread::Token => {
            length("signal", tokens, parts.signal.len())?;
            finite("signal", parts.signal, response_mask)?;
            for index in (0..tokens).filter(|&index| response_mask[index]) {
                rewards[index] = parts.signal[index];
            }
        }
        Spread::SegmentEven | Spread::SegmentLast => {
            let mut end = 0;
            for (index, segment) in parts.segments.iter().enumerate() {
                length("segments", end, segment.start)?;
                end = segment.end;
                finite_number("segments", f64::from(segment.score))?;
                let own: Vec<usize> = (segment.start..segment.end.min(tokens))
                    .filter(|&token| response_mask[token])
                    .collect();
                match (own.last(), spread) {
                    (None, _) if segment.score == 0.0 => {}
                    (None, _) => return Err(Error::NoPlace { segment: index }),
                    (Some(&last), Spread::SegmentLast) => rewards[last] = segment.score,
                    (Some(_), _) => {
                        let part = (f64::from(segment.score) / own.len() as f64) as f32;
                        own.into_iter().for_each(|token| rewards[token] = part);
                    }
                }
            }
            length("segments", tokens, end)?;
        }
    }
    Ok(rewards)
}
