//! Products of 1 to 64 rows with a weight packed in bf16 panels: a step of decoding.
//!
//! At such sizes reading the weight takes about as long as multiplying by it, so every panel is read from memory once: all
//! rows are multiplied by it while it is in the second-level cache, and the next one is asked for meanwhile. The products of a
//! layer are small, so the tasks are too: two threads must end together.
//!
//! The sums are those of [`multiply_packed`](crate::bf16::multiply_packed), bit for bit.

use std::ops::Range;

use crate::bf16::{Ahead, BLOCK_PAIRS, LINE, Tile, available, multiply_packed, multiply_rows};
use crate::matmul::{ProductShape, Store};
use crate::panels::{COLUMNS, ROWS, left_words, packed_words, padded_pairs};
use crate::parallel::{SharedOut, for_each_block_of_shares};
use crate::processor::{Processor, processor};
use crate::team::LastOf;

/// The most rows this is for: the packed rows stay in the second-level cache.
pub(crate) const MOST_ROWS: usize = 64;
/// Words of weight in a task (110 KiB, two panels of 576 inputs).
const TASK_WORDS: usize = 28 << 10;

/// A right operand that is read next.
#[derive(Clone, Copy)]
pub(crate) struct Next<'a> {
    /// In panels of [`COLUMNS`] columns.
    pub(crate) words: &'a [f32],
    pub(crate) columns: usize,
    pub(crate) k: usize,
}

impl Next<'_> {
    /// Where the share begins of which the thread has come to the last block of this product.
    fn panel(&self, last: LastOf) -> *const u32 {
        let (panels, block) = (self.columns.div_ceil(COLUMNS), task_panels(self.k));
        let first = last.first(panels.div_ceil(block)) * block;
        let words = self.words.as_ptr().cast::<u32>();
        words.wrapping_add(first * COLUMNS * padded_pairs(self.k))
    }
}

/// Right panels of a task whose sums are `k` long.
fn task_panels(k: usize) -> usize {
    (TASK_WORDS / (k.div_ceil(2) * COLUMNS).max(1)).max(1)
}

/// `out (+)= left · right`: `left` packed by `pack_left`, `right` in panels of [`COLUMNS`] columns. Then `next` will be read: the
/// threads of a team ask for what is theirs of it while they end this product.
///
/// # Panics
/// If the instructions are missing or a slice is too short.
pub(crate) fn multiply_few(
    left: &[f32],
    right: &[f32],
    out: &mut [f32],
    shape: ProductShape,
    store: Store,
    next: Option<Next<'_>>,
) {
    let ProductShape { m, n, k } = shape;
    assert!(available(), "bf16 instructions are missing");
    assert!(out.len() >= m * n);
    assert!(left.len() >= left_words(m, k) && right.len() >= packed_words::<COLUMNS>(n, k));
    if m == 0 || n == 0 {
        return;
    }
    if processor() == Processor::Amx {
        return multiply_packed(left, right, out, (n, 0), shape, store);
    }
    let (pairs, padded) = (k.div_ceil(2), padded_pairs(k));
    let target = SharedOut::new(out);
    let body = |panels: Range<usize>, last: Option<LastOf>| {
        for panel in panels.clone() {
            let column = panel * COLUMNS;
            let following = right.as_ptr().cast::<u32>();
            let following = match (next, last) {
                (Some(next), Some(last)) if panel + 1 == panels.end => next.panel(last),
                _ => following.wrapping_add((column + COLUMNS) * padded),
            };
            let mut lines_before = 0usize;
            for row in (0..m).step_by(ROWS) {
                // The next panel's three lines a pair, spread over the passes over this one.
                let passes_left = (m - row).div_ceil(ROWS);
                let lines = (3 - lines_before).div_ceil(passes_left);
                for start in (0..pairs.max(1)).step_by(BLOCK_PAIRS) {
                    let depth = BLOCK_PAIRS.min(pairs - start);
                    // SAFETY: the features and the panels' lengths were asserted above; the tile lies inside `out`, and this
                    // task alone has its columns.
                    unsafe {
                        let tile = Tile {
                            out: target.at(row * n + column),
                            stride: n,
                            columns: COLUMNS.min(n - column),
                            add: store == Store::Add || start > 0,
                        };
                        let left = left.as_ptr().cast::<u32>();
                        let left = left.add(row * padded + start * ROWS);
                        let right = right.as_ptr().cast::<u32>();
                        let ahead = Ahead {
                            from: following
                                .wrapping_add((lines_before * pairs + start * lines) * LINE),
                            lines,
                        };
                        let right = right.add(column * padded + start * COLUMNS);
                        multiply_rows(ROWS.min(m - row), left, right, depth, tile, ahead);
                    }
                }
                lines_before += lines;
            }
        }
    };
    let work = m * n * k / 2;
    for_each_block_of_shares(n.div_ceil(COLUMNS), task_panels(k), work, body);
}
