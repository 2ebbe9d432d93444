//! Rotation and attention together, from rows of query, key and value.

use crate::attention::{AttentionInput, attention};
use crate::attention_backward::{AttentionSaved, attention_backward};
use crate::matmul::Precision;
use crate::parallel::{SharedOut, for_each_block, rows_per_block, zeros};
#[cfg(target_arch = "x86_64")]
use crate::parallel::{with_scratch, written};
use crate::plan::AttentionPlan;
use crate::rope::RopeTable;
use crate::rounded::RoundedFloats;

/// [`RopeTable::split`] and [`attention`], bit for bit: the output and the log-sum-exps.
///
/// With AMX and operands in bf16 the rows are read where they lie and rotated where they are packed.
///
/// # Shapes
/// `joined` is `[tokens, (heads + 2 * kv_heads) * head_dim]`; the results are `[tokens, heads * head_dim]` and `[tokens, heads]`.
///
/// # Panics
/// If `joined` has another length, or plan and table are of other tokens or heads.
#[must_use]
pub fn rope_attention(
    plan: &AttentionPlan,
    rope: &RopeTable,
    joined: &[f32],
) -> (Vec<f32>, Vec<f32>) {
    let shape = plan.shape();
    check(plan, rope, joined);
    #[cfg(target_arch = "x86_64")]
    if crate::attention_amx_rows::takes(plan) {
        let source = crate::attention_amx_rows::Source::joined(shape, Some(rope), joined);
        // SAFETY: tokens are in a span or in a gap, and each is written.
        return unsafe {
            crate::attention::written_by(plan, |out, lse| {
                crate::attention::fill_gaps(plan, out, lse);
                crate::attention_amx_forward::forward(plan, source, out, lse);
            })
        };
    }
    let [q, k, v] = rope.split(joined, shape);
    let input = AttentionInput {
        q: &q,
        k: &k,
        v: &v,
    };
    attention(plan, input)
}

/// The gradient of [`rope_attention`] with respect to `joined`: [`attention_backward`] and [`RopeTable::join`].
///
/// # Shapes
/// `saved` is what [`rope_attention`] returned, `dout` is shaped as its output, the result as `joined`.
///
/// # Panics
/// If a slice has another length, or plan and table are of other tokens or heads.
#[must_use]
pub fn rope_attention_backward(
    plan: &AttentionPlan,
    rope: &RopeTable,
    joined: &[f32],
    saved: AttentionSaved<'_>,
    dout: &[f32],
) -> Vec<f32> {
    let shape = plan.shape();
    check(plan, rope, joined);
    saved.check(plan, dout);
    #[cfg(target_arch = "x86_64")]
    if crate::attention_amx_rows::takes(plan) {
        let source = crate::attention_amx_rows::Source::joined(shape, Some(rope), joined);
        return backward_amx(plan, rope, source, saved, dout);
    }
    backward_apart(plan, rope, rope.split(joined, shape), saved, dout)
}

/// From query and key rotated, and value.
fn backward_apart(
    plan: &AttentionPlan,
    rope: &RopeTable,
    [q, k, v]: [Vec<f32>; 3],
    saved: AttentionSaved<'_>,
    dout: &[f32],
) -> Vec<f32> {
    let input = AttentionInput {
        q: &q,
        k: &k,
        v: &v,
    };
    let parts = attention_backward(plan, input, saved, dout);
    rope.join(parts.each_ref().map(|part| &part[..]), plan.shape())
}

#[cfg(target_arch = "x86_64")]
fn backward_amx(
    plan: &AttentionPlan,
    rope: &RopeTable,
    source: crate::attention_amx_rows::Source<'_>,
    saved: AttentionSaved<'_>,
    dout: &[f32],
) -> Vec<f32> {
    use crate::attention_amx_rows::Target;
    let shape = plan.shape();
    let width = shape.joined_width();
    // SAFETY: tokens are in a span or in a gap, and each is written: as a query, and as one of its family.
    unsafe {
        written(plan.tokens() * width, |gradient| {
            for gap in &plan.gaps {
                let gap = gradient.slice(gap.start * width, gap.len() * width);
                gap.fill(0.0);
            }
            let target = Target::joined(shape, rope, gradient);
            crate::attention_amx_backward::backward(plan, source, saved, dout, target);
        })
    }
}

