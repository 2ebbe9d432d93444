//! A key-value cache laid out for attention of one token at a time, and that attention.
//!
//! Keys lie in blocks of 16 positions, transposed, so that a block's scores are 16 sums side by side; values lie position by
//! position (with bf16 pair by pair). A prompt's cache is read once for several of its samples: their queries are rows of one small
//! product.

use std::ops::Range;

#[cfg(target_arch = "x86_64")]
use crate::key_values_avx512;
use crate::lanes::{exp_shifted, maximum, sum};
use crate::matmul::Precision;
#[cfg(target_arch = "x86_64")]
use crate::matmul::bf16_available;
use crate::parallel::{SharedOut, check_len, check_matrix, for_each_block, with_scratch};
use crate::plan::AttentionShape;
use crate::processor::{Processor, processor};

mod ahead;
mod append;
mod laid;
mod portable;
mod runs;

pub use append::append_step;

use ahead::Ahead;
use laid::{Laid, padded};
#[cfg(target_arch = "x86_64")]
pub(crate) use laid::{Pair, Word};
use runs::runs;

/// Positions of a block.
pub(crate) const BLOCK: usize = 16;
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
    /// Rounded, which halves what a step reads and doubles what it multiplies in a time. Only where there is AVX-512 BF16.
    #[cfg(target_arch = "x86_64")]
    Bf16(Laid<Pair>),
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

    /// Elements in a word of this cache, and of the queries and weights that it is multiplied by.
    fn word_elements(&self) -> usize {
        match self.stored {
            Stored::F32(_) => 1,
            #[cfg(target_arch = "x86_64")]
            Stored::Bf16(_) => Pair::ELEMENTS,
        }
    }

    /// A query times the scale of scores, in this cache's words.
    fn query_words(&self, query: &[f32], scale: f32, words: &mut [f32]) {
        match self.stored {
            Stored::F32(_) => query
                .iter()
                .zip(words)
                .for_each(|(query, word)| *word = query * scale),
            #[cfg(target_arch = "x86_64")]
            Stored::Bf16(_) => key_values_avx512::query_pairs(query, scale, words),
        }
    }

    /// The softmax of the scores of whole blocks, in place, in this cache's words: pairs fill the first half.
    fn soften(&self, scores: &mut [f32]) {
        match self.stored {
            Stored::F32(_) => soften(scores),
            #[cfg(target_arch = "x86_64")]
            Stored::Bf16(_) => key_values_avx512::soften_to_pairs(scores),
        }
    }

    /// Where the keys lie, and the values.
    fn memory(&self) -> [Range<*const u8>; 2] {
        match &self.stored {
            Stored::F32(laid) => laid.memory(),
            #[cfg(target_arch = "x86_64")]
            Stored::Bf16(laid) => laid.memory(),
        }
    }

    fn blocks(&self) -> usize {
        self.tokens.div_ceil(BLOCK)
    }
}

