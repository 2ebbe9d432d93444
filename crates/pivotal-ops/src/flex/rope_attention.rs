//! Rotary embedding and tree attention in one node; the formulas stand beside the kernels.

use std::sync::Arc;

use burn::backend::Flex;
use burn::backend::autodiff::checkpoint::{base::Checkpointer, strategy::CheckpointStrategy};
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::flex::FlexTensor;
use pivotal_kernels::{
    AttentionGradients, AttentionInput, AttentionSaved, attention_backward, attention_forward,
};

use super::{TrackedTensor, contiguous, dims, floats, from_values, map_in_place};
use crate::attention_layout::LayoutPlan;

#[derive(Debug)]
struct RopeAttentionBackward;

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
    let q = map_in_place(q, |q| plan.rope.apply(q, shape.heads));
    let k = map_in_place(k, |k| plan.rope.apply(k, shape.kv_heads));
    let v = contiguous(v);
    let [tokens, width] = dims(&q);
    let mut out = vec![0.0; tokens * width];
    let mut lse = vec![0.0; tokens * shape.heads];
    let input = AttentionInput {
        q: floats(&q),
        k: floats(&k),
        v: floats(&v),
    };
    attention_forward(&plan.attention, input, &mut out, &mut lse);
    let out = from_values(out, [tokens, width]);
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

impl Backward<Flex, 3> for RopeAttentionBackward {
    type State = State;

    fn backward(self, ops: Ops<State, 3>, grads: &mut Gradients, _: &mut Checkpointer) {
        let dout = contiguous(grads.consume::<Flex>(&ops.node));
        let state = ops.state;
        let plan = &state.plan;
        let shape = plan.attention.shape();
        let ([tokens, width], [_, key_width]) = (dims(&state.q), dims(&state.k));
        let mut dq = vec![0.0; tokens * width];
        let mut dk = vec![0.0; tokens * key_width];
        let mut dv = vec![0.0; tokens * key_width];
        let saved = AttentionSaved {
            out: floats(&state.out),
            lse: &state.lse,
        };
        let gradients = AttentionGradients {
            q: &mut dq,
            k: &mut dk,
            v: &mut dv,
        };
        attention_backward(
            &plan.attention,
            state.input(),
            saved,
            floats(&dout),
            gradients,
        );
        let [q_node, k_node, v_node] = ops.parents;
        if let Some(node) = q_node {
            plan.rope.apply_transpose(&mut dq, shape.heads);
            grads.register::<Flex>(node.id, from_values(dq, [tokens, width]));
        }
        if let Some(node) = k_node {
            plan.rope.apply_transpose(&mut dk, shape.kv_heads);
            grads.register::<Flex>(node.id, from_values(dk, [tokens, key_width]));
        }
        if let Some(node) = v_node {
            grads.register::<Flex>(node.id, from_values(dv, [tokens, key_width]));
        }
    }
}
