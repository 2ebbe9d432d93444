//! Attention's products with bf16 operands, on AMX.
//!
//! The right operand's words lie as tiles want them. The left one's are copied into tiles, turned where its sums run down the
//! rows of a matrix: 64 rows are a few hundred instructions, against thousands for their products without tiles.

use std::arch::x86_64::{__m512i, _mm512_castps_si512, _mm512_castsi512_ps, _mm512_setzero_si512};

use crate::amx::{BLOCK_ROWS, Block, Piece, Tiles, multiply};
use crate::attention_avx512::{Left, Right, Size, VECTOR, load_part, store};
use crate::panels::{COLUMNS, TILE_ROWS, transpose};

/// Words of a left tile.
const TILE_WORDS: usize = TILE_ROWS * VECTOR;
/// Tiles along the longest sum: heads of 128 elements.
const DEPTH: usize = 4;
/// Columns of the widest product.
const MOST_COLUMNS: usize = 128;

/// Whether [`product`] takes a product of this size. What it does not take goes the way of processors without AMX.
pub(crate) fn takes(size: Size) -> bool {
    size.steps <= DEPTH * VECTOR && size.columns <= MOST_COLUMNS
}

#[repr(C, align(64))]
struct LeftTiles([f32; 2 * DEPTH * TILE_WORDS]);

/// `out (+)= left · right`, for sizes that [`takes`] takes; whoever calls has checked that all words and sums are inside their
/// slices. An element's sum does not depend on the rows and columns beside it.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
pub(crate) fn product(
    tiles: &Tiles,
    left: Left<'_>,
    right: Right<'_>,
    size: Size,
    (out, stride): (&mut [f32], usize),
    add: bool,
) {
    let Size {
        rows,
        columns,
        steps,
    } = size;
    assert!(takes(size) && rows > 0 && columns.is_multiple_of(VECTOR));
    assert!(out.len() >= (rows - 1) * stride + columns);
    let (whole, depth) = (steps / VECTOR, steps.div_ceil(VECTOR));
    assert!(steps == 0 || right.words.len() >= (steps - 1) * right.step + columns);
    // Words beyond the last step are whatever was there before, and zero times NaN is NaN: the last tile is completed here.
    let mut rest = [0.0; VECTOR * MOST_COLUMNS];
    for (step, to) in (whole * VECTOR..steps).zip(rest.chunks_exact_mut(MOST_COLUMNS)) {
        to[..columns].copy_from_slice(&right.words[step * right.step..][..columns]);
    }
    let mut words = LeftTiles([0.0; 2 * DEPTH * TILE_WORDS]);
    for row in (0..rows).step_by(BLOCK_ROWS) {
        let block_rows = BLOCK_ROWS.min(rows - row);
        for (half, words) in words.0.chunks_exact_mut(DEPTH * TILE_WORDS).enumerate() {
            let first = row + half * TILE_ROWS;
            if first < rows {
                fill(left, first..rows.min(first + TILE_ROWS), steps, words);
            }
        }
        for column in (0..columns).step_by(COLUMNS) {
            let piece =
                |tile: usize, tiles: usize, right: &[f32], column: usize, step: usize| Piece {
                    left: words.0[tile * TILE_WORDS..].as_ptr().cast(),
                    below: words.0[(DEPTH + tile) * TILE_WORDS..].as_ptr().cast(),
                    right: right[column.min(right.len())..].as_ptr().cast(),
                    right_row: 4 * step,
                    tiles,
                };
            let pieces = [
                piece(0, whole, right.words, column, right.step),
                piece(
                    whole.min(DEPTH - 1),
                    depth - whole,
                    &rest,
                    column,
                    MOST_COLUMNS,
                ),
            ];
            let block = Block {
                out: out[row * stride + column..].as_mut_ptr(),
                stride,
                rows: block_rows,
                columns: COLUMNS.min(columns - column),
                add,
                streams: false,
            };
            // SAFETY: both halves of `words` hold `depth` tiles; `whole` tiles of `right` and one of `rest` are there by the
            // assertions, and so are the rows of `out`.
            unsafe { multiply(tiles, &pieces, block) };
        }
    }
}

/// Rows `rows` of the left operand as tiles, zeros beyond the last step.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
fn fill(left: Left<'_>, rows: std::ops::Range<usize>, steps: usize, words: &mut [f32]) {
    let count = rows.len();
    for (tile, words) in (0..steps)
        .step_by(VECTOR)
        .zip(words.chunks_exact_mut(TILE_WORDS))
    {
        let width = VECTOR.min(steps - tile);
        if left.step == 1 {
            for (row, to) in rows.clone().zip(words.chunks_exact_mut(VECTOR)) {
                let from = &left.words[row * left.row + tile..][..width];
                store(load_part(from), to);
            }
            continue;
        }
        assert_eq!(left.row, 1, "one stride of the left operand must be 1");
        let mut block: [__m512i; VECTOR] = [_mm512_setzero_si512(); VECTOR];
        for (step, lanes) in block.iter_mut().enumerate().take(width) {
            let from = &left.words[rows.start + (tile + step) * left.step..][..count];
            *lanes = _mm512_castps_si512(load_part(from));
        }
        let block = transpose(block);
        for (lanes, to) in block.into_iter().zip(words.chunks_exact_mut(VECTOR)) {
            store(_mm512_castsi512_ps(lanes), to);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attention_avx512;
    use crate::processor::{Processor, processor};
    use crate::testing::{assert_close, random, widen};

    /// Pairs of small whole numbers: products and sums are exact, and any order gives the same.
    fn pairs(len: usize, seed: u64) -> Vec<f32> {
        let whole = |x: f32| (4.0 * x).round().to_bits() >> 16;
        let halves = random(2 * len, seed);
        halves
            .chunks_exact(2)
            .map(|pair| f32::from_bits(whole(pair[0]) | whole(pair[1]) << 16))
            .collect()
    }

    #[test]
    fn products_are_those_of_the_vectors() {
        if processor() < Processor::Amx {
            return;
        }
        for (rows, columns, steps) in [
            (1, 16, 1),
            (15, 48, 16),
            (16, 32, 17),
            (17, 48, 31),
            (33, 64, 24),
            (64, 48, 32),
            (64, 128, 33),
            (65, 16, 64),
            (3, 48, 0),
        ] {
            for along in [true, false] {
                let (row, step) = if along { (steps + 3, 1) } else { (1, rows + 5) };
                let words = pairs((rows + 5) * (steps + 5), 1);
                let left = Left {
                    words: &words,
                    row,
                    step,
                };
                // After the last step there is NaN, as in scratch that was used before.
                let mut right = pairs(steps * (columns + 7), 2);
                right.resize(right.len() + 16 * (columns + 7), f32::NAN);
                let right = Right {
                    words: &right,
                    step: columns + 7,
                };
                let size = Size {
                    rows,
                    columns,
                    steps,
                };
                for add in [false, true] {
                    let start: Vec<f32> = random(rows * (columns + 2), 3)
                        .iter()
                        .map(|x| (8.0 * x).round())
                        .collect();
                    let (mut fast, mut slow) = (start.clone(), start);
                    let stride = columns + 2;
                    // SAFETY: the processor has both.
                    unsafe {
                        let tiles = Tiles::configure();
                        product(&tiles, left, right, size, (&mut fast, stride), add);
                        drop(tiles);
                        attention_avx512::product::<true>(
                            None,
                            left,
                            right,
                            size,
                            (&mut slow, stride),
                            add,
                        );
                    }
                    assert_close(&format!("{size:?} {along}"), &fast, &widen(&slow), 0.0);
                }
            }
        }
    }
}
