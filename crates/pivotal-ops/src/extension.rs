//! The operations as a Burn backend extension: Flex, and Flex under autodiff.

use std::sync::Arc;

use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::backend::{Autodiff, Backend, Flex, backend_extension};
use pivotal_kernels::Precision;

use crate::attention_layout::LayoutPlan;
use crate::flex;
use crate::frozen::{FrozenJob, MlpJob};

/// Only Flex is listed: every other backend takes the bodies of [`crate::portable`] before it comes here.
#[backend_extension(Autodiff, Flex)]
pub(crate) trait FusedOps: Backend {
    fn fused_linear(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        precision: Precision,
    ) -> FloatTensor<Self>;

    fn fused_lora_linear(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        scale: f32,
        precision: Precision,
    ) -> FloatTensor<Self>;

    fn fused_rms_norm(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        eps: f32,
    ) -> FloatTensor<Self>;

    fn fused_rope_attention(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        plan: Arc<LayoutPlan>,
    ) -> FloatTensor<Self>;

    fn fused_swiglu(gate: FloatTensor<Self>, up: FloatTensor<Self>) -> FloatTensor<Self>;

    fn fused_residual(x: FloatTensor<Self>, y: FloatTensor<Self>) -> FloatTensor<Self>;

    fn fused_token_logps(
        hidden: FloatTensor<Self>,
        head: FloatTensor<Self>,
        targets: IntTensor<Self>,
        precision: Precision,
    ) -> FloatTensor<Self>;

    fn fused_vocabulary_kl(
        hidden: FloatTensor<Self>,
        head: FloatTensor<Self>,
        reference_hidden: FloatTensor<Self>,
        reference_head: FloatTensor<Self>,
        precision: Precision,
    ) -> FloatTensor<Self>;

    fn fused_frozen_linears(x: FloatTensor<Self>, job: Arc<FrozenJob>) -> FloatTensor<Self>;

    fn fused_frozen_lora_linears(
        x: FloatTensor<Self>,
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        job: Arc<FrozenJob>,
    ) -> FloatTensor<Self>;

    fn fused_frozen_token_logps(
        hidden: FloatTensor<Self>,
        targets: IntTensor<Self>,
        job: Arc<FrozenJob>,
    ) -> FloatTensor<Self>;

    fn fused_rope_attention_joined(
        qkv: FloatTensor<Self>,
        plan: Arc<LayoutPlan>,
    ) -> FloatTensor<Self>;

    fn fused_frozen_mlp(x: FloatTensor<Self>, job: Arc<MlpJob>) -> FloatTensor<Self>;

    fn fused_frozen_lora_mlp(
        x: FloatTensor<Self>,
        gate_up_a: FloatTensor<Self>,
        gate_up_b: FloatTensor<Self>,
        down_a: FloatTensor<Self>,
        down_b: FloatTensor<Self>,
        job: Arc<MlpJob>,
    ) -> FloatTensor<Self>;
}

impl FusedOps for Flex {
    fn fused_linear(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        precision: Precision,
    ) -> FloatTensor<Self> {
        flex::linear::forward(&flex::contiguous(x), &flex::contiguous(weight), precision)
    }

    fn fused_lora_linear(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        scale: f32,
        precision: Precision,
    ) -> FloatTensor<Self> {
        let inputs = [x, weight, a, b].map(flex::contiguous);
        flex::lora_linear::forward(&inputs, scale, precision).0
    }

    fn fused_rms_norm(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        eps: f32,
    ) -> FloatTensor<Self> {
        flex::rms_norm::forward(&flex::contiguous(x), &flex::contiguous(weight), eps).0
    }

    fn fused_rope_attention(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        plan: Arc<LayoutPlan>,
    ) -> FloatTensor<Self> {
        flex::rope_attention::forward(q, k, v, plan).0
    }

    fn fused_residual(x: FloatTensor<Self>, y: FloatTensor<Self>) -> FloatTensor<Self> {
        flex::residual::forward(x, y)
    }

    fn fused_swiglu(gate: FloatTensor<Self>, up: FloatTensor<Self>) -> FloatTensor<Self> {
        flex::swiglu::forward(&flex::contiguous(gate), &flex::contiguous(up))
    }

    fn fused_token_logps(
        hidden: FloatTensor<Self>,
        head: FloatTensor<Self>,
        targets: IntTensor<Self>,
        precision: Precision,
    ) -> FloatTensor<Self> {
        let (hidden, head) = (flex::contiguous(hidden), flex::contiguous(head));
        flex::token_logps::forward(&hidden, &head, &flex::token_ids(&targets), precision).0
    }

    fn fused_vocabulary_kl(
        hidden: FloatTensor<Self>,
        head: FloatTensor<Self>,
        reference_hidden: FloatTensor<Self>,
        reference_head: FloatTensor<Self>,
        precision: Precision,
    ) -> FloatTensor<Self> {
        let sides = [hidden, head, reference_hidden, reference_head].map(flex::contiguous);
        flex::vocabulary_kl::forward(&sides, precision).0
    }

    fn fused_frozen_linears(x: FloatTensor<Self>, job: Arc<FrozenJob>) -> FloatTensor<Self> {
        flex::frozen_linears::forward(&flex::contiguous(x), None, &job)
    }

