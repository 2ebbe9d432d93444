//! Operands rounded to bf16 and laid out in panels, as the instructions that multiply them want to read them.
//!
//! A panel is `W` lines (rows of the left operand, columns of the right one); along the sum one 32-bit word holds a pair of
//! consecutive elements. Panels of 8 rows and of 48 columns hold, pair by pair, the words of all their lines. Panels of 16
//! rows are tiles, each of 16 pairs: line by line, the words of its pairs.
//!
//! Every panel has a multiple of 16 pairs, zero beyond the last element, so a tile never reaches into the next panel; and
//! both left layouts take the same room.

use std::ops::Range;

use std::arch::x86_64::{
    __m512bh, __m512i, _mm256_storeu_si256, _mm512_castsi512_si256, _mm512_cvtne2ps_pbh,
    _mm512_extracti64x4_epi64, _mm512_loadu_si512, _mm512_maskz_loadu_ps, _mm512_permutexvar_epi16,
    _mm512_setzero_si512, _mm512_shuffle_i32x4, _mm512_storeu_si512, _mm512_unpackhi_epi32,
    _mm512_unpackhi_epi64, _mm512_unpacklo_epi32, _mm512_unpacklo_epi64,
};

use crate::bf16::available;
use crate::parallel::{SharedOut, for_each_block, reaches, with_scratch};
use crate::processor::{Processor, processor};

/// Rows of a left panel that AVX-512 reads.
pub(crate) const ROWS: usize = 8;
/// Rows of a left panel that AMX reads: those of a tile register.
pub(crate) const TILE_ROWS: usize = 16;
/// Columns of a right panel: three vectors, or three tile registers.
pub(crate) const COLUMNS: usize = 48;
/// Lines packed together: the width of a vector. Also the pairs of a tile.
const GROUP: usize = 16;

/// Pairs of a panel whose sums are `k` long.
pub(crate) fn padded_pairs(k: usize) -> usize {
    k.div_ceil(2).next_multiple_of(GROUP)
}

/// As [`packed_words`], of the left operand on this processor.
pub(crate) fn left_words(rows: usize, k: usize) -> usize {
    packed_words::<TILE_ROWS>(rows, k)
}

/// As [`pack`], of the left operand for this processor.
pub(crate) fn pack_left(source: Source<'_>, words: &mut [f32]) {
    if processor() == Processor::Amx {
        pack::<TILE_ROWS>(source, words);
    } else {
        pack::<ROWS>(source, words);
    }
}

/// Words that `lines` lines of `k` elements take in panels of `W`. Left panels of 8 come in twos, packed together.
pub(crate) fn packed_words<const W: usize>(lines: usize, k: usize) -> usize {
    let unit = W.max(GROUP);
    let lines = lines.checked_next_multiple_of(unit);
    let words = lines.and_then(|lines| lines.checked_mul(padded_pairs(k)));
    words.expect("an operand has more elements than can be counted")
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
        let strides = (self.line_stride, self.k_stride);
        assert!(
            reaches(self.values.len(), (self.lines, self.k), strides),
            "an operand is shorter than its strides reach"
        );
    }
}

/// Rounds `source` to bf16 into panels of `W` lines; lines beyond the last are zero.
pub(crate) fn pack<const W: usize>(source: Source<'_>, words: &mut [f32]) {
    assert!(available(), "bf16 instructions are missing");
    source.check();
    let unit = W.max(GROUP);
    let pairs = padded_pairs(source.k);
    assert_eq!(words.len(), packed_words::<W>(source.lines, source.k));
    let target = SharedOut::new(words);
    for_each_block(
        source.lines.div_ceil(unit),
        1,
        source.lines * source.k,
        |units| {
            for at in units {
                // SAFETY: the features were checked; the source by `check`; unit `at` of the target is this block's own,
                // and `words` has room for it by the length asserted above.
                unsafe {
                    let (first, target) = (at * unit, target.at(at * unit * pairs).cast::<u32>());
                    if source.k_stride != 1 {
                        pack_across_k::<W>(source, first, target, pairs);
                        continue;
                    }
                    for group in (0..unit).step_by(GROUP) {
                        pack_along_k::<W>(source, first + group, pairs, target.add(group));
                    }
                }
            }
        },
    );
}

