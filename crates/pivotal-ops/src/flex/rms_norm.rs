//! Root mean square normalisation; the formulas stand beside the kernel.

use std::sync::Arc;

use burn::backend::Flex;
use burn::backend::autodiff::checkpoint::{base::Checkpointer, strategy::CheckpointStrategy};
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::flex::FlexTensor;
use pivotal_kernels::account::{Part, time};
use pivotal_kernels::{RmsNormGradients, rms_norm_backward, rms_norm_forward, zeros};

use super::{TrackedTensor, contiguous, dims, floats, from_values};

#[derive(Debug)]
struct RmsNormBackward;

#[derive(Clone, Debug)]
struct State {
    x: FlexTensor,
    weight: FlexTensor,
    /// `1/√(mean(x²) + eps)`, `[rows]`.
    rstd: Arc<[f32]>,
}

/// The output and each row's reciprocal root mean square.
pub(crate) fn forward(x: &FlexTensor, weight: &FlexTensor, eps: f32) -> (FlexTensor, Vec<f32>) {
    let [rows, hidden] = dims(x);
    let mut out = zeros(rows * hidden);
    let mut rstd = zeros(rows);
    time(Part::Norm, || {
        rms_norm_forward(floats(x), floats(weight), eps, &mut out, &mut rstd);
    });
    (from_values(out, [rows, hidden]), rstd)
}

pub(crate) fn tracked<C: CheckpointStrategy>(
    x: TrackedTensor,
    weight: TrackedTensor,
    eps: f32,
) -> TrackedTensor {
    let ((x, x_node), (weight, weight_node)) = (x.into_parts(), weight.into_parts());
    let (x, weight) = (contiguous(x), contiguous(weight));
    let (out, rstd) = forward(&x, &weight, eps);
    match RmsNormBackward
        .prepare::<C>([x_node, weight_node])
        .compute_bound()
        .stateful()
    {
        OpsKind::Tracked(prepared) => {
            let rstd = rstd.into();
            prepared.finish(State { x, weight, rstd }, out)
        }
        OpsKind::UnTracked(prepared) => prepared.finish(out),
    }
}

impl Backward<Flex, 2> for RmsNormBackward {
    type State = State;

    fn backward(self, ops: Ops<State, 2>, grads: &mut Gradients, _: &mut Checkpointer) {
        let dout = contiguous(grads.consume::<Flex>(&ops.node));
        let State { x, weight, rstd } = ops.state;
        let [x_node, weight_node] = ops.parents;
        let [rows, hidden] = dims(&x);
        let mut dx = zeros(rows * hidden);
        let mut dweight = weight_node.as_ref().map(|_| zeros(hidden));
        let gradients = RmsNormGradients {
            x: &mut dx,
            weight: dweight.as_deref_mut(),
        };
        time(Part::Norm, || {
            rms_norm_backward(floats(&x), floats(&weight), &rstd, floats(&dout), gradients);
        });
        if let Some(node) = x_node {
            grads.register::<Flex>(node.id, from_values(dx, [rows, hidden]));
        }
        if let (Some(node), Some(dweight)) = (weight_node, dweight) {
            grads.register::<Flex>(node.id, from_values(dweight, [hidden]));
        }
    }
}
