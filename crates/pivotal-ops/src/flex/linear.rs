//! `y = x Wᵀ`: `dx = dy W`, `dW = dyᵀ x`.

use burn::backend::Flex;
use burn::backend::autodiff::checkpoint::{base::Checkpointer, strategy::CheckpointStrategy};
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::flex::FlexTensor;
use pivotal_kernels::account::{Part, time};
use pivotal_kernels::{Precision, ProductShape, Store, matmul_nn, matmul_nt, matmul_tn, zeros};

use super::{TrackedTensor, contiguous, dims, floats, from_values};

#[derive(Debug)]
struct LinearBackward;

#[derive(Clone, Debug)]
struct State {
    /// Kept for the weight's gradient.
    x: Option<FlexTensor>,
    /// Kept for the input's gradient.
    weight: Option<FlexTensor>,
    precision: Precision,
}

pub(crate) fn forward(x: &FlexTensor, weight: &FlexTensor, precision: Precision) -> FlexTensor {
    let ([m, k], [n, _]) = (dims(x), dims(weight));
    let mut y = zeros(m * n);
    let shape = ProductShape { m, n, k };
    time(Part::Linear, || {
        matmul_nt(
            floats(x),
            floats(weight),
            &mut y,
            shape,
            Store::Replace,
            precision,
        );
    });
    from_values(y, [m, n])
}

pub(crate) fn tracked<C: CheckpointStrategy>(
    x: TrackedTensor,
    weight: TrackedTensor,
    precision: Precision,
) -> TrackedTensor {
    let (x_tracked, weight_tracked) = (x.is_tracked(), weight.is_tracked());
    let ((x, x_node), (weight, weight_node)) = (x.into_parts(), weight.into_parts());
    let (x, weight) = (contiguous(x), contiguous(weight));
    let y = forward(&x, &weight, precision);
    match LinearBackward
        .prepare::<C>([x_node, weight_node])
        .compute_bound()
        .stateful()
    {
        OpsKind::Tracked(prepared) => {
            let state = State {
                x: weight_tracked.then_some(x),
                weight: x_tracked.then_some(weight),
                precision,
            };
            prepared.finish(state, y)
        }
        OpsKind::UnTracked(prepared) => prepared.finish(y),
    }
}

impl Backward<Flex, 2> for LinearBackward {
    type State = State;

    fn backward(self, ops: Ops<State, 2>, grads: &mut Gradients, _: &mut Checkpointer) {
        let dy = contiguous(grads.consume::<Flex>(&ops.node));
        let [x_node, weight_node] = ops.parents;
        let precision = ops.state.precision;
        if let (Some(node), Some(weight)) = (x_node, &ops.state.weight) {
            grads.register::<Flex>(node.id, input_gradient(&dy, weight, precision));
        }
        if let (Some(node), Some(x)) = (weight_node, &ops.state.x) {
            grads.register::<Flex>(node.id, weight_gradient(&dy, x, precision));
        }
    }
}

/// `dy W`.
pub(super) fn input_gradient(
    dy: &FlexTensor,
    weight: &FlexTensor,
    precision: Precision,
) -> FlexTensor {
    let ([m, k], [_, n]) = (dims(dy), dims(weight));
    let mut dx = zeros(m * n);
    let shape = ProductShape { m, n, k };
    time(Part::Linear, || {
        matmul_nn(
            floats(dy),
            floats(weight),
            &mut dx,
            shape,
            Store::Replace,
            precision,
        );
    });
    from_values(dx, [m, n])
}

/// `dyᵀ x`.
pub(super) fn weight_gradient(dy: &FlexTensor, x: &FlexTensor, precision: Precision) -> FlexTensor {
    let ([k, m], [_, n]) = (dims(dy), dims(x));
    let mut dw = zeros(m * n);
    let shape = ProductShape { m, n, k };
    time(Part::Linear, || {
        matmul_tn(
            floats(dy),
            floats(x),
            &mut dw,
            shape,
            Store::Replace,
            precision,
        );
    });
    from_values(dw, [m, n])
}