/// What [`rope_attention`] multiplied: its rows rotated, queries times the scale of scores, and rounded to bf16, in half the
/// room of `joined`.
#[derive(Clone, Debug)]
pub struct RotatedRows(RoundedFloats);

impl RotatedRows {
    /// The rows of `joined`, or `None` where the plan's products do not round their operands to bf16.
    ///
    /// # Panics
    /// As [`rope_attention`].
    #[must_use]
    pub fn new(plan: &AttentionPlan, rope: &RopeTable, joined: &[f32]) -> Option<Self> {
        let shape = plan.shape();
        check(plan, rope, joined);
        if plan.precision() != Precision::Bf16 {
            return None;
        }
        let (queries, keys) = (shape.query_width(), shape.key_width());
        let width = shape.joined_width();
        let rows = RoundedFloats::of_rows(plan.tokens(), width, |token, row| {
            let from = &joined[token * width..][..width];
            rope.turn(
                token,
                &from[..queries + keys],
                &mut row[..queries + keys],
                1.0,
            );
            row[..queries].iter_mut().for_each(|q| *q *= shape.scale());
            row[queries + keys..].copy_from_slice(&from[queries + keys..]);
        });
        rows.map(Self)
    }

    /// [`rope_attention_backward`] at the `joined` that these were made of, bit for bit.
    ///
    /// # Panics
    /// As [`rope_attention_backward`].
    #[must_use]
    pub fn backward(
        &self,
        plan: &AttentionPlan,
        rope: &RopeTable,
        saved: AttentionSaved<'_>,
        dout: &[f32],
    ) -> Vec<f32> {
        saved.check(plan, dout);
        let (shape, tokens) = (plan.shape(), plan.tokens());
        let (queries, keys) = (shape.query_width(), shape.key_width());
        let width = shape.joined_width();
        // The kernels scale queries before they round them: what is on the grid of bf16 comes back to where it was.
        let unscale = |q: &mut [f32]| q.iter_mut().for_each(|q| *q *= 1.0 / shape.scale());
        let by_rows = |body: &(dyn Fn(usize) + Sync)| {
            for_each_block(tokens, rows_per_block(width), tokens * width, |block| {
                block.for_each(body);
            });
        };
        #[cfg(target_arch = "x86_64")]
        if crate::attention_amx_rows::takes(plan) {
            return with_scratch(tokens * width, |joined| {
                let target = SharedOut::new(joined);
                by_rows(&|token| {
                    // SAFETY: row `token` is this task's own.
                    let row = unsafe { target.slice(token * width, width) };
                    self.0.read(token * width, row);
                    unscale(&mut row[..queries]);
                });
                let source = crate::attention_amx_rows::Source::joined(shape, None, joined);
                backward_amx(plan, rope, source, saved, dout)
            });
        }
        let mut parts = [queries, keys, keys].map(|width| zeros(tokens * width));
        let [q, k, v] = parts.each_mut().map(|part| SharedOut::new(part));
        by_rows(&|token| {
            // SAFETY: row `token` of each part is this task's own.
            let [q, k, v] = unsafe {
                [
                    q.slice(token * queries, queries),
                    k.slice(token * keys, keys),
                    v.slice(token * keys, keys),
                ]
            };
            let first = token * width;
            self.0.read(first, q);
            unscale(q);
            self.0.read(first + queries, k);
            self.0.read(first + queries + keys, v);
        });
        backward_apart(plan, rope, parts, saved, dout)
    }
}