/// Attends query row `i` to all of `contexts[i]`; an empty context gives zeros.
///
/// Agrees with [`attention_forward`](crate::attention_forward) of the caches' precision up to f32 rounding (the sums run in another
/// order; with bf16 the weights are rounded after they are divided by their sum, not before). A sequence's result does not depend
/// on the others.
///
/// # Shapes
/// `q` and `out` are `[sequences, heads * head_dim]`.
///
/// # Panics
/// If lengths or the caches do not fit the shape, or a sequence's two caches are not of one precision.
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
    check_matrix("q", q, contexts.len(), shape.query_width());
    check_matrix("out", out, contexts.len(), shape.query_width());
    for StepContext { prefix, own } in contexts {
        prefix.check(shape);
        own.check(shape);
        assert!(
            prefix.word_elements() == own.word_elements(),
            "a prefix and a cache of two precisions"
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
            let queries = heads.clone().flat_map(|head| {
                let sequences = run.clone();
                sequences.flat_map(move |sequence| {
                    q[at(sequence, head)..][..width].chunks_exact(shape.head_dim)
                })
            });
            let following = contexts.get(run.end);
            let contexts = &contexts[run.clone()];
            attend_run(
                shape,
                queries,
                contexts,
                heads,
                wide,
                following,
                |head, row, sums| {
                    let member = row % shape.group() * shape.head_dim;
                    let sequence = run.start + row / shape.group();
                    // SAFETY: this task alone has this head of this sequence.
                    let out = unsafe { target.slice(at(sequence, head) + member, shape.head_dim) };
                    out.copy_from_slice(&sums[..shape.head_dim]);
                },
            );
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

/// Heads `heads` of sequences that share a prefix, before `following`. `queries` has them head by head; `write` gets a head, which of
/// its queries it is, and the result.
fn attend_run<'a>(
    shape: AttentionShape,
    queries: impl Iterator<Item = &'a [f32]>,
    contexts: &[StepContext<'_>],
    heads: Range<usize>,
    wide: bool,
    following: Option<&StepContext<'_>>,
    mut write: impl FnMut(usize, usize, &[f32]),
) {
    let (group, prefix) = (shape.group(), contexts[0].prefix);
    let own_blocks = contexts.iter().map(|c| c.own.blocks()).max().unwrap_or(0);
    let (first, padded) = (prefix.blocks() * BLOCK, prefix.padded());
    let stride = first + own_blocks * BLOCK;
    let rows = contexts.len() * group;
    let words = shape.head_dim.div_ceil(prefix.word_elements());
    let count = heads.len() * rows;
    with_scratch(count * (words + stride + padded), |scratch| {
        let (query_words, rest) = scratch.split_at_mut(count * words);
        let (scores, sums) = rest.split_at_mut(count * stride);
        for (query, words) in queries.zip(query_words.chunks_exact_mut(words)) {
            prefix.query_words(query, shape.scale(), words);
        }
        sums.fill(0.0);
        let table = |values, width| Tables {
            heads: heads.clone(),
            values,
            rows,
            width,
        };
        let (mut scores, mut sums) = (table(scores, stride), table(sums, padded));
        let queries: Vec<&[f32]> = query_words.chunks_exact(words).collect();
        let queries = &queries[..];
        let members = || {
            let rows = |member: usize| member * group..(member + 1) * group;
            (0..).map(rows).zip(contexts)
        };
        let mut ahead = Ahead::default();
        if heads.len() == shape.kv_heads {
            let own = || contexts.iter().map(|context| context.own.memory());
            let [_, values] = prefix.memory();
            ahead.extend(own().map(|[keys, _]| keys));
            ahead.extend([values]);
            ahead.extend(own().map(|[_, values]| values));
            ahead.extend(following.map(|context| context.prefix.memory()[0].clone()));
        }
        score_all(
            prefix,
            queries,
            &mut scores,
            &(0..rows),
            0,
            wide,
            &mut ahead,
        );
        for (rows, context) in members() {
            score_all(
                context.own,
                queries,
                &mut scores,
                &rows,
                first,
                wide,
                &mut ahead,
            );
            let len = first + context.own.blocks() * BLOCK;
            for (_, scores) in scores.each(&rows) {
                for row in scores.chunks_exact_mut(stride.max(1)) {
                    row[prefix.tokens..first].fill(f32::NEG_INFINITY);
                    row[first + context.own.tokens..].fill(f32::NEG_INFINITY);
                    prefix.soften(&mut row[..len]);
                }
            }
        }
        add_all(
            prefix,
            &mut scores,
            &mut sums,
            &(0..rows),
            0,
            wide,
            &mut ahead,
        );
        for (rows, context) in members() {
            add_all(
                context.own,
                &mut scores,
                &mut sums,
                &rows,
                first,
                wide,
                &mut ahead,
            );
        }
        for (head, sums) in sums.each(&(0..rows)) {
            for (row, sums) in sums.chunks_exact(padded).enumerate() {
                write(head, row, sums);
            }
        }
    });
}

/// The softmax of `row`, in place.
fn soften(row: &mut [f32]) {
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
    ahead: &mut Ahead,
) {
    let (each, stride) = (scores.rows, scores.width);
    for block in 0..cache.blocks() {
        let at = first + block * BLOCK;
        let tables = scores.each(rows);
        for (queries, (head, scores)) in queries.chunks_exact(each.max(1)).zip(tables) {
            let queries = &queries[rows.clone()];
            match &cache.stored {
                Stored::F32(laid) => {
                    let [keys, _] = laid.block(cache.sizes(), block, head);
                    ahead.ask(keys, rows.len());
                    portable::score(queries, keys, scores, stride, at, wide);
                }
                #[cfg(target_arch = "x86_64")]
                Stored::Bf16(laid) => {
                    let [keys, _] = laid.block(cache.sizes(), block, head);
                    ahead.ask(keys, rows.len());
                    key_values_avx512::score(queries, keys, scores, stride, at);
                }
            }
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
    ahead: &mut Ahead,
) {
    let (padded, stride) = (sums.width, weights.width);
    for block in 0..cache.blocks() {
        let tokens = BLOCK.min(cache.tokens - block * BLOCK);
        let at = first + block * BLOCK;
        for ((head, weights), (_, sums)) in weights.each(rows).zip(sums.each(rows)) {
            let weights = &weights[at / cache.word_elements()..];
            match &cache.stored {
                Stored::F32(laid) => {
                    let [_, values] = laid.block(cache.sizes(), block, head);
                    ahead.ask(values, rows.len());
                    portable::add(
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
                    let [_, values] = laid.block(cache.sizes(), block, head);
                    ahead.ask(values, rows.len());
                    key_values_avx512::add(
                        &values[..tokens.div_ceil(Pair::ELEMENTS) * padded],
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

#[cfg(test)]
mod tests;
