//! Frozen linear layers over one input; the formulas stand beside the kernels.
//!
//! What a norm or a gate makes of the input is not kept for the backward pass but made again.

use std::sync::Arc;

use burn::backend::autodiff::checkpoint::{base::Checkpointer, strategy::CheckpointStrategy};
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::flex::FlexTensor;
use burn::backend::{Flex, TensorMetadata};
use pivotal_kernels::account::{Part, time};
use pivotal_kernels::{
    self as kernels, FrozenGroup, FrozenOutputs, FrozenSaved, FrozenWanted, LowRankUpdate,
    Precision,
};

use super::{Kept, TrackedTensor, contiguous, dims, floats, from_values, register, shaped_as};
use crate::frozen::{FrozenJob, Prologue};

#[derive(Debug)]
struct FrozenBackward;

#[derive(Debug)]
struct FrozenLoraBackward;

/// What the backward pass needs.
#[derive(Clone, Debug)]
struct State {
    x: Kept,
    /// The norm's reciprocal root mean square, `[rows]`; empty without a norm.
    rstd: Arc<[f32]>,
    update: Option<(FlexTensor, FlexTensor)>,
    /// `s·x Aᵀ`.
    h: Arc<[f32]>,
    job: Arc<FrozenJob>,
}

/// `body` on the group as the kernels take it.
pub(super) fn with_group<T>(
    update: Option<&(FlexTensor, FlexTensor)>,
    job: &FrozenJob,
    body: impl FnOnce(FrozenGroup<'_>) -> T,
) -> T {
    let layers = job.layers();
    body(FrozenGroup {
        prologue: match &job.weights.input {
            Prologue::Plain => kernels::Prologue::Plain,
            Prologue::Gated => kernels::Prologue::Gated,
            Prologue::Normed { weight, eps } => kernels::Prologue::Normed {
                weight: floats(weight),
                eps: *eps,
            },
        },
        inputs: job.weights.inputs,
        layers: &layers,
        update: update.map(|(a, b)| LowRankUpdate {
            a: floats(a),
            b: floats(b),
            rank: job.rank,
            scale: job.scale,
        }),
        precision: job.precision,
    })
}

pub(crate) fn forward(
    x: &FlexTensor,
    update: Option<&(FlexTensor, FlexTensor)>,
    job: &FrozenJob,
) -> FlexTensor {
    compute(x, update, job).0
}

/// The output, the norm's reciprocal root mean square, and `h`.
fn compute(
    x: &FlexTensor,
    update: Option<&(FlexTensor, FlexTensor)>,
    job: &FrozenJob,
) -> (FlexTensor, Vec<f32>, Vec<f32>) {
    let (rows, outputs) = (dims(x)[0], job.weights.outputs());
    let FrozenOutputs { y, h, rstd } = with_group(update, job, |group| {
        time(Part::Linear, || group.forward(floats(x), rows))
    });
    (from_values(y, [rows, outputs]), rstd, h)
}

pub(crate) fn tracked<C: CheckpointStrategy>(
    x: TrackedTensor,
    job: Arc<FrozenJob>,
) -> TrackedTensor {
    let (x, node) = x.into_parts();
    let x = contiguous(x);
    let (y, rstd, h) = compute(&x, None, &job);
    match FrozenBackward
        .prepare::<C>([node])
        .compute_bound()
        .stateful()
    {
        OpsKind::Tracked(prepared) => {
            let state = State {
                x: kept(x, &job),
                rstd: rstd.into(),
                update: None,
                h: h.into(),
                job,
            };
            prepared.finish(state, y)
        }
        OpsKind::UnTracked(prepared) => prepared.finish(y),
    }
}

pub(crate) fn tracked_lora<C: CheckpointStrategy>(
    [x, a, b]: [TrackedTensor; 3],
    job: Arc<FrozenJob>,
) -> TrackedTensor {
    let ((x, x_node), (a, a_node), (b, b_node)) = (x.into_parts(), a.into_parts(), b.into_parts());
    let (x, update) = (contiguous(x), Some((contiguous(a), contiguous(b))));
    let (y, rstd, h) = compute(&x, update.as_ref(), &job);
    match FrozenLoraBackward
        .prepare::<C>([x_node, a_node, b_node])
        .compute_bound()
        .stateful()
    {
        OpsKind::Tracked(prepared) => {
            let state = State {
                x: kept(x, &job),
                rstd: rstd.into(),
                update,
                h: h.into(),
                job,
            };
            prepared.finish(state, y)
        }
        OpsKind::UnTracked(prepared) => prepared.finish(y),
    }
}

/// An input that only a norm reads besides is kept rounded. A plain one is the output of an operation that keeps it whole.
fn kept(x: FlexTensor, job: &FrozenJob) -> Kept {
    let precision = match job.weights.input {
        Prologue::Normed { .. } => job.precision,
        Prologue::Plain | Prologue::Gated => Precision::F32,
    };
    time(Part::Linear, || Kept::new(x, precision))
}

/// The wanted gradients of `x`, `a` and `b`.
fn gradients(state: &State, dy: &FlexTensor, [x, a, b]: [bool; 3]) -> [Option<FlexTensor>; 3] {
    let rows = dims(dy)[0];
    let update = state.update.as_ref();
    let gradients = with_group(update, &state.job, |group| {
        let wanted = FrozenWanted { x, a, b };
        time(Part::Linear, || {
            state.x.with(|x| {
                let saved = FrozenSaved {
                    x,
                    h: &state.h,
                    rstd: &state.rstd,
                };
                group.backward(saved, floats(dy), rows, wanted)
            })
        })
    });
    [
        shaped_as(gradients.x, Some(state.x.shape())),
        shaped_as(gradients.a, update.map(|(a, _)| a.shape())),
        shaped_as(gradients.b, update.map(|(_, b)| b.shape())),
    ]
}

impl Backward<Flex, 1> for FrozenBackward {
    type State = State;

    fn backward(self, ops: Ops<State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let dy = contiguous(grads.consume::<Flex>(&ops.node));
        let [dx, ..] = gradients(&ops.state, &dy, [ops.parents[0].is_some(), false, false]);
        register(grads, &ops, [dx]);
    }
}

impl Backward<Flex, 3> for FrozenLoraBackward {
    type State = State;

    fn backward(self, ops: Ops<State, 3>, grads: &mut Gradients, _: &mut Checkpointer) {
        let dy = contiguous(grads.consume::<Flex>(&ops.node));
        let wanted = ops.parents.each_ref().map(Option::is_some);
        let gradients = gradients(&ops.state, &dy, wanted);
        register(grads, &ops, gradients);
    }
}
