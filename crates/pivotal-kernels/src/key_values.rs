//! A key-value cache laid out for attention of one token at a time, and that attention.
//!
//! Keys lie in blocks of 16 positions, transposed, so that a block's scores are 16 sums side by side; values lie position by
//! position. A prompt's cache is read once for several of its samples: their queries are rows of one small product.

use std::ops::Range;

#[cfg(target_arch = "x86_64")]
use crate::key_values_avx512;
use crate::lanes::{LANES, Lanes, exp_shifted, maximum, sum};
use crate::matmul::Precision;
#[cfg(target_arch = "x86_64")]
use crate::matmul::bf16_available;
use crate::parallel::{SharedOut, check_len, for_each_block, with_scratch};
use crate::plan::AttentionShape;
use crate::processor::{Processor, processor};

mod append;
mod runs;

pub use append::append_step;
use runs::runs;

/// Positions of a block.
pub(crate) const BLOCK: usize = 16;
/// Vectors of a block's positions.
const VECTORS: usize = BLOCK / LANES;
/// Queries multiplied together: their sums are half of the 16 AVX registers.
const QUERIES: usize = 4;
/// Runs for each thread at which a task has all heads of a run: enough that threads end together.
const RUNS_A_THREAD: usize = 4;

/// Keys and values of some positions, in the layout [`attend_step`] wants.
#[derive(Clone, Debug, PartialEq)]
pub struct KeyValues {
    kv_heads: usize,
    head_dim: usize,
    tokens: usize,
    stored: Stored,
}

#[derive(Clone, Debug, PartialEq)]
enum Stored {
    F32(Laid<f32>),
    /// Rounded, which halves what a step reads. Only where there is AVX-512, which widens them on the way.
    #[cfg(target_arch = "x86_64")]
    Bf16(Laid<Bf16>),
}

#[derive(Clone, Debug, Default, PartialEq)]
struct Laid<T> {
    /// `[blocks, kv_heads, head_dim, 16]`; positions not yet there are zero.
    keys: Vec<T>,
    /// `[blocks, kv_heads, 16, padded head_dim]`.
    values: Vec<T>,
}

/// The upper half of an f32.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(transparent)]
pub(crate) struct Bf16(u16);

/// What a cache holds elements as.
trait Element: Copy + Default {
    fn of(value: f32) -> Self;
}

impl Element for f32 {
    fn of(value: f32) -> Self {
        value
    }
}

impl Element for Bf16 {
    /// To nearest, ties to even; NaN stays NaN.
    fn of(value: f32) -> Self {
        let bits = value.to_bits();
        if value.is_nan() {
            return Self((bits >> 16) as u16 | 0x40);
        }
        Self(((bits + 0x7fff + (bits >> 16 & 1)) >> 16) as u16)
    }
}

impl<T: Element> Laid<T> {
    /// Appends rows of `kv_heads` heads of `head_dim` elements after `tokens` positions.
    fn extend(
        &mut self,
        tokens: usize,
        [kv_heads, head_dim]: [usize; 2],
        keys: &[f32],
        values: &[f32],
    ) {
        let (width, padded) = (kv_heads * head_dim, padded(head_dim));
        let blocks = (tokens + keys.len() / width).div_ceil(BLOCK);
        self.keys.resize(blocks * BLOCK * width, T::default());
        self.values
            .resize(blocks * BLOCK * kv_heads * padded, T::default());
        let rows = keys.chunks_exact(width).zip(values.chunks_exact(width));
        for (token, (key, value)) in (tokens..).zip(rows) {
            let (block, lane) = (token / BLOCK, token % BLOCK);
            let heads = key.chunks_exact(head_dim).zip(value.chunks_exact(head_dim));
            for (head, (key, value)) in heads.enumerate() {
                let index = (block * kv_heads + head) * BLOCK;
                let keys = &mut self.keys[index * head_dim + lane..];
                for (to, &key) in keys.iter_mut().step_by(BLOCK).zip(key) {
                    *to = T::of(key);
                }
                let values = &mut self.values[(index + lane) * padded..][..head_dim];
                for (to, &value) in values.iter_mut().zip(value) {
                    *to = T::of(value);
                }
            }
        }
    }
}

