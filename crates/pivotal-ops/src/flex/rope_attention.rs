//! Rotary embedding and tree attention in one node; the formulas stand beside the kernels.

use std::sync::Arc;

use burn::backend::Flex;
use burn::backend::autodiff::checkpoint::{base::Checkpointer, strategy::CheckpointStrategy};
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::flex::FlexTensor;
use pivotal_kernels::account::{Part, time};
use pivotal_kernels::{
    AttentionInput, AttentionSaved, RotatedRows, attention, attention_backward, rope_attention,
    rope_attention_backward,
};

use super::{TrackedTensor, contiguous, dims, floats, from_values, map_in_place};
use crate::attention_layout::LayoutPlan;

#[derive(Debug)]
struct RopeAttentionBackward;

#[derive(Debug)]
struct JoinedBackward;

/// What the backward pass needs: `q` and `k` after their rotation.
#[derive(Clone, Debug)]
pub(crate) struct State {
    q: FlexTensor,
    k: FlexTensor,
    v: FlexTensor,
    out: FlexTensor,
    lse: Arc<[f32]>,
    plan: Arc<LayoutPlan>,
}

/// What the backward pass needs where the rows are joined.
#[derive(Clone, Debug)]
pub(crate) struct JoinedState {
    rows: JoinedRows,
    out: FlexTensor,
    lse: Arc<[f32]>,
    plan: Arc<LayoutPlan>,
}

#[derive(Clone, Debug)]
enum JoinedRows {
    /// Not rotated yet.
    Whole(FlexTensor),
    /// As bf16 products read them.
    Rotated(Arc<RotatedRows>),
}

impl State {
    fn input(&self) -> AttentionInput<'_> {
        AttentionInput {
            q: floats(&self.q),
            k: floats(&self.k),
            v: floats(&self.v),
        }
    }
}

pub(crate) fn forward(
    q: FlexTensor,
    k: FlexTensor,
    v: FlexTensor,
    plan: Arc<LayoutPlan>,
) -> (FlexTensor, State) {
    let shape = plan.attention.shape();
    let q = map_in_place(q, |q| time(Part::Rope, || plan.rope.apply(q, shape.heads)));
    let k = map_in_place(k, |k| {
        time(Part::Rope, || plan.rope.apply(k, shape.kv_heads))
    });
    let v = contiguous(v);
    let input = AttentionInput {
        q: floats(&q),
        k: floats(&k),
        v: floats(&v),
    };
    let (out, lse) = time(Part::Attention, || attention(&plan.attention, input));
    let out = from_values(out, dims(&q));
    let state = State {
        q,
        k,
        v,
        out: out.clone(),
        lse: lse.into(),
        plan,
    };
    (out, state)
}

pub(crate) fn tracked<C: CheckpointStrategy>(
    q: TrackedTensor,
    k: TrackedTensor,
    v: TrackedTensor,
    plan: Arc<LayoutPlan>,
) -> TrackedTensor {
    let ((q, q_node), (k, k_node), (v, v_node)) = (q.into_parts(), k.into_parts(), v.into_parts());
    let (out, state) = forward(q, k, v, plan);
    match RopeAttentionBackward
        .prepare::<C>([q_node, k_node, v_node])
        .compute_bound()
        .stateful()
    {
        OpsKind::Tracked(prepared) => prepared.finish(state, out),
        OpsKind::UnTracked(prepared) => {
            drop(state);
            prepared.finish(out)
        }
    }
}

/// As [`forward`], from rows of query, key and value, which are rotated where they are read: the output and `lse`.
pub(crate) fn forward_joined(qkv: &FlexTensor, plan: &LayoutPlan) -> (FlexTensor, Vec<f32>) {
    let shape = plan.attention.shape();
    let (out, lse) = time(Part::Attention, || {
        rope_attention(&plan.attention, &plan.rope, floats(qkv))
    });
    let out = from_values(out, [dims(qkv)[0], shape.heads * shape.head_dim]);
    (out, lse)
}

pub(crate) fn tracked_joined<C: CheckpointStrategy>(
    qkv: TrackedTensor,
    plan: Arc<LayoutPlan>,
) -> TrackedTensor {
    let (qkv, node) = qkv.into_parts();
    let qkv = contiguous(qkv);
    let (out, lse) = forward_joined(&qkv, &plan);
    match JoinedBackward
        .prepare::<C>([node])
        .compute_bound()
        .stateful()
    {
        OpsKind::Tracked(prepared) => {
            let rotated = time(Part::Attention, || {
                RotatedRows::new(&plan.attention, &plan.rope, floats(&qkv))
            });
            let state = JoinedState {
                rows: match rotated {
                    Some(rows) => JoinedRows::Rotated(Arc::new(rows)),
                    None => JoinedRows::Whole(qkv),
                },
                out: out.clone(),
                lse: lse.into(),
                plan,
            };
            prepared.finish(state, out)
        }
        OpsKind::UnTracked(prepared) => prepared.finish(out),
    }
}

/// The gradients of value, and of rotated query and key.
fn gradients(state: &State, dout: &FlexTensor) -> [Vec<f32>; 3] {
    let saved = AttentionSaved {
        out: floats(&state.out),
        lse: &state.lse,
    };
    time(Part::Attention, || {
        attention_backward(&state.plan.attention, state.input(), saved, floats(dout))
    })
}

impl Backward<Flex, 3> for RopeAttentionBackward {
    type State = State;

    fn backward(self, ops: Ops<State, 3>, grads: &mut Gradients, _: &mut Checkpointer) {
        let dout = contiguous(grads.consume::<Flex>(&ops.node));
        let shapes = [&ops.state.q, &ops.state.k, &ops.state.v].map(dims);
        let [mut dq, mut dk, dv] = gradients(&ops.state, &dout);
        let (rope, shape) = (&ops.state.plan.rope, ops.state.plan.attention.shape());
        time(Part::Rope, || {
            rope.apply_transpose(&mut dq, shape.heads);
            rope.apply_transpose(&mut dk, shape.kv_heads);
        });
        let gradients = [dq, dk, dv];
        for ((node, gradient), shape) in ops.parents.into_iter().zip(gradients).zip(shapes) {
            if let Some(node) = node {
                grads.register::<Flex>(node.id, from_values(gradient, shape));
            }
        }
    }
}

impl Backward<Flex, 1> for JoinedBackward {
    type State = JoinedState;

    fn backward(self, ops: Ops<JoinedState, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let dout = contiguous(grads.consume::<Flex>(&ops.node));
        let [node] = ops.parents;
        let Some(node) = node else { return };
        let JoinedState {
            rows,
            out,
            lse,
            plan,
        } = &ops.state;
        let saved = AttentionSaved {
            out: floats(out),
            lse,
        };
        let (attention, rope, dout) = (&plan.attention, &plan.rope, floats(&dout));
        let gradient = time(Part::Attention, || match rows {
            JoinedRows::Whole(qkv) => {
                rope_attention_backward(attention, rope, floats(qkv), saved, dout)
            }
            JoinedRows::Rotated(rows) => rows.backward(attention, rope, saved, dout),
        });
        let shape = [attention.tokens(), attention.shape().joined_width()];
        grads.register::<Flex>(node.id, from_values(gradient, shape));
    }
}
