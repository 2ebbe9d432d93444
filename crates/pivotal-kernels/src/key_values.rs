//! A key-value cache laid out for attention of one token at a time, and that attention.
//!
//! Keys lie in blocks of 16 positions, transposed, so that a block's scores are 16 sums side by side; values lie position by
//! position. A prompt's cache is read once for several of its samples: their queries are rows of one small product.

#[cfg(target_arch = "x86_64")]
use crate::key_values_avx512;
use crate::lanes::{LANES, Lanes, exp_shifted, maximum, sum};
use crate::matmul::Precision;
#[cfg(target_arch = "x86_64")]
use crate::matmul::bf16_available;
use crate::parallel::{SharedOut, check_len, for_each_block, with_scratch};
use crate::plan::AttentionShape;
use crate::processor::{Processor, processor};

/// Positions of a block.
pub(crate) const BLOCK: usize = 16;
/// Vectors of a block's positions.
const VECTORS: usize = BLOCK / LANES;
/// Queries multiplied together: their sums are half of the 16 AVX registers.
const QUERIES: usize = 4;
/// Samples of one prompt in a task.
const TASK_SEQUENCES: usize = 8;

/// Keys and values of some positions, in the layout [`attend_step`] wants.
#[derive(Clone, Debug)]
pub struct KeyValues {
    kv_heads: usize,
    head_dim: usize,
    tokens: usize,
    stored: Stored,
}

#[derive(Clone, Debug)]
enum Stored {
    F32(Laid<f32>),
    /// Rounded, which halves what a step reads. Only where there is AVX-512, which widens them on the way.
    #[cfg(target_arch = "x86_64")]
    Bf16(Laid<Bf16>),
}

#[derive(Clone, Debug, Default)]
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
        assert!(
            (cache.kv_heads, cache.head_dim) == (shape.kv_heads, shape.head_dim),
            "a cache of {} heads of {} does not fit {shape:?}",
            cache.kv_heads,
            cache.head_dim
        );
    }
    let runs = runs(contexts);
    let wide = cfg!(target_arch = "x86_64") && processor() >= Processor::Avx512;
    let positions: usize = contexts
        .iter()
        .map(|c| c.prefix.tokens + c.own.tokens)
        .sum();
    let work = 2 * positions * shape.query_width();
    let target = SharedOut::new(out);
    for_each_block(runs.len() * shape.kv_heads, 1, work, |tasks| {
        for task in tasks {
            let (run, head) = (runs[task / shape.kv_heads].clone(), task % shape.kv_heads);
            let width = shape.group() * shape.head_dim;
            let at = |sequence: usize| sequence * shape.query_width() + head * width;
            let rows: Vec<&[f32]> = run
                .clone()
                .flat_map(|sequence| q[at(sequence)..][..width].chunks_exact(shape.head_dim))
                .collect();
            attend_run(
                shape,
                &rows,
                &contexts[run.clone()],
                head,
                wide,
                |row, sums| {
                    let member = row % shape.group() * shape.head_dim;
                    // SAFETY: this task alone has this head of this sequence.
                    let out = unsafe {
                        target.slice(at(run.start + row / shape.group()) + member, shape.head_dim)
                    };
                    out.copy_from_slice(&sums[..shape.head_dim]);
                },
            );
        }
    });
}