impl<T> Laid<T> {
    fn block(&self, [kv_heads, head_dim]: [usize; 2], block: usize, head: usize) -> (&[T], &[T]) {
        let index = (block * kv_heads + head) * BLOCK;
        let (keys, values) = (BLOCK * head_dim, BLOCK * padded(head_dim));
        (
            &self.keys[index * head_dim..][..keys],
            &self.values[index * padded(head_dim)..][..values],
        )
    }
}

/// A head's width in the values: whole vectors, of either path.
fn padded(head_dim: usize) -> usize {
    head_dim.next_multiple_of(2 * LANES)
}

/// What one sequence attends to: a prefix that other sequences may share, then its own tokens.
#[derive(Clone, Copy, Debug)]
pub struct StepContext<'a> {
    /// The prompt. Neighbours with the same one (the same object) are computed together, with the same result.
    pub prefix: &'a KeyValues,
    /// The sequence's own tokens, the newest included.
    pub own: &'a KeyValues,
}

impl KeyValues {
    /// An empty cache. With [`Precision::Bf16`] it rounds what it is given to bf16, as products with bf16 operands do, where
    /// the processor has those.
    #[must_use]
    pub fn new(shape: AttentionShape, precision: Precision) -> Self {
        shape.check();
        Self {
            kv_heads: shape.kv_heads,
            head_dim: shape.head_dim,
            tokens: 0,
            stored: match precision {
                #[cfg(target_arch = "x86_64")]
                Precision::Bf16 if bf16_available() => Stored::Bf16(Laid::default()),
                _ => Stored::F32(Laid::default()),
            },
        }
    }

    /// An empty cache of the same shape and precision.
    #[must_use]
    pub fn emptied(&self) -> Self {
        Self {
            tokens: 0,
            stored: match self.stored {
                Stored::F32(_) => Stored::F32(Laid::default()),
                #[cfg(target_arch = "x86_64")]
                Stored::Bf16(_) => Stored::Bf16(Laid::default()),
            },
            ..*self
        }
    }

    /// Positions held.
    #[must_use]
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// Appends positions.
    ///
    /// # Shapes
    /// `keys` (rotated) and `values` are `[positions, kv_heads * head_dim]`.
    ///
    /// # Panics
    /// If they are not whole rows, or not equally many.
    pub fn extend(&mut self, keys: &[f32], values: &[f32]) {
        let width = self.kv_heads * self.head_dim;
        check_len("values", values, keys.len());
        assert!(
            keys.len().is_multiple_of(width),
            "{} elements are not whole rows of {width}",
            keys.len()
        );
        let (tokens, sizes) = (self.tokens, self.sizes());
        match &mut self.stored {
            Stored::F32(laid) => laid.extend(tokens, sizes, keys, values),
            #[cfg(target_arch = "x86_64")]
            Stored::Bf16(laid) => laid.extend(tokens, sizes, keys, values),
        }
        self.tokens += keys.len() / width;
    }

    #[track_caller]
    fn check(&self, shape: AttentionShape) {
        assert!(
            self.sizes() == [shape.kv_heads, shape.head_dim],
            "a cache of {} heads of {} does not fit {shape:?}",
            self.kv_heads,
            self.head_dim
        );
    }

    fn sizes(&self) -> [usize; 2] {
        [self.kv_heads, self.head_dim]
    }

    fn padded(&self) -> usize {
        padded(self.head_dim)
    }

    fn blocks(&self) -> usize {
        self.tokens.div_ceil(BLOCK)
    }
}

