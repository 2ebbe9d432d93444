//! The rows of a block as lanes: which keys they see, and how they come in and go out.

use std::arch::x86_64::{
    _mm512_castps_si512, _mm512_castsi512_ps, _mm512_cmpge_epi32_mask, _mm512_cvtne2ps_pbh,
    _mm512_loadu_si512, _mm512_mul_ps, _mm512_set1_epi32, _mm512_set1_ps, _mm512_setzero_ps,
};

use crate::attention_avx512::{
    TILE, VECTOR, bits, elements, load, load_part, padded, store, store_part,
};
use crate::panels::transpose;
use crate::parallel::SharedOut;
use crate::plan::{AttentionShape, BLOCK_LANES, LaneBlock};

/// The rows of a [`LaneBlock`] of one key head.
#[derive(Clone, Copy)]
pub(crate) struct Lanes {
    pub(crate) shape: AttentionShape,
    pub(crate) block: LaneBlock,
    pub(crate) head: usize,
}

/// Keys that a block sees together.
#[derive(Clone, Copy)]
pub(crate) struct KeyTile {
    /// First token, and its pair (`token` is at an even place of its piece).
    pub(crate) token: usize,
    pub(crate) pair: usize,
    pub(crate) len: usize,
    /// The first key's index in the span, where some lanes must not see all of them.
    pub(crate) masked_from: Option<usize>,
}

impl KeyTile {
    /// Where the tile's sum over tokens starts, in steps, and how many it has.
    pub(crate) fn steps<const BF16: bool>(self) -> (usize, usize) {
        if BF16 {
            (self.pair, self.len.div_ceil(2))
        } else {
            (self.token, self.len)
        }
    }
}

impl Lanes {
    /// Lanes in whole vectors.
    pub(crate) fn columns(&self) -> usize {
        self.block.rows.next_multiple_of(VECTOR)
    }

    /// Index of row `row` in a `[tokens, heads]` slice; times `head_dim` in a `[tokens, heads * head_dim]` slice.
    pub(crate) fn place(&self, row: usize) -> usize {
        let group = self.shape.group();
        let row = self.block.first + row;
        (self.block.span.start + row / group) * self.shape.heads + self.head * group + row % group
    }

    /// The block's keys in tiles, in order: the prefix, then the span's own up to the last that a row sees.
    pub(crate) fn tiles(&self) -> impl Iterator<Item = KeyTile> + use<> {
        let LaneBlock { span, .. } = self.block;
        let group = self.shape.group();
        let everybody_sees = self.block.first / group + 1;
        let own = self.block.own_keys(group);
        let (prefix_pair, own_pair) = (self.block.prefix_pair, self.block.own_pair);
        let prefix = (0..span.prefix_len).step_by(TILE).map(move |at| KeyTile {
            token: span.prefix_start + at,
            pair: prefix_pair + at / 2,
            len: TILE.min(span.prefix_len - at),
            masked_from: None,
        });
        let own = (0..own).step_by(TILE).map(move |at| {
            let len = TILE.min(own - at);
            KeyTile {
                token: span.start + at,
                pair: own_pair + at / 2,
                len,
                masked_from: (at + len > everybody_sees).then_some(at),
            }
        });
        prefix.chain(own)
    }

    /// For each lane the last key of the span that it sees.
    pub(crate) fn limits(&self) -> [i32; BLOCK_LANES] {
        let group = self.shape.group();
        std::array::from_fn(|lane| ((self.block.first + lane) / group) as i32)
    }

    /// Copies the rows out of a `[tokens, heads * head_dim]` slice, times `scale`: `[48, padded]`, zeros around them.
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    pub(crate) fn gather(&self, from: &[f32], scale: f32, to: &mut [f32]) {
        let (dim, padded) = (self.shape.head_dim, padded(self.shape));
        for (row, to) in to.chunks_exact_mut(padded).enumerate() {
            if row < self.block.rows {
                let from = &from[self.place(row) * dim..][..dim];
                for (from, to) in from.chunks(VECTOR).zip(to.chunks_exact_mut(VECTOR)) {
                    store(_mm512_mul_ps(load_part(from), _mm512_set1_ps(scale)), to);
                }
            } else {
                to.fill(0.0);
            }
        }
    }

    /// Turns gathered rows `[48, padded]` into the right operand of a sum over `head_dim`: words `[steps, 48]`.
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    pub(crate) fn turn<const BF16: bool>(&self, rows: &[f32], to: &mut [f32]) {
        let padded = padded(self.shape);
        let steps = padded / elements(BF16);
        for lane in (0..self.columns()).step_by(VECTOR) {
            for at in (0..padded).step_by(VECTOR * elements(BF16)) {
                let mut block = [_mm512_castps_si512(_mm512_setzero_ps()); VECTOR];
                for (row, words) in block.iter_mut().enumerate() {
                    let row = &rows[(lane + row) * padded..][at..padded];
                    *words = if BF16 {
                        let high =
                            load_part(&row[row.len().min(VECTOR)..row.len().min(2 * VECTOR)]);
                        bits(_mm512_cvtne2ps_pbh(high, load(row)))
                    } else {
                        _mm512_castps_si512(load(row))
                    };
                }
                let first = at / elements(BF16);
                for (step, words) in transpose(block).into_iter().enumerate() {
                    if first + step < steps {
                        store(
                            _mm512_castsi512_ps(words),
                            &mut to[(first + step) * BLOCK_LANES + lane..],
                        );
                    }
                }
            }
        }
    }

    /// Writes `[head_dim, 48]` to the rows' places in a `[tokens, heads * head_dim]` slice.
    ///
    /// # Safety
    /// No other task may touch these heads of these tokens.
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    pub(crate) unsafe fn scatter(&self, from: &[f32], to: SharedOut) {
        let dim = self.shape.head_dim;
        for lane in (0..self.block.rows).step_by(VECTOR) {
            for at in (0..dim).step_by(VECTOR) {
                let width = VECTOR.min(dim - at);
                let mut block = [_mm512_castps_si512(_mm512_setzero_ps()); VECTOR];
                for (element, words) in block.iter_mut().enumerate().take(width) {
                    *words =
                        _mm512_castps_si512(load(&from[(at + element) * BLOCK_LANES + lane..]));
                }
                let rows = transpose(block);
                for (row, &words) in rows.iter().enumerate().take(self.block.rows - lane) {
                    // SAFETY: row `lane + row` is one of the block's; no other task has it, by the caller's promise.
                    let to = unsafe { to.slice(self.place(lane + row) * dim + at, width) };
                    store_part(_mm512_castsi512_ps(words), to);
                }
            }
        }
    }
}

/// The lanes of vector `vector` that see key `key` of the span.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
#[inline]
pub(crate) fn sees(limits: &[i32; BLOCK_LANES], vector: usize, key: usize) -> u16 {
    // SAFETY: three vectors of 16 limits.
    let limits = unsafe { _mm512_loadu_si512(limits[vector * VECTOR..][..VECTOR].as_ptr().cast()) };
    _mm512_cmpge_epi32_mask(limits, _mm512_set1_epi32(key as i32))
}
