//! The backward pass on AVX-512: scores of a block of 48 query rows and a tile of keys are computed again, transposed.
//!
//! Families are cut and summed by `attention_runs`.

use std::arch::x86_64::{
    _mm512_fmsub_ps, _mm512_maskz_mov_ps, _mm512_mul_ps, _mm512_set1_ps, _mm512_setzero_ps,
    _mm512_sub_ps,
};
use std::f32::consts::LOG2_E;
use std::ops::Range;

use crate::amx::Tiles;
use crate::attention::AttentionInput;
use crate::attention_avx512::{
    Left, Operand, Right, Size, TILE, VECTOR, cut, elements, exp2, interleave, load, pack_pairs,
    pack_rows, padded, pair_rows, pair_words, product, round_lanes, row_words, store,
};
use crate::attention_avx512_lanes::{KeyTile, Lanes, sees};
use crate::attention_backward::AttentionSaved;
use crate::attention_runs::{cut_by_work, sum_by_runs};
use crate::lanes::dot;
use crate::matmul::Precision;
use crate::parallel::{SharedOut, with_scratch};
use crate::plan::{AttentionPlan, BLOCK_LANES, Family};

/// Multiply-adds of one product that a run should have at least: about a millisecond of each of the five.
const RUN_WORK: usize = 1 << 25;

/// Where the gradients go, each `[tokens, ...]`, zeros so far.
#[derive(Clone, Copy)]
pub(crate) struct Targets {
    pub(crate) q: SharedOut,
    pub(crate) k: SharedOut,
    pub(crate) v: SharedOut,
}

pub(crate) fn backward(
    plan: &AttentionPlan,
    input: AttentionInput<'_>,
    saved: AttentionSaved<'_>,
    dout: &[f32],
    targets: Targets,
) {
    assert!(plan.vectors, "AVX-512 instructions are missing");
    match plan.precision() {
        Precision::F32 => {
            let [keys, values] = [input.k, input.v].map(|x| Operand::f32(plan.shape(), x));
            Backward {
                plan,
                q: input.q,
                saved,
                dout,
                keys,
                values,
                key_columns: keys,
                targets,
            }
            .run::<false>();
        }
        Precision::Bf16 => {
            let rows = row_words(plan);
            with_scratch(2 * rows + pair_words(plan), |words| {
                let (key_words, words) = words.split_at_mut(rows);
                let (value_words, words) = words.split_at_mut(rows);
                let keys = pack_rows(plan, input.k, key_words);
                let values = pack_rows(plan, input.v, value_words);
                let key_columns = pack_pairs(plan, input.k, words);
                Backward {
                    plan,
                    q: input.q,
                    saved,
                    dout,
                    keys,
                    values,
                    key_columns,
                    targets,
                }
                .run::<true>();
            });
        }
    }
}

struct Backward<'a> {
    plan: &'a AttentionPlan,
    q: &'a [f32],
    saved: AttentionSaved<'a>,
    dout: &'a [f32],
    /// Rows are tokens.
    keys: Operand<'a>,
    values: Operand<'a>,
    /// Rows are elements of the head.
    key_columns: Operand<'a>,
    targets: Targets,
}