/// What [`pack`] made right panels of, lines one after the other: `values` is `[lines, k]`.
///
/// # Panics
/// If the panels are not those of so many elements.
pub(crate) fn unpack_columns(words: &[f32], k: usize, values: &mut [f32]) {
    let lines = values.len() / k.max(1);
    assert_eq!(words.len(), packed_words::<COLUMNS>(lines, k));
    let pairs = padded_pairs(k);
    let values = SharedOut::new(values);
    for_each_block(lines.div_ceil(COLUMNS), 1, lines * k, |panels| {
        for panel in panels {
            let first = panel * COLUMNS;
            let words = &words[first * pairs..][..COLUMNS * pairs];
            for line in 0..COLUMNS.min(lines - first) {
                // SAFETY: line `first + line` is this panel's own.
                let values = unsafe { values.slice((first + line) * k, k) };
                let words = words[line..].iter().step_by(COLUMNS);
                for (two, word) in values.chunks_mut(2).zip(words) {
                    let bits = word.to_bits();
                    two[0] = f32::from_bits(bits << 16);
                    if let Some(second) = two.get_mut(1) {
                        *second = f32::from_bits(bits & 0xffff_0000);
                    }
                }
            }
        }
    });
}

/// Rows that lie in memory, or that are made where they are wanted.
pub(crate) enum Rows<'a> {
    /// `stride` floats from one to the next.
    InMemory { values: &'a [f32], stride: usize },
    /// `make` writes some of them, each `width` long, one after the other.
    Made {
        width: usize,
        make: &'a (dyn Fn(Range<usize>, &mut [f32]) + Sync),
    },
}

/// Columns `first..first + columns` of [`Rows`], and what they are packed into.
pub(crate) struct Part<'a> {
    pub(crate) first: usize,
    pub(crate) columns: usize,
    /// The rows as those of a left operand: [`left_words`] of them.
    pub(crate) left: Option<&'a mut [f32]>,
    /// The columns as those of a right operand, whose sums run over the rows: [`packed_words`].
    pub(crate) right: Option<&'a mut [f32]>,
}

/// Rows that [`pack_rows`] takes at a time: a tile's pairs on the right, two tiles on the left.
const UNIT_ROWS: usize = 2 * GROUP;

/// Packs parts of `rows` rows, in one pass over them.
pub(crate) fn pack_rows(rows: usize, source: &Rows<'_>, parts: &mut [Part<'_>]) {
    assert!(available(), "bf16 instructions are missing");
    struct Target {
        first: usize,
        columns: usize,
        left: Option<SharedOut>,
        right: Option<SharedOut>,
    }
    let width = match source {
        Rows::InMemory { stride, .. } => *stride,
        Rows::Made { width, .. } => *width,
    };
    if let Rows::InMemory { values, stride } = source {
        assert!(values.len() >= rows * stride, "`values` is too short");
    }
    let targets: Vec<Target> = parts
        .iter_mut()
        .map(|part| {
            assert!(part.first + part.columns <= width, "a part is too wide");
            let check = |words: &mut [f32], expected| {
                assert_eq!(words.len(), expected);
                SharedOut::new(words)
            };
            let right_words = packed_words::<COLUMNS>(part.columns, rows);
            Target {
                first: part.first,
                columns: part.columns,
                left: part
                    .left
                    .as_deref_mut()
                    .map(|words| check(words, left_words(rows, part.columns))),
                right: part
                    .right
                    .as_deref_mut()
                    .map(|words| check(words, right_words)),
            }
        })
        .collect();
    let path = processor();
    for_each_block(rows.div_ceil(UNIT_ROWS), 1, rows * width, |units| {
        for unit in units {
            let first_row = unit * UNIT_ROWS;
            let count = UNIT_ROWS.min(rows - first_row);
            let pack = |values: &[f32], stride: usize| {
                for target in &targets {
                    let values = &values[target.first.min(values.len())..];
                    let lines = Source {
                        values,
                        line_stride: stride,
                        k_stride: 1,
                        lines: count,
                        k: target.columns,
                    };
                    let across = Source {
                        values,
                        line_stride: 1,
                        k_stride: stride,
                        lines: target.columns,
                        k: count,
                    };
                    lines.check();
                    across.check();
                    if let Some(left) = target.left {
                        let pairs = padded_pairs(target.columns);
                        // SAFETY: the features and the source were checked; `left` has room for 16 rows from each
                        // multiple of 16 on, and these are this block's own.
                        unsafe {
                            pack_lines(lines, path, left.at(first_row * pairs).cast(), pairs, 0)
                        };
                    }
                    if let Some(right) = target.right {
                        // SAFETY: as above; `right` has whole panels of all rows, of which these are this block's own.
                        unsafe { pack_columns(across, right, rows, first_row, 0) };
                    }
                }
            };
            match source {
                Rows::InMemory { values, stride } => pack(&values[first_row * stride..], *stride),
                Rows::Made { width, make } => with_scratch(count * width, |made| {
                    make(first_row..first_row + count, made);
                    pack(made, *width);
                }),
            }
        }
    });
}

