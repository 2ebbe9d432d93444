//! Products with bf16 operands and f32 sums, on processors with AVX-512 BF16.
//!
//! Both operands are rounded and packed into panels: `W` rows (or columns) side by side, and along the sum one 32-bit word
//! for each pair of consecutive elements, as `vdpbf16ps` wants them. Panels of 8 rows times panels of 48 columns keep 24 of
//! the 32 vector registers as sums.
//!
//! The sum of one output element runs over the pairs in ascending order, in blocks of [`BLOCK_PAIRS`], whatever the number
//! of rows, columns and threads.

use std::arch::x86_64::{
    __m512bh, __m512i, _mm256_storeu_si256, _mm512_add_ps, _mm512_castsi512_si256,
    _mm512_cvtne2ps_pbh, _mm512_dpbf16_ps, _mm512_extracti64x4_epi64, _mm512_loadu_si512,
    _mm512_mask_storeu_ps, _mm512_maskz_loadu_ps, _mm512_permutexvar_epi16, _mm512_set1_epi32,
    _mm512_setzero_ps, _mm512_setzero_si512, _mm512_shuffle_i32x4, _mm512_storeu_si512,
    _mm512_unpackhi_epi32, _mm512_unpackhi_epi64, _mm512_unpacklo_epi32, _mm512_unpacklo_epi64,
};
use std::sync::LazyLock;

use crate::matmul::{ProductShape, Store};
use crate::parallel::{SharedOut, for_each_block, with_scratch};

/// Rows of a left panel.
pub(crate) const ROWS: usize = 8;
/// Columns of a right panel: three vectors.
pub(crate) const COLUMNS: usize = 48;
/// Lines packed together: the width of a vector.
const GROUP: usize = 16;
/// Pairs summed in registers before the sums go to memory: a right panel of that depth is 96 KiB, a tenth of the
/// second-level cache.
pub(crate) const BLOCK_PAIRS: usize = 512;
/// Rows of one task: its left panels take 256 KiB of the second-level cache.
const TASK_ROWS: usize = 128;
/// Right panels of one task.
const TASK_PANELS: usize = 8;
/// Words of packed right operand at a time: 8 MiB, a part of the third-level cache.
const CHUNK_WORDS: usize = 2 << 20;

/// Whether the processor has the instructions this module needs.
pub(crate) fn available() -> bool {
    static AVAILABLE: LazyLock<bool> = LazyLock::new(|| {
        is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512bf16")
    });
    #[cfg(test)]
    if crate::testing::portable_forced() {
        return false;
    }
    *AVAILABLE
}

/// Words that `lines` lines of `k` elements take in panels of `W`. Left panels come in twos, packed together.
pub(crate) fn packed_words<const W: usize>(lines: usize, k: usize) -> usize {
    let unit = W.max(GROUP);
    lines.div_ceil(unit) * unit * k.div_ceil(2)
}

/// An operand to pack: `lines` rows of the left one or columns of the right one, `k` elements each.
#[derive(Clone, Copy)]
pub(crate) struct Source<'a> {
    pub(crate) values: &'a [f32],
    pub(crate) line_stride: usize,
    pub(crate) k_stride: usize,
    pub(crate) lines: usize,
    pub(crate) k: usize,
}

impl Source<'_> {
    fn check(&self) {
        assert!(
            self.line_stride == 1 || self.k_stride == 1,
            "one stride must be 1"
        );
        if self.lines > 0 && self.k > 0 {
            let reach = (self.lines - 1) * self.line_stride + (self.k - 1) * self.k_stride + 1;
            assert!(
                self.values.len() >= reach,
                "an operand is shorter than its strides reach"
            );
        }
    }
}

/// Rounds `source` to bf16 into panels of `W` lines; lines beyond the last are zero.
pub(crate) fn pack<const W: usize>(source: Source<'_>, words: &mut [f32]) {
    assert!(available(), "bf16 instructions are missing");
    source.check();
    let unit = W.max(GROUP);
    let pairs = source.k.div_ceil(2);
    assert_eq!(words.len(), packed_words::<W>(source.lines, source.k));
    let target = SharedOut::new(words);
    for_each_block(
        source.lines.div_ceil(unit),
        1,
        source.lines * source.k,
        |units| {
            for at in units {
                for group in 0..unit / GROUP {
                    // SAFETY: the features were checked; the source by `check`; unit `at` of the target is this block's own,
                    // and `words` has room for it by the length asserted above.
                    unsafe {
                        let first = at * unit + group * GROUP;
                        let target = target
                            .at(at * unit * pairs)
                            .cast::<u32>()
                            .add(group * GROUP);
                        if source.k_stride == 1 {
                            pack_along_k::<W>(source, first, target);
                        } else {
                            pack_across_k::<W>(source, first, target);
                        }
                    }
                }
            }
        },
    );
}

/// A mask of the first `count` of 16 lanes.
pub(crate) fn first_lanes(count: usize) -> u16 {
    if count >= 16 {
        u16::MAX
    } else {
        (1 << count) - 1
    }
}

