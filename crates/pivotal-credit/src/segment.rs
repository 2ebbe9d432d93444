//! Segments: half-open, non-empty, in order, tiling the response.

use pivotal_core::Sign;

/// Tokens `start..end` of a response; `start` is the pivot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// First token.
    pub start: usize,
    /// One past the last token.
    pub end: usize,
}

impl Segment {
    /// Tokens in the segment.
    pub const fn tokens(self) -> usize {
        self.end - self.start
    }
}

/// The segments whose pivots are marked in `cuts`; the first token begins a segment whether marked or not.
///
/// # Examples
/// ```
/// use pivotal_credit::{Segment, segments_from_cuts};
/// let segments = segments_from_cuts(&[true, false, true]);
/// assert_eq!(segments, [Segment { start: 0, end: 2 }, Segment { start: 2, end: 3 }]);
/// ```
pub fn segments_from_cuts(cuts: &[bool]) -> Vec<Segment> {
    let mut segments = Vec::new();
    let mut start = 0;
    for (index, _) in cuts.iter().enumerate().skip(1).filter(|&(_, &cut)| cut) {
        segments.push(Segment { start, end: index });
        start = index;
    }
    if !cuts.is_empty() {
        segments.push(Segment {
            start,
            end: cuts.len(),
        });
    }
    segments
}

/// Merges each segment of fewer than `min_len` tokens into the one before it, from left to right. The first segment has
/// none before it and stays as it is.
///
/// `signs`, where the cut rule gives each segment one (a trigger's state), follows: a merged segment takes the sign of
/// the one it joins, and neighbours that end up with one sign become one segment, since no state changes between them.
///
/// # Panics
/// If `signs` is given and is not one a segment.
///
/// # Examples
/// ```
/// use pivotal_credit::{Segment, merge_short};
/// let mut segments = vec![
///     Segment { start: 0, end: 3 }, Segment { start: 3, end: 4 }, Segment { start: 4, end: 6 },
/// ];
/// merge_short(&mut segments, None, 2);
/// assert_eq!(segments, [Segment { start: 0, end: 4 }, Segment { start: 4, end: 6 }]);
/// ```
pub fn merge_short(segments: &mut Vec<Segment>, signs: Option<&mut Vec<Sign>>, min_len: usize) {
    let mut none = Vec::new();
    let has_signs = signs.is_some();
    let signs = signs.unwrap_or(&mut none);
    assert!(
        !has_signs || signs.len() == segments.len(),
        "one sign a segment"
    );
    let mut kept = 0;
    for index in 0..segments.len() {
        let segment = segments[index];
        let joins = kept > 0
            && (segment.tokens() < min_len || (has_signs && signs[index] == signs[kept - 1]));
        if joins {
            segments[kept - 1].end = segment.end;
        } else {
            segments[kept] = segment;
            if has_signs {
                signs[kept] = signs[index];
            }
            kept += 1;
        }
    }
    segments.truncate(kept);
    signs.truncate(kept);
}
