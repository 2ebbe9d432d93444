//! `silu(gate)·up`; the formulas stand beside the kernel.

use burn::backend::Flex;
use burn::backend::autodiff::checkpoint::{base::Checkpointer, strategy::CheckpointStrategy};
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::flex::FlexTensor;
use pivotal_kernels::account::{Part, time};
use pivotal_kernels::{swiglu_backward, swiglu_forward, zeros};

use super::{TrackedTensor, contiguous, dims, floats, from_values};

#[derive(Debug)]
struct SwigluBackward;

pub(crate) fn forward(gate: &FlexTensor, up: &FlexTensor) -> FlexTensor {
    let [rows, width] = dims(gate);
    let mut out = zeros(rows * width);
    time(Part::Swiglu, || {
        swiglu_forward(floats(gate), floats(up), &mut out)
    });
    from_values(out, [rows, width])
}

pub(crate) fn tracked<C: CheckpointStrategy>(
    gate: TrackedTensor,
    up: TrackedTensor,
) -> TrackedTensor {
    let ((gate, gate_node), (up, up_node)) = (gate.into_parts(), up.into_parts());
    let (gate, up) = (contiguous(gate), contiguous(up));
    let out = forward(&gate, &up);
    match SwigluBackward
        .prepare::<C>([gate_node, up_node])
        .compute_bound()
        .stateful()
    {
        OpsKind::Tracked(prepared) => prepared.finish([gate, up], out),
        OpsKind::UnTracked(prepared) => prepared.finish(out),
    }
}

impl Backward<Flex, 2> for SwigluBackward {
    type State = [FlexTensor; 2];

    fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, _: &mut Checkpointer) {
        let dout = contiguous(grads.consume::<Flex>(&ops.node));
        let [gate, up] = ops.state;
        let [rows, width] = dims(&gate);
        let mut dgate = zeros(rows * width);
        let mut dup = zeros(rows * width);
        time(Part::Swiglu, || {
            swiglu_backward(
                floats(&gate),
                floats(&up),
                floats(&dout),
                &mut dgate,
                &mut dup,
            );
        });
        for (node, gradient) in ops.parents.into_iter().zip([dgate, dup]) {
            if let Some(node) = node {
                grads.register::<Flex>(node.id, from_values(gradient, [rows, width]));
            }
        }
    }
}
