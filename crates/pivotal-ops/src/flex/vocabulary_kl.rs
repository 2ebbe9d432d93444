//! The divergence from the reference over the whole vocabulary, in tiles; the formulas stand beside the kernel.

use std::sync::Arc;

use burn::backend::Flex;
use burn::backend::autodiff::checkpoint::{base::Checkpointer, strategy::CheckpointStrategy};
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::flex::FlexTensor;
use pivotal_kernels::account::{Part, time};
use pivotal_kernels::{
    HeadInput, HeadShape, Precision, VocabularyKl, vocabulary_kl_backward, vocabulary_kl_forward,
    zeros,
};

use super::{TrackedTensor, contiguous, dims, floats, from_values};

#[derive(Debug)]
struct VocabularyKlBackward;

#[derive(Clone, Debug)]
struct State {
    /// The policy's hidden states and head, then the reference's.
    sides: [FlexTensor; 4],
    saved: Arc<VocabularyKl>,
    precision: Precision,
}

/// The divergences, and what the backward pass needs of the forward one. `sides` as in [`State`].
pub(crate) fn forward(sides: &[FlexTensor; 4], precision: Precision) -> (FlexTensor, VocabularyKl) {
    let [policy, reference] = inputs(sides);
    let saved = time(Part::Head, || {
        vocabulary_kl_forward(policy, reference, head_shape(sides), precision)
    });
    (from_values(saved.kl.clone(), [saved.kl.len()]), saved)
}

pub(crate) fn tracked<C: CheckpointStrategy>(
    policy: [TrackedTensor; 2],
    reference: [TrackedTensor; 2],
    precision: Precision,
) -> TrackedTensor {
    let [(hidden, hidden_node), (head, head_node)] = policy.map(TrackedTensor::into_parts);
    // The reference has no gradient, whatever tape it comes from.
    let [(reference_hidden, _), (reference_head, _)] = reference.map(TrackedTensor::into_parts);
    let sides = [hidden, head, reference_hidden, reference_head].map(contiguous);
    let (kl, saved) = forward(&sides, precision);
    match VocabularyKlBackward
        .prepare::<C>([hidden_node, head_node])
        .compute_bound()
        .stateful()
    {
        OpsKind::Tracked(prepared) => {
            let state = State {
                sides,
                saved: Arc::new(saved),
                precision,
            };
            prepared.finish(state, kl)
        }
        OpsKind::UnTracked(prepared) => prepared.finish(kl),
    }
}

impl Backward<Flex, 2> for VocabularyKlBackward {
    type State = State;

    fn backward(self, ops: Ops<State, 2>, grads: &mut Gradients, _: &mut Checkpointer) {
        let dkl = contiguous(grads.consume::<Flex>(&ops.node));
        let state = ops.state;
        let [hidden_node, head_node] = ops.parents;
        let (hidden_dims, head_dims) = (dims(&state.sides[0]), dims(&state.sides[1]));
        let mut dhidden = zeros(hidden_dims[0] * hidden_dims[1]);
        let mut dhead = head_node
            .as_ref()
            .map(|_| zeros(head_dims[0] * head_dims[1]));
        let [policy, reference] = inputs(&state.sides);
        time(Part::Head, || {
            vocabulary_kl_backward(
                policy,
                reference,
                &state.saved,
                floats(&dkl),
                head_shape(&state.sides),
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

fn inputs(
    [hidden, head, reference_hidden, reference_head]: &[FlexTensor; 4],
) -> [HeadInput<'_>; 2] {
    let side = |hidden, head| HeadInput {
        hidden: floats(hidden),
        head: floats(head),
    };
    [side(hidden, head), side(reference_hidden, reference_head)]
}

fn head_shape(sides: &[FlexTensor; 4]) -> HeadShape {
    let [vocab, hidden] = dims(&sides[1]);
    HeadShape { hidden, vocab }
}
