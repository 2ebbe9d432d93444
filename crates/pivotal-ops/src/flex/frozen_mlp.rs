//! A frozen gated perceptron with its norm and its residual sum in one node; the formulas stand beside the kernel.

use std::sync::Arc;

use burn::backend::autodiff::checkpoint::{base::Checkpointer, strategy::CheckpointStrategy};
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::flex::FlexTensor;
use burn::backend::{Flex, TensorMetadata};
use pivotal_kernels::account::{Part, time};
use pivotal_kernels::{FrozenMlp, MlpGradients, MlpSaved, MlpWanted};

use super::frozen_linears::with_group;
use super::{Kept, TrackedTensor, contiguous, dims, floats, from_values, register, shaped_as};
use crate::frozen::MlpJob;

/// A group's `A` and `B`.
type Update = (FlexTensor, FlexTensor);

#[derive(Debug)]
struct MlpBackward;

#[derive(Debug)]
struct MlpLoraBackward;

/// What the backward pass needs.
#[derive(Clone, Debug)]
struct State {
    x: Kept,
    saved: Arc<MlpSaved>,
    /// Of the gates and ups, and of the last layer.
    updates: Option<[Update; 2]>,
    job: Arc<MlpJob>,
}

/// `body` on the perceptron as the kernels take it.
fn with_mlp<T>(
    updates: Option<&[Update; 2]>,
    job: &MlpJob,
    body: impl FnOnce(FrozenMlp<'_>) -> T,
) -> T {
    let update = |group: usize| updates.map(|updates| &updates[group]);
    with_group(update(0), &job.gate_up, |gate_up| {
        with_group(update(1), &job.down, |down| {
            time(Part::Mlp, || body(FrozenMlp { gate_up, down }))
        })
    })
}

pub(crate) fn forward(x: &FlexTensor, updates: Option<&[Update; 2]>, job: &MlpJob) -> FlexTensor {
    compute(x, updates, job, false).0
}

fn compute(
    x: &FlexTensor,
    updates: Option<&[Update; 2]>,
    job: &MlpJob,
    keep: bool,
) -> (FlexTensor, Option<MlpSaved>) {
    let [rows, hidden] = dims(x);
    let outputs = with_mlp(updates, job, |mlp| mlp.forward(floats(x), rows, keep));
    (from_values(outputs.y, [rows, hidden]), outputs.saved)
}

pub(crate) fn tracked<C: CheckpointStrategy>(x: TrackedTensor, job: Arc<MlpJob>) -> TrackedTensor {
    let keep = x.is_tracked();
    let (x, node) = x.into_parts();
    let x = contiguous(x);
    let (y, saved) = compute(&x, None, &job, keep);
    match MlpBackward.prepare::<C>([node]).compute_bound().stateful() {
        OpsKind::Tracked(prepared) => prepared.finish(state(x, saved, None, job), y),
        OpsKind::UnTracked(prepared) => prepared.finish(y),
    }
}

/// The inputs are `x`, then `A` and `B` of the gates and ups, then those of the last layer.
pub(crate) fn tracked_lora<C: CheckpointStrategy>(
    inputs: [TrackedTensor; 5],
    job: Arc<MlpJob>,
) -> TrackedTensor {
    let keep = inputs.iter().any(TrackedTensor::is_tracked);
    let nodes = inputs.each_ref().map(TrackedTensor::node);
    let [x, gate_up_a, gate_up_b, down_a, down_b] =
        inputs.map(|input| contiguous(input.into_primitive()));
    let updates = [(gate_up_a, gate_up_b), (down_a, down_b)];
    let (y, saved) = compute(&x, Some(&updates), &job, keep);
    match MlpLoraBackward
        .prepare::<C>(nodes)
        .compute_bound()
        .stateful()
    {
        OpsKind::Tracked(prepared) => prepared.finish(state(x, saved, Some(updates), job), y),
        OpsKind::UnTracked(prepared) => prepared.finish(y),
    }
}

fn state(
    x: FlexTensor,
    saved: Option<MlpSaved>,
    updates: Option<[Update; 2]>,
    job: Arc<MlpJob>,
) -> State {
    State {
        x: time(Part::Mlp, || Kept::new(x, job.down.precision)),
        saved: Arc::new(saved.expect("a tracked operation has a tracked parent")),
        updates,
        job,
    }
}

/// The wanted gradients, in the order of the inputs.
fn gradients(state: &State, dy: &FlexTensor, wanted: [bool; 5]) -> [Option<FlexTensor>; 5] {
    let rows = dims(dy)[0];
    let [x, gate_up_a, gate_up_b, down_a, down_b] = wanted;
    let wanted = MlpWanted {
        x,
        gate_up_a,
        gate_up_b,
        down_a,
        down_b,
    };
    let MlpGradients {
        x,
        gate_up_a,
        gate_up_b,
        down_a,
        down_b,
    } = with_mlp(state.updates.as_ref(), &state.job, |mlp| {
        let x = &state.x;
        x.with(|x| mlp.backward(x, &state.saved, floats(dy), rows, wanted))
    });
    let [gate_up, down] = [0, 1].map(|group| state.updates.as_ref().map(|updates| &updates[group]));
    [
        shaped_as(x, Some(state.x.shape())),
        shaped_as(gate_up_a, gate_up.map(|(a, _)| a.shape())),
        shaped_as(gate_up_b, gate_up.map(|(_, b)| b.shape())),
        shaped_as(down_a, down.map(|(a, _)| a.shape())),
        shaped_as(down_b, down.map(|(_, b)| b.shape())),
    ]
}

impl Backward<Flex, 1> for MlpBackward {
    type State = State;

    fn backward(self, ops: Ops<State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let dy = contiguous(grads.consume::<Flex>(&ops.node));
        let wanted = [ops.parents[0].is_some(), false, false, false, false];
        let [dx, ..] = gradients(&ops.state, &dy, wanted);
        register(grads, &ops, [dx]);
    }
}

impl Backward<Flex, 5> for MlpLoraBackward {
    type State = State;

    fn backward(self, ops: Ops<State, 5>, grads: &mut Gradients, _: &mut Checkpointer) {
        let dy = contiguous(grads.consume::<Flex>(&ops.node));
        let wanted = ops.parents.each_ref().map(Option::is_some);
        let gradients = gradients(&ops.state, &dy, wanted);
        register(grads, &ops, gradients);
    }
}
