//! The forward pass on AMX: 32 query rows at a time, up to 192 keys at a time, nothing transposed but the keys, once.
//!
//! ```text
//! S [rows, keys] = Q [rows, head_dim] · Kᵀ,  P = 2^(S·log2 e - shift),  out = P [rows, keys] · V [keys, head_dim] / Σ P
//! ```
//!
//! Queries and weights are left tiles as they come; keys and values are packed for each run of rows, which is a small part of
//! multiplying by them. A row's softmax is a horizontal one, which is what lanes were for on processors without tiles.
//!
//! Every row is computed by the same instructions whatever the other rows hold.

use std::arch::x86_64::{
    __m512, _mm512_add_ps, _mm512_castsi512_ps, _mm512_cvtne2ps_pbh, _mm512_fmsub_ps,
    _mm512_mask_max_ps, _mm512_maskz_mov_ps, _mm512_max_ps, _mm512_mul_ps, _mm512_reduce_add_ps,
    _mm512_reduce_max_ps, _mm512_set1_ps, _mm512_setzero_ps,
};
use std::f32::consts::LOG2_E;

use rayon::prelude::*;

use crate::amx::{BLOCK_ROWS, Tiles, multiply};
use crate::attention_amx_rows::{
    DEPTH, GROUP, Keys, Rows, Source, TILE_WORDS, piece, takes, tiles, to_block,
};
use crate::attention_avx512::{VECTOR, bits, cut, exp2, first_lanes, load, store, store_part};
use crate::panels::{COLUMNS, TILE_ROWS};
use crate::parallel::{SERIAL_WORK, SharedOut, with_scratch};
use crate::plan::{AttentionPlan, Family, Span};

/// Keys whose scores are held at a time: whole panels of keys and whole tiles of weights.
const CHUNK: usize = 192;
/// Tiles of weights.
const CHUNK_TILES: usize = CHUNK / GROUP;
/// Scores that a run has before it ends: packing its keys is then a small part of it.
const RUN_SCORES: usize = 1 << 19;

/// Rows of a span that are multiplied together.
#[derive(Clone, Copy)]
pub(crate) struct RowBlock {
    pub(crate) span: Span,
    pub(crate) rows: Rows,
    /// Tokens of the span that the last row sees.
    pub(crate) own: usize,
}

impl RowBlock {
    pub(crate) fn keys(&self) -> usize {
        self.span.prefix_len + self.own
    }

    pub(crate) fn scores(&self) -> usize {
        self.rows.count * self.keys()
    }
}

/// Blocks that share keys, as one task takes them.
struct Run {
    blocks: Vec<RowBlock>,
    scores: usize,
}

/// Where the runs end depends on the spans alone, and no row depends on where they do.
fn runs(plan: &AttentionPlan) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::new();
    for family in &plan.families {
        let mut open = false;
        for block in row_blocks(family, plan.shape().group()) {
            match runs.last_mut() {
                Some(run) if open && run.scores < RUN_SCORES => {
                    run.scores += block.scores();
                    run.blocks.push(block);
                }
                _ => runs.push(Run {
                    blocks: vec![block],
                    scores: block.scores(),
                }),
            }
            open = true;
        }
    }
    // The largest first, so that none is left for the end; the sort is stable.
    runs.sort_by_key(|run| std::cmp::Reverse(run.scores));
    runs
}

/// The rows of a family's spans, in order.
pub(crate) fn row_blocks(family: &Family, group: usize) -> impl Iterator<Item = RowBlock> {
    family.spans().flat_map(move |span| {
        let lanes = span.len * group;
        (0..lanes).step_by(BLOCK_ROWS).map(move |first| {
            let count = BLOCK_ROWS.min(lanes - first);
            RowBlock {
                span,
                rows: Rows { first, count },
                own: (first + count - 1) / group + 1,
            }
        })
    })
}

/// Every row of both outputs that is a span's.
///
/// # Safety
/// They are as long as [`crate::attention_forward`] says, initialised or not, and nobody else touches them meanwhile.
pub(crate) unsafe fn forward(
    plan: &AttentionPlan,
    source: Source<'_>,
    out: SharedOut,
    lse: SharedOut,
) {
    assert!(takes(plan), "AMX is missing, or heads are too large");
    let pass = Forward { source, out, lse };
    let (runs, heads) = (runs(plan), plan.shape().kv_heads);
    let task = |task: usize| pass.run(&runs[task / heads], task % heads, &tiles(plan));
    let tasks = 0..runs.len() * heads;
    if plan.work < SERIAL_WORK {
        tasks.for_each(task);
    } else {
        tasks.into_par_iter().with_max_len(1).for_each(task);
    }
}

struct Forward<'a> {
    source: Source<'a>,
    out: SharedOut,
    lse: SharedOut,
}

