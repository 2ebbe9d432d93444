//! Products with bf16 operands and f32 sums, on processors with AVX-512 BF16.
//!
//! Both operands are packed in panels first (`panels.rs`). Panels of 8 rows times panels of 48 columns keep 24 of the 32
//! vector registers as sums. With AMX the same operands go through `group.rs` to `amx.rs`.
//!
//! The sum of one output element runs over the pairs in ascending order, in blocks of [`BLOCK_PAIRS`], whatever the number
//! of rows, columns and threads.

use std::arch::x86_64::{
    __m512bh, __m512i, _MM_HINT_T1, _mm_prefetch, _mm512_add_ps, _mm512_dpbf16_ps,
    _mm512_loadu_si512, _mm512_mask_storeu_ps, _mm512_maskz_loadu_ps, _mm512_set1_epi32,
    _mm512_setzero_ps,
};

use crate::group::{Job, Segment, multiply_jobs};
use crate::matmul::{ProductShape, Store};
use crate::panels::{
    COLUMNS, ROWS, Source, first_lanes, left_words, pack, pack_left, packed_words, padded_pairs,
};
use crate::parallel::{SharedOut, for_each_block, with_scratch};
use crate::processor::{Processor, processor};

/// Pairs summed in registers before the sums go to memory: a right panel of that depth is 96 KiB, a tenth of the
/// second-level cache.
pub(crate) const BLOCK_PAIRS: usize = 512;
/// Rows of one task: its left panels take 256 KiB of the second-level cache.
const TASK_ROWS: usize = 128;
/// Right panels of one task.
const TASK_PANELS: usize = 8;
/// Words of packed right operand at a time: 8 MiB, a part of the third-level cache.
const CHUNK_WORDS: usize = 2 << 20;

/// Whether the processor has the instructions this module needs, and is to use them.
pub(crate) fn available() -> bool {
    processor() >= Processor::Avx512
}

/// Where a tile of sums goes.
#[derive(Clone, Copy)]
pub(crate) struct Tile {
    pub(crate) out: *mut f32,
    pub(crate) stride: usize,
    pub(crate) columns: usize,
    pub(crate) add: bool,
}

/// What is asked for while a tile is computed: `lines` cache lines for each pair, one after the other.
#[derive(Clone, Copy)]
pub(crate) struct Ahead {
    pub(crate) from: *const u32,
    pub(crate) lines: usize,
}

impl Ahead {
    pub(crate) const NOTHING: Self = Self {
        from: std::ptr::null(),
        lines: 0,
    };
}

/// Words of a cache line.
pub(crate) const LINE: usize = 16;

/// `R` rows times 48 columns over `pairs` pairs.
///
/// # Safety
/// `left` has `pairs` times 8 words and `right` `pairs` times 48; the tile's `R` rows of `columns` floats are the caller's.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
unsafe fn multiply_tile<const R: usize>(
    left: *const u32,
    right: *const u32,
    pairs: usize,
    tile: Tile,
    ahead: Ahead,
) {
    let mut sums = [[_mm512_setzero_ps(); 3]; R];
    for pair in 0..pairs {
        for line in 0..ahead.lines {
            let at = ahead.from.wrapping_add((pair * ahead.lines + line) * LINE);
            // It may be nobody's memory: that is no fault.
            _mm_prefetch::<_MM_HINT_T1>(at.cast());
        }
        // SAFETY: pair < pairs, so the three vectors and `R` words lie inside the panels.
        unsafe {
            let right = right.add(pair * COLUMNS);
            let columns: [__m512bh; 3] = [
                std::mem::transmute::<__m512i, __m512bh>(_mm512_loadu_si512(right.cast())),
                std::mem::transmute::<__m512i, __m512bh>(_mm512_loadu_si512(right.add(16).cast())),
                std::mem::transmute::<__m512i, __m512bh>(_mm512_loadu_si512(right.add(32).cast())),
            ];
            for (row, sums) in sums.iter_mut().enumerate() {
                let word = *left.add(pair * ROWS + row);
                let word =
                    std::mem::transmute::<__m512i, __m512bh>(_mm512_set1_epi32(word.cast_signed()));
                for (sum, column) in sums.iter_mut().zip(columns) {
                    *sum = _mm512_dpbf16_ps(*sum, word, column);
                }
            }
        }
    }
    for (row, sums) in sums.iter().enumerate() {
        for (vector, &sum) in sums.iter().enumerate() {
            let mask = first_lanes(tile.columns.saturating_sub(16 * vector));
            // SAFETY: the mask stops at the tile's last column; what is masked off may be out of bounds, hence the
            // wrapping addition.
            unsafe {
                let at = tile.out.wrapping_add(row * tile.stride + 16 * vector);
                let before = if tile.add { mask } else { 0 };
                let sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(before, at));
                _mm512_mask_storeu_ps(at, mask, sum);
            }
        }
    }
}

/// # Safety
/// As for [`multiply_tile`], with `rows` from 1 to 8.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
pub(crate) unsafe fn multiply_rows(
    rows: usize,
    left: *const u32,
    right: *const u32,
    pairs: usize,
    tile: Tile,
    ahead: Ahead,
) {
    // SAFETY: passed on to the caller.
    unsafe {
        match rows {
            1 => multiply_tile::<1>(left, right, pairs, tile, ahead),
            2 => multiply_tile::<2>(left, right, pairs, tile, ahead),
            3 => multiply_tile::<3>(left, right, pairs, tile, ahead),
            4 => multiply_tile::<4>(left, right, pairs, tile, ahead),
            5 => multiply_tile::<5>(left, right, pairs, tile, ahead),
            6 => multiply_tile::<6>(left, right, pairs, tile, ahead),
            7 => multiply_tile::<7>(left, right, pairs, tile, ahead),
            _ => multiply_tile::<8>(left, right, pairs, tile, ahead),
        }
    }
}