/// Stores 16 lines of one pair: one vector into a right panel, two halves into two left panels.
///
/// # Safety
/// `target` is the group's place in a panel of `pairs` pairs with room for 16 lines (`W` = 48) or two panels (`W` = 8).
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
unsafe fn store_pair<const W: usize>(target: *mut u32, pair: usize, pairs: usize, lines: __m512i) {
    // SAFETY: by the caller's promise; the stores need no alignment.
    unsafe {
        if W == ROWS {
            let (low, high) = (
                _mm512_castsi512_si256(lines),
                _mm512_extracti64x4_epi64::<1>(lines),
            );
            _mm256_storeu_si256(target.add(pair * ROWS).cast(), low);
            _mm256_storeu_si256(target.add((pairs + pair) * ROWS).cast(), high);
        } else {
            _mm512_storeu_si512(target.add(pair * W).cast(), lines);
        }
    }
}

/// Packs 16 lines whose elements are contiguous along the sum: 16 pairs of each at a time, transposed.
///
/// # Safety
/// `source` passed `check` and has `k_stride` 1; `target` as for [`store_pair`].
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
unsafe fn pack_along_k<const W: usize>(source: Source<'_>, first: usize, target: *mut u32) {
    let pairs = source.k.div_ceil(2);
    for pair in (0..pairs).step_by(GROUP) {
        let at = 2 * pair;
        let left = source.k - at;
        let (low_mask, high_mask) = (first_lanes(left), first_lanes(left.saturating_sub(16)));
        let mut block = [_mm512_setzero_si512(); GROUP];
        for (line, row) in block.iter_mut().enumerate() {
            if first + line < source.lines {
                // SAFETY: the masks stop at the line's last element; `wrapping_add` because the upper half may start
                // beyond it, masked off.
                unsafe {
                    let from = source
                        .values
                        .as_ptr()
                        .add((first + line) * source.line_stride + at);
                    let low = _mm512_maskz_loadu_ps(low_mask, from);
                    let high = _mm512_maskz_loadu_ps(high_mask, from.wrapping_add(16));
                    *row = std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(high, low));
                }
            }
        }
        let block = transpose(block);
        for (offset, &lines) in block.iter().enumerate().take(pairs - pair) {
            // SAFETY: pair + offset < pairs.
            unsafe { store_pair::<W>(target, pair + offset, pairs, lines) };
        }
    }
}

/// Packs 16 lines that lie side by side: two consecutive elements of the sum are two rows, interleaved.
///
/// # Safety
/// `source` passed `check` and has `line_stride` 1; `target` as for [`store_pair`].
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
unsafe fn pack_across_k<const W: usize>(source: Source<'_>, first: usize, target: *mut u32) {
    const INTERLEAVE: [u16; 32] = {
        let mut order = [0; 32];
        let mut lane = 0;
        while lane < 16 {
            order[2 * lane] = lane as u16;
            order[2 * lane + 1] = 16 + lane as u16;
            lane += 1;
        }
        order
    };
    let pairs = source.k.div_ceil(2);
    let mask = first_lanes(source.lines.saturating_sub(first));
    // SAFETY: 32 words of 16 bits are one vector.
    let order = unsafe { _mm512_loadu_si512(INTERLEAVE.as_ptr().cast()) };
    for pair in 0..pairs {
        let from = source
            .values
            .as_ptr()
            .wrapping_add(2 * pair * source.k_stride + first);
        let odd_mask = if 2 * pair + 1 < source.k { mask } else { 0 };
        // SAFETY: the masks stop at the last line and the last element; what is masked off may be out of bounds, hence
        // the wrapping additions.
        let both = unsafe {
            let even = _mm512_maskz_loadu_ps(mask, from);
            let odd = _mm512_maskz_loadu_ps(odd_mask, from.wrapping_add(source.k_stride));
            std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(odd, even))
        };
        // SAFETY: pair < pairs.
        unsafe { store_pair::<W>(target, pair, pairs, _mm512_permutexvar_epi16(order, both)) };
    }
}

/// Transposes 16 rows of 16 words.
#[target_feature(enable = "avx512f")]
pub(crate) fn transpose(rows: [__m512i; 16]) -> [__m512i; 16] {
    let mut quads = rows;
    for four in 0..4 {
        let at = 4 * four;
        let (r0, r1, r2, r3) = (rows[at], rows[at + 1], rows[at + 2], rows[at + 3]);
        let (low01, high01) = (_mm512_unpacklo_epi32(r0, r1), _mm512_unpackhi_epi32(r0, r1));
        let (low23, high23) = (_mm512_unpacklo_epi32(r2, r3), _mm512_unpackhi_epi32(r2, r3));
        quads[at] = _mm512_unpacklo_epi64(low01, low23);
        quads[at + 1] = _mm512_unpackhi_epi64(low01, low23);
        quads[at + 2] = _mm512_unpacklo_epi64(high01, high23);
        quads[at + 3] = _mm512_unpackhi_epi64(high01, high23);
    }
    // `quads[4j + c]` holds, in its 128-bit lane L, column 4L + c of rows 4j..4j + 4.
    let mut columns = rows;
    for c in 0..4 {
        let even = |a, b| _mm512_shuffle_i32x4::<0x88>(a, b);
        let odd = |a, b| _mm512_shuffle_i32x4::<0xdd>(a, b);
        let (upper_even, upper_odd) = (even(quads[c], quads[4 + c]), odd(quads[c], quads[4 + c]));
        let (lower_even, lower_odd) = (
            even(quads[8 + c], quads[12 + c]),
            odd(quads[8 + c], quads[12 + c]),
        );
        columns[c] = even(upper_even, lower_even);
        columns[8 + c] = odd(upper_even, lower_even);
        columns[4 + c] = even(upper_odd, lower_odd);
        columns[12 + c] = odd(upper_odd, lower_odd);
    }
    columns
}

