//! The operations as a model calls them: the fused kernel where there is one, the portable body elsewhere.

use burn::tensor::{Int, Tensor};

use crate::{AttentionLayout, Precision, portable};

/// `x Wᵀ`.
///
/// # Shapes
/// `x` `[rows, in]`, `weight` `[out, in]`; returns `[rows, out]`.
///
/// # Panics
/// If the inner sizes differ.
pub fn linear(x: Tensor<2>, weight: Tensor<2>, _precision: Precision) -> Tensor<2> {
    portable::linear(x, weight)
}

/// `x Wᵀ + scale · (x Aᵀ) Bᵀ`.
///
/// # Shapes
/// `x` `[rows, in]`, `weight` `[out, in]`, `a` `[rank, in]`, `b` `[out, rank]`; returns `[rows, out]`.
///
/// # Panics
/// If the shapes do not fit.
pub fn lora_linear(
    x: Tensor<2>,
    weight: Tensor<2>,
    a: Tensor<2>,
    b: Tensor<2>,
    scale: f32,
    _precision: Precision,
) -> Tensor<2> {
    portable::lora_linear(x, weight, a, b, scale)
}

/// `x / sqrt(mean(x²) + eps) · weight`, row by row (Zhang & Sennrich 2019, arXiv:1910.07467).
///
/// # Shapes
/// `x` `[rows, hidden]`, `weight` `[hidden]`; returns `[rows, hidden]`.
///
/// # Panics
/// If the widths differ.
pub fn rms_norm(x: Tensor<2>, weight: Tensor<1>, eps: f32) -> Tensor<2> {
    portable::rms_norm(x, weight, eps)
}

/// Rotary embedding of `q` and `k`, then attention within the spans of `layout`.
///
/// # Shapes
/// `q` `[tokens, heads * head_dim]`, `k` and `v` `[tokens, kv_heads * head_dim]`; returns the shape of `q`.
///
/// # Panics
/// If the shapes are not those of the layout.
pub fn rope_attention(
    q: Tensor<2>,
    k: Tensor<2>,
    v: Tensor<2>,
    layout: &AttentionLayout,
) -> Tensor<2> {
    portable::rope_attention(q, k, v, layout)
}

/// `silu(gate) · up`, element by element (Shazeer 2020, arXiv:2002.05202).
///
/// # Shapes
/// `gate`, `up` and the result `[rows, width]`.
///
/// # Panics
/// If the shapes differ.
pub fn swiglu(gate: Tensor<2>, up: Tensor<2>) -> Tensor<2> {
    portable::swiglu(gate, up)
}

/// Log-probability of each row's target under `softmax(hidden headᵀ)`, in nats.
///
/// # Shapes
/// `hidden` `[rows, hidden]`, `head` `[vocab, hidden]`, `targets` `[rows]`; returns `[rows]`.
///
/// # Panics
/// If the shapes do not fit, or a target is not below `vocab`.
pub fn token_logps(
    hidden: Tensor<2>,
    head: Tensor<2>,
    targets: Tensor<1, Int>,
    _precision: Precision,
) -> Tensor<1> {
    portable::token_logps(hidden, head, targets)
}
