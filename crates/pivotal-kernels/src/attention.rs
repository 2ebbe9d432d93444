//! Grouped-query attention over a tree-packed batch: exact softmax, one block of queries at a time.
//!
//! ```text
//! out_i = Σ_j softmax_j(q_i·k_j / √head_dim)·v_j,  j over the prefix and the span's tokens up to i
//! ```
//!
//! This is the portable path; `attention_avx512` holds the other. Here a block is about 96 rows (queries times the heads that
//! share a key head), so scratch is 96 times the longest context.
//! Kept for the backward pass: the output and each row's log-sum-exp; the probabilities are computed again there.

use gemm::Parallelism;

use crate::lanes::{exp_shifted, maximum, sum};
use crate::matmul::{ProductShape, Store, f32_product};
use crate::parallel::{SharedOut, check_matrix, for_each_block, with_scratch, written};
use crate::plan::{AttentionPlan, AttentionShape, Block};

/// Queries, keys and values of a batch, rotated already.
#[derive(Clone, Copy, Debug)]
pub struct AttentionInput<'a> {
    /// `[tokens, heads * head_dim]`
    pub q: &'a [f32],
    /// `[tokens, kv_heads * head_dim]`
    pub k: &'a [f32],
    /// `[tokens, kv_heads * head_dim]`
    pub v: &'a [f32],
}

impl AttentionInput<'_> {
    #[track_caller]
    pub(crate) fn check(&self, plan: &AttentionPlan) {
        let shape = plan.shape();
        check_matrix("q", self.q, plan.tokens(), shape.query_width());
        check_matrix("k", self.k, plan.tokens(), shape.key_width());
        check_matrix("v", self.v, plan.tokens(), shape.key_width());
    }
}

/// Attends every token to its prefix and, causally, to its own span. Tokens in no span get zeros and a log-sum-exp of
/// negative infinity.
///
/// # Shapes
/// `out` is `[tokens, heads * head_dim]`; `lse` is `[tokens, heads]`, in nats. Both are overwritten.
///
/// # Panics
/// If a slice's length does not fit the plan.
///
/// # Examples
/// ```
/// use pivotal_kernels::{AttentionInput, AttentionPlan, AttentionShape, Span, attention_forward};
/// let shape = AttentionShape { heads: 1, kv_heads: 1, head_dim: 1 };
/// let span = Span { start: 0, len: 2, prefix_start: 0, prefix_len: 0 };
/// let plan = AttentionPlan::new(&[span], 2, shape);
/// let (mut out, mut lse) = ([0.0; 2], [0.0; 2]);
/// // Equal keys: the second token gets the mean of both values.
/// let input = AttentionInput { q: &[1.0, 1.0], k: &[0.0, 0.0], v: &[1.0, 3.0] };
/// attention_forward(&plan, input, &mut out, &mut lse);
/// assert_eq!(out, [1.0, 2.0]);
/// assert_eq!(lse, [0.0, 2f32.ln()]);
/// ```
pub fn attention_forward(
    plan: &AttentionPlan,
    input: AttentionInput<'_>,
    out: &mut [f32],
    lse: &mut [f32],
) {
    let shape = plan.shape();
    input.check(plan);
    check_matrix("out", out, plan.tokens(), shape.query_width());
    check_matrix("lse", lse, plan.tokens(), shape.heads);
    // SAFETY: both have the lengths checked.
    unsafe { attend(plan, input, SharedOut::new(out), SharedOut::new(lse)) };
}

/// [`attention_forward`] into new memory: the output and the log-sum-exps.
///
/// # Panics
/// If a slice's length does not fit the plan.
#[must_use]
pub fn attention(plan: &AttentionPlan, input: AttentionInput<'_>) -> (Vec<f32>, Vec<f32>) {
    input.check(plan);
    // SAFETY: tokens are in a span or in a gap, and `attend` writes the rows of both.
    unsafe { written_by(plan, |out, lse| attend(plan, input, out, lse)) }
}

/// New memory that `write` fills: the output and the log-sum-exps.
///
/// # Safety
/// `write` writes every element of both.
pub(crate) unsafe fn written_by(
    plan: &AttentionPlan,
    write: impl FnOnce(SharedOut, SharedOut),
) -> (Vec<f32>, Vec<f32>) {
    let shape = plan.shape();
    let mut lse = Vec::new();
    // SAFETY: the caller's promise.
    let out = unsafe {
        written(plan.tokens() * shape.query_width(), |out| {
            lse = written(plan.tokens() * shape.heads, |lse| write(out, lse));
        })
    };
    (out, lse)
}

/// Every element of both outputs.
///
/// # Safety
/// They are as long as [`attention_forward`] says, initialised or not, and nobody else touches them meanwhile.
unsafe fn attend(plan: &AttentionPlan, input: AttentionInput<'_>, out: SharedOut, lse: SharedOut) {
    // SAFETY: the caller's promise.
    unsafe { fill_gaps(plan, out, lse) };
    let shape = plan.shape();
    #[cfg(target_arch = "x86_64")]
    if crate::attention_amx_rows::takes(plan) {
        let source = crate::attention_amx_rows::Source::apart(shape, input);
        // SAFETY: the caller's promise.
        return unsafe { crate::attention_amx_forward::forward(plan, source, out, lse) };
    }
    #[cfg(target_arch = "x86_64")]
    if plan.vectors {
        return crate::attention_avx512_forward::forward(plan, input, out, lse);
    }
    let blocks: Vec<Block> = plan
        .families
        .iter()
        .flat_map(|family| family.blocks.clone())
        .collect();
    for_each_block(blocks.len() * shape.kv_heads, 1, plan.work, |tasks| {
        for task in tasks {
            let (block, head) = (blocks[task / shape.kv_heads], task % shape.kv_heads);
            attend_block(shape, input, block, head, out, lse);
        }
    });
}

