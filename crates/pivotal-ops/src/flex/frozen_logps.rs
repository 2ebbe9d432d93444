//! Log-probabilities under a frozen head: the gradient is made in the forward pass and waits for its upstream factor.

use std::sync::Arc;

use burn::backend::autodiff::checkpoint::{base::Checkpointer, strategy::CheckpointStrategy};
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::flex::FlexTensor;
use burn::backend::{Flex, TensorMetadata};
use pivotal_kernels::account::{Part, time};
use pivotal_kernels::{HeadShape, frozen_token_logps, zeros};

use super::{TrackedTensor, contiguous, dims, floats, from_values, map_in_place, token_ids};
use crate::frozen::FrozenJob;

#[derive(Debug)]
struct FrozenLogpsBackward;

pub(crate) fn forward(hidden: &FlexTensor, targets: &FlexTensor, job: &FrozenJob) -> FlexTensor {
    compute(hidden, targets, job, None)
}

fn compute(
    hidden: &FlexTensor,
    targets: &FlexTensor,
    job: &FrozenJob,
    slopes: Option<&mut [f32]>,
) -> FlexTensor {
    let (head, panels) = job.head();
    let shape = HeadShape {
        hidden: job.weights.inputs,
        vocab: job.weights.outputs(),
    };
    let targets = token_ids(targets);
    let result = time(Part::Head, || {
        frozen_token_logps(
            floats(hidden),
            head,
            panels,
            &targets,
            shape,
            job.precision,
            slopes,
        )
    });
    from_values(result.logps, [targets.len()])
}

pub(crate) fn tracked<C: CheckpointStrategy>(
    hidden: TrackedTensor,
    targets: &FlexTensor,
    job: Arc<FrozenJob>,
) -> TrackedTensor {
    let is_tracked = hidden.is_tracked();
    let (hidden, node) = hidden.into_parts();
    let hidden = contiguous(hidden);
    let mut slopes = is_tracked.then(|| zeros(hidden.shape().num_elements()));
    let logps = compute(&hidden, targets, &job, slopes.as_deref_mut());
    match FrozenLogpsBackward
        .prepare::<C>([node])
        .compute_bound()
        .stateful()
    {
        OpsKind::Tracked(prepared) => {
            let slopes = slopes.expect("a tracked operation has a tracked parent");
            prepared.finish(from_values(slopes, hidden.shape()), logps)
        }
        OpsKind::UnTracked(prepared) => prepared.finish(logps),
    }
}

impl Backward<Flex, 1> for FrozenLogpsBackward {
    /// Each row's gradient of its log-probability, `[rows, hidden]`.
    type State = FlexTensor;

    fn backward(self, ops: Ops<FlexTensor, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let dlogps = contiguous(grads.consume::<Flex>(&ops.node));
        let [node] = ops.parents;
        let Some(node) = node else { return };
        let [_, width] = dims(&ops.state);
        let dhidden = map_in_place(ops.state, |slopes| {
            let rows = slopes.chunks_exact_mut(width.max(1));
            for (row, &upstream) in rows.zip(floats(&dlogps)) {
                row.iter_mut().for_each(|slope| *slope *= upstream);
            }
        });
        grads.register::<Flex>(node.id, dhidden);
    }
}