/// One block's operands and sums.
struct Buffers<'a> {
    /// Left tiles: [`DEPTH`] of the first 16 rows, then of the next.
    queries: &'a mut [f32],
    /// `[32, CHUNK]`
    scores: &'a mut [f32],
    /// Left tiles: [`CHUNK_TILES`] of the first 16 rows, then of the next.
    weights: &'a mut [f32],
    /// `[32, columns]`
    sums: &'a mut [f32],
    /// For each row sixteen sums of weights.
    totals: &'a mut [f32],
    /// For each row the largest score times log2 e.
    shifts: [f32; BLOCK_ROWS],
}

impl Forward<'_> {
    fn run(&self, run: &Run, head: usize, tiles: &Tiles) {
        let columns = self.source.columns();
        let most = run.blocks.iter().map(RowBlock::keys).max().unwrap_or(0);
        let words = Keys::scratch(&self.source, most, false);
        let block =
            2 * (DEPTH + CHUNK_TILES) * TILE_WORDS + BLOCK_ROWS * (CHUNK + columns + VECTOR);
        with_scratch(words + block, |mut scratch| {
            let mut buffers = Buffers {
                queries: cut(&mut scratch, 2 * DEPTH * TILE_WORDS),
                scores: cut(&mut scratch, BLOCK_ROWS * CHUNK),
                weights: cut(&mut scratch, 2 * CHUNK_TILES * TILE_WORDS),
                sums: cut(&mut scratch, BLOCK_ROWS * columns),
                totals: cut(&mut scratch, BLOCK_ROWS * VECTOR),
                shifts: [0.0; BLOCK_ROWS],
            };
            let mut keys = Keys::new(self.source, head, most, false, scratch);
            for blocks in run.blocks.chunk_by(|a, b| a.span.start == b.span.start) {
                let last = blocks[blocks.len() - 1];
                // SAFETY: the features were found when the plan was made.
                unsafe {
                    keys.pack(last.span, last.own);
                    for &block in blocks {
                        self.block(block, head, &keys, &mut buffers, tiles);
                    }
                }
            }
        });
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    fn block(
        &self,
        block: RowBlock,
        head: usize,
        keys: &Keys<'_>,
        buffers: &mut Buffers<'_>,
        tiles: &Tiles,
    ) {
        let rows = block.rows;
        self.source.queries(block.span, head, rows, buffers.queries);
        let total = block.keys();
        for first in (0..total).step_by(CHUNK) {
            let len = CHUNK.min(total - first);
            self.scores(keys, first, len, rows.count, buffers, tiles);
            let visible = |row: usize| {
                let seen =
                    block.span.prefix_len + (rows.first + row) / self.source.shape.group() + 1;
                seen.saturating_sub(first).min(len)
            };
            buffers.weigh(
                rows.count,
                visible,
                len,
                (first > 0).then_some(self.source.columns()),
            );
            self.mix(keys, first, len, rows.count, buffers, tiles);
        }
        self.finish(block, head, buffers);
    }

    /// The scores of a chunk of keys.
    fn scores(
        &self,
        keys: &Keys<'_>,
        first: usize,
        len: usize,
        rows: usize,
        buffers: &mut Buffers<'_>,
        tiles: &Tiles,
    ) {
        let (queries, depth) = (&*buffers.queries, self.source.steps() / VECTOR);
        for at in (0..len).step_by(COLUMNS) {
            let panel = keys.keys((first + at) / COLUMNS);
            let pieces = piece(queries, DEPTH, panel, COLUMNS, depth);
            let columns = COLUMNS.min((len - at).next_multiple_of(VECTOR));
            let size = (rows.next_multiple_of(TILE_ROWS), columns);
            let block = to_block(&mut buffers.scores[at..], CHUNK, size, false);
            // SAFETY: both halves of the queries have `depth` tiles, a panel has that many times 16 steps of 48 words, and the
            // scores have 32 rows of whole chunks.
            unsafe { multiply(tiles, &pieces, block) };
        }
    }

    /// Adds the weighted values of a chunk to the sums; those of the first chunk replace them.
    fn mix(
        &self,
        keys: &Keys<'_>,
        first: usize,
        len: usize,
        rows: usize,
        buffers: &mut Buffers<'_>,
        tiles: &Tiles,
    ) {
        let columns = self.source.columns();
        let (weights, values) = (&*buffers.weights, keys.pairs(first));
        let depth = len.div_ceil(GROUP);
        assert!(values.len() >= depth * VECTOR * columns);
        for at in (0..columns).step_by(GROUP) {
            let pieces = piece(weights, CHUNK_TILES, &values[at..], columns, depth);
            let size = (rows.next_multiple_of(TILE_ROWS), GROUP.min(columns - at));
            let block = to_block(&mut buffers.sums[at..], columns, size, first > 0);
            // SAFETY: both halves of the weights have `depth` tiles, the values that many times 16 pairs by the assertion, and
            // the sums have 32 rows of whole tiles.
            unsafe { multiply(tiles, &pieces, block) };
        }
    }

    /// Divides by the sums of the weights and writes the outputs and log-sum-exps.
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    fn finish(&self, block: RowBlock, head: usize, buffers: &Buffers<'_>) {
        let shape = self.source.shape;
        let (dim, group, columns) = (shape.head_dim, shape.group(), self.source.columns());
        for row in 0..block.rows.count {
            let at = block.rows.first + row;
            let place = (block.span.start + at / group) * shape.heads + head * group + at % group;
            let total = _mm512_reduce_add_ps(load(&buffers.totals[row * VECTOR..]));
            let factor = _mm512_set1_ps(1.0 / total);
            // SAFETY: this task alone has these heads of these tokens.
            let to = unsafe { self.out.slice(place * dim, dim) };
            let sums = &buffers.sums[row * columns..][..columns];
            for (sums, to) in sums.chunks_exact(VECTOR).zip(to.chunks_mut(VECTOR)) {
                store_part(_mm512_mul_ps(load(sums), factor), to);
            }
            let shift = f64::from(buffers.shifts[row]) * std::f64::consts::LN_2;
            // SAFETY: as above.
            unsafe { *self.lse.at(place) = (shift + f64::from(total.ln())) as f32 };
        }
    }
}