/// Neighbours that share a prefix, at most [`TASK_SEQUENCES`] together.
fn runs(contexts: &[StepContext<'_>]) -> Vec<std::ops::Range<usize>> {
    let mut runs = Vec::with_capacity(contexts.len());
    let mut start = 0;
    for end in 1..=contexts.len() {
        let shared = end < contexts.len()
            && end - start < TASK_SEQUENCES
            && std::ptr::eq(contexts[end].prefix, contexts[start].prefix);
        if !shared {
            runs.push(start..end);
            start = end;
        }
    }
    runs
}

/// All queries of one key-value head of sequences that share a prefix; `write` gets each query's index and result.
fn attend_run(
    shape: AttentionShape,
    queries: &[&[f32]],
    contexts: &[StepContext<'_>],
    head: usize,
    wide: bool,
    mut write: impl FnMut(usize, &[f32]),
) {
    let (group, prefix) = (shape.group(), contexts[0].prefix);
    let own_blocks = contexts.iter().map(|c| c.own.blocks()).max().unwrap_or(0);
    let stride = (prefix.blocks() + own_blocks) * BLOCK;
    let padded = prefix.padded();
    with_scratch(queries.len() * (stride + padded), |scratch| {
        let (scores, sums) = scratch.split_at_mut(queries.len() * stride);
        score_all(prefix, head, queries, scores, stride, 0, wide);
        sums.fill(0.0);
        for (member, context) in contexts.iter().enumerate() {
            let rows = member * group..(member + 1) * group;
            let scores = &mut scores[rows.start * stride..rows.end * stride];
            let first = prefix.blocks() * BLOCK;
            score_all(
                context.own,
                head,
                &queries[rows],
                scores,
                stride,
                first,
                wide,
            );
            let len = first + context.own.blocks() * BLOCK;
            for row in scores.chunks_exact_mut(stride.max(1)) {
                row[prefix.tokens..first].fill(f32::NEG_INFINITY);
                row[first + context.own.tokens..].fill(f32::NEG_INFINITY);
                soften(&mut row[..len], shape.scale());
            }
        }
        add_all(prefix, head, scores, stride, 0, sums, wide);
        for (member, context) in contexts.iter().enumerate() {
            let rows = member * group..(member + 1) * group;
            let scores = &scores[rows.start * stride..rows.end * stride];
            let sums = &mut sums[rows.start * padded..rows.end * padded];
            add_all(
                context.own,
                head,
                scores,
                stride,
                prefix.blocks() * BLOCK,
                sums,
                wide,
            );
        }
        for (row, sums) in sums.chunks_exact(padded).enumerate() {
            write(row, sums);
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

/// Puts the products of all queries with all keys of a head into `scores` `[queries, stride]` from `first` on.
fn score_all(
    cache: &KeyValues,
    head: usize,
    queries: &[&[f32]],
    scores: &mut [f32],
    stride: usize,
    first: usize,
    #[cfg_attr(not(target_arch = "x86_64"), expect(unused_variables))] wide: bool,
) {
    for block in 0..cache.blocks() {
        let at = first + block * BLOCK;
        let keys = match &cache.stored {
            Stored::F32(laid) => laid.block(cache.sizes(), block, head).0,
            #[cfg(target_arch = "x86_64")]
            Stored::Bf16(laid) => {
                let (keys, _) = laid.block(cache.sizes(), block, head);
                key_values_avx512::score(queries, keys, scores, stride, at);
                continue;
            }
        };
        #[cfg(target_arch = "x86_64")]
        if wide {
            key_values_avx512::score(queries, keys, scores, stride, at);
            continue;
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

/// Adds all values of a head, weighted by `weights` `[queries, stride]` from `first` on, to `sums` `[queries, padded]`.
fn add_all(
    cache: &KeyValues,
    head: usize,
    weights: &[f32],
    stride: usize,
    first: usize,
    sums: &mut [f32],
    #[cfg_attr(not(target_arch = "x86_64"), expect(unused_variables))] wide: bool,
) {
    let padded = cache.padded();
    let queries = sums.len() / padded;
    for block in 0..cache.blocks() {
        let tokens = BLOCK.min(cache.tokens - block * BLOCK);
        let values = match &cache.stored {
            Stored::F32(laid) => &laid.block(cache.sizes(), block, head).1[..tokens * padded],
            #[cfg(target_arch = "x86_64")]
            Stored::Bf16(laid) => {
                let (_, values) = laid.block(cache.sizes(), block, head);
                let weights = &weights[first + block * BLOCK..];
                key_values_avx512::add(&values[..tokens * padded], weights, stride, sums, padded);
                continue;
            }
        };
        #[cfg(target_arch = "x86_64")]
        if wide {
            let weights = &weights[first + block * BLOCK..];
            key_values_avx512::add(values, weights, stride, sums, padded);
            continue;
        }
        for row in (0..queries).step_by(QUERIES) {
            let sums = &mut sums[row * padded..];
            let weights = &weights[row * stride + first + block * BLOCK..];
            match queries - row {
                1 => add_block::<1>(values, weights, stride, sums, padded),
                2 => add_block::<2>(values, weights, stride, sums, padded),
                3 => add_block::<3>(values, weights, stride, sums, padded),
                _ => add_block::<4>(values, weights, stride, sums, padded),
            }
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
