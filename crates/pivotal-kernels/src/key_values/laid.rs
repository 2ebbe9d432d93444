//! The memory of a cache, in the words that one instruction multiplies.

use std::ops::Range;

use super::BLOCK;
use crate::lanes::LANES;

/// Words hold one element or two; two are neighbours along the sum that they are for. Elements not yet there are zero.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Laid<W> {
    /// `[blocks, kv_heads, words of head_dim, 16]`.
    keys: Vec<W>,
    /// `[blocks, kv_heads, words of 16, padded head_dim]`.
    values: Vec<W>,
}

/// The upper half of an f32.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(transparent)]
pub(super) struct Bf16(pub(super) u16);

impl Bf16 {
    /// To nearest, ties to even; NaN stays NaN.
    pub(super) fn of(value: f32) -> Self {
        let bits = value.to_bits();
        if value.is_nan() {
            return Self((bits >> 16) as u16 | 0x40);
        }
        Self(((bits + 0x7fff + (bits >> 16 & 1)) >> 16) as u16)
    }
}

/// Two that are multiplied and summed by one instruction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C, align(4))]
pub(crate) struct Pair([Bf16; 2]);

/// What a cache is made of.
pub(crate) trait Word: Copy + Default {
    /// Elements in one.
    const ELEMENTS: usize;
    /// Puts an element in its place.
    fn set(&mut self, at: usize, value: f32);
}

impl Word for f32 {
    const ELEMENTS: usize = 1;

    fn set(&mut self, _at: usize, value: f32) {
        *self = value;
    }
}

impl Word for Pair {
    const ELEMENTS: usize = 2;

    fn set(&mut self, at: usize, value: f32) {
        self.0[at] = Bf16::of(value);
    }
}

impl<W: Word> Laid<W> {
    /// Words of a block's keys and values of one head.
    fn block_words(head_dim: usize) -> [usize; 2] {
        [
            head_dim.div_ceil(W::ELEMENTS) * BLOCK,
            BLOCK / W::ELEMENTS * padded(head_dim),
        ]
    }

    /// Appends rows of `kv_heads` heads of `head_dim` elements after `tokens` positions.
    pub(super) fn extend(
        &mut self,
        tokens: usize,
        [kv_heads, head_dim]: [usize; 2],
        keys: &[f32],
        values: &[f32],
    ) {
        let (width, padded) = (kv_heads * head_dim, padded(head_dim));
        let heads = (tokens + keys.len() / width).div_ceil(BLOCK) * kv_heads;
        let [key_words, value_words] = Self::block_words(head_dim);
        self.keys.resize(heads * key_words, W::default());
        self.values.resize(heads * value_words, W::default());
        let rows = keys.chunks_exact(width).zip(values.chunks_exact(width));
        for (token, (key, value)) in (tokens..).zip(rows) {
            let (block, lane) = (token / BLOCK, token % BLOCK);
            let heads = key.chunks_exact(head_dim).zip(value.chunks_exact(head_dim));
            for (head, (key, value)) in heads.enumerate() {
                let index = block * kv_heads + head;
                let keys = &mut self.keys[index * key_words + lane..];
                for (to, key) in keys.iter_mut().step_by(BLOCK).zip(key.chunks(W::ELEMENTS)) {
                    key.iter()
                        .enumerate()
                        .for_each(|(at, &key)| to.set(at, key));
                }
                let first = index * value_words + lane / W::ELEMENTS * padded;
                for (to, &value) in self.values[first..][..head_dim].iter_mut().zip(value) {
                    to.set(lane % W::ELEMENTS, value);
                }
            }
        }
    }

    /// Where the keys lie, and the values.
    pub(super) fn memory(&self) -> [Range<*const u8>; 2] {
        [&self.keys, &self.values].map(|words| {
            let Range { start, end } = words.as_ptr_range();
            start.cast()..end.cast()
        })
    }

    pub(super) fn block(
        &self,
        [kv_heads, head_dim]: [usize; 2],
        block: usize,
        head: usize,
    ) -> [&[W]; 2] {
        let index = block * kv_heads + head;
        let [keys, values] = Self::block_words(head_dim);
        [
            &self.keys[index * keys..][..keys],
            &self.values[index * values..][..values],
        ]
    }
}

/// A head's width in the values: whole vectors, of either path.
pub(super) fn padded(head_dim: usize) -> usize {
    head_dim.next_multiple_of(2 * LANES)
}
