//! The backward pass on AMX: 32 query rows and up to 96 keys at a time.
//!
//! ```text
//! S = Q·Kᵀ,  dP = dO·Vᵀ,  P = 2^(S·log2 e - lse),  dS = P·(dP - D)
//! dQ += dS·K,  dVᵀ += dOᵀ·P,  dKᵀ += Qᵀ·dS
//! ```
//!
//! The last two have the weights on the right, where pairs of rows lie as they are computed; only queries and output gradients
//! are turned, once a block. Families are cut and summed by `attention_runs`.

use std::arch::x86_64::{
    _mm512_add_ps, _mm512_castps_si512, _mm512_castsi512_ps, _mm512_cvtne2ps_pbh, _mm512_fmsub_ps,
    _mm512_maskz_mov_ps, _mm512_mul_ps, _mm512_set1_ps, _mm512_setzero_ps, _mm512_setzero_si512,
    _mm512_sub_ps,
};
use std::f32::consts::LOG2_E;
use std::ops::Range;

use crate::amx::{BLOCK_ROWS, Tiles, multiply};
use crate::attention_amx_forward::{RowBlock, before, row_blocks};
use crate::attention_amx_rows::{
    Columns, DEPTH, GROUP, Keys, Source, TILE_WORDS, Target, piece, takes, tiles, to_block,
};
use crate::attention_avx512::{VECTOR, bits, cut, exp2, interleave, load, store};
use crate::attention_backward::AttentionSaved;
use crate::attention_runs::{cut_by_work, sum_by_runs};
use crate::lanes::dot;
use crate::panels::{COLUMNS, TILE_ROWS, transpose};
use crate::parallel::with_scratch;
use crate::plan::{AttentionPlan, Family};

/// Keys whose scores are held at a time: whole panels of keys and whole tiles of slopes.
const CHUNK: usize = 96;
const CHUNK_TILES: usize = CHUNK / GROUP;
/// Pairs of rows of a block.
const PAIRS: usize = BLOCK_ROWS / 2;
/// Scores that a run should have at least.
const RUN_SCORES: usize = 1 << 20;

/// Every gradient of a token that is a span's or a prefix's.
///
/// # Safety
/// `target` has room for the plan's tokens, and nobody else touches it meanwhile.
pub(crate) unsafe fn backward(
    plan: &AttentionPlan,
    source: Source<'_>,
    saved: AttentionSaved<'_>,
    dout: &[f32],
    target: Target<'_>,
) {
    assert!(takes(plan), "AMX is missing, or heads are too large");
    let width = plan.shape().query_width();
    let dout = Columns {
        values: dout,
        width,
        first: 0,
    };
    Backward {
        plan,
        source,
        saved,
        dout,
        target,
    }
    .run();
}

struct Backward<'a> {
    plan: &'a AttentionPlan,
    source: Source<'a>,
    saved: AttentionSaved<'a>,
    dout: Columns<'a>,
    target: Target<'a>,
}

/// One block's operands and sums.
struct Buffers<'a> {
    /// Left tiles for sums over `head_dim`: [`DEPTH`] of the first 16 rows, then of the next.
    queries: &'a mut [f32],
    dout: &'a mut [f32],
    /// Left tiles for sums over the rows: one for each 16 elements of a head.
    queries_turned: &'a mut [f32],
    dout_turned: &'a mut [f32],
    /// `[32, CHUNK]`: products with keys and values.
    scores: &'a mut [f32],
    products: &'a mut [f32],
    /// Words `[PAIRS, CHUNK]`, for sums over the rows.
    weight_pairs: &'a mut [f32],
    slope_pairs: &'a mut [f32],
    /// Left tiles for sums over the keys: [`CHUNK_TILES`] of the first 16 rows, then of the next.
    slopes: &'a mut [f32],
    /// `[32, columns]`
    dq: &'a mut [f32],
    /// Panels of 48 keys of the span's line, `[columns, 48]` each.
    dk: &'a mut [f32],
    dv: &'a mut [f32],
}

impl<'a> Buffers<'a> {
    fn floats(columns: usize, keys: usize) -> usize {
        2 * (2 * DEPTH + CHUNK_TILES) * TILE_WORDS
            + 2 * columns * VECTOR
            + 2 * (BLOCK_ROWS + PAIRS) * CHUNK
            + BLOCK_ROWS * columns
            + 2 * columns * keys.next_multiple_of(COLUMNS)
    }

