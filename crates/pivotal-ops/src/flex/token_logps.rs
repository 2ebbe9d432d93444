//! Head, log-softmax and gather in tiles of the vocabulary; the formulas stand beside the kernel.

use std::sync::Arc;

use burn::backend::Flex;
use burn::backend::autodiff::checkpoint::{base::Checkpointer, strategy::CheckpointStrategy};
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::flex::FlexTensor;
use pivotal_kernels::account::{Part, time};
use pivotal_kernels::{HeadShape, Precision, token_logps_backward, token_logps_forward, zeros};

use super::{TrackedTensor, contiguous, dims, floats, from_values, token_ids};

#[derive(Debug)]
struct TokenLogpsBackward;

#[derive(Clone, Debug)]
struct State {
    hidden: FlexTensor,
    head: FlexTensor,
    targets: Arc<[u32]>,
    /// `ln Σ e^logit`, `[rows]`.
    lse: Arc<[f32]>,
    precision: Precision,
}

/// The log-probabilities and each row's log-sum-exp.
pub(crate) fn forward(
    hidden: &FlexTensor,
    head: &FlexTensor,
    targets: &[u32],
    precision: Precision,
) -> (FlexTensor, Vec<f32>) {
    let result = time(Part::Head, || {
        token_logps_forward(
            floats(hidden),
            floats(head),
            targets,
            head_shape(head),
            precision,
        )
    });
    (from_values(result.logps, [targets.len()]), result.lse)
}

pub(crate) fn tracked<C: CheckpointStrategy>(
    hidden: TrackedTensor,
    head: TrackedTensor,
    targets: &FlexTensor,
    precision: Precision,
) -> TrackedTensor {
    let ((hidden, hidden_node), (head, head_node)) = (hidden.into_parts(), head.into_parts());
    let (hidden, head) = (contiguous(hidden), contiguous(head));
    let targets = token_ids(targets);
    let (logps, lse) = forward(&hidden, &head, &targets, precision);
    match TokenLogpsBackward
        .prepare::<C>([hidden_node, head_node])
        .compute_bound()
        .stateful()
    {
        OpsKind::Tracked(prepared) => {
            let state = State {
                hidden,
                head,
                targets: targets.into(),
                lse: lse.into(),
                precision,
            };
            prepared.finish(state, logps)
        }
        OpsKind::UnTracked(prepared) => prepared.finish(logps),
    }
}

impl Backward<Flex, 2> for TokenLogpsBackward {
    type State = State;

    fn backward(self, ops: Ops<State, 2>, grads: &mut Gradients, _: &mut Checkpointer) {
        let dlogps = contiguous(grads.consume::<Flex>(&ops.node));
        let state = ops.state;
        let [hidden_node, head_node] = ops.parents;
        let (hidden_dims, head_dims) = (dims(&state.hidden), dims(&state.head));
        let mut dhidden = zeros(hidden_dims[0] * hidden_dims[1]);
        let mut dhead = head_node
            .as_ref()
            .map(|_| zeros(head_dims[0] * head_dims[1]));
        time(Part::Head, || {
            token_logps_backward(
                floats(&state.hidden),
                floats(&state.head),
                &state.targets,
                &state.lse,
                floats(&dlogps),
                head_shape(&state.head),
                state.precision,
                &mut dhidden,
                dhead.as_deref_mut(),
            );
        });
        if let Some(node) = hidden_node {
            grads.register::<Flex>(node.id, from_values(dhidden, hidden_dims));
        }
        if let (Some(node), Some(dhead)) = (head_node, dhead) {
            grads.register::<Flex>(node.id, from_values(dhead, head_dims));
        }
    }
}

fn head_shape(head: &FlexTensor) -> HeadShape {
    let [vocab, hidden] = dims(head);
    HeadShape { hidden, vocab }
}
