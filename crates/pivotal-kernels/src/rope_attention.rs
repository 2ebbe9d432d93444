//! Rotation and attention together, from rows of query, key and value.

use crate::attention::{AttentionInput, attention};
use crate::attention_backward::{AttentionSaved, attention_backward};
#[cfg(target_arch = "x86_64")]
use crate::parallel::written;
use crate::plan::AttentionPlan;
use crate::rope::RopeTable;

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
        let source = crate::attention_amx_rows::Source::joined(shape, rope, joined);
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
        use crate::attention_amx_rows::{Source, Target};
        let source = Source::joined(shape, rope, joined);
        let width = shape.query_width() + 2 * shape.key_width();
        // SAFETY: tokens are in a span or in a gap, and each is written: as a query, and as one of its family.
        return unsafe {
            written(joined.len(), |gradient| {
                for gap in &plan.gaps {
                    let gap = gradient.slice(gap.start * width, gap.len() * width);
                    gap.fill(0.0);
                }
                let target = Target::joined(shape, rope, gradient);
                crate::attention_amx_backward::backward(plan, source, saved, dout, target);
            })
        };
    }
    let [q, k, v] = rope.split(joined, shape);
    let input = AttentionInput {
        q: &q,
        k: &k,
        v: &v,
    };
    let parts = attention_backward(plan, input, saved, dout);
    rope.join(parts.each_ref().map(|part| &part[..]), shape)
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
    use crate::matmul::Precision;
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
