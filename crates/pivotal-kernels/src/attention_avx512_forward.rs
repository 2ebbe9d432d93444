//! The forward pass on AVX-512: a block of 48 query rows, a tile of keys at a time, with a running maximum and sum.
//!
//! Scratch is one tile of scores whatever the length; with bf16 operands also the keys and values of the batch, once, in bf16.

use std::arch::x86_64::{
    __m512, _CMP_NEQ_UQ, _mm512_add_ps, _mm512_cmp_ps_mask, _mm512_div_ps, _mm512_fmsub_ps,
    _mm512_mask_blend_ps, _mm512_max_ps, _mm512_mul_ps, _mm512_set1_ps, _mm512_setzero_ps,
    _mm512_sub_ps,
};
use std::f32::consts::LOG2_E;

use crate::amx::Tiles;
use crate::attention::AttentionInput;
use crate::attention_avx512::{
    Operand, Right, Size, TILE, VECTOR, cut, elements, exp2, interleave, load, pack_pairs,
    pack_rows, padded, pair_words, product, row_words, store,
};
use crate::attention_avx512_lanes::{KeyTile, Lanes, sees};
use crate::matmul::Precision;
use crate::parallel::{SharedOut, for_each_block, with_scratch};
use crate::plan::{AttentionPlan, BLOCK_LANES, LaneBlock};

pub(crate) fn forward(
    plan: &AttentionPlan,
    input: AttentionInput<'_>,
    out: SharedOut,
    lse: SharedOut,
) {
    assert!(plan.vectors, "AVX-512 instructions are missing");
    match plan.precision() {
        Precision::F32 => {
            let keys = Operand::f32(plan.shape(), input.k);
            let values = Operand::f32(plan.shape(), input.v);
            Forward {
                plan,
                q: input.q,
                keys,
                values,
                out,
                lse,
            }
            .run::<false>();
        }
        Precision::Bf16 => {
            with_scratch(row_words(plan), |key_words| {
                with_scratch(pair_words(plan), |value_words| {
                    let keys = pack_rows(plan, input.k, key_words);
                    let values = pack_pairs(plan, input.v, value_words);
                    Forward {
                        plan,
                        q: input.q,
                        keys,
                        values,
                        out,
                        lse,
                    }
                    .run::<true>();
                });
            });
        }
    }
}

struct Forward<'a> {
    plan: &'a AttentionPlan,
    q: &'a [f32],
    /// Rows are tokens.
    keys: Operand<'a>,
    /// Rows are elements of the head.
    values: Operand<'a>,
    out: SharedOut,
    lse: SharedOut,
}

/// What the tiles so far leave: for each lane the largest score, the sum of `2^(score·log2 e - shift)`, and that `shift`.
struct Running {
    largest: [__m512; BLOCK_LANES / VECTOR],
    shift: [__m512; BLOCK_LANES / VECTOR],
    total: [__m512; BLOCK_LANES / VECTOR],
}

impl Forward<'_> {
    fn run<const BF16: bool>(&self) {
        let shape = self.plan.shape();
        let families = self.plan.families.iter();
        let blocks: Vec<LaneBlock> = families
            .flat_map(|family| family.lane_blocks.iter().copied())
            .collect();
        for_each_block(blocks.len() * shape.kv_heads, 1, self.plan.work, |tasks| {
            // SAFETY: the plan found AMX.
            let tiles = (BF16 && self.plan.tiles).then(|| unsafe { Tiles::configure() });
            for task in tasks {
                let (block, head) = (blocks[task / shape.kv_heads], task % shape.kv_heads);
                // SAFETY: the features were found when the plan was made.
                unsafe { self.block::<BF16>(Lanes { shape, block, head }, tiles.as_ref()) };
            }
        });
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    fn block<const BF16: bool>(&self, lanes: Lanes, tiles: Option<&Tiles>) {
        let (dim, padded) = (lanes.shape.head_dim, padded(lanes.shape));
        let steps = dim.div_ceil(elements(BF16));
        with_scratch(BLOCK_LANES * (3 * padded + 2 * TILE), |mut scratch| {
            let rows = cut(&mut scratch, BLOCK_LANES * padded);
            let queries = cut(&mut scratch, BLOCK_LANES * padded);
            let sums = cut(&mut scratch, BLOCK_LANES * dim);
            let scores = cut(&mut scratch, BLOCK_LANES * TILE);
            let weights = cut(&mut scratch, BLOCK_LANES * TILE);
            lanes.gather(self.q, lanes.shape.scale(), rows);
            lanes.turn::<BF16>(rows, queries);
            let mut running = Running::new();
            let limits = lanes.limits();
            let mut later = false;
            for tile in lanes.tiles() {
                let size = Size {
                    rows: tile.len,
                    columns: lanes.columns(),
                    steps,
                };
                let queries = Right {
                    words: queries,
                    step: BLOCK_LANES,
                };
                let keys = self.keys.rows(lanes.head, tile.token);
                product::<BF16>(tiles, keys, queries, size, (scores, BLOCK_LANES), false);
                let vectors = lanes.columns() / VECTOR;
                for vector in 0..vectors {
                    running.tile::<BF16>(
                        vector,
                        tile,
                        &limits,
                        scores,
                        weights,
                        later.then_some((&mut *sums, dim)),
                    );
                }
                let (first, steps) = tile.steps::<BF16>();
                let values = self.values.columns(lanes.head, first);
                let weights = Right {
                    words: weights,
                    step: BLOCK_LANES,
                };
                let size = Size {
                    rows: dim,
                    columns: lanes.columns(),
                    steps,
                };
                product::<BF16>(tiles, values, weights, size, (sums, BLOCK_LANES), later);
                later = true;
            }
            self.finish(lanes, &running, sums);
        });
    }

    /// Divides by the sums of the weights and writes the outputs and log-sum-exps.
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    fn finish(&self, lanes: Lanes, running: &Running, sums: &mut [f32]) {
        let dim = lanes.shape.head_dim;
        let (mut shifts, mut totals) = ([0.0; BLOCK_LANES], [0.0; BLOCK_LANES]);
        for vector in 0..lanes.columns() / VECTOR {
            let at = vector * VECTOR;
            store(running.shift[vector], &mut shifts[at..]);
            store(running.total[vector], &mut totals[at..]);
            for sums in sums[..BLOCK_LANES * dim].chunks_exact_mut(BLOCK_LANES) {
                store(
                    _mm512_div_ps(load(&sums[at..]), running.total[vector]),
                    &mut sums[at..],
                );
            }
        }
        // SAFETY: this task alone has these heads of these tokens.
        unsafe { lanes.scatter(sums, self.out) };
        for row in 0..lanes.block.rows {
            let shift = f64::from(shifts[row]) * std::f64::consts::LN_2;
            let total = f64::from(totals[row]).ln();
            // SAFETY: as above.
            unsafe { *self.lse.at(lanes.place(row)) = (shift + total) as f32 };
        }
    }
}