/// Multiplies packed operands into columns `first_column..first_column + shape.n` of an output whose rows are `stride` long.
pub(crate) fn multiply_packed(
    left: &[f32],
    right: &[f32],
    out: &mut [f32],
    (stride, first_column): (usize, usize),
    shape: ProductShape,
    store: Store,
) {
    let ProductShape { m, n, k } = shape;
    assert!(available(), "bf16 instructions are missing");
    assert!(left.len() >= left_words(m, k) && right.len() >= packed_words::<COLUMNS>(n, k));
    assert!(first_column + n <= stride && out.len() >= m * stride);
    if m == 0 || n == 0 {
        return;
    }
    if processor() == Processor::Amx {
        let job = Job {
            segments: &[Segment::whole(left, right, k)],
            columns: n,
            out_column: first_column,
        };
        return multiply_jobs(&[job], m, out, stride, store);
    }
    let (pairs, padded) = (k.div_ceil(2), padded_pairs(k));
    let panels = n.div_ceil(COLUMNS);
    let row_tasks = m.div_ceil(TASK_ROWS);
    // With few rows a task is memory-bound: smaller ones spread better.
    let task_panels = if m <= ROWS {
        TASK_PANELS / 2
    } else {
        TASK_PANELS
    };
    let panel_tasks = panels.div_ceil(task_panels);
    let target = SharedOut::new(out);
    for_each_block(row_tasks * panel_tasks, 1, m * n * k / 2, |tasks| {
        for task in tasks {
            let rows = task / panel_tasks * TASK_ROWS;
            let rows = rows..(rows + TASK_ROWS).min(m);
            let columns = task % panel_tasks * task_panels;
            for panel in columns..(columns + task_panels).min(panels) {
                let column = panel * COLUMNS;
                for start in (0..pairs.max(1)).step_by(BLOCK_PAIRS) {
                    let depth = BLOCK_PAIRS.min(pairs - start);
                    for row in rows.clone().step_by(ROWS) {
                        // SAFETY: the features and the panels' lengths were asserted above; the tile lies inside `out`,
                        // and this task alone has its rows and columns.
                        unsafe {
                            let tile = Tile {
                                out: target.at(row * stride + first_column + column),
                                stride,
                                columns: COLUMNS.min(n - column),
                                add: store == Store::Add || start > 0,
                            };
                            let left = left
                                .as_ptr()
                                .cast::<u32>()
                                .add((row * padded) + start * ROWS);
                            let right = right.as_ptr().cast::<u32>();
                            let right = right.add(column * padded + start * COLUMNS);
                            multiply_rows(
                                ROWS.min(m - row),
                                left,
                                right,
                                depth,
                                tile,
                                Ahead::NOTHING,
                            );
                        }
                    }
                }
            }
        }
    });
}

/// `out (+)= a · b`, strides as (row, column) of the logical `[m, k]` and `[k, n]` operands.
pub(crate) fn product(
    a: &[f32],
    a_strides: (usize, usize),
    b: &[f32],
    b_strides: (usize, usize),
    out: &mut [f32],
    shape: ProductShape,
    store: Store,
) {
    let ProductShape { m, n, k } = shape;
    let rows = Source {
        values: a,
        line_stride: a_strides.0,
        k_stride: a_strides.1,
        lines: m,
        k,
    };
    let chunk =
        (CHUNK_WORDS / k.div_ceil(2).max(1)).clamp(4 * COLUMNS, 128 * COLUMNS) / COLUMNS * COLUMNS;
    with_scratch(left_words(m, k), |left| {
        pack_left(rows, left);
        with_scratch(packed_words::<COLUMNS>(n.min(chunk), k), |right| {
            for first in (0..n).step_by(chunk) {
                let columns = Source {
                    values: &b[(first * b_strides.1).min(b.len())..],
                    line_stride: b_strides.1,
                    k_stride: b_strides.0,
                    lines: chunk.min(n - first),
                    k,
                };
                let right = &mut right[..packed_words::<COLUMNS>(columns.lines, k)];
                pack::<COLUMNS>(columns, right);
                let part = ProductShape {
                    m,
                    n: columns.lines,
                    k,
                };
                multiply_packed(left, right, out, (n, first), part, store);
            }
        });
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::random;

    #[test]
    fn columns_beyond_the_product_stay() {
        if !available() {
            return;
        }
        let shape = ProductShape { m: 9, n: 50, k: 3 };
        let (a, b) = (random(27, 1), random(150, 2));
        let mut left = vec![0.0; left_words(9, 3)];
        let mut right = vec![0.0; packed_words::<COLUMNS>(50, 3)];
        pack_left(
            Source {
                values: &a,
                line_stride: 3,
                k_stride: 1,
                lines: 9,
                k: 3,
            },
            &mut left,
        );
        pack::<COLUMNS>(
            Source {
                values: &b,
                line_stride: 3,
                k_stride: 1,
                lines: 50,
                k: 3,
            },
            &mut right,
        );
        let mut out = vec![7.0; 9 * 60];
        multiply_packed(&left, &right, &mut out, (60, 5), shape, Store::Replace);
        for row in out.chunks(60) {
            assert!(row[..5].iter().chain(&row[55..]).all(|&x| x == 7.0));
            assert!(row[5..55].iter().all(|&x| x != 7.0));
        }
    }
}