#[track_caller]
fn check(plan: &AttentionPlan, rope: &RopeTable, joined: &[f32]) {
    rope.joined_width(joined, plan.shape());
    assert!(
        rope.tokens() == plan.tokens(),
        "the table is of {} tokens, the plan of {}",
        rope.tokens(),
        plan.tokens()
    );
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::{AttentionShape, Span};
    use crate::testing::{on_each, on_threads, random};

    fn span(start: usize, len: usize, prefix_start: usize, prefix_len: usize) -> Span {
        Span {
            start,
            len,
            prefix_start,
            prefix_len,
        }
    }

    /// Spans, and the tokens of the batch.
    fn layouts() -> Vec<(Vec<Span>, usize)> {
        let single = |len| (vec![span(0, len, 0, 0)], len);
        let pair = vec![
            span(0, 139, 0, 0),
            span(139, 60, 0, 139),
            span(199, 63, 0, 139),
        ];
        // A gap, a response to part of a prompt, and one to tokens in the middle of it.
        let odd = vec![
            span(0, 65, 0, 0),
            span(65, 1, 0, 65),
            span(70, 33, 0, 64),
            span(103, 200, 7, 50),
        ];
        // Several chunks of keys.
        let long = vec![span(0, 300, 0, 0), span(300, 250, 0, 300)];
        let mut layouts: Vec<_> = [0, 1, 63, 64, 65].map(single).into();
        layouts.extend([(pair, 262), (odd, 310), (long, 550)]);
        layouts
    }

    fn table(tokens: usize, half: usize) -> RopeTable {
        let frequencies: Vec<f32> = (0..half).map(|i| 0.7f32.powi(i as i32)).collect();
        let positions: Vec<usize> = (0..tokens).map(|token| token * 37 % 301).collect();
        RopeTable::new(&frequencies, &positions, 1.25)
    }

    #[test]
    fn it_is_the_steps_one_by_one() {
        for (heads, kv_heads, head_dim) in
            [(1, 1, 64), (9, 3, 64), (8, 1, 16), (3, 3, 6), (2, 1, 80)]
        {
            let shape = AttentionShape {
                heads,
                kv_heads,
                head_dim,
            };
            for (spans, tokens) in layouts() {
                for precision in [Precision::F32, Precision::Bf16] {
                    on_each(|| {
                        let plan =
                            AttentionPlan::new(&spans, tokens, shape).with_precision(precision);
                        let rope = table(tokens, head_dim / 2);
                        let joined = random(tokens * (heads + 2 * kv_heads) * head_dim, 1);
                        let dout = random(tokens * heads * head_dim, 2);
                        let [q, k, v] = rope.split(&joined, shape);
                        let input = AttentionInput {
                            q: &q,
                            k: &k,
                            v: &v,
                        };
                        let (out, lse) = attention(&plan, input);
                        let whole = rope_attention(&plan, &rope, &joined);
                        assert_eq!(whole, (out.clone(), lse.clone()), "{shape:?} {spans:?}");
                        let saved = AttentionSaved {
                            out: &out,
                            lse: &lse,
                        };
                        let parts = attention_backward(&plan, input, saved, &dout);
                        let parts = rope.join(parts.each_ref().map(|part| &part[..]), shape);
                        let run = || rope_attention_backward(&plan, &rope, &joined, saved, &dout);
                        assert_eq!(on_threads(1, run), parts, "{shape:?} {spans:?}");
                        assert_eq!(on_threads(3, run), parts, "{shape:?} {spans:?}");
                        let kept = RotatedRows::new(&plan, &rope, &joined);
                        assert_eq!(kept.is_some(), plan.precision() == Precision::Bf16);
                        if let Some(kept) = kept {
                            let run = || kept.backward(&plan, &rope, saved, &dout);
                            assert_eq!(on_threads(1, run), parts, "{shape:?} {spans:?}");
                            assert_eq!(on_threads(3, run), parts, "{shape:?} {spans:?}");
                        }
                    });
                }
            }
        }
    }

    #[test]
    #[should_panic(expected = "the table is of 3 tokens, the plan of 2")]
    fn a_table_of_other_tokens_is_refused() {
        let shape = AttentionShape {
            heads: 1,
            kv_heads: 1,
            head_dim: 2,
        };
        let plan = AttentionPlan::new(&[span(0, 2, 0, 0)], 2, shape);
        let _ = rope_attention(&plan, &table(3, 1), &[0.0; 18]);
    }
}