impl Running {
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    fn new() -> Self {
        Self {
            largest: [_mm512_set1_ps(f32::NEG_INFINITY); BLOCK_LANES / VECTOR],
            shift: [_mm512_setzero_ps(); BLOCK_LANES / VECTOR],
            total: [_mm512_setzero_ps(); BLOCK_LANES / VECTOR],
        }
    }

    /// Turns one vector of lanes of a tile's scores into words of weights, and scales what was summed before (`sums`, of the
    /// given number of rows) to the new maximum.
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    fn tile<const BF16: bool>(
        &mut self,
        vector: usize,
        tile: KeyTile,
        limits: &[i32; BLOCK_LANES],
        scores: &mut [f32],
        weights: &mut [f32],
        sums: Option<(&mut [f32], usize)>,
    ) {
        let at = vector * VECTOR;
        if let Some(first) = tile.masked_from {
            for key in 0..tile.len {
                let scores = &mut scores[key * BLOCK_LANES + at..];
                let seen = sees(limits, vector, first + key);
                let hidden = _mm512_set1_ps(f32::NEG_INFINITY);
                store(_mm512_mask_blend_ps(seen, hidden, load(scores)), scores);
            }
        }
        let mut largest = self.largest[vector];
        for key in 0..tile.len {
            largest = _mm512_max_ps(largest, load(&scores[key * BLOCK_LANES + at..]));
        }
        let log2_e = _mm512_set1_ps(LOG2_E);
        let shift = _mm512_mul_ps(largest, log2_e);
        if let Some((sums, rows)) = sums {
            let changed = _mm512_cmp_ps_mask::<_CMP_NEQ_UQ>(largest, self.largest[vector]);
            if changed != 0 {
                let factor = exp2(_mm512_sub_ps(self.shift[vector], shift));
                self.total[vector] = _mm512_mul_ps(self.total[vector], factor);
                for sums in sums[..BLOCK_LANES * rows].chunks_exact_mut(BLOCK_LANES) {
                    store(_mm512_mul_ps(load(&sums[at..]), factor), &mut sums[at..]);
                }
            }
        }
        (self.largest[vector], self.shift[vector]) = (largest, shift);
        let mut totals = [_mm512_setzero_ps(); 2];
        for key in (0..tile.len).step_by(2) {
            let scores = &scores[key * BLOCK_LANES + at..];
            let even = exp2(_mm512_fmsub_ps(load(scores), log2_e, shift));
            totals[0] = _mm512_add_ps(totals[0], even);
            let odd = if key + 1 < tile.len {
                exp2(_mm512_fmsub_ps(load(&scores[BLOCK_LANES..]), log2_e, shift))
            } else {
                _mm512_setzero_ps()
            };
            totals[1] = _mm512_add_ps(totals[1], odd);
            if BF16 {
                store(
                    interleave(even, odd),
                    &mut weights[key / 2 * BLOCK_LANES + at..],
                );
            } else {
                store(even, &mut weights[key * BLOCK_LANES + at..]);
                if key + 1 < tile.len {
                    store(odd, &mut weights[(key + 1) * BLOCK_LANES + at..]);
                }
            }
        }
        let total = _mm512_add_ps(totals[0], totals[1]);
        self.total[vector] = _mm512_add_ps(self.total[vector], total);
    }
}
