//! Products of 1 to 64 rows with a weight packed in bf16 panels: a step of decoding.
//!
//! At such sizes reading the weight takes about as long as multiplying by it, so every panel is read from memory once: all
//! rows are multiplied by it while it is in the second-level cache, and the next one is asked for meanwhile. The products of a
//! layer are small, so the tasks are too: two threads must end together.
//!
//! The sums are those of [`multiply_packed`](crate::bf16::multiply_packed), bit for bit.

use crate::bf16::{Ahead, BLOCK_PAIRS, LINE, Tile, available, multiply_packed, multiply_rows};
use crate::matmul::{ProductShape, Store};
use crate::panels::{COLUMNS, ROWS, left_words, packed_words, padded_pairs};
use crate::parallel::{SharedOut, for_each_block};
use crate::processor::{Processor, processor};

/// The most rows this is for: the packed rows stay in the second-level cache.
pub(crate) const MOST_ROWS: usize = 64;
/// Words of weight in a task (110 KiB, two panels of 576 inputs).
const TASK_WORDS: usize = 28 << 10;

/// `out (+)= left · right`: `left` packed by `pack_left`, `right` in panels of [`COLUMNS`] columns.
///
/// # Panics
/// If the instructions are missing or a slice is too short.
pub(crate) fn multiply_few(
    left: &[f32],
    right: &[f32],
    out: &mut [f32],
    shape: ProductShape,
    store: Store,
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
    let block = (TASK_WORDS / (pairs * COLUMNS).max(1)).max(1);
    let target = SharedOut::new(out);
    for_each_block(n.div_ceil(COLUMNS), block, m * n * k / 2, |panels| {
        for panel in panels {
            let column = panel * COLUMNS;
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
                        let next = right.wrapping_add((column + COLUMNS) * padded);
                        let ahead = Ahead {
                            from: next.wrapping_add((lines_before * pairs + start * lines) * LINE),
                            lines,
                        };
                        let right = right.add(column * padded + start * COLUMNS);
                        multiply_rows(ROWS.min(m - row), left, right, depth, tile, ahead);
                    }
                }
                lines_before += lines;
            }
        }
    });
}
