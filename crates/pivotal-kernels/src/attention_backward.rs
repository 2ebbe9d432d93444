//! The gradient of tree-packed attention, with the probabilities computed again from the kept log-sum-exp.
//!
//! ```text
//! P = exp(s - lse),  D_i = dout_i·out_i,  dS = P·(dout vᵀ - D)
//! dv = Pᵀ dout,  dq = dS k/√d,  dk = dSᵀ q/√d
//! ```

use gemm::Parallelism;

use crate::attention::{AttentionInput, Rows};
use crate::lanes::{dot, exp};
use crate::matmul::{ProductShape, Store, f32_product};
use crate::parallel::{SharedOut, check_matrix, for_each_block, with_scratch, zeros};
use crate::plan::{AttentionPlan, Family};

/// What the forward pass returned.
#[derive(Clone, Copy, Debug)]
pub struct AttentionSaved<'a> {
    /// `[tokens, heads * head_dim]`
    pub out: &'a [f32],
    /// `[tokens, heads]`
    pub lse: &'a [f32],
}

impl AttentionSaved<'_> {
    #[track_caller]
    pub(crate) fn check(&self, plan: &AttentionPlan, dout: &[f32]) {
        let (tokens, shape) = (plan.tokens(), plan.shape());
        check_matrix("saved.out", self.out, tokens, shape.query_width());
        check_matrix("saved.lse", self.lse, tokens, shape.heads);
        check_matrix("dout", dout, tokens, shape.query_width());
    }
}

/// The gradients of [`attention_forward`](crate::attention_forward) with respect to `q`, `k` and `v`, each shaped as that. Those
/// of a shared prompt are sums over its responses, in their order.
///
/// # Shapes
/// `dout` is `[tokens, heads * head_dim]`.
///
/// # Panics
/// If a slice's length does not fit the plan.
#[must_use]
pub fn attention_backward(
    plan: &AttentionPlan,
    input: AttentionInput<'_>,
    saved: AttentionSaved<'_>,
    dout: &[f32],
) -> [Vec<f32>; 3] {
    let shape = plan.shape();
    let queries = plan.tokens() * shape.query_width();
    let keys = plan.tokens() * shape.key_width();
    input.check(plan);
    saved.check(plan, dout);
    let mut gradients = [queries, keys, keys].map(zeros);
    let [dq, dk, dv] = gradients
        .each_mut()
        .map(|gradient| SharedOut::new(gradient));
    #[cfg(target_arch = "x86_64")]
    if crate::attention_amx_rows::takes(plan) {
        let source = crate::attention_amx_rows::Source::apart(shape, input);
        let target = crate::attention_amx_rows::Target::apart(shape, [dq, dk, dv]);
        // SAFETY: the three have the lengths of the plan.
        unsafe { crate::attention_amx_backward::backward(plan, source, saved, dout, target) };
        return gradients;
    }
    #[cfg(target_arch = "x86_64")]
    if plan.vectors {
        let targets = crate::attention_avx512_backward::Targets {
            q: dq,
            k: dk,
            v: dv,
        };
        crate::attention_avx512_backward::backward(plan, input, saved, dout, targets);
        return gradients;
    }
    let pass = Backward {
        plan,
        input,
        saved,
        dout,
        dq,
        dk,
        dv,
    };
    for_each_block(
        plan.families.len() * shape.kv_heads,
        1,
        5 * plan.work,
        |tasks| {
            for task in tasks {
                pass.family(&plan.families[task / shape.kv_heads], task % shape.kv_heads);
            }
        },
    );
    gradients
}

struct Backward<'a> {
    plan: &'a AttentionPlan,
    input: AttentionInput<'a>,
    saved: AttentionSaved<'a>,
    dout: &'a [f32],
    dq: SharedOut,
    dk: SharedOut,
    dv: SharedOut,
}