/// Attends query row `i` to all of `contexts[i]`; an empty context gives zeros.
///
/// Agrees with [`attention_forward`](crate::attention_forward) up to f32 rounding (the sums run in another order), and a
/// sequence's result does not depend on the others.
///
/// # Shapes
/// `q` and `out` are `[sequences, heads * head_dim]`.
///
/// # Panics
/// If lengths or the caches do not fit the shape.
///
/// # Examples
/// ```
/// use pivotal_kernels::{AttentionShape, KeyValues, Precision, StepContext, attend_step};
/// let shape = AttentionShape { heads: 1, kv_heads: 1, head_dim: 1 };
/// let empty = KeyValues::new(shape, Precision::F32);
/// let (mut prefix, mut own) = (empty.clone(), empty);
/// prefix.extend(&[0.0], &[1.0]);
/// own.extend(&[0.0], &[3.0]);
/// let mut out = [0.0];
/// attend_step(shape, &[1.0], &[StepContext { prefix: &prefix, own: &own }], &mut out);
/// assert_eq!(out, [2.0]);
/// ```
pub fn attend_step(
    shape: AttentionShape,
    q: &[f32],
    contexts: &[StepContext<'_>],
    out: &mut [f32],
) {
    shape.check();
    check_len("q", q, contexts.len() * shape.query_width());
    check_len("out", out, contexts.len() * shape.query_width());
    for cache in contexts.iter().flat_map(|c| [c.prefix, c.own]) {
        cache.check(shape);
    }
    let runs = runs(contexts);
    let wide = cfg!(target_arch = "x86_64") && processor() >= Processor::Avx512;
    let positions: usize = contexts
        .iter()
        .map(|c| c.prefix.tokens + c.own.tokens)
        .sum();
    let work = 2 * positions * shape.query_width();
    let target = SharedOut::new(out);
    // All heads in one task read a cache from end to end, as memory likes it.
    let heads = match runs.len() >= RUNS_A_THREAD * rayon::current_num_threads() {
        true => shape.kv_heads,
        false => 1,
    };
    let parts = shape.kv_heads / heads;
    for_each_block(runs.len() * parts, 1, work, |tasks| {
        for task in tasks {
            let (run, part) = (runs[task / parts].clone(), task % parts);
            let heads = part * heads..(part + 1) * heads;
            let width = shape.group() * shape.head_dim;
            let at = |sequence: usize, head: usize| sequence * shape.query_width() + head * width;
            let mut queries: Vec<&[f32]> =
                Vec::with_capacity(heads.len() * run.len() * shape.group());
            for head in heads.clone() {
                for sequence in run.clone() {
                    queries.extend(q[at(sequence, head)..][..width].chunks_exact(shape.head_dim));
                }
            }
            let contexts = &contexts[run.clone()];
            attend_run(shape, &queries, contexts, heads, wide, |head, row, sums| {
                let member = row % shape.group() * shape.head_dim;
                let sequence = run.start + row / shape.group();
                // SAFETY: this task alone has this head of this sequence.
                let out = unsafe { target.slice(at(sequence, head) + member, shape.head_dim) };
                out.copy_from_slice(&sums[..shape.head_dim]);
            });
        }
    });
}

/// Some heads' tables, one after the other: `rows` rows of `width` floats for each.
struct Tables<'a> {
    heads: Range<usize>,
    values: &'a mut [f32],
    rows: usize,
    width: usize,
}

impl Tables<'_> {
    /// Rows `rows` of each head, and which head it is.
    fn each(&mut self, rows: &Range<usize>) -> impl Iterator<Item = (usize, &mut [f32])> {
        let (from, len) = (rows.start * self.width, rows.len() * self.width);
        let tables = self
            .values
            .chunks_exact_mut((self.rows * self.width).max(1));
        self.heads
            .clone()
            .zip(tables.map(move |table| &mut table[from..][..len]))
    }
}