/// Where a tile of sums goes.
#[derive(Clone, Copy)]
pub(crate) struct Tile {
    pub(crate) out: *mut f32,
    pub(crate) stride: usize,
    pub(crate) columns: usize,
    pub(crate) add: bool,
}

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
) {
    let mut sums = [[_mm512_setzero_ps(); 3]; R];
    for pair in 0..pairs {
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
) {
    // SAFETY: passed on to the caller.
    unsafe {
        match rows {
            1 => multiply_tile::<1>(left, right, pairs, tile),
            2 => multiply_tile::<2>(left, right, pairs, tile),
            3 => multiply_tile::<3>(left, right, pairs, tile),
            4 => multiply_tile::<4>(left, right, pairs, tile),
            5 => multiply_tile::<5>(left, right, pairs, tile),
            6 => multiply_tile::<6>(left, right, pairs, tile),
            7 => multiply_tile::<7>(left, right, pairs, tile),
            _ => multiply_tile::<8>(left, right, pairs, tile),
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
    assert!(
        left.len() >= packed_words::<ROWS>(m, k) && right.len() >= packed_words::<COLUMNS>(n, k)
    );
    assert!(first_column + n <= stride && out.len() >= m * stride);
    let pairs = k.div_ceil(2);
    if m == 0 || n == 0 {
        return;
    }
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
                                .add((row * pairs) + start * ROWS);
                            let right = right.as_ptr().cast::<u32>();
                            let right = right.add(column * pairs + start * COLUMNS);
                            multiply_rows(ROWS.min(m - row), left, right, depth, tile);
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
    with_scratch(packed_words::<ROWS>(m, k), |left| {
        pack::<ROWS>(rows, left);
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

    fn bf16(x: f32) -> u32 {
        let bits = x.to_bits();
        (bits + 0x7fff + ((bits >> 16) & 1)) >> 16
    }

    fn packs<const W: usize>(lines: usize, k: usize, along: bool) {
        let values = random(lines * k, 9);
        let (line_stride, k_stride) = if along { (k, 1) } else { (1, lines) };
        let source = Source {
            values: &values,
            line_stride,
            k_stride,
            lines,
            k,
        };
        let mut words = vec![f32::NAN; packed_words::<W>(lines, k)];
        pack::<W>(source, &mut words);
        let pairs = k.div_ceil(2);
        let value = |line: usize, at: usize| {
            if line < lines && at < k {
                bf16(values[line * line_stride + at * k_stride])
            } else {
                0
            }
        };
        for (index, word) in words.iter().enumerate() {
            let (panel, rest) = (index / (W * pairs), index % (W * pairs));
            let (pair, line) = (rest / W, panel * W + rest % W);
            let expected = value(line, 2 * pair) | value(line, 2 * pair + 1) << 16;
            assert_eq!(
                word.to_bits(),
                expected,
                "line {line} pair {pair} of {lines}x{k}"
            );
        }
    }

    #[test]
    fn panels_hold_rounded_pairs_and_zeros_beyond_the_edge() {
        if !available() {
            return;
        }
        for lines in [1, 8, 15, 16, 17, 47, 48, 49, 100] {
            for k in [1, 2, 31, 32, 33, 64, 71] {
                for along in [true, false] {
                    packs::<ROWS>(lines, k, along);
                    packs::<COLUMNS>(lines, k, along);
                }
            }
        }
    }

    #[test]
    fn packing_nothing_is_nothing() {
        if available() {
            for (lines, k) in [(0, 5), (5, 0), (0, 0)] {
                packs::<ROWS>(lines, k, true);
                packs::<COLUMNS>(lines, k, false);
            }
        }
    }

    #[test]
    fn columns_beyond_the_product_stay() {
        if !available() {
            return;
        }
        let shape = ProductShape { m: 9, n: 50, k: 3 };
        let (a, b) = (random(27, 1), random(150, 2));
        let mut left = vec![0.0; packed_words::<ROWS>(9, 3)];
        let mut right = vec![0.0; packed_words::<COLUMNS>(50, 3)];
        pack::<ROWS>(
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