/// Packs lines that are contiguous along the sum as those of a left operand, from pair `first_pair`, a multiple of 16, on.
///
/// # Safety
/// The features are there and `source` passed `check`; `target` has room for the lines, rounded up to 16, in panels of `pairs`
/// pairs.
unsafe fn pack_lines(
    source: Source<'_>,
    path: Processor,
    target: *mut u32,
    pairs: usize,
    first_pair: usize,
) {
    for first in (0..source.lines).step_by(GROUP) {
        // SAFETY: by the caller's promise.
        unsafe {
            let to = target.add(first * pairs);
            match path == Processor::Amx {
                true => {
                    let to = to.add(first_pair * TILE_ROWS);
                    pack_along_k::<TILE_ROWS>(source, first, pairs, to);
                }
                false => {
                    let to = to.add(first_pair * ROWS);
                    pack_along_k::<ROWS>(source, first, pairs, to);
                }
            }
        }
    }
}

/// Packs the columns of rows `first_row..`, a multiple of 2, as columns `first..`, a multiple of 48, of a right operand whose sums
/// run over `all` rows.
///
/// # Safety
/// The features are there and `source` passed `check`; `target` has [`packed_words`] of all columns and rows, of which the pairs
/// of these rows are the caller's alone, and if they are the last ones all that follow.
unsafe fn pack_columns(
    source: Source<'_>,
    target: SharedOut,
    all: usize,
    first_row: usize,
    first: usize,
) {
    let (pairs, first_pair) = (padded_pairs(all), first_row / 2);
    let written = match first_row + source.k == all {
        true => pairs - first_pair,
        false => source.k / 2,
    };
    for column in (0..source.lines).step_by(COLUMNS) {
        let at = (first + column) * pairs + first_pair * COLUMNS;
        // SAFETY: by the caller's promise.
        unsafe { pack_across_k::<COLUMNS>(source, column, target.at(at).cast(), written) };
    }
}

/// A block of rows, `stride` apart, and how many of their first columns count.
#[derive(Clone, Copy)]
pub(crate) struct BlockRows<'a> {
    pub(crate) values: &'a [f32],
    pub(crate) stride: usize,
    pub(crate) rows: usize,
    pub(crate) columns: usize,
}

impl BlockRows<'_> {
    /// Packs them, on the calling thread, as columns `first..` of a left operand for `path` whose rows are `k` long; `first` is
    /// a multiple of 32.
    pub(crate) fn pack_left(&self, path: Processor, words: &mut [f32], k: usize, first: usize) {
        assert!(available(), "bf16 instructions are missing");
        let source = Source {
            values: self.values,
            line_stride: self.stride,
            k_stride: 1,
            lines: self.rows,
            k: self.columns,
        };
        source.check();
        let pairs = padded_pairs(k);
        assert!(first.is_multiple_of(2 * GROUP) && first / 2 + padded_pairs(self.columns) <= pairs);
        assert!(words.len() >= left_words(self.rows, k));
        // SAFETY: the features, the source and the room were checked.
        unsafe { pack_lines(source, path, words.as_mut_ptr().cast(), pairs, first / 2) };
    }

    /// Packs them, on the calling thread, as columns `first..` of a right operand whose sums run over `all` rows, these being
    /// rows `first_row..` of them: multiples of 48 and of 2. They are an even number unless they are the last ones.
    ///
    /// # Safety
    /// `words` has [`packed_words`] of all columns and rows; nobody else touches those of these columns and rows, nor, if these
    /// rows are the last ones, what follows them.
    pub(crate) unsafe fn pack_right(
        &self,
        words: SharedOut,
        all: usize,
        first_row: usize,
        first: usize,
    ) {
        assert!(available(), "bf16 instructions are missing");
        let source = Source {
            values: self.values,
            line_stride: 1,
            k_stride: self.stride,
            lines: self.columns,
            k: self.rows,
        };
        source.check();
        assert!(first_row.is_multiple_of(2) && first.is_multiple_of(COLUMNS));
        let end = first_row + self.rows;
        assert!(end == all || end < all && self.rows.is_multiple_of(2));
        // SAFETY: the caller's promise; the features and the source were checked.
        unsafe { pack_columns(source, words, all, first_row, first) };
    }
}

