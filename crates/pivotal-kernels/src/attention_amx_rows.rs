//! Rows of queries, keys and values as the tiles of AMX want them: read where they lie, rotated on the way.

use std::arch::x86_64::{
    __m512i, _MM_HINT_T0, _mm_prefetch, _mm512_add_ps, _mm512_castps_si512, _mm512_castsi512_ps,
    _mm512_cvtne2ps_pbh, _mm512_mul_ps, _mm512_set1_ps, _mm512_setzero_si512, _mm512_sub_ps,
};

use crate::amx::{Block, Piece, Tiles};
use crate::attention::AttentionInput;
use crate::attention_avx512::{VECTOR, bits, interleave, load, load_part, store, store_part};
use crate::matmul::Precision;
use crate::panels::{COLUMNS, TILE_ROWS, transpose};
use crate::parallel::SharedOut;
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

/// Tokens that rows are asked for ahead of their turn: about a block of three heads a key head.
const AHEAD: usize = 11;

/// Asks for the lines of `row` as it lies so many floats further on, wherever that is: nothing is read.
#[inline]
fn ask_ahead(row: &[f32], floats: usize) {
    let line = row.as_ptr().wrapping_add(floats);
    for at in (0..row.len()).step_by(VECTOR) {
        // SAFETY: a prefetch of any address is allowed.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(line.wrapping_add(at).cast()) };
    }
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

    /// Rows of query, key and value; rotated already without a table.
    pub(crate) fn joined(
        shape: AttentionShape,
        rope: Option<&'a RopeTable>,
        values: &'a [f32],
    ) -> Self {
        let (queries, keys) = (shape.query_width(), shape.key_width());
        let part = |first| Columns {
            values,
            width: shape.joined_width(),
            first,
        };
        Self {
            shape,
            q: part(0),
            k: part(queries),
            v: part(queries + keys),
            rope,
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

    /// Rows of a span (query times group, then head in the group) as left tiles, times the scale of scores: `tiles` holds
    /// [`DEPTH`] tiles of 16 rows, then those of the next 16; zeros below the last row.
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    pub(crate) fn queries(&self, span: Span, head: usize, rows: Rows, tiles: &mut [f32]) {
        let scale = self.shape.scale();
        self.rows((self.q, self.rope), scale, (span, head, rows), tiles, None);
    }

    /// The same of any matrix of queries' shape. `turned`, where it is wanted, gets the rows as columns: for each 16 elements
    /// of a head a left tile `[16, 16 pairs of rows]`.
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    pub(crate) fn rows(
        &self,
        (from, rope): (Columns<'_>, Option<&RopeTable>),
        scale: f32,
        (span, head, rows): (Span, usize, Rows),
        tiles: &mut [f32],
        turned: Option<&mut [f32]>,
    ) {
        let (dim, group) = (self.shape.head_dim, self.shape.group());
        let columns = self.columns();
        let mut two = [Row::ZERO; 2];
        let mut pairs = [[_mm512_setzero_si512(); VECTOR]; MOST / VECTOR];
        let (mut query, mut member) = (rows.first / group, rows.first % group);
        for at in 0..rows.count.next_multiple_of(TILE_ROWS) {
            let to = &mut tiles[at / TILE_ROWS * DEPTH * TILE_WORDS + at % TILE_ROWS * VECTOR..];
            let row = &mut two[at % 2];
            if at < rows.count {
                let token = span.start + query;
                let ahead = AHEAD * from.width;
                let from = from.head(token, head * group + member, dim);
                ask_ahead(from, ahead);
                row.fetch(from, rope.map(|rope| rope.angles(token)), scale);
                member += 1;
                if member == group {
                    (query, member) = (query + 1, 0);
                }
            } else {
                *row = Row::ZERO;
            }
            for tile in 0..self.steps() / VECTOR {
                store(
                    _mm512_castsi512_ps(row.words(tile)),
                    &mut to[tile * TILE_WORDS..],
                );
            }
            if turned.is_some() && at % 2 == 1 {
                let [even, odd] = &two;
                for (tile, pairs) in pairs.iter_mut().enumerate().take(columns / VECTOR) {
                    let part = tile * VECTOR..;
                    let words = interleave(load(&even.0[part.clone()]), load(&odd.0[part]));
                    pairs[at / 2] = _mm512_castps_si512(words);
                }
            }
        }
        if let Some(turned) = turned {
            let tiles = turned.chunks_exact_mut(TILE_WORDS).take(columns / VECTOR);
            for (pairs, to) in pairs.iter().zip(tiles) {
                for (words, to) in transpose(*pairs)
                    .into_iter()
                    .zip(to.chunks_exact_mut(VECTOR))
                {
                    store(_mm512_castsi512_ps(words), to);
                }
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
#[derive(Clone, Copy)]
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

    /// Words of two rows: an element of the first, then the same of the second.
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    #[inline]
    fn pair(rows: &[Self; 2], to: &mut [f32]) {
        let [even, odd] = rows;
        let from = even.0.chunks_exact(VECTOR).zip(odd.0.chunks_exact(VECTOR));
        for ((even, odd), to) in from.zip(to.chunks_exact_mut(VECTOR)) {
            store(interleave(load(even), load(odd)), to);
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

/// What the rows of a span see, as right operands: the prefix and the span behind it, in one line.
pub(crate) struct Keys<'a> {
    source: Source<'a>,
    head: usize,
    /// Panels of 48 keys, `[steps, 48]` each, for sums over `head_dim`; the gradient wants the values so as well.
    keys: &'a mut [f32],
    values: Option<&'a mut [f32]>,
    /// Pairs of values, `[pairs, columns]`, for sums over tokens; the gradient wants the keys so.
    pairs: &'a mut [f32],
    /// First token of the line, and how many tokens after it are packed.
    start: usize,
    len: usize,
}

impl<'a> Keys<'a> {
    /// Floats of scratch for `keys` keys.
    pub(crate) fn scratch(source: &Source<'_>, keys: usize, gradient: bool) -> usize {
        let keys = keys.next_multiple_of(WHOLE);
        keys * source.steps() * (1 + usize::from(gradient)) + keys / 2 * source.columns()
    }

    /// Nothing is packed yet; `scratch` is as long as [`Keys::scratch`] says for the longest line.
    pub(crate) fn new(
        source: Source<'a>,
        head: usize,
        longest: usize,
        gradient: bool,
        scratch: &'a mut [f32],
    ) -> Self {
        let panels = longest.next_multiple_of(WHOLE) * source.steps();
        let (keys, scratch) = scratch.split_at_mut(panels);
        let (values, pairs) = scratch.split_at_mut(if gradient { panels } else { 0 });
        Self {
            source,
            head,
            keys,
            values: gradient.then_some(values),
            pairs,
            start: 0,
            len: 0,
        }
    }

    /// Panel `panel` of keys: words `[steps, 48]`.
    pub(crate) fn keys(&self, panel: usize) -> &[f32] {
        let words = self.source.steps() * COLUMNS;
        &self.keys[panel * words..][..words]
    }

    /// The same of values, where there is a gradient.
    pub(crate) fn values(&self, panel: usize) -> &[f32] {
        let words = self.source.steps() * COLUMNS;
        let values = self.values.as_deref().expect("packed for the gradient");
        &values[panel * words..][..words]
    }

    /// Pairs from key `key` (an even one) on: words `[pairs, columns]`.
    pub(crate) fn pairs(&self, key: usize) -> &[f32] {
        &self.pairs[key / 2 * self.source.columns()..]
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
        let Self {
            source, head, keys, ..
        } = self;
        let Source { k, v, rope, .. } = *source;
        let pairs = &mut self.pairs[first / 2 * source.columns()..];
        match &mut self.values {
            Some(values) => {
                source.panel((k, rope), *head, first, tokens, keys, Some(pairs));
                source.panel((v, None), *head, first, tokens, values, None);
            }
            None => {
                source.panel((k, rope), *head, first, tokens, keys, None);
                source.pairs(v, *head, tokens, pairs);
            }
        }
    }
}

impl Source<'_> {
    /// Columns `first..first + 32` of panels, and their pairs.
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    fn panel(
        &self,
        (from, rope): (Columns<'_>, Option<&RopeTable>),
        head: usize,
        first: usize,
        tokens: [Option<usize>; GROUP],
        panels: &mut [f32],
        mut pairs: Option<&mut [f32]>,
    ) {
        let (steps, columns) = (self.steps(), self.columns());
        let mut rows = [Row::ZERO; 2];
        for (half, tokens) in tokens.chunks_exact(VECTOR).enumerate() {
            let mut tiles = [[_mm512_setzero_si512(); VECTOR]; DEPTH];
            for (at, token) in tokens.iter().enumerate() {
                let row = &mut rows[at % 2];
                match *token {
                    Some(token) => {
                        let ahead = AHEAD * from.width;
                        let from = from.head(token, head, self.shape.head_dim);
                        ask_ahead(from, ahead);
                        row.fetch(from, rope.map(|rope| rope.angles(token)), 1.0);
                    }
                    None => *row = Row::ZERO,
                }
                for (tile, words) in tiles.iter_mut().enumerate().take(steps / VECTOR) {
                    words[at] = row.words(tile);
                }
                if let Some(pairs) = pairs.as_deref_mut().filter(|_| at % 2 == 1) {
                    Row::pair(
                        &rows,
                        &mut pairs[(half * VECTOR + at) / 2 * columns..][..columns],
                    );
                }
            }
            let key = first + half * VECTOR;
            let panel = &mut panels[key / COLUMNS * steps * COLUMNS + key % COLUMNS..];
            for (tile, words) in tiles.iter().enumerate().take(steps / VECTOR) {
                for (step, words) in transpose(*words).into_iter().enumerate() {
                    let to = &mut panel[(tile * VECTOR + step) * COLUMNS..];
                    store(_mm512_castsi512_ps(words), to);
                }
            }
        }
    }

    /// Pairs of rows as they lie, not rotated.
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    fn pairs(
        &self,
        from: Columns<'_>,
        head: usize,
        tokens: [Option<usize>; GROUP],
        to: &mut [f32],
    ) {
        let columns = self.columns();
        for (tokens, to) in tokens.chunks_exact(2).zip(to.chunks_exact_mut(columns)) {
            let value = |token: Option<usize>| {
                token.map_or(&[][..], |token| from.head(token, head, self.shape.head_dim))
            };
            let (even, odd) = (value(tokens[0]), value(tokens[1]));
            for (at, to) in to.chunks_exact_mut(VECTOR).enumerate() {
                let part = |x: &[f32]| {
                    load_part(&x[(at * VECTOR).min(x.len())..(at * VECTOR + VECTOR).min(x.len())])
                };
                store(interleave(part(even), part(odd)), to);
            }
        }
    }
}

/// Where the gradients of a [`Source`] go.
#[derive(Clone, Copy)]
pub(crate) struct Target<'a> {
    pub(crate) q: Place,
    pub(crate) k: Place,
    pub(crate) v: Place,
    /// Turns the gradients of queries and keys back.
    pub(crate) rope: Option<&'a RopeTable>,
}

/// Some columns of a matrix that tasks write at disjoint places.
#[derive(Clone, Copy)]
pub(crate) struct Place {
    pub(crate) values: SharedOut,
    pub(crate) width: usize,
    pub(crate) first: usize,
}

impl<'a> Target<'a> {
    /// Three matrices.
    pub(crate) fn apart(shape: AttentionShape, [q, k, v]: [SharedOut; 3]) -> Self {
        let whole = |values, width| Place {
            values,
            width,
            first: 0,
        };
        Self {
            q: whole(q, shape.query_width()),
            k: whole(k, shape.key_width()),
            v: whole(v, shape.key_width()),
            rope: None,
        }
    }

    /// Rows of query, key and value.
    pub(crate) fn joined(shape: AttentionShape, rope: &'a RopeTable, values: SharedOut) -> Self {
        let (queries, keys) = (shape.query_width(), shape.key_width());
        let part = |first| Place {
            values,
            width: shape.joined_width(),
            first,
        };
        Self {
            q: part(0),
            k: part(queries),
            v: part(queries + keys),
            rope: Some(rope),
        }
    }
}

impl Place {
    /// Writes one head of one token, times `scale`, turned back where there is a table.
    ///
    /// # Safety
    /// The head of the token lies inside the matrix, and no other task touches it.
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    pub(crate) unsafe fn write(
        self,
        (token, head): (usize, usize),
        from: &[f32],
        scale: f32,
        rope: Option<&RopeTable>,
    ) {
        let at = token * self.width + self.first + head * from.len();
        // SAFETY: the caller's promise.
        let to = unsafe { self.values.slice(at, from.len()) };
        let scale = _mm512_set1_ps(scale);
        let Some((cosines, sines)) = rope.map(|rope| rope.angles(token)) else {
            for (from, to) in from.chunks(VECTOR).zip(to.chunks_mut(VECTOR)) {
                store_part(_mm512_mul_ps(load_part(from), scale), to);
            }
            return;
        };
        let half = cosines.len();
        let ((a, b), (first, second)) = (from.split_at(half), to.split_at_mut(half));
        for at in (0..half).step_by(VECTOR) {
            let part = at..half.min(at + VECTOR);
            let a = _mm512_mul_ps(load_part(&a[part.clone()]), scale);
            let b = _mm512_mul_ps(load_part(&b[part.clone()]), scale);
            let cosine = load_part(&cosines[part.clone()]);
            let sine = load_part(&sines[part.clone()]);
            let turned = _mm512_add_ps(_mm512_mul_ps(a, cosine), _mm512_mul_ps(b, sine));
            store_part(turned, &mut first[part.clone()]);
            let turned = _mm512_sub_ps(_mm512_mul_ps(b, cosine), _mm512_mul_ps(a, sine));
            store_part(turned, &mut second[part]);
        }
    }
}

/// The tiles of this thread, which a plan that [`takes`] takes has.
pub(crate) fn tiles(plan: &AttentionPlan) -> Tiles {
    assert!(plan.tiles, "AMX is missing");
    // SAFETY: the plan found AMX.
    unsafe { Tiles::configure() }
}

/// The two halves of a left operand, `half` tiles apart, and words on the right, `step` apart.
pub(crate) fn piece(
    left: &[f32],
    half: usize,
    right: &[f32],
    step: usize,
    tiles: usize,
) -> [Piece; 1] {
    // Where there is no second half, the first stands for it.
    let below = left
        .get(half * TILE_WORDS..)
        .filter(|below| !below.is_empty());
    [Piece {
        left: left.as_ptr().cast(),
        below: below.unwrap_or(left).as_ptr().cast(),
        right: right.as_ptr().cast(),
        right_row: 4 * step,
        tiles,
    }]
}

/// A block of sums in rows of `out`, which begin with what is there if `add`.
pub(crate) fn to_block(
    out: &mut [f32],
    stride: usize,
    (rows, columns): (usize, usize),
    add: bool,
) -> Block {
    Block {
        out: out.as_mut_ptr(),
        stride,
        rows,
        columns,
        add,
        streams: false,
    }
}
