//! Attention of one new token a sequence to a key-value cache: the step of a decoder.

use crate::lanes::{add_scaled, dot, exp_shifted, maximum, sum};
use crate::parallel::{SharedOut, check_len, check_matrix, for_each_block, with_scratch};
use crate::plan::AttentionShape;

/// What one sequence attends to. The prefix may be shared by many sequences (samples of one prompt) or be empty.
///
/// All four are `[positions, kv_heads * head_dim]`; the new token's own key and value are the last row of `keys` and `values`.
#[derive(Clone, Copy, Debug)]
pub struct CachedContext<'a> {
    /// Keys of the shared prefix.
    pub prefix_keys: &'a [f32],
    /// Values of the shared prefix.
    pub prefix_values: &'a [f32],
    /// Keys of the sequence itself.
    pub keys: &'a [f32],
    /// Values of the sequence itself.
    pub values: &'a [f32],
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
/// If lengths do not fit the shape.
///
/// # Examples
/// ```
/// use pivotal_kernels::{AttentionShape, CachedContext, attend_cached};
/// let shape = AttentionShape { heads: 1, kv_heads: 1, head_dim: 1 };
/// let context = CachedContext { prefix_keys: &[0.0], prefix_values: &[1.0], keys: &[0.0], values: &[3.0] };
/// let mut out = [0.0];
/// attend_cached(shape, &[1.0], &[context], &mut out);
/// assert_eq!(out, [2.0]);
/// ```
pub fn attend_cached(
    shape: AttentionShape,
    q: &[f32],
    contexts: &[CachedContext<'_>],
    out: &mut [f32],
) {
    shape.check();
    check_matrix("q", q, contexts.len(), shape.query_width());
    check_matrix("out", out, contexts.len(), shape.query_width());
    let width = shape.key_width();
    for context in contexts {
        check_len("values", context.values, context.keys.len());
        check_len(
            "prefix_values",
            context.prefix_values,
            context.prefix_keys.len(),
        );
        assert!(
            context.keys.len().is_multiple_of(width)
                && context.prefix_keys.len().is_multiple_of(width),
            "a cache of {} and {} elements is not whole rows of {width}",
            context.prefix_keys.len(),
            context.keys.len()
        );
    }
    let positions: usize = contexts
        .iter()
        .map(|c| (c.keys.len() + c.prefix_keys.len()) / width)
        .sum();
    let out = SharedOut::new(out);
    for_each_block(
        contexts.len() * shape.kv_heads,
        1,
        2 * positions * shape.query_width(),
        |tasks| {
            for task in tasks {
                let (sequence, head) = (task / shape.kv_heads, task % shape.kv_heads);
                let group_width = shape.group() * shape.head_dim;
                let at = sequence * shape.query_width() + head * group_width;
                // SAFETY: this task alone has these heads of this sequence.
                let out = unsafe { out.slice(at, group_width) };
                attend_group(
                    shape,
                    &q[at..at + group_width],
                    contexts[sequence],
                    head,
                    out,
                );
            }
        },
    );
}

fn attend_group(
    shape: AttentionShape,
    q: &[f32],
    context: CachedContext<'_>,
    head: usize,
    out: &mut [f32],
) {
    let (dim, width, group) = (shape.head_dim, shape.key_width(), shape.group());
    let row = |row: &'_ [f32]| -> std::ops::Range<usize> {
        debug_assert_eq!(row.len(), width);
        head * dim..(head + 1) * dim
    };
    let keys = context
        .prefix_keys
        .chunks_exact(width)
        .chain(context.keys.chunks_exact(width));
    let values = context
        .prefix_values
        .chunks_exact(width)
        .chain(context.values.chunks_exact(width));
    let positions = (context.prefix_keys.len() + context.keys.len()) / width;
    out.fill(0.0);
    if positions == 0 {
        return;
    }
    with_scratch(group * positions, |scores| {
        for (position, key) in keys.enumerate() {
            let key = &key[row(key)];
            for (member, q) in q.chunks_exact(dim).enumerate() {
                scores[member * positions + position] = dot(q, key) * shape.scale();
            }
        }
        for scores in scores.chunks_exact_mut(positions) {
            exp_shifted(scores, maximum(scores));
            let total = sum(scores);
            for weight in scores {
                *weight /= total;
            }
        }
        for (position, value) in values.enumerate() {
            let value = &value[row(value)];
            for (member, out) in out.chunks_exact_mut(dim).enumerate() {
                add_scaled(out, scores[member * positions + position], value);
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attention::{AttentionInput, attention_forward};
    use crate::plan::{AttentionPlan, Span};
    use crate::testing::{assert_close, on_threads, random, widen};

    // Two f32 softmaxes over up to 100 keys, summed in different orders.
    const TOLERANCE: f64 = 2e-6;

    #[test]
    fn decoding_agrees_with_the_packed_forward() {
        for (heads, kv_heads, head_dim) in [(1, 1, 5), (3, 1, 8), (16, 2, 64)] {
            let shape = AttentionShape {
                heads,
                kv_heads,
                head_dim,
            };
            let (prompt, response) = (37, 64);
            let tokens = prompt + 2 * response;
            let spans = [
                (0, prompt, 0),
                (prompt, response, prompt),
                (prompt + response, response, prompt),
            ]
            .map(|(start, len, prefix_len)| Span {
                start,
                len,
                prefix_start: 0,
                prefix_len,
            });
            let (query_width, width) = (heads * head_dim, kv_heads * head_dim);
            let q: Vec<f32> = random(tokens * query_width, 1)
                .iter()
                .map(|x| x * 4.0)
                .collect();
            let (k, v) = (random(tokens * width, 2), random(tokens * width, 3));
            let (mut full, mut lse) = (vec![0.0; q.len()], vec![0.0; tokens * heads]);
            let plan = AttentionPlan::new(&spans, tokens, shape);
            attention_forward(
                &plan,
                AttentionInput {
                    q: &q,
                    k: &k,
                    v: &v,
                },
                &mut full,
                &mut lse,
            );
            for step in [0, 1, 62, 63] {
                let rows = [prompt + step, prompt + response + step];
                let contexts = [prompt, prompt + response].map(|start| CachedContext {
                    prefix_keys: &k[..prompt * width],
                    prefix_values: &v[..prompt * width],
                    keys: &k[start * width..][..(step + 1) * width],
                    values: &v[start * width..][..(step + 1) * width],
                });
                let pick = |x: &[f32]| -> Vec<f32> {
                    rows.iter()
                        .flat_map(|row| x[row * query_width..][..query_width].to_vec())
                        .collect()
                };
                let mut out = vec![f32::NAN; 2 * query_width];
                attend_cached(shape, &pick(&q), &contexts, &mut out);
                assert_close("cached", &out, &widen(&pick(&full)), TOLERANCE);
                let mut alone = vec![0.0; query_width];
                attend_cached(shape, &pick(&q)[query_width..], &contexts[1..], &mut alone);
                assert_eq!(alone, out[query_width..]);
            }
        }
    }

    #[test]
    fn an_empty_context_gives_zeros_and_threads_change_no_bit() {
        let shape = AttentionShape {
            heads: 8,
            kv_heads: 4,
            head_dim: 32,
        };
        let (k, v) = (random(300 * 128, 1), random(300 * 128, 2));
        let full = CachedContext {
            prefix_keys: &k,
            prefix_values: &v,
            keys: &k[..256],
            values: &v[..256],
        };
        let empty = CachedContext {
            prefix_keys: &[],
            prefix_values: &[],
            keys: &[],
            values: &[],
        };
        let q = random(2 * 256, 3);
        let run = || {
            let mut out = vec![f32::NAN; 512];
            attend_cached(shape, &q, &[full, empty], &mut out);
            out
        };
        let one = on_threads(1, run);
        assert_eq!(one, on_threads(2, run));
        assert!(one[256..].iter().all(|&x| x == 0.0));
    }
}
