//! The operations composed of Burn's own: for devices without fused kernels, and as the oracle of the fused ones.
//!
//! Burn differentiates these itself. They take any float type and any device, always compute in the tensor's own
//! precision (a model's is `f32`, whatever [`crate::Precision`] it asks for), and hold every intermediate in memory:
//! [`token_logps`] holds `[rows, vocab]`, [`vocabulary_kl`] several of them, [`rope_attention`] three times `[heads, tokens, tokens]` a layer under autodiff.

use burn::tensor::{Int, Tensor, activation};

use crate::AttentionLayout;

/// `x Wᵀ`.
///
/// # Shapes
/// `x` `[rows, in]`, `weight` `[out, in]`; returns `[rows, out]`.
pub fn linear(x: Tensor<2>, weight: Tensor<2>) -> Tensor<2> {
    x.matmul(weight.transpose())
}

/// `x Wᵀ + scale · (x Aᵀ) Bᵀ`.
///
/// # Shapes
/// `x` `[rows, in]`, `weight` `[out, in]`, `a` `[rank, in]`, `b` `[out, rank]`; returns `[rows, out]`.
pub fn lora_linear(
    x: Tensor<2>,
    weight: Tensor<2>,
    a: Tensor<2>,
    b: Tensor<2>,
    scale: f32,
) -> Tensor<2> {
    let update = linear(linear(x.clone(), a), b).mul_scalar(scale);
    linear(x, weight) + update
}

/// `x / sqrt(mean(x²) + eps) · weight`, row by row.
///
/// # Shapes
/// `x` `[rows, hidden]`, `weight` `[hidden]`; returns `[rows, hidden]`.
pub fn rms_norm(x: Tensor<2>, weight: Tensor<1>, eps: f32) -> Tensor<2> {
    let scale = x.clone().square().mean_dim(1).add_scalar(eps).sqrt();
    x / scale * weight.unsqueeze::<2>()
}

/// Rotary embedding of `q` and `k`, then attention within the spans of `layout`.
///
/// # Shapes
/// `q` `[tokens, heads * head_dim]`, `k` and `v` `[tokens, kv_heads * head_dim]`; returns the shape of `q`.
///
/// The scores of all pairs of tokens of the pack exist, `[heads, tokens, tokens]`, those between spans that do not see each
/// other too: memory and work grow with the square of the pack, not of a span. Keep packs short (`--micro-batch-tokens`).
pub fn rope_attention(
    q: Tensor<2>,
    k: Tensor<2>,
    v: Tensor<2>,
    layout: &AttentionLayout,
) -> Tensor<2> {
    let dense = layout.dense();
    let dtype = q.dtype();
    let cos = dense.cos.clone().cast(dtype);
    let sin = dense.sin.clone().cast(dtype);
    let (tokens, head_dim) = (layout.tokens(), layout.head_dim());
    let (heads, kv_heads) = (layout.heads(), layout.kv_heads());
    let group = heads / kv_heads;
    let (cos, sin) = if q.is_autodiff() {
        (cos.autodiff(), sin.autodiff())
    } else {
        (cos, sin)
    };

    // [heads, tokens, head_dim], each key head repeated for the query heads that share it.
    let split = |x: Tensor<2>, heads: usize| x.reshape([tokens, heads, head_dim]);
    let repeat = |x: Tensor<3>| {
        x.permute([1, 0, 2])
            .reshape([kv_heads, 1, tokens, head_dim])
            .expand([kv_heads, group, tokens, head_dim])
            .reshape([heads, tokens, head_dim])
    };
    let q = rotate(split(q, heads), &cos, &sin).permute([1, 0, 2]);
    let k = repeat(rotate(split(k, kv_heads), &cos, &sin));
    let v = repeat(split(v, kv_heads));

    let scores = q
        .matmul(k.transpose())
        .mul_scalar((head_dim as f64).sqrt().recip())
        .mask_fill(
            dense.hidden.clone().expand([heads, tokens, tokens]),
            f32::NEG_INFINITY,
        );
    activation::softmax(scores, 2)
        .matmul(v)
        .permute([1, 0, 2])
        .reshape([tokens, heads * head_dim])
}

fn rotate(x: Tensor<3>, cos: &Tensor<3>, sin: &Tensor<3>) -> Tensor<3> {
    let half = x.dims()[2] / 2;
    let first = x.clone().narrow(2, 0, half);
    let second = x.narrow(2, half, half);
    Tensor::cat(
        vec![
            first.clone() * cos.clone() - second.clone() * sin.clone(),
            second * cos.clone() + first * sin.clone(),
        ],
        2,
    )
}

/// `silu(gate) · up`, element by element; silu is `x · sigmoid(x)`.
///
/// # Shapes
/// `gate`, `up` and the result `[rows, width]`.
pub fn swiglu(gate: Tensor<2>, up: Tensor<2>) -> Tensor<2> {
    activation::silu(gate) * up
}

/// Log-probability of each row's target under `softmax(hidden headᵀ)`, in nats.
///
/// # Shapes
/// `hidden` `[rows, hidden]`, `head` `[vocab, hidden]`, `targets` `[rows]`; returns `[rows]`.
pub fn token_logps(hidden: Tensor<2>, head: Tensor<2>, targets: Tensor<1, Int>) -> Tensor<1> {
    let logits = hidden.matmul(head.transpose());
    activation::log_softmax(logits, 1)
        .gather(1, targets.unsqueeze_dim(1))
        .squeeze_dim(1)
}

/// KL(softmax(reference)‖softmax(policy)) of each row over the whole vocabulary, in nats; the reference gets no gradient.
///
/// # Shapes
/// `hidden` and `reference_hidden` `[rows, hidden]`, `head` and `reference_head` `[vocab, hidden]`; returns `[rows]`.
pub fn vocabulary_kl(
    hidden: Tensor<2>,
    head: Tensor<2>,
    reference_hidden: Tensor<2>,
    reference_head: Tensor<2>,
) -> Tensor<1> {
    let logps = |hidden: Tensor<2>, head: Tensor<2>| {
        activation::log_softmax(hidden.matmul(head.transpose()), 1)
    };
    let reference = logps(reference_hidden, reference_head).detach();
    let log_ratio = reference.clone() - logps(hidden, head);
    (reference.exp() * log_ratio).sum_dim(1).squeeze_dim(1)
}