/// Heads `heads` of sequences that share a prefix. `queries` has them head by head; `write` gets a head, which of its queries it is,
/// and the result.
fn attend_run(
    shape: AttentionShape,
    queries: &[&[f32]],
    contexts: &[StepContext<'_>],
    heads: Range<usize>,
    wide: bool,
    mut write: impl FnMut(usize, usize, &[f32]),
) {
    let (group, prefix) = (shape.group(), contexts[0].prefix);
    let own_blocks = contexts.iter().map(|c| c.own.blocks()).max().unwrap_or(0);
    let (first, padded) = (prefix.blocks() * BLOCK, prefix.padded());
    let stride = first + own_blocks * BLOCK;
    let rows = contexts.len() * group;
    with_scratch(queries.len() * (stride + padded), |scratch| {
        let (scores, sums) = scratch.split_at_mut(queries.len() * stride);
        sums.fill(0.0);
        let table = |values, width| Tables {
            heads: heads.clone(),
            values,
            rows,
            width,
        };
        let (mut scores, mut sums) = (table(scores, stride), table(sums, padded));
        let members = || {
            let rows = |member: usize| member * group..(member + 1) * group;
            (0..).map(rows).zip(contexts)
        };
        score_all(prefix, queries, &mut scores, &(0..rows), 0, wide);
        for (rows, context) in members() {
            score_all(context.own, queries, &mut scores, &rows, first, wide);
            let len = first + context.own.blocks() * BLOCK;
            for (_, scores) in scores.each(&rows) {
                for row in scores.chunks_exact_mut(stride.max(1)) {
                    row[prefix.tokens..first].fill(f32::NEG_INFINITY);
                    row[first + context.own.tokens..].fill(f32::NEG_INFINITY);
                    soften(&mut row[..len], shape.scale());
                }
            }
        }
        add_all(prefix, &mut scores, &mut sums, &(0..rows), 0, wide);
        for (rows, context) in members() {
            add_all(context.own, &mut scores, &mut sums, &rows, first, wide);
        }
        for (head, sums) in sums.each(&(0..rows)) {
            for (row, sums) in sums.chunks_exact(padded).enumerate() {
                write(head, row, sums);
            }
        }
    });
}

/// The softmax of `scale · row`, in place.
fn soften(row: &mut [f32], scale: f32) {
    for score in row.iter_mut() {
        *score *= scale;
    }
    let largest = maximum(row);
    if largest == f32::NEG_INFINITY && !row.iter().any(|x| x.is_nan()) {
        row.fill(0.0);
        return;
    }
    exp_shifted(row, largest);
    let part = 1.0 / sum(row);
    for weight in row {
        *weight *= part;
    }
}

/// Puts the products of each head's queries `rows` with all its keys into those rows of `scores`, from column `first` on.
fn score_all(
    cache: &KeyValues,
    queries: &[&[f32]],
    scores: &mut Tables<'_>,
    rows: &Range<usize>,
    first: usize,
    wide: bool,
) {
    let (each, stride) = (scores.rows, scores.width);
    for block in 0..cache.blocks() {
        let at = first + block * BLOCK;
        let tables = scores.each(rows);
        for (queries, (head, scores)) in queries.chunks_exact(each.max(1)).zip(tables) {
            let queries = &queries[rows.clone()];
            match &cache.stored {
                Stored::F32(laid) => {
                    let (keys, _) = laid.block(cache.sizes(), block, head);
                    score_f32(queries, keys, scores, stride, at, wide);
                }
                #[cfg(target_arch = "x86_64")]
                Stored::Bf16(laid) => {
                    let (keys, _) = laid.block(cache.sizes(), block, head);
                    key_values_avx512::score(queries, keys, scores, stride, at);
                }
            }
        }
    }
}

fn score_f32(
    queries: &[&[f32]],
    keys: &[f32],
    scores: &mut [f32],
    stride: usize,
    at: usize,
    #[cfg_attr(not(target_arch = "x86_64"), expect(unused_variables))] wide: bool,
) {
    #[cfg(target_arch = "x86_64")]
    if wide {
        return key_values_avx512::score(queries, keys, scores, stride, at);
    }
    for (index, queries) in queries.chunks(QUERIES).enumerate() {
        let scores = &mut scores[index * QUERIES * stride..];
        match *queries {
            [a, b, c, d] => score_block([a, b, c, d], keys, scores, stride, at),
            [a, b, c] => score_block([a, b, c], keys, scores, stride, at),
            [a, b] => score_block([a, b], keys, scores, stride, at),
            _ => score_block([queries[0]], keys, scores, stride, at),
        }
    }
}

fn score_block<const Q: usize>(
    queries: [&[f32]; Q],
    keys: &[f32],
    scores: &mut [f32],
    stride: usize,
    at: usize,
) {
    let mut sums = [[Lanes::splat(0.0); VECTORS]; Q];
    let queries = queries.map(|query| &query[..keys.len() / BLOCK]);
    for (dim, keys) in keys.chunks_exact(BLOCK).enumerate() {
        let keys: [Lanes; VECTORS] = std::array::from_fn(|v| Lanes::load(&keys[v * LANES..]));
        for (sums, query) in sums.iter_mut().zip(queries) {
            let query = Lanes::splat(query[dim]);
            for (sum, key) in sums.iter_mut().zip(keys) {
                *sum = query.mul_add(key, *sum);
            }
        }
    }
    for (row, sums) in sums.iter().enumerate() {
        for (vector, sum) in sums.iter().enumerate() {
            sum.store(&mut scores[row * stride + at + vector * LANES..][..LANES]);
        }
    }
}

/// Adds each head's values, weighted by rows `rows` of `weights` from column `first` on, to those rows of `sums`.
fn add_all(
    cache: &KeyValues,
    weights: &mut Tables<'_>,
    sums: &mut Tables<'_>,
    rows: &Range<usize>,
    first: usize,
    wide: bool,
) {
    let (padded, stride) = (sums.width, weights.width);
    for block in 0..cache.blocks() {
        let tokens = BLOCK.min(cache.tokens - block * BLOCK);
        let at = first + block * BLOCK;
        for ((head, weights), (_, sums)) in weights.each(rows).zip(sums.each(rows)) {
            let weights = &weights[at..];
            match &cache.stored {
                Stored::F32(laid) => {
                    let (_, values) = laid.block(cache.sizes(), block, head);
                    add_f32(
                        &values[..tokens * padded],
                        weights,
                        stride,
                        sums,
                        padded,
                        wide,
                    );
                }
                #[cfg(target_arch = "x86_64")]
                Stored::Bf16(laid) => {
                    let (_, values) = laid.block(cache.sizes(), block, head);
                    key_values_avx512::add(
                        &values[..tokens * padded],
                        weights,
                        stride,
                        sums,
                        padded,
                    );
                }
            }
        }
    }
}

fn add_f32(
    values: &[f32],
    weights: &[f32],
    stride: usize,
    sums: &mut [f32],
    padded: usize,
    #[cfg_attr(not(target_arch = "x86_64"), expect(unused_variables))] wide: bool,
) {
    #[cfg(target_arch = "x86_64")]
    if wide {
        return key_values_avx512::add(values, weights, stride, sums, padded);
    }
    let queries = sums.len() / padded;
    for row in (0..queries).step_by(QUERIES) {
        let sums = &mut sums[row * padded..];
        let weights = &weights[row * stride..];
        match queries - row {
            1 => add_block::<1>(values, weights, stride, sums, padded),
            2 => add_block::<2>(values, weights, stride, sums, padded),
            3 => add_block::<3>(values, weights, stride, sums, padded),
            _ => add_block::<4>(values, weights, stride, sums, padded),
        }
    }
}

fn add_block<const Q: usize>(
    values: &[f32],
    weights: &[f32],
    stride: usize,
    sums: &mut [f32],
    padded: usize,
) {
    let mut dim = 0;
    while dim + 2 * LANES <= padded {
        add_columns::<Q, 2>(values, weights, stride, sums, (padded, dim));
        dim += 2 * LANES;
    }
    if dim < padded {
        add_columns::<Q, 1>(values, weights, stride, sums, (padded, dim));
    }
}

fn add_columns<const Q: usize, const V: usize>(
    values: &[f32],
    weights: &[f32],
    stride: usize,
    sums: &mut [f32],
    (padded, dim): (usize, usize),
) {
    let tokens = values.len() / padded;
    let weights: [&[f32]; Q] = std::array::from_fn(|q| &weights[q * stride..][..tokens]);
    let at = |q: usize, v: usize| q * padded + dim + v * LANES;
    let mut held: [[Lanes; V]; Q] =
        std::array::from_fn(|q| std::array::from_fn(|v| Lanes::load(&sums[at(q, v)..])));
    for (token, value) in values.chunks_exact(padded).enumerate() {
        let value: [Lanes; V] = std::array::from_fn(|v| Lanes::load(&value[dim + v * LANES..]));
        for (held, weights) in held.iter_mut().zip(weights) {
            let weight = Lanes::splat(weights[token]);
            for (held, value) in held.iter_mut().zip(value) {
                *held = weight.mul_add(value, *held);
            }
        }
    }
    for (q, held) in held.iter().enumerate() {
        for (v, held) in held.iter().enumerate() {
            held.store(&mut sums[at(q, v)..][..LANES]);
        }
    }
}

#[cfg(test)]
mod tests;
