//! Eight fused, differentiable operations of a Llama-shaped transformer on Burn tensors.
//!
//! | operation | what is fused |
//! |---|---|
//! | [`linear`] | `x Wᵀ`, optionally with bfloat16 operands |
//! | [`lora_linear`] | the frozen weight and its low-rank update in one node |
//! | [`rms_norm`] | root mean square normalisation and its gain |
//! | [`rope_attention`] | rotary embedding and attention over a tree-packed batch |
//! | [`swiglu`] | `silu(gate) · up` |
//! | [`residual`] | a sum with all threads, in place |
//! | [`token_logps`] | language model head, log-softmax and gather, without the logits |
//! | [`vocabulary_kl`] | two heads, their softmax and the divergence between the two, without the logits |
//!
//! On Burn's processor backend (Flex, `f32`) each runs the kernels of `pivotal-kernels` and has a gradient written by
//! hand. Everywhere else the same function is composed of Burn's own operations ([`portable`]) and Burn derives the
//! gradient. [`FrozenLinears`] goes further where weights are not trained: it packs them once, and takes the norm before
//! them, the layers side by side and their low-rank updates together, and a whole gated perceptron with its norm and residual
//! sum. A parent that does not require a gradient gets none computed and keeps nothing alive for the others' sake.

mod attention_layout;
mod device;
mod extension;
mod flex;
mod frozen;
mod fused;
mod packed_matrix;
pub mod portable;

pub use attention_layout::{AttentionLayout, LayoutError};
pub use device::{DeviceError, DeviceName, card};
pub use frozen::{FrozenInput, FrozenLayer, FrozenLinears, FrozenWeight, LowRank};
pub use fused::{
    linear, lora_linear, residual, rms_norm, rope_attention, rope_attention_joined, swiglu,
    token_logps, vocabulary_kl,
};
pub use packed_matrix::PackedMatrix;
pub use pivotal_kernels::{Precision, Span as AttentionSpan};