impl Backward<'_> {
    fn run<const BF16: bool>(&self) {
        let shape = self.plan.shape();
        sum_by_runs(
            self.plan,
            |family| {
                let work = family.lane_blocks.iter();
                let work: Vec<usize> = work
                    .map(|block| block.rows * block.keys(shape.group()) * shape.head_dim)
                    .collect();
                cut_by_work(&work, RUN_WORK)
            },
            |family| 2 * family.extent().len() * padded(shape),
            |family, blocks, head, sums| self.blocks::<BF16>(family, blocks, head, sums),
            |family, head, sums| self.write(family, head, sums),
        );
    }

    /// The key and value gradients of a run of blocks: `sums` is overwritten by `dk` and `dv`, each `[extent, padded]`.
    fn blocks<const BF16: bool>(
        &self,
        family: &Family,
        blocks: Range<usize>,
        head: usize,
        sums: &mut [f32],
    ) {
        // SAFETY: the plan found AMX.
        let tiles = (BF16 && self.plan.tiles).then(|| unsafe { Tiles::configure() });
        let tiles = tiles.as_ref();
        let shape = self.plan.shape();
        sums.fill(0.0);
        let (dk, dv) = sums.split_at_mut(family.extent().len() * padded(shape));
        for &block in &family.lane_blocks[blocks] {
            let lanes = Lanes { shape, block, head };
            // SAFETY: the features were found when the plan was made.
            unsafe { self.block::<BF16>(lanes, family.extent().start, dk, dv, tiles) };
        }
    }

    fn write(&self, family: &Family, head: usize, sums: &[f32]) {
        let shape = self.plan.shape();
        let (dim, padded, extent) = (shape.head_dim, padded(shape), family.extent());
        let (dk, dv) = sums.split_at(extent.len() * padded);
        for token in family.tokens.iter().cloned().flatten() {
            let from = (token - extent.start) * padded;
            let to = token * shape.key_width() + head * dim;
            for (target, sums) in [(self.targets.k, dk), (self.targets.v, dv)] {
                // SAFETY: no other task has this head of this token: families share no token.
                unsafe {
                    target
                        .slice(to, dim)
                        .copy_from_slice(&sums[from..from + dim])
                };
            }
        }
    }

    /// Adds one block's part to `dk` and `dv`, `[tokens from first_token on, padded]`, and writes its part of `dq`.
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    fn block<const BF16: bool>(
        &self,
        lanes: Lanes,
        first_token: usize,
        dk: &mut [f32],
        dv: &mut [f32],
        tiles: Option<&Tiles>,
    ) {
        let (dim, padded) = (lanes.shape.head_dim, padded(lanes.shape));
        let (columns, words) = (lanes.columns(), BLOCK_LANES / elements(BF16));
        let steps = dim.div_ceil(elements(BF16));
        let size = BLOCK_LANES * (7 * padded + 5 * TILE);
        with_scratch(size, |mut scratch| {
            let rows = cut(&mut scratch, BLOCK_LANES * padded);
            let dout_rows = cut(&mut scratch, BLOCK_LANES * padded);
            let mut one = Buffers {
                queries: cut(&mut scratch, BLOCK_LANES * padded),
                dout: cut(&mut scratch, BLOCK_LANES * padded),
                query_rows: cut(&mut scratch, words * padded),
                dout_rows: cut(&mut scratch, words * padded),
                dq: cut(&mut scratch, BLOCK_LANES * dim),
                scores: cut(&mut scratch, BLOCK_LANES * TILE),
                slopes: cut(&mut scratch, BLOCK_LANES * TILE),
                weights_left: cut(&mut scratch, words * TILE),
                slopes_left: cut(&mut scratch, words * TILE),
                slopes_right: cut(&mut scratch, BLOCK_LANES * TILE),
            };
            // SAFETY: the features were found when the plan was made; this task alone has these heads of these tokens.
            unsafe {
                lanes.gather(self.q, lanes.shape.scale(), rows);
                lanes.gather(self.dout, 1.0, dout_rows);
                lanes.turn::<BF16>(rows, one.queries);
                lanes.turn::<BF16>(dout_rows, one.dout);
                sum_over_rows::<BF16>(rows, padded, one.query_rows);
                sum_over_rows::<BF16>(dout_rows, padded, one.dout_rows);
                let stats = self.stats(lanes, dout_rows);
                for (index, tile) in lanes.tiles().enumerate() {
                    let right = |words| Right {
                        words,
                        step: BLOCK_LANES,
                    };
                    let size = Size {
                        rows: tile.len,
                        columns,
                        steps,
                    };
                    let keys = self.keys.rows(lanes.head, tile.token);
                    let values = self.values.rows(lanes.head, tile.token);
                    product::<BF16>(
                        tiles,
                        keys,
                        right(one.queries),
                        size,
                        (one.scores, BLOCK_LANES),
                        false,
                    );
                    product::<BF16>(
                        tiles,
                        values,
                        right(one.dout),
                        size,
                        (one.slopes, BLOCK_LANES),
                        false,
                    );
                    one.weigh::<BF16>(tile, columns, &stats);

                    let left = |words| Left {
                        words,
                        row: BLOCK_LANES / elements(BF16),
                        step: 1,
                    };
                    let right = |words| Right {
                        words,
                        step: padded,
                    };
                    let steps = lanes.block.rows.div_ceil(elements(BF16));
                    let size = Size {
                        rows: tile.len,
                        columns: padded,
                        steps,
                    };
                    let at = (tile.token - first_token) * padded;
                    let (dv, dk) = (&mut dv[at..], &mut dk[at..]);
                    product::<BF16>(
                        tiles,
                        left(one.weights_left),
                        right(one.dout_rows),
                        size,
                        (dv, padded),
                        true,
                    );
                    product::<BF16>(
                        tiles,
                        left(one.slopes_left),
                        right(one.query_rows),
                        size,
                        (dk, padded),
                        true,
                    );

                    let (first, steps) = tile.steps::<BF16>();
                    let slopes = if BF16 {
                        &*one.slopes_right
                    } else {
                        &*one.slopes
                    };
                    let slopes = Right {
                        words: slopes,
                        step: BLOCK_LANES,
                    };
                    let size = Size {
                        rows: dim,
                        columns,
                        steps,
                    };
                    let keys = self.key_columns.columns(lanes.head, first);
                    product::<BF16>(tiles, keys, slopes, size, (one.dq, BLOCK_LANES), index > 0);
                }
                let scale = _mm512_set1_ps(lanes.shape.scale());
                for dq in one.dq.chunks_exact_mut(VECTOR) {
                    store(_mm512_mul_ps(load(dq), scale), dq);
                }
                lanes.scatter(one.dq, self.targets.q);
            }
        });
    }

    /// Each lane's log-sum-exp (base 2) and `D = dout·out`, and the last key it sees.
    fn stats(&self, lanes: Lanes, dout_rows: &[f32]) -> Stats {
        let (dim, padded) = (lanes.shape.head_dim, padded(lanes.shape));
        let mut stats = Stats {
            lse: [0.0; BLOCK_LANES],
            mean: [0.0; BLOCK_LANES],
            limits: lanes.limits(),
        };
        for row in 0..lanes.block.rows {
            let place = lanes.place(row);
            let out = &self.saved.out[place * dim..][..dim];
            stats.lse[row] = self.saved.lse[place] * LOG2_E;
            stats.mean[row] = dot(out, &dout_rows[row * padded..][..dim]);
        }
        stats
    }
}