/// A mask of the first `count` of 16 lanes.
pub(crate) fn first_lanes(count: usize) -> u16 {
    if count >= 16 {
        u16::MAX
    } else {
        (1 << count) - 1
    }
}

/// Stores 16 lines of one pair: one vector into a right panel, two halves into two left panels of 8.
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

/// Stores a tile: 16 lines of 16 pairs from `pair` on.
///
/// # Safety
/// `target` is a panel of 16 lines, and `pair`, a multiple of 16, is below its pairs.
#[target_feature(enable = "avx512f")]
unsafe fn store_tile(target: *mut u32, pair: usize, lines: [__m512i; GROUP]) {
    for (line, pairs) in lines.into_iter().enumerate() {
        // SAFETY: by the caller's promise; the stores need no alignment.
        unsafe { _mm512_storeu_si512(target.add((pair + line) * GROUP).cast(), pairs) };
    }
}

/// Packs 16 lines whose elements are contiguous along the sum: 16 pairs of each at a time, transposed.
///
/// # Safety
/// `source` passed `check` and has `k_stride` 1; `target` as for [`store_pair`], at the first pair, in panels of `pairs` pairs.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
unsafe fn pack_along_k<const W: usize>(
    source: Source<'_>,
    first: usize,
    pairs: usize,
    target: *mut u32,
) {
    for pair in (0..padded_pairs(source.k)).step_by(GROUP) {
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
        if W == TILE_ROWS {
            // SAFETY: pair < pairs, a multiple of 16.
            unsafe { store_tile(target, pair, block) };
            continue;
        }
        for (offset, lines) in transpose(block).into_iter().enumerate() {
            // SAFETY: pair + offset < pairs, a multiple of 16.
            unsafe { store_pair::<W>(target, pair + offset, pairs, lines) };
        }
    }
}

/// Packs a panel's lines, at least 16, that lie side by side, as its first `pairs` pairs: two consecutive elements of the sum are two
/// rows, interleaved. A row's part is read at one go, for the next row is another page.
///
/// # Safety
/// `source` passed `check` and has `line_stride` 1; `target` is the panel, with room for so many pairs. Panels of 8 lines are two, and
/// have so many pairs each; tiles have a multiple of 16.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
unsafe fn pack_across_k<const W: usize>(
    source: Source<'_>,
    first: usize,
    target: *mut u32,
    pairs: usize,
) {
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
    // SAFETY: 32 words of 16 bits are one vector.
    let order = unsafe { _mm512_loadu_si512(INTERLEAVE.as_ptr().cast()) };
    let words = |first: usize, pair: usize| {
        let mask = first_lanes(source.lines.saturating_sub(first));
        let from = source
            .values
            .as_ptr()
            .wrapping_add(2 * pair * source.k_stride + first);
        let mask_at = |at: usize| if at < source.k { mask } else { 0 };
        // SAFETY: the masks stop at the last line and the last element; what is masked off may be out of bounds, hence
        // the wrapping additions.
        let both = unsafe {
            let even = _mm512_maskz_loadu_ps(mask_at(2 * pair), from);
            let odd =
                _mm512_maskz_loadu_ps(mask_at(2 * pair + 1), from.wrapping_add(source.k_stride));
            std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(odd, even))
        };
        _mm512_permutexvar_epi16(order, both)
    };
    if W == TILE_ROWS {
        for pair in (0..pairs).step_by(GROUP) {
            let mut block = [_mm512_setzero_si512(); GROUP];
            for (offset, lines) in block.iter_mut().enumerate() {
                *lines = words(first, pair + offset);
            }
            // SAFETY: pair < pairs, a multiple of 16.
            unsafe { store_tile(target, pair, transpose(block)) };
        }
        return;
    }
    for pair in 0..pairs {
        for group in (0..W.max(GROUP)).step_by(GROUP) {
            // SAFETY: pair < pairs, and the group is one of the panel's.
            unsafe {
                let target = target.add(group);
                store_pair::<W>(target, pair, pairs, words(first + group, pair));
            }
        }
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

#[cfg(test)]
mod tests;