/// What tokens in no span get.
///
/// # Safety
/// As for [`attend`].
pub(crate) unsafe fn fill_gaps(plan: &AttentionPlan, out: SharedOut, lse: SharedOut) {
    let shape = plan.shape();
    for gap in &plan.gaps {
        // SAFETY: a gap lies inside the batch.
        unsafe {
            let (width, heads) = (shape.query_width(), shape.heads);
            out.slice(gap.start * width, gap.len() * width).fill(0.0);
            lse.slice(gap.start * heads, gap.len() * heads)
                .fill(f32::NEG_INFINITY);
        }
    }
}

/// A block of queries of the heads that share key head `head`, as matrices with row `query * group + head in the group`.
pub(crate) struct Rows {
    pub(crate) shape: AttentionShape,
    pub(crate) block: Block,
    pub(crate) head: usize,
}

impl Rows {
    pub(crate) fn count(&self) -> usize {
        self.block.rows * self.shape.group()
    }

    /// Floats between rows of the scores.
    pub(crate) fn stride(&self) -> usize {
        self.block.keys().next_multiple_of(16)
    }

    /// Index in a `[tokens, heads * head_dim]` slice of the block's query `query`, and the floats of its group.
    pub(crate) fn place(&self, query: usize) -> (usize, usize) {
        let width = self.shape.group() * self.shape.head_dim;
        let token = self.block.span.start + self.block.first + query;
        (token * self.shape.query_width() + self.head * width, width)
    }

    /// Index in a `[tokens, heads]` slice of row `row`.
    pub(crate) fn row_place(&self, row: usize) -> usize {
        let group = self.shape.group();
        let token = self.block.span.start + self.block.first + row / group;
        token * self.shape.heads + self.head * group + row % group
    }

    /// Keys that row `row` sees.
    pub(crate) fn visible(&self, row: usize) -> usize {
        self.block.span.prefix_len + self.block.first + row / self.shape.group() + 1
    }

    /// Copies the block's rows out of a `[tokens, heads * head_dim]` slice, times `scale`.
    pub(crate) fn gather(&self, from: &[f32], scale: f32, to: &mut [f32]) {
        for query in 0..self.block.rows {
            let (at, width) = self.place(query);
            let to = &mut to[query * width..][..width];
            for (to, from) in to.iter_mut().zip(&from[at..at + width]) {
                *to = from * scale;
            }
        }
    }

    /// `scores = rows · keysᵀ`: `[count, stride]`, masked places included.
    pub(crate) fn times_keys(&self, rows: &[f32], keys: &[f32], scores: &mut [f32]) {
        let (dim, width) = (self.shape.head_dim, self.shape.key_width());
        for (token, len, at) in self.block.segments() {
            if len > 0 {
                let shape = ProductShape {
                    m: self.count(),
                    n: len,
                    k: dim,
                };
                let keys = &keys[token * width + self.head * dim..];
                let (scores, stride) = (&mut scores[at..], self.stride());
                f32_product(
                    rows,
                    (dim, 1),
                    keys,
                    (1, width),
                    scores,
                    stride,
                    shape,
                    Store::Replace,
                    Parallelism::None,
                );
            }
        }
    }

    /// `out = weights · values`, `[count, head_dim]`.
    pub(crate) fn times_values(&self, weights: &[f32], values: &[f32], out: &mut [f32]) {
        let (dim, width) = (self.shape.head_dim, self.shape.key_width());
        let mut store = Store::Replace;
        for (token, len, at) in self.block.segments() {
            if len > 0 {
                let shape = ProductShape {
                    m: self.count(),
                    n: dim,
                    k: len,
                };
                let (weights, strides) = (&weights[at..], (self.stride(), 1));
                let values = &values[token * width + self.head * dim..];
                f32_product(
                    weights,
                    strides,
                    values,
                    (width, 1),
                    out,
                    dim,
                    shape,
                    store,
                    Parallelism::None,
                );
                store = Store::Add;
            }
        }
    }
}

fn attend_block(
    shape: AttentionShape,
    input: AttentionInput<'_>,
    block: Block,
    head: usize,
    out: SharedOut,
    lse: SharedOut,
) {
    let rows = Rows { shape, block, head };
    let (count, stride, dim) = (rows.count(), rows.stride(), shape.head_dim);
    with_scratch(count * (dim + stride), |scratch| {
        let (queries, scores) = scratch.split_at_mut(count * dim);
        rows.gather(input.q, shape.scale(), queries);
        rows.times_keys(queries, input.k, scores);
        for row in 0..count {
            let scores = &mut scores[row * stride..][..stride];
            let (seen, masked) = scores.split_at_mut(rows.visible(row));
            let shift = maximum(seen);
            exp_shifted(seen, shift);
            masked.fill(0.0);
            let total = sum(seen);
            for weight in seen {
                *weight /= total;
            }
            // SAFETY: this task alone has these heads of these tokens.
            unsafe { *lse.at(rows.row_place(row)) = shift + total.ln() };
        }
        let attended = queries;
        rows.times_values(scores, input.v, attended);
        for query in 0..block.rows {
            let (at, width) = rows.place(query);
            // SAFETY: as above.
            let out = unsafe { out.slice(at, width) };
            out.copy_from_slice(&attended[query * width..][..width]);
        }
    });
}