struct Stats {
    lse: [f32; BLOCK_LANES],
    mean: [f32; BLOCK_LANES],
    limits: [i32; BLOCK_LANES],
}

/// One block's operands and one tile's scores.
struct Buffers<'a> {
    /// `[steps, 48]`, for sums over `head_dim`.
    queries: &'a mut [f32],
    dout: &'a mut [f32],
    /// `[steps, padded]`, for sums over the rows.
    query_rows: &'a mut [f32],
    dout_rows: &'a mut [f32],
    /// `[head_dim, 48]`
    dq: &'a mut [f32],
    /// `[keys, 48]`: products with keys and values.
    scores: &'a mut [f32],
    slopes: &'a mut [f32],
    /// `[keys, steps]`, for sums over the rows.
    weights_left: &'a mut [f32],
    slopes_left: &'a mut [f32],
    /// `[steps, 48]`, for sums over the keys; unused with f32, where `slopes` serves.
    slopes_right: &'a mut [f32],
}

impl Buffers<'_> {
    /// `P = 2^(s·log2 e - lse)` and `dS = P·(dP - D)`, as words of the products that they enter.
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    fn weigh<const BF16: bool>(&mut self, tile: KeyTile, columns: usize, stats: &Stats) {
        let log2_e = _mm512_set1_ps(LOG2_E);
        for vector in 0..columns / VECTOR {
            let at = vector * VECTOR;
            let (lse, mean) = (load(&stats.lse[at..]), load(&stats.mean[at..]));
            let mut even = _mm512_setzero_ps();
            for key in 0..tile.len {
                let from = key * BLOCK_LANES + at;
                let mut weight = exp2(_mm512_fmsub_ps(load(&self.scores[from..]), log2_e, lse));
                if let Some(first) = tile.masked_from {
                    weight = _mm512_maskz_mov_ps(sees(&stats.limits, vector, first + key), weight);
                }
                let slope = _mm512_mul_ps(weight, _mm512_sub_ps(load(&self.slopes[from..]), mean));
                if BF16 {
                    let left = (key * BLOCK_LANES + at) / 2;
                    round_lanes(weight, &mut self.weights_left[left..]);
                    round_lanes(slope, &mut self.slopes_left[left..]);
                    let to = key / 2 * BLOCK_LANES + at;
                    if key % 2 == 1 {
                        store(interleave(even, slope), &mut self.slopes_right[to..]);
                    } else if key + 1 == tile.len {
                        store(
                            interleave(slope, _mm512_setzero_ps()),
                            &mut self.slopes_right[to..],
                        );
                    }
                    even = slope;
                } else {
                    store(weight, &mut self.weights_left[from..]);
                    store(slope, &mut self.slopes_left[from..]);
                    store(slope, &mut self.slopes[from..]);
                }
            }
        }
    }
}

/// Gathered rows `[48, padded]` as the right operand of a sum over the rows: words `[steps, padded]`.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
fn sum_over_rows<const BF16: bool>(rows: &[f32], padded: usize, to: &mut [f32]) {
    if BF16 {
        for (two, to) in rows
            .chunks_exact(2 * padded)
            .zip(to.chunks_exact_mut(padded))
        {
            let (even, odd) = two.split_at(padded);
            pair_rows(even, odd, to);
        }
    } else {
        to.copy_from_slice(rows);
    }
}
