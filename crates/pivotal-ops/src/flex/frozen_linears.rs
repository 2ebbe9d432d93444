//! Frozen linear layers over one input; the formulas stand beside the kernels.
//!
//! What a norm or a gate makes of the input is not kept for the backward pass but made again.

use std::borrow::Cow;
use std::sync::Arc;

use burn::backend::autodiff::checkpoint::{base::Checkpointer, strategy::CheckpointStrategy};
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::flex::FlexTensor;
use burn::backend::{Flex, TensorMetadata};
use pivotal_kernels::account::{Part, time};
use pivotal_kernels::{
    FrozenGradients, LowRankUpdate, RmsNormGradients, frozen_linears_backward,
    frozen_linears_forward, rms_norm_backward, rms_norm_forward, swiglu_joined_backward,
    swiglu_joined_forward, zeros,
};

use super::{TrackedTensor, contiguous, dims, floats, from_values};
use crate::frozen::{FrozenJob, Prologue};

#[derive(Debug)]
struct FrozenBackward;

#[derive(Debug)]
struct FrozenLoraBackward;

/// What the backward pass needs.
#[derive(Clone, Debug)]
struct State {
    x: FlexTensor,
    /// The norm's reciprocal root mean square, `[rows]`; empty without a norm.
    rstd: Arc<[f32]>,
    update: Option<(FlexTensor, FlexTensor)>,
    /// `s·x Aᵀ`.
    h: Arc<[f32]>,
    job: Arc<FrozenJob>,
}

/// The first products' input, and the norm's reciprocal root mean square.
fn prepared<'a>(x: &'a FlexTensor, job: &FrozenJob) -> (Cow<'a, [f32]>, Vec<f32>) {
    let (rows, inputs) = (dims(x)[0], job.weights.inputs);
    match &job.weights.input {
        Prologue::Plain => (Cow::Borrowed(floats(x)), Vec::new()),
        Prologue::Normed { weight, eps } => time(Part::Norm, || {
            let mut out = zeros(rows * inputs);
            let mut rstd = zeros(rows);
            rms_norm_forward(floats(x), floats(weight), *eps, &mut out, &mut rstd);
            (Cow::Owned(out), rstd)
        }),
        Prologue::Gated => time(Part::Swiglu, || {
            let mut out = zeros(rows * inputs);
            swiglu_joined_forward(floats(x), inputs, &mut out);
            (Cow::Owned(out), Vec::new())
        }),
    }
}

fn low_rank<'a>(
    update: Option<&'a (FlexTensor, FlexTensor)>,
    job: &FrozenJob,
) -> Option<LowRankUpdate<'a>> {
    update.map(|(a, b)| LowRankUpdate {
        a: floats(a),
        b: floats(b),
        rank: job.rank,
        scale: job.scale,
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
    let (input, rstd) = prepared(x, job);
    let adapted = job.adapted.iter().filter(|&&adapted| adapted).count();
    let mut y = zeros(rows * outputs);
    let mut h = zeros(rows * adapted * job.rank);
    time(Part::Linear, || {
        frozen_linears_forward(
            &input,
            rows,
            job.weights.inputs,
            &job.layers(),
            low_rank(update, job),
            &mut y,
            &mut h,
            job.precision,
        );
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
                x,
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
                x,
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

/// The wanted gradients of `x`, `a` and `b`.
fn gradients(state: &State, dy: &FlexTensor, wanted: [bool; 3]) -> [Option<FlexTensor>; 3] {
    let job = &state.job;
    let (rows, inputs) = (dims(dy)[0], job.weights.inputs);
    let input = if wanted[1] {
        prepared(&state.x, job).0
    } else {
        Cow::Borrowed(&[][..])
    };
    let like = |tensor: &FlexTensor| zeros(tensor.shape().num_elements());
    let mut dinput = wanted[0].then(|| zeros(rows * inputs));
    let update = state.update.as_ref();
    let mut da = update.filter(|_| wanted[1]).map(|(a, _)| like(a));
    let mut db = update.filter(|_| wanted[2]).map(|(_, b)| like(b));
    time(Part::Linear, || {
        frozen_linears_backward(
            &input,
            rows,
            inputs,
            &job.layers(),
            low_rank(update, job),
            &state.h,
            floats(dy),
            FrozenGradients {
                x: dinput.as_deref_mut(),
                a: da.as_deref_mut(),
                b: db.as_deref_mut(),
            },
            job.precision,
        );
    });
    drop(input);
    let shaped = |values: Option<Vec<f32>>, of: Option<&FlexTensor>| {
        values
            .zip(of)
            .map(|(values, of)| from_values(values, of.shape()))
    };
    [
        dinput.map(|dinput| input_gradient(state, dinput)),
        shaped(da, update.map(|(a, _)| a)),
        shaped(db, update.map(|(_, b)| b)),
    ]
}

/// Back through the norm or the gate.
fn input_gradient(state: &State, dinput: Vec<f32>) -> FlexTensor {
    let (x, job) = (&state.x, &state.job);
    match &job.weights.input {
        Prologue::Plain => from_values(dinput, x.shape()),
        Prologue::Normed { weight, .. } => time(Part::Norm, || {
            let mut dx = zeros(dinput.len());
            let gradients = RmsNormGradients {
                x: &mut dx,
                weight: None,
            };
            rms_norm_backward(floats(x), floats(weight), &state.rstd, &dinput, gradients);
            from_values(dx, x.shape())
        }),
        Prologue::Gated => time(Part::Swiglu, || {
            let mut dx = zeros(2 * dinput.len());
            swiglu_joined_backward(floats(x), job.weights.inputs, &dinput, &mut dx);
            from_values(dx, x.shape())
        }),
    }
}

impl Backward<Flex, 1> for FrozenBackward {
    type State = State;

    fn backward(self, ops: Ops<State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let dy = contiguous(grads.consume::<Flex>(&ops.node));
        let [x_node] = ops.parents;
        let [dx, ..] = gradients(&ops.state, &dy, [x_node.is_some(), false, false]);
        if let (Some(node), Some(dx)) = (x_node, dx) {
            grads.register::<Flex>(node.id, dx);
        }
    }
}

impl Backward<Flex, 3> for FrozenLoraBackward {
    type State = State;

    fn backward(self, ops: Ops<State, 3>, grads: &mut Gradients, _: &mut Checkpointer) {
        let dy = contiguous(grads.consume::<Flex>(&ops.node));
        let wanted = ops.parents.each_ref().map(Option::is_some);
        let gradients = gradients(&ops.state, &dy, wanted);
        for (node, gradient) in ops.parents.into_iter().zip(gradients) {
            if let (Some(node), Some(gradient)) = (node, gradient) {
                grads.register::<Flex>(node.id, gradient);
            }
        }
    }
}
