//! Rows of queries, keys and values as the tiles of AMX want them: read where they lie, rotated on the way.

use std::arch::x86_64::{
    __m512i, _mm512_add_ps, _mm512_castsi512_ps, _mm512_cvtne2ps_pbh, _mm512_mul_ps,
    _mm512_set1_ps, _mm512_setzero_si512, _mm512_sub_ps,
};

use crate::amx::Tiles;
use crate::attention::AttentionInput;
use crate::attention_avx512::{VECTOR, bits, interleave, load, load_part, store, store_part};
use crate::matmul::Precision;
use crate::panels::{COLUMNS, TILE_ROWS, transpose};
use crate::plan::{AttentionPlan, AttentionShape, Span};
use crate::rope::RopeTable;

/// Elements of the largest head.
const MOST: usize = 128;
/// Words of a left tile.
pub(crate) const TILE_WORDS: usize = TILE_ROWS * VECTOR;
/// Tiles along a head.
pub(crate) const DEPTH: usize = MOST / (2 * VECTOR);
/// Keys are packed in groups of one left tile's width.
pub(crate) const GROUP: usize = 2 * VECTOR;
/// Scratch for keys is in whole groups and whole panels.
const WHOLE: usize = 96;

/// Whether the plan's products go through tiles from end to end.
pub(crate) fn takes(plan: &AttentionPlan) -> bool {
    plan.vectors
        && plan.tiles
        && plan.precision() == Precision::Bf16
        && plan.shape().head_dim <= MOST
}

/// Some columns of a matrix, one token a row.
#[derive(Clone, Copy)]
pub(crate) struct Columns<'a> {
    pub(crate) values: &'a [f32],
    /// Floats from a row to the next, and of a row before these columns.
    pub(crate) width: usize,
    pub(crate) first: usize,
}

impl<'a> Columns<'a> {
    fn head(&self, token: usize, head: usize, dim: usize) -> &'a [f32] {
        &self.values[token * self.width + self.first + head * dim..][..dim]
    }
}

/// Where queries, keys and values lie, and what is to be rotated.
#[derive(Clone, Copy)]
pub(crate) struct Source<'a> {
    pub(crate) shape: AttentionShape,
    pub(crate) q: Columns<'a>,
    pub(crate) k: Columns<'a>,
    pub(crate) v: Columns<'a>,
    /// Rotates queries and keys; they are rotated already where there is none.
    pub(crate) rope: Option<&'a RopeTable>,
}

impl<'a> Source<'a> {
    /// Three matrices, rotated already.
    pub(crate) fn apart(shape: AttentionShape, input: AttentionInput<'a>) -> Self {
        let whole = |values, width| Columns {
            values,
            width,
            first: 0,
        };
        Self {
            shape,
            q: whole(input.q, shape.query_width()),
            k: whole(input.k, shape.key_width()),
            v: whole(input.v, shape.key_width()),
            rope: None,
        }
    }

    /// Rows of query, key and value.
    pub(crate) fn joined(shape: AttentionShape, rope: &'a RopeTable, values: &'a [f32]) -> Self {
        let (queries, keys) = (shape.query_width(), shape.key_width());
        let part = |first| Columns {
            values,
            width: queries + 2 * keys,
            first,
        };
        Self {
            shape,
            q: part(0),
            k: part(queries),
            v: part(queries + keys),
            rope: Some(rope),
        }
    }

    /// Words of a head, in whole tiles.
    pub(crate) fn steps(&self) -> usize {
        self.shape.head_dim.next_multiple_of(GROUP) / 2
    }

    /// Columns of a head, in whole tiles.
    pub(crate) fn columns(&self) -> usize {
        self.shape.head_dim.next_multiple_of(VECTOR)
    }

