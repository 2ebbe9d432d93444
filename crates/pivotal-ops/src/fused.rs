//! The operations as a model calls them: the fused kernel where there is one, the portable body elsewhere.

use burn::backend::{Dispatch, DispatchDevice};
use burn::tensor::{DType, Int, Tensor};
use pivotal_kernels::Precision;

use crate::extension::FusedOps;
use crate::{AttentionLayout, portable};

/// `x Wᵀ`.
///
/// # Shapes
/// `x` `[rows, in]`, `weight` `[out, in]`; returns `[rows, out]`.
///
/// # Panics
/// If the inner sizes differ.
///
/// # Examples
/// ```
/// use burn::tensor::{Device, Tensor};
/// use pivotal_ops::{Precision, linear};
/// let device = Device::flex();
/// let x = Tensor::<2>::from_floats([[1.0, 2.0]], &device);
/// let weight = Tensor::<2>::from_floats([[3.0, 4.0], [5.0, 6.0]], &device);
/// let y = linear(x, weight, Precision::F32).try_into_vec_as::<f32>().unwrap();
/// assert_eq!(y, [11.0, 17.0]);
/// ```
pub fn linear(x: Tensor<2>, weight: Tensor<2>, precision: Precision) -> Tensor<2> {
    expect_dim("weight", 1, weight.dims()[1], x.dims()[1]);
    if !(fuses(&x) && fuses(&weight)) {
        return portable::linear(x, weight);
    }
    Tensor::from_dispatch(Dispatch::fused_linear(
        x.into_dispatch(),
        weight.into_dispatch(),
        precision,
    ))
}

/// `x Wᵀ + scale · (x Aᵀ) Bᵀ` (Hu et al. 2021, arXiv:2106.09685). With `b` all zero this is [`linear`], bit for bit.
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
    precision: Precision,
) -> Tensor<2> {
    expect_dim("weight", 1, weight.dims()[1], x.dims()[1]);
    expect_dim("a", 1, a.dims()[1], x.dims()[1]);
    expect_dim("b", 0, b.dims()[0], weight.dims()[0]);
    expect_dim("b", 1, b.dims()[1], a.dims()[0]);
    if !(fuses(&x) && fuses(&weight) && fuses(&a) && fuses(&b)) {
        return portable::lora_linear(x, weight, a, b, scale);
    }
    Tensor::from_dispatch(Dispatch::fused_lora_linear(
        x.into_dispatch(),
        weight.into_dispatch(),
        a.into_dispatch(),
        b.into_dispatch(),
        scale,
        precision,
    ))
}

/// `x / sqrt(mean(x²) + eps) · weight`, row by row (Zhang & Sennrich 2019, arXiv:1910.07467).
///
/// # Shapes
/// `x` `[rows, hidden]`, `weight` `[hidden]`; returns `[rows, hidden]`.
///
/// # Panics
/// If the widths differ.
pub fn rms_norm(x: Tensor<2>, weight: Tensor<1>, eps: f32) -> Tensor<2> {
    expect_dim("weight", 0, weight.dims()[0], x.dims()[1]);
    if !(fuses(&x) && fuses(&weight)) {
        return portable::rms_norm(x, weight, eps);
    }
    Tensor::from_dispatch(Dispatch::fused_rms_norm(
        x.into_dispatch(),
        weight.into_dispatch(),
        eps,
    ))
}

/// Rotary embedding of `q` and `k` (Su et al. 2021, arXiv:2104.09864), then attention within the spans of `layout`.
///
/// `q` and `k` are rotated in their own memory where nothing else holds them, so pass them by value, not cloned.
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
    let key_width = layout.kv_heads() * layout.head_dim();
    expect_dim("q", 1, q.dims()[1], layout.heads() * layout.head_dim());
    expect_dim("q", 0, q.dims()[0], layout.tokens());
    for (name, tensor) in [("k", &k), ("v", &v)] {
        expect_dim(name, 0, tensor.dims()[0], layout.tokens());
        expect_dim(name, 1, tensor.dims()[1], key_width);
    }
    if !(fuses(&q) && fuses(&k) && fuses(&v)) {
        return portable::rope_attention(q, k, v, layout);
    }
    Tensor::from_dispatch(Dispatch::fused_rope_attention(
        q.into_dispatch(),
        k.into_dispatch(),
        v.into_dispatch(),
        layout.plan().clone(),
    ))
}