/// The places of a vector at `at` that are before `seen`.
pub(crate) fn before(seen: usize, at: usize) -> u16 {
    first_lanes(seen.saturating_sub(at))
}

impl Buffers<'_> {
    /// Turns a chunk's scores into tiles of weights. `later` says how many columns of sums there are already: they are scaled
    /// to the new maximum.
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    fn weigh(
        &mut self,
        rows: usize,
        visible: impl Fn(usize) -> usize,
        len: usize,
        later: Option<usize>,
    ) {
        for row in 0..rows {
            let shift = largest(&self.scores[row * CHUNK..][..CHUNK], visible(row)) * LOG2_E;
            let totals = &mut self.totals[row * VECTOR..][..VECTOR];
            let Some(columns) = later else {
                store(_mm512_setzero_ps(), totals);
                self.shifts[row] = shift;
                continue;
            };
            let before = self.shifts[row];
            let shift = if shift > before { shift } else { before };
            if shift != before {
                let factor = exp2(_mm512_set1_ps(before - shift));
                store(_mm512_mul_ps(load(totals), factor), totals);
                for sums in self.sums[row * columns..][..columns].chunks_exact_mut(VECTOR) {
                    store(_mm512_mul_ps(load(sums), factor), sums);
                }
            }
            self.shifts[row] = shift;
        }
        let log2_e = _mm512_set1_ps(LOG2_E);
        for row in 0..rows {
            let (scores, seen) = (&self.scores[row * CHUNK..][..CHUNK], visible(row));
            let shift = _mm512_set1_ps(self.shifts[row]);
            let totals = &mut self.totals[row * VECTOR..][..VECTOR];
            let mut total = load(totals);
            let tiles = row / TILE_ROWS * CHUNK_TILES * TILE_WORDS + row % TILE_ROWS * VECTOR;
            let tiles = &mut self.weights[tiles..];
            let weight =
                |at: usize| -> __m512 { exp2(_mm512_fmsub_ps(load(&scores[at..]), log2_e, shift)) };
            let whole = seen / GROUP;
            for tile in 0..whole {
                let (low, high) = (weight(tile * GROUP), weight(tile * GROUP + VECTOR));
                total = _mm512_add_ps(total, _mm512_add_ps(low, high));
                let words = _mm512_castsi512_ps(bits(_mm512_cvtne2ps_pbh(high, low)));
                store(words, &mut tiles[tile * TILE_WORDS..]);
            }
            for tile in whole..len.div_ceil(GROUP) {
                let part = |at: usize| _mm512_maskz_mov_ps(before(seen, at), weight(at));
                let words = if tile * GROUP < seen {
                    let (low, high) = (part(tile * GROUP), part(tile * GROUP + VECTOR));
                    total = _mm512_add_ps(total, _mm512_add_ps(low, high));
                    _mm512_castsi512_ps(bits(_mm512_cvtne2ps_pbh(high, low)))
                } else {
                    _mm512_setzero_ps()
                };
                store(words, &mut tiles[tile * TILE_WORDS..]);
            }
            store(total, totals);
        }
    }
}

/// The largest of the first `seen` scores of a row; negative infinity for none.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
#[inline]
fn largest(scores: &[f32], seen: usize) -> f32 {
    let mut largest = _mm512_set1_ps(f32::NEG_INFINITY);
    let whole = seen / VECTOR * VECTOR;
    for scores in scores[..whole].chunks_exact(VECTOR) {
        largest = _mm512_max_ps(largest, load(scores));
    }
    if whole < seen {
        let scores = load(&scores[whole..]);
        largest = _mm512_mask_max_ps(largest, before(seen, whole), largest, scores);
    }
    _mm512_reduce_max_ps(largest)
}