    fn new(mut scratch: &'a mut [f32], columns: usize, keys: usize) -> Self {
        let sums = columns * keys.next_multiple_of(COLUMNS);
        Self {
            queries: cut(&mut scratch, 2 * DEPTH * TILE_WORDS),
            dout: cut(&mut scratch, 2 * DEPTH * TILE_WORDS),
            queries_turned: cut(&mut scratch, columns * VECTOR),
            dout_turned: cut(&mut scratch, columns * VECTOR),
            scores: cut(&mut scratch, BLOCK_ROWS * CHUNK),
            products: cut(&mut scratch, BLOCK_ROWS * CHUNK),
            weight_pairs: cut(&mut scratch, PAIRS * CHUNK),
            slope_pairs: cut(&mut scratch, PAIRS * CHUNK),
            slopes: cut(&mut scratch, 2 * CHUNK_TILES * TILE_WORDS),
            dq: cut(&mut scratch, BLOCK_ROWS * columns),
            dk: cut(&mut scratch, sums),
            dv: cut(&mut scratch, sums),
        }
    }
}

/// Each row's log-sum-exp (base 2) and `D = dout·out`, and how many keys it sees.
struct Stats {
    lse: [f32; BLOCK_ROWS],
    mean: [f32; BLOCK_ROWS],
    seen: [usize; BLOCK_ROWS],
}

