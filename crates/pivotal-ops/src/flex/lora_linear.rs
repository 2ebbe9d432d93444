//! `y = x Wᵀ + s·(x Aᵀ) Bᵀ` (Hu et al. 2021, arXiv:2106.09685).
//!
//! ```text
//! h = s·x Aᵀ,  dh = s·dy B
//! dx = dy W + dh A,  dW = dyᵀ x,  dA = dhᵀ x,  dB = dyᵀ h
//! ```

use burn::backend::Flex;
use burn::backend::autodiff::checkpoint::{base::Checkpointer, strategy::CheckpointStrategy};
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::flex::FlexTensor;
use pivotal_kernels::account::{Part, time};
use pivotal_kernels::{Precision, ProductShape, Store, matmul_nn, matmul_nt};

use super::linear::{self, input_gradient, weight_gradient};
use super::{TrackedTensor, contiguous, dims, floats, map_in_place};

#[derive(Debug)]
struct LoraLinearBackward;

#[derive(Clone, Debug)]
struct State {
    x: Option<FlexTensor>,
    weight: Option<FlexTensor>,
    a: Option<FlexTensor>,
    b: Option<FlexTensor>,
    /// `s·x Aᵀ`, `[rows, rank]`.
    h: Option<FlexTensor>,
    scale: f32,
    precision: Precision,
}

/// The output and `h`; the inputs are `x`, `W`, `A`, `B`.
pub(crate) fn forward(
    [x, weight, a, b]: &[FlexTensor; 4],
    scale: f32,
    precision: Precision,
) -> (FlexTensor, FlexTensor) {
    let h = scaled(linear::forward(x, a, precision), scale);
    let y = linear::forward(x, weight, precision);
    let ([m, k], [n, _]) = (dims(&h), dims(b));
    let y = map_in_place(y, |y| {
        let shape = ProductShape { m, n, k };
        time(Part::Lora, || {
            matmul_nt(floats(&h), floats(b), y, shape, Store::Add, precision)
        });
    });
    (y, h)
}

pub(crate) fn tracked<C: CheckpointStrategy>(
    inputs: [TrackedTensor; 4],
    scale: f32,
    precision: Precision,
) -> TrackedTensor {
    let [x_tracked, weight_tracked, a_tracked, b_tracked] =
        inputs.each_ref().map(TrackedTensor::is_tracked);
    let nodes = inputs.each_ref().map(TrackedTensor::node);
    let inputs = inputs.map(|input| contiguous(input.into_primitive()));
    let (y, h) = forward(&inputs, scale, precision);
    match LoraLinearBackward
        .prepare::<C>(nodes)
        .compute_bound()
        .stateful()
    {
        OpsKind::Tracked(prepared) => {
            let [x, weight, a, b] = inputs;
            let state = State {
                x: (weight_tracked || a_tracked).then_some(x),
                weight: x_tracked.then_some(weight),
                a: x_tracked.then_some(a),
                b: (x_tracked || a_tracked).then_some(b),
                h: b_tracked.then_some(h),
                scale,
                precision,
            };
            prepared.finish(state, y)
        }
        OpsKind::UnTracked(prepared) => prepared.finish(y),
    }
}

impl Backward<Flex, 4> for LoraLinearBackward {
    type State = State;

    fn backward(self, ops: Ops<State, 4>, grads: &mut Gradients, _: &mut Checkpointer) {
        let dy = contiguous(grads.consume::<Flex>(&ops.node));
        let [x_node, weight_node, a_node, b_node] = ops.parents;
        let State {
            x,
            weight,
            a,
            b,
            h,
            scale,
            precision,
        } = ops.state;
        let dh = b.map(|b| scaled(input_gradient(&dy, &b, precision), scale));

        if let (Some(node), Some(weight), Some(a), Some(dh)) = (x_node, weight, a, &dh) {
            let ([m, k], [_, n]) = (dims(dh), dims(&a));
            let dx = map_in_place(input_gradient(&dy, &weight, precision), |dx| {
                let shape = ProductShape { m, n, k };
                time(Part::Lora, || {
                    matmul_nn(floats(dh), floats(&a), dx, shape, Store::Add, precision);
                });
            });
            grads.register::<Flex>(node.id, dx);
        }
        if let (Some(node), Some(x)) = (weight_node, &x) {
            grads.register::<Flex>(node.id, weight_gradient(&dy, x, precision));
        }
        if let (Some(node), Some(x), Some(dh)) = (a_node, &x, &dh) {
            grads.register::<Flex>(node.id, weight_gradient(dh, x, precision));
        }
        if let (Some(node), Some(h)) = (b_node, h) {
            grads.register::<Flex>(node.id, weight_gradient(&dy, &h, precision));
        }
    }
}

fn scaled(tensor: FlexTensor, scale: f32) -> FlexTensor {
    map_in_place(tensor, |values| {
        values.iter_mut().for_each(|value| *value *= scale);
    })
}