/// [`rope_attention`] where a row holds the query, the key and the value, in this order.
///
/// # Shapes
/// `qkv` `[tokens, (heads + 2 * kv_heads) * head_dim]`; returns `[tokens, heads * head_dim]`.
///
/// # Panics
/// If the shape is not that of the layout.
pub fn rope_attention_joined(qkv: Tensor<2>, layout: &AttentionLayout) -> Tensor<2> {
    let width = layout.heads() * layout.head_dim();
    let key_width = layout.kv_heads() * layout.head_dim();
    expect_dim("qkv", 0, qkv.dims()[0], layout.tokens());
    expect_dim("qkv", 1, qkv.dims()[1], width + 2 * key_width);
    if !fuses(&qkv) {
        let part = |first, width| qkv.clone().narrow(1, first, width);
        let (q, k) = (part(0, width), part(width, key_width));
        return portable::rope_attention(q, k, part(width + key_width, key_width), layout);
    }
    Tensor::from_dispatch(Dispatch::fused_rope_attention_joined(
        qkv.into_dispatch(),
        layout.plan().clone(),
    ))
}

/// `silu(gate) · up`, element by element (Shazeer 2020, arXiv:2002.05202).
///
/// # Shapes
/// `gate`, `up` and the result `[rows, width]`.
///
/// # Panics
/// If the shapes differ.
pub fn swiglu(gate: Tensor<2>, up: Tensor<2>) -> Tensor<2> {
    expect_dim("up", 0, up.dims()[0], gate.dims()[0]);
    expect_dim("up", 1, up.dims()[1], gate.dims()[1]);
    if !(fuses(&gate) && fuses(&up)) {
        return portable::swiglu(gate, up);
    }
    Tensor::from_dispatch(Dispatch::fused_swiglu(
        gate.into_dispatch(),
        up.into_dispatch(),
    ))
}

/// Log-probability of each row's target under `softmax(hidden headᵀ)`, in nats.
///
/// # Shapes
/// `hidden` `[rows, hidden]`, `head` `[vocab, hidden]`, `targets` `[rows]`; returns `[rows]`. No `[rows, vocab]` is ever
/// held on Flex.
///
/// # Panics
/// If the shapes do not fit, or a target is not below `vocab`.
///
/// # Examples
/// ```
/// use burn::tensor::{Device, Int, Tensor};
/// use pivotal_ops::{Precision, token_logps};
/// let device = Device::flex();
/// let hidden = Tensor::<2>::from_floats([[3.0]], &device);
/// let head = Tensor::<2>::from_floats([[1.0], [1.0]], &device);
/// let targets = Tensor::<1, Int>::from_ints([1], &device);
/// let logps = token_logps(hidden, head, targets, Precision::F32);
/// assert_eq!(logps.into_scalar::<f32>(), -(2f32.ln()));
/// ```
pub fn token_logps(
    hidden: Tensor<2>,
    head: Tensor<2>,
    targets: Tensor<1, Int>,
    precision: Precision,
) -> Tensor<1> {
    expect_dim("head", 1, head.dims()[1], hidden.dims()[1]);
    expect_dim("targets", 0, targets.dims()[0], hidden.dims()[0]);
    if !(fuses(&hidden) && fuses(&head)) {
        return portable::token_logps(hidden, head, targets);
    }
    Tensor::from_dispatch(Dispatch::fused_token_logps(
        hidden.into_dispatch(),
        head.into_dispatch(),
        targets.into_dispatch(),
        precision,
    ))
}