    /// Rows `first..first + rows` of a span (query times group, then head in the group) as left tiles, times the scale of
    /// scores: `tiles` holds [`DEPTH`] tiles of 16 rows, then those of the next 16; zeros below the last row.
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    pub(crate) fn queries(&self, span: Span, head: usize, rows: Rows, tiles: &mut [f32]) {
        let (dim, group) = (self.shape.head_dim, self.shape.group());
        let mut row = Row::ZERO;
        let (mut query, mut member) = (rows.first / group, rows.first % group);
        for at in 0..rows.count.next_multiple_of(TILE_ROWS) {
            let to = &mut tiles[at / TILE_ROWS * DEPTH * TILE_WORDS + at % TILE_ROWS * VECTOR..];
            if at >= rows.count {
                for tile in 0..self.steps() / VECTOR {
                    to[tile * TILE_WORDS..][..VECTOR].fill(0.0);
                }
                continue;
            }
            let token = span.start + query;
            let from = self.q.head(token, head * group + member, dim);
            row.fetch(
                from,
                self.rope.map(|rope| rope.angles(token)),
                self.shape.scale(),
            );
            for tile in 0..self.steps() / VECTOR {
                store(
                    _mm512_castsi512_ps(row.words(tile)),
                    &mut to[tile * TILE_WORDS..],
                );
            }
            member += 1;
            if member == group {
                (query, member) = (query + 1, 0);
            }
        }
    }
}

/// Some rows of a span.
#[derive(Clone, Copy)]
pub(crate) struct Rows {
    pub(crate) first: usize,
    pub(crate) count: usize,
}

/// One row of a head, zeros after its end.
#[repr(C, align(64))]
struct Row([f32; MOST]);

impl Row {
    const ZERO: Self = Self([0.0; MOST]);

    /// The row, turned by the angles of these cosines and sines, times `scale`.
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    #[inline]
    fn fetch(&mut self, from: &[f32], angles: Option<(&[f32], &[f32])>, scale: f32) {
        let scale = _mm512_set1_ps(scale);
        let Some((cosines, sines)) = angles else {
            for (from, to) in from.chunks(VECTOR).zip(self.0.chunks_exact_mut(VECTOR)) {
                store(_mm512_mul_ps(load_part(from), scale), to);
            }
            return;
        };
        let half = cosines.len();
        let (a, b) = from.split_at(half);
        let (first, second) = self.0[..2 * half].split_at_mut(half);
        for at in (0..half).step_by(VECTOR) {
            let part = at..half.min(at + VECTOR);
            let (a, b) = (load_part(&a[part.clone()]), load_part(&b[part.clone()]));
            let cosine = load_part(&cosines[part.clone()]);
            let sine = load_part(&sines[part.clone()]);
            let turned = [
                _mm512_sub_ps(_mm512_mul_ps(a, cosine), _mm512_mul_ps(b, sine)),
                _mm512_add_ps(_mm512_mul_ps(b, cosine), _mm512_mul_ps(a, sine)),
            ];
            for (turned, to) in turned.into_iter().zip([&mut *first, &mut *second]) {
                let turned = _mm512_mul_ps(turned, scale);
                match &mut to[part.clone()] {
                    to if to.len() == VECTOR => store(turned, to),
                    to => store_part(turned, to),
                }
            }
        }
    }

    /// Elements `32·tile` and on, rounded to bf16.
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    #[inline]
    fn words(&self, tile: usize) -> __m512i {
        let from = &self.0[tile * GROUP..][..GROUP];
        bits(_mm512_cvtne2ps_pbh(load(&from[VECTOR..]), load(from)))
    }
}

/// The keys and values that the rows of a span see, as right operands: the prefix and the span behind it, in one line.
pub(crate) struct Keys<'a> {
    source: Source<'a>,
    head: usize,
    /// Panels of 48 keys, `[steps, 48]` each.
    keys: &'a mut [f32],
    /// Pairs of values, `[pairs, columns]`.
    values: &'a mut [f32],
    /// First token of the line, and how many tokens after it are packed.
    start: usize,
    len: usize,
}

impl<'a> Keys<'a> {
    /// Floats of scratch for `keys` keys.
    pub(crate) fn scratch(source: &Source<'_>, keys: usize) -> usize {
        let keys = keys.next_multiple_of(WHOLE);
        keys * source.steps() + keys / 2 * source.columns()
    }