impl Backward<'_> {
    /// One key head of the spans that share keys: the task that owns their key and value gradients.
    fn family(&self, family: &Family, head: usize) {
        let shape = self.plan.shape();
        let (dim, width) = (shape.head_dim, shape.key_width());
        let extent = family.extent();
        with_scratch(2 * extent.len() * dim, |sums| {
            sums.fill(0.0);
            let (dk, dv) = sums.split_at_mut(extent.len() * dim);
            for &block in &family.blocks {
                self.block(&Rows { shape, block, head }, extent.start, dk, dv);
            }
            for token in family.tokens.iter().cloned().flatten() {
                let from = (token - extent.start) * dim;
                let to = token * width + head * dim;
                // SAFETY: no other task has this head of this token: families share no token.
                unsafe {
                    self.dk
                        .slice(to, dim)
                        .copy_from_slice(&dk[from..from + dim]);
                    self.dv
                        .slice(to, dim)
                        .copy_from_slice(&dv[from..from + dim]);
                }
            }
        });
    }

    /// Adds one block's part to `dk` and `dv`, `[tokens from first_token on, head_dim]`, and writes its part of `dq`.
    fn block(&self, rows: &Rows, first_token: usize, dk: &mut [f32], dv: &mut [f32]) {
        let shape = rows.shape;
        let (count, stride, dim) = (rows.count(), rows.stride(), shape.head_dim);
        with_scratch(count * (2 * dim + 2 * stride), |scratch| {
            let (queries, scratch) = scratch.split_at_mut(count * dim);
            let (dout, scratch) = scratch.split_at_mut(count * dim);
            let (weights, slopes) = scratch.split_at_mut(count * stride);
            rows.gather(self.input.q, shape.scale(), queries);
            rows.gather(self.dout, 1.0, dout);
            rows.times_keys(queries, self.input.k, weights);
            rows.times_keys(dout, self.input.v, slopes);
            for row in 0..count {
                let (query, member) = (row / shape.group(), row % shape.group());
                let at = rows.place(query).0 + member * dim;
                let mean = dot(&self.saved.out[at..at + dim], &dout[row * dim..][..dim]);
                let lse = self.saved.lse[rows.row_place(row)];
                let visible = rows.visible(row);
                let weights = &mut weights[row * stride..][..stride];
                let slopes = &mut slopes[row * stride..][..stride];
                for (weight, slope) in weights[..visible].iter_mut().zip(&mut slopes[..visible]) {
                    *weight = exp(*weight - lse);
                    *slope = *weight * (*slope - mean);
                }
                weights[visible..].fill(0.0);
                slopes[visible..].fill(0.0);
            }
            add_transposed(rows, weights, dout, first_token, dv);
            add_transposed(rows, slopes, queries, first_token, dk);
            let dq = dout;
            rows.times_values(slopes, self.input.k, dq);
            for query in 0..rows.block.rows {
                let (at, width) = rows.place(query);
                // SAFETY: this task alone has these heads of these tokens.
                let to = unsafe { self.dq.slice(at, width) };
                for (to, from) in to.iter_mut().zip(&dq[query * width..]) {
                    *to = from * shape.scale();
                }
            }
        });
    }
}

/// `sums += weightsᵀ · rows` for the keys of the block.
fn add_transposed(
    rows: &Rows,
    weights: &[f32],
    values: &[f32],
    first_token: usize,
    sums: &mut [f32],
) {
    let dim = rows.shape.head_dim;
    for (token, len, at) in rows.block.segments() {
        if len > 0 {
            let shape = ProductShape {
                m: len,
                n: dim,
                k: rows.count(),
            };
            let (weights, strides) = (&weights[at..], (1, rows.stride()));
            let sums = &mut sums[(token - first_token) * dim..];
            f32_product(
                weights,
                strides,
                values,
                (dim, 1),
                sums,
                dim,
                shape,
                Store::Add,
                Parallelism::None,
            );
        }
    }
}

#[cfg(test)]
mod tests;