    fn fused_frozen_lora_linears(
        x: FloatTensor<Self>,
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        job: Arc<FrozenJob>,
    ) -> FloatTensor<Self> {
        let update = (flex::contiguous(a), flex::contiguous(b));
        flex::frozen_linears::forward(&flex::contiguous(x), Some(&update), &job)
    }

    fn fused_frozen_token_logps(
        hidden: FloatTensor<Self>,
        targets: IntTensor<Self>,
        job: Arc<FrozenJob>,
    ) -> FloatTensor<Self> {
        flex::frozen_logps::forward(&flex::contiguous(hidden), &targets, &job)
    }

    fn fused_rope_attention_joined(
        qkv: FloatTensor<Self>,
        plan: Arc<LayoutPlan>,
    ) -> FloatTensor<Self> {
        flex::rope_attention::forward_joined(&flex::contiguous(qkv), &plan).0
    }

    fn fused_frozen_mlp(x: FloatTensor<Self>, job: Arc<MlpJob>) -> FloatTensor<Self> {
        flex::frozen_mlp::forward(&flex::contiguous(x), None, &job)
    }

    fn fused_frozen_lora_mlp(
        x: FloatTensor<Self>,
        gate_up_a: FloatTensor<Self>,
        gate_up_b: FloatTensor<Self>,
        down_a: FloatTensor<Self>,
        down_b: FloatTensor<Self>,
        job: Arc<MlpJob>,
    ) -> FloatTensor<Self> {
        let [gate_up_a, gate_up_b, down_a, down_b] =
            [gate_up_a, gate_up_b, down_a, down_b].map(flex::contiguous);
        let updates = [(gate_up_a, gate_up_b), (down_a, down_b)];
        flex::frozen_mlp::forward(&flex::contiguous(x), Some(&updates), &job)
    }
}

impl<C: CheckpointStrategy> FusedOps for Autodiff<Flex, C> {
    fn fused_linear(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        precision: Precision,
    ) -> FloatTensor<Self> {
        flex::linear::tracked::<C>(x, weight, precision)
    }

    fn fused_lora_linear(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        scale: f32,
        precision: Precision,
    ) -> FloatTensor<Self> {
        flex::lora_linear::tracked::<C>([x, weight, a, b], scale, precision)
    }

    fn fused_rms_norm(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        eps: f32,
    ) -> FloatTensor<Self> {
        flex::rms_norm::tracked::<C>(x, weight, eps)
    }

    fn fused_rope_attention(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        plan: Arc<LayoutPlan>,
    ) -> FloatTensor<Self> {
        flex::rope_attention::tracked::<C>(q, k, v, plan)
    }

    fn fused_residual(x: FloatTensor<Self>, y: FloatTensor<Self>) -> FloatTensor<Self> {
        flex::residual::tracked::<C>(x, y)
    }

    fn fused_swiglu(gate: FloatTensor<Self>, up: FloatTensor<Self>) -> FloatTensor<Self> {
        flex::swiglu::tracked::<C>(gate, up)
    }

    fn fused_token_logps(
        hidden: FloatTensor<Self>,
        head: FloatTensor<Self>,
        targets: IntTensor<Self>,
        precision: Precision,
    ) -> FloatTensor<Self> {
        flex::token_logps::tracked::<C>(hidden, head, &targets, precision)
    }

    fn fused_vocabulary_kl(
        hidden: FloatTensor<Self>,
        head: FloatTensor<Self>,
        reference_hidden: FloatTensor<Self>,
        reference_head: FloatTensor<Self>,
        precision: Precision,
    ) -> FloatTensor<Self> {
        let reference = [reference_hidden, reference_head];
        flex::vocabulary_kl::tracked::<C>([hidden, head], reference, precision)
    }

    fn fused_frozen_linears(x: FloatTensor<Self>, job: Arc<FrozenJob>) -> FloatTensor<Self> {
        flex::frozen_linears::tracked::<C>(x, job)
    }

    fn fused_frozen_lora_linears(
        x: FloatTensor<Self>,
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        job: Arc<FrozenJob>,
    ) -> FloatTensor<Self> {
        flex::frozen_linears::tracked_lora::<C>([x, a, b], job)
    }

    fn fused_frozen_token_logps(
        hidden: FloatTensor<Self>,
        targets: IntTensor<Self>,
        job: Arc<FrozenJob>,
    ) -> FloatTensor<Self> {
        flex::frozen_logps::tracked::<C>(hidden, &targets, job)
    }

    fn fused_rope_attention_joined(
        qkv: FloatTensor<Self>,
        plan: Arc<LayoutPlan>,
    ) -> FloatTensor<Self> {
        flex::rope_attention::tracked_joined::<C>(qkv, plan)
    }

    fn fused_frozen_mlp(x: FloatTensor<Self>, job: Arc<MlpJob>) -> FloatTensor<Self> {
        flex::frozen_mlp::tracked::<C>(x, job)
    }

    fn fused_frozen_lora_mlp(
        x: FloatTensor<Self>,
        gate_up_a: FloatTensor<Self>,
        gate_up_b: FloatTensor<Self>,
        down_a: FloatTensor<Self>,
        down_b: FloatTensor<Self>,
        job: Arc<MlpJob>,
    ) -> FloatTensor<Self> {
        flex::frozen_mlp::tracked_lora::<C>([x, gate_up_a, gate_up_b, down_a, down_b], job)
    }
}