    /// Nothing is packed yet; `scratch` is as long as [`Keys::scratch`] says for the longest line.
    pub(crate) fn new(
        source: Source<'a>,
        head: usize,
        keys: usize,
        scratch: &'a mut [f32],
    ) -> Self {
        let (keys, values) = scratch.split_at_mut(keys.next_multiple_of(WHOLE) * source.steps());
        Self {
            source,
            head,
            keys,
            values,
            start: 0,
            len: 0,
        }
    }

    /// Panel `panel` of keys: words `[steps, 48]`.
    pub(crate) fn panel(&self, panel: usize) -> &[f32] {
        &self.keys[panel * self.source.steps() * COLUMNS..][..self.source.steps() * COLUMNS]
    }

    /// The values of key `key` (an even one) and on: words `[pairs, columns]`.
    pub(crate) fn values(&self, key: usize) -> &[f32] {
        &self.values[key / 2 * self.source.columns()..]
    }

    /// Packs what the first `own` tokens of `span` see. What is there already of its prefix stays.
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    pub(crate) fn pack(&mut self, span: Span, own: usize) {
        let prefix = span.prefix_len;
        let (start, whole) = if prefix > 0 {
            (span.prefix_start, prefix)
        } else {
            (span.start, own)
        };
        let kept = if start == self.start {
            self.len.min(whole)
        } else {
            0
        };
        let end = prefix + own;
        for first in (kept / GROUP * GROUP..end).step_by(GROUP) {
            let token = |key: usize| {
                let token = if key < prefix {
                    span.prefix_start + key
                } else {
                    span.start + key - prefix
                };
                (key < end).then_some(token)
            };
            self.group(first, std::array::from_fn(|at| token(first + at)));
        }
        (self.start, self.len) = (start, whole);
    }

    /// Packs a group of keys and their values, zeros where there is no token.
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    fn group(&mut self, first: usize, tokens: [Option<usize>; GROUP]) {
        let Source {
            shape, k, v, rope, ..
        } = self.source;
        let (steps, columns) = (self.source.steps(), self.source.columns());
        let mut row = Row::ZERO;
        for (half, tokens) in tokens.chunks_exact(VECTOR).enumerate() {
            let mut tiles = [[_mm512_setzero_si512(); VECTOR]; DEPTH];
            for (at, token) in tokens.iter().enumerate() {
                let Some(token) = *token else { break };
                let from = k.head(token, self.head, shape.head_dim);
                row.fetch(from, rope.map(|rope| rope.angles(token)), 1.0);
                for (tile, words) in tiles.iter_mut().enumerate().take(steps / VECTOR) {
                    words[at] = row.words(tile);
                }
            }
            let key = first + half * VECTOR;
            let panel = &mut self.keys[key / COLUMNS * steps * COLUMNS + key % COLUMNS..];
            for (tile, words) in tiles.into_iter().enumerate().take(steps / VECTOR) {
                for (step, words) in transpose(words).into_iter().enumerate() {
                    let to = &mut panel[(tile * VECTOR + step) * COLUMNS..];
                    store(_mm512_castsi512_ps(words), to);
                }
            }
        }
        for (pair, tokens) in tokens.chunks_exact(2).enumerate() {
            let value = |token: Option<usize>| {
                token.map_or(&[][..], |token| v.head(token, self.head, shape.head_dim))
            };
            let (even, odd) = (value(tokens[0]), value(tokens[1]));
            let to = &mut self.values[(first / 2 + pair) * columns..][..columns];
            for (at, to) in to.chunks_exact_mut(VECTOR).enumerate() {
                let part = |x: &[f32]| {
                    load_part(&x[(at * VECTOR).min(x.len())..(at * VECTOR + VECTOR).min(x.len())])
                };
                store(interleave(part(even), part(odd)), to);
            }
        }
    }
}

/// The tiles of this thread, which a plan that [`takes`] takes has.
pub(crate) fn tiles(plan: &AttentionPlan) -> Tiles {
    assert!(plan.tiles, "AMX is missing");
    // SAFETY: the plan found AMX.
    unsafe { Tiles::configure() }
}