impl Backward<'_> {
    fn run(&self) {
        let (group, columns) = (self.plan.shape().group(), self.source.columns());
        sum_by_runs(
            self.plan,
            |family| {
                let scores: Vec<usize> = row_blocks(family, group)
                    .map(|block| block.scores())
                    .collect();
                cut_by_work(&scores, RUN_SCORES)
            },
            |family| 2 * family.extent().len() * columns,
            |family, blocks, head, sums| self.blocks(family, blocks, head, sums),
            |family, head, sums| self.write(family, head, sums),
        );
    }

    /// The key and value gradients of a run of blocks: `sums` is overwritten by `dk` and `dv`, each `[extent, columns]`.
    fn blocks(&self, family: &Family, blocks: Range<usize>, head: usize, sums: &mut [f32]) {
        let (columns, extent) = (self.source.columns(), family.extent());
        let run: Vec<RowBlock> = row_blocks(family, self.plan.shape().group())
            .skip(blocks.start)
            .take(blocks.len())
            .collect();
        sums.fill(0.0);
        let (dk, dv) = sums.split_at_mut(extent.len() * columns);
        let longest = run.iter().map(RowBlock::keys).max().unwrap_or(0);
        let words = Keys::scratch(&self.source, longest, true);
        with_scratch(words + Buffers::floats(columns, longest), |scratch| {
            let (words, scratch) = scratch.split_at_mut(words);
            let mut keys = Keys::new(self.source, head, longest, true, words);
            let mut buffers = Buffers::new(scratch, columns, longest);
            let tiles = tiles(self.plan);
            for blocks in run.chunk_by(|a, b| a.span.start == b.span.start) {
                let RowBlock { span, own, .. } = blocks[blocks.len() - 1];
                let line = span.prefix_len + own;
                let panels = columns * line.next_multiple_of(COLUMNS);
                buffers.dk[..panels].fill(0.0);
                buffers.dv[..panels].fill(0.0);
                // SAFETY: the features were found when the plan was made.
                unsafe {
                    keys.pack(span, own);
                    for &block in blocks {
                        self.block(block, head, &keys, &mut buffers, &tiles);
                    }
                }
                let token = |key: usize| {
                    let token = if key < span.prefix_len {
                        span.prefix_start + key
                    } else {
                        span.start + key - span.prefix_len
                    };
                    token - extent.start
                };
                // SAFETY: as above.
                unsafe {
                    add_panels(buffers.dk, columns, line, token, dk);
                    add_panels(buffers.dv, columns, line, token, dv);
                }
            }
        });
    }

    fn write(&self, family: &Family, head: usize, sums: &[f32]) {
        let (columns, extent) = (self.source.columns(), family.extent());
        let (dk, dv) = sums.split_at(extent.len() * columns);
        for token in family.tokens.iter().cloned().flatten() {
            let at = (token - extent.start) * columns;
            let at = at..at + self.source.shape.head_dim;
            let Target { k, v, rope, .. } = self.target;
            // SAFETY: the features were found when the plan was made. No other task has this head of this token: families share
            // no token.
            unsafe {
                k.write((token, head), &dk[at.clone()], 1.0, rope);
                v.write((token, head), &dv[at], 1.0, None);
            }
        }
    }

    /// Adds one block's part to the panels of key and value gradients, and writes its part of `dq`.
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    fn block(
        &self,
        block: RowBlock,
        head: usize,
        keys: &Keys<'_>,
        buffers: &mut Buffers<'_>,
        tiles: &Tiles,
    ) {
        let (source, rows) = (&self.source, block.rows);
        let (shape, columns) = (source.shape, source.columns());
        let place = (block.span, head, rows);
        let one = &mut *buffers;
        source.rows(
            (source.q, source.rope),
            shape.scale(),
            place,
            one.queries,
            Some(one.queries_turned),
        );
        source.rows(
            (self.dout, None),
            1.0,
            place,
            one.dout,
            Some(one.dout_turned),
        );
        let stats = self.stats(block, head);
        let whole = rows.count.next_multiple_of(TILE_ROWS);
        let (depth, total) = (source.steps() / VECTOR, block.keys());
        for first in (0..total).step_by(CHUNK) {
            let len = CHUNK.min(total - first);
            for at in (0..len).step_by(COLUMNS) {
                let panel = (first + at) / COLUMNS;
                let width = COLUMNS.min((len - at).next_multiple_of(VECTOR));
                for (left, right, out) in [
                    (&*one.queries, keys.keys(panel), &mut *one.scores),
                    (&*one.dout, keys.values(panel), &mut *one.products),
                ] {
                    let pieces = piece(left, DEPTH, right, COLUMNS, depth);
                    let to = to_block(&mut out[at..], CHUNK, (whole, width), false);
                    // SAFETY: both halves of the left operand have `depth` tiles, a panel that many times 16 steps of 48 words,
                    // and the sums 32 rows of whole chunks.
                    unsafe { multiply(tiles, &pieces, to) };
                }
            }
            one.weigh(rows.count, first, len, &stats);
            let pairs = keys.pairs(first);
            let steps = len.div_ceil(GROUP);
            assert!(pairs.len() >= steps * VECTOR * columns);
            for at in (0..columns).step_by(GROUP) {
                let pieces = piece(one.slopes, CHUNK_TILES, &pairs[at..], columns, steps);
                let size = (whole, GROUP.min(columns - at));
                let to = to_block(&mut one.dq[at..], columns, size, first > 0);
                // SAFETY: both halves of the slopes have `steps` tiles, the keys that many times 16 pairs by the assertion, and
                // the sums 32 rows of whole tiles.
                unsafe { multiply(tiles, &pieces, to) };
            }
            for at in (0..len).step_by(COLUMNS) {
                let panel = (first + at) / COLUMNS * columns * COLUMNS;
                let width = COLUMNS.min((len - at).next_multiple_of(VECTOR));
                for (left, right, out) in [
                    (&*one.queries_turned, &*one.slope_pairs, &mut *one.dk),
                    (&*one.dout_turned, &*one.weight_pairs, &mut *one.dv),
                ] {
                    let out = &mut out[panel..][..columns * COLUMNS];
                    for row in (0..columns).step_by(BLOCK_ROWS) {
                        let pieces = piece(&left[row * VECTOR..], 1, &right[at..], CHUNK, 1);
                        let size = (BLOCK_ROWS.min(columns - row), width);
                        let to = to_block(&mut out[row * COLUMNS..], COLUMNS, size, true);
                        // SAFETY: there is a left tile for each 16 rows, sixteen pairs of a chunk on the right, and a panel of
                        // `columns` rows for the sums.
                        unsafe { multiply(tiles, &pieces, to) };
                    }
                }
            }
        }
        let group = shape.group();
        for row in 0..rows.count {
            let at = rows.first + row;
            let place = (block.span.start + at / group, head * group + at % group);
            let from = &one.dq[row * columns..][..shape.head_dim];
            // SAFETY: this task alone has these heads of these tokens.
            unsafe {
                self.target
                    .q
                    .write(place, from, shape.scale(), self.target.rope);
            }
        }
    }

    fn stats(&self, block: RowBlock, head: usize) -> Stats {
        let (shape, group) = (self.source.shape, self.source.shape.group());
        let mut stats = Stats {
            lse: [0.0; BLOCK_ROWS],
            mean: [0.0; BLOCK_ROWS],
            seen: [0; BLOCK_ROWS],
        };
        for row in 0..block.rows.count {
            let at = block.rows.first + row;
            let place = (block.span.start + at / group) * shape.heads + head * group + at % group;
            let part = place * shape.head_dim..(place + 1) * shape.head_dim;
            stats.lse[row] = self.saved.lse[place] * LOG2_E;
            stats.mean[row] = dot(&self.saved.out[part.clone()], &self.dout.values[part]);
            stats.seen[row] = block.span.prefix_len + at / group + 1;
        }
        stats
    }
}