/// KL(softmax(reference)‖softmax(policy)) of each row over the whole vocabulary, in nats, with the policy's gradient.
///
/// Exactly 0 where the two sides are the same. The reference gets no gradient; the head gets one where it is trained.
///
/// # Shapes
/// `hidden` and `reference_hidden` `[rows, hidden]`, `head` and `reference_head` `[vocab, hidden]`; returns `[rows]`. No
/// `[rows, vocab]` is ever held on Flex.
///
/// # Panics
/// If the shapes do not fit.
///
/// # Examples
/// ```
/// use burn::tensor::{Device, Tensor};
/// use pivotal_ops::{Precision, vocabulary_kl};
/// let tensor = |rows: [[f32; 1]; 2]| Tensor::<2>::from_floats(rows, &Device::flex());
/// // The first row's policy says (¾, ¼) and the second row's (½, ½); the reference always (½, ½).
/// let (head, hidden) = (tensor([[3f32.ln()], [0.0]]), tensor([[1.0], [0.0]]));
/// let reference = tensor([[0.0], [0.0]]);
/// let kl = vocabulary_kl(hidden, head.clone(), reference, head, Precision::F32);
/// let kl: Vec<f32> = kl.try_into_vec_as().unwrap();
/// assert!((kl[0] - 0.5 * (4f32 / 3.0).ln()).abs() < 1e-6);
/// assert_eq!(kl[1], 0.0);
/// ```
pub fn vocabulary_kl(
    hidden: Tensor<2>,
    head: Tensor<2>,
    reference_hidden: Tensor<2>,
    reference_head: Tensor<2>,
    precision: Precision,
) -> Tensor<1> {
    let ([rows, width], [vocab, head_width]) = (hidden.dims(), head.dims());
    expect_dim("head", 1, head_width, width);
    expect_dim("reference_hidden", 0, reference_hidden.dims()[0], rows);
    expect_dim("reference_hidden", 1, reference_hidden.dims()[1], width);
    expect_dim("reference_head", 0, reference_head.dims()[0], vocab);
    expect_dim("reference_head", 1, reference_head.dims()[1], width);
    let sides = [&hidden, &head, &reference_hidden, &reference_head];
    if !sides.into_iter().all(fuses) {
        return portable::vocabulary_kl(hidden, head, reference_hidden, reference_head);
    }
    Tensor::from_dispatch(Dispatch::fused_vocabulary_kl(
        hidden.into_dispatch(),
        head.into_dispatch(),
        reference_hidden.into_dispatch(),
        reference_head.into_dispatch(),
        precision,
    ))
}

/// `x + y`, the residual stream and what a layer adds to it.
///
/// # Shapes
/// Both of one shape, which is returned.
///
/// # Panics
/// If the shapes differ.
///
/// # Examples
/// ```
/// use burn::tensor::{Device, Tensor};
/// let row = |values: [f32; 2]| Tensor::<2>::from_floats([values], &Device::flex());
/// let sum = pivotal_ops::residual(row([1.0, 2.0]), row([10.0, 20.0]));
/// assert_eq!(sum.try_into_vec_as::<f32>().unwrap(), [11.0, 22.0]);
/// ```
pub fn residual(x: Tensor<2>, y: Tensor<2>) -> Tensor<2> {
    expect_dim("y", 0, y.dims()[0], x.dims()[0]);
    expect_dim("y", 1, y.dims()[1], x.dims()[1]);
    if !fuses(&x) || !fuses(&y) {
        return x + y;
    }
    Tensor::from_dispatch(Dispatch::fused_residual(
        x.into_dispatch(),
        y.into_dispatch(),
    ))
}

/// Whether a kernel takes this tensor: on Flex, in `f32`.
fn fuses<const D: usize>(tensor: &Tensor<D>) -> bool {
    let device = tensor.device();
    let on_flex = match device.as_dispatch() {
        DispatchDevice::Autodiff(inner) => matches!(**inner, DispatchDevice::Flex(_)),
        device => matches!(device, DispatchDevice::Flex(_)),
    };
    on_flex && tensor.dtype() == DType::F32
}

#[track_caller]
fn expect_dim(name: &str, axis: usize, found: usize, expected: usize) {
    assert!(
        found == expected,
        "`{name}` has {found} along axis {axis}, expected {expected}"
    );
}