impl Buffers<'_> {
    /// `P` and `dS` of a chunk, as words of the products that they enter; zeros below the last row and after the last key.
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    fn weigh(&mut self, rows: usize, first: usize, len: usize, stats: &Stats) {
        let (log2_e, zero) = (_mm512_set1_ps(LOG2_E), _mm512_setzero_ps());
        for pair in 0..PAIRS {
            for tile in 0..len.div_ceil(GROUP) {
                // Of each row the weights and slopes of 32 keys.
                let mut words = [[[zero; 2]; 2]; 2];
                for (row, words) in (2 * pair..2 * pair + 2).zip(&mut words) {
                    let seen = if row < rows {
                        stats.seen[row].saturating_sub(first).min(len)
                    } else {
                        0
                    };
                    let [weights, slopes] = words;
                    for half in 0..2 {
                        let at = tile * GROUP + half * VECTOR;
                        if at >= seen {
                            break;
                        }
                        let from = row * CHUNK + at;
                        let (lse, mean) = (stats.lse[row], stats.mean[row]);
                        let score = load(&self.scores[from..]);
                        let weight = exp2(_mm512_fmsub_ps(score, log2_e, _mm512_set1_ps(lse)));
                        let product = load(&self.products[from..]);
                        let slope =
                            _mm512_mul_ps(weight, _mm512_sub_ps(product, _mm512_set1_ps(mean)));
                        let mask = before(seen, at);
                        weights[half] = _mm512_maskz_mov_ps(mask, weight);
                        slopes[half] = _mm512_maskz_mov_ps(mask, slope);
                    }
                    let to = (row / TILE_ROWS * CHUNK_TILES + tile) * TILE_WORDS
                        + row % TILE_ROWS * VECTOR;
                    let left = bits(_mm512_cvtne2ps_pbh(slopes[1], slopes[0]));
                    store(_mm512_castsi512_ps(left), &mut self.slopes[to..]);
                }
                let [[even_weights, even_slopes], [odd_weights, odd_slopes]] = words;
                for half in 0..2 {
                    let to = pair * CHUNK + tile * GROUP + half * VECTOR;
                    store(
                        interleave(even_weights[half], odd_weights[half]),
                        &mut self.weight_pairs[to..],
                    );
                    store(
                        interleave(even_slopes[half], odd_slopes[half]),
                        &mut self.slope_pairs[to..],
                    );
                }
            }
        }
    }
}

/// Adds panels `[columns, 48]` of the first `len` keys to rows `[token, columns]`.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
fn add_panels(
    panels: &[f32],
    columns: usize,
    len: usize,
    token: impl Fn(usize) -> usize,
    sums: &mut [f32],
) {
    for key in (0..len).step_by(VECTOR) {
        let panel = &panels[key / COLUMNS * columns * COLUMNS + key % COLUMNS..];
        for at in (0..columns).step_by(VECTOR) {
            let mut words = [_mm512_setzero_si512(); VECTOR];
            for (row, words) in words.iter_mut().enumerate() {
                *words = _mm512_castps_si512(load(&panel[(at + row) * COLUMNS..]));
            }
            let rows = transpose(words);
            for (row, &words) in rows.iter().enumerate().take(len - key) {
                let to = &mut sums[token(key + row) * columns + at..];
                store(_mm512_add_ps(load(to), _mm512_castsi512_ps(words)), to);
            }
        }
    }
}
