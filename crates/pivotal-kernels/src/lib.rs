//! CPU kernels over plain `f32` slices, without a tensor type.
//!
//! Matrix products in f32 and with bf16 operands, prepacked weights for decoding, attention over tree-packed batches,
//! normalisation, rotary embedding, SwiGLU and vocabulary log-probabilities in tiles. Every forward kernel that carries
//! a gradient has its hand-written backward kernel beside it.
//!
//! Matrices are row-major and dense. Wrong slice lengths panic with both numbers: they are a caller's bug, never data's.
//!
//! Threads come from rayon's current pool. No result depends on how many there are: wherever work is cut, every sum runs in one
//! order that the shapes fix.
//!
//! What the processor offers beyond the compile-time target (AVX-512, bf16 dot products, AMX's tiles) is found at run time; the portable
//! path is never absent.

#![cfg_attr(
    not(target_arch = "x86_64"),
    allow(dead_code, reason = "what only the vector paths use")
)]

pub mod account;
#[cfg(target_arch = "x86_64")]
mod amx;
mod attention;
#[cfg(target_arch = "x86_64")]
mod attention_amx;
#[cfg(target_arch = "x86_64")]
mod attention_amx_backward;
#[cfg(target_arch = "x86_64")]
mod attention_amx_forward;
#[cfg(target_arch = "x86_64")]
mod attention_amx_rows;
#[cfg(target_arch = "x86_64")]
mod attention_avx512;
#[cfg(target_arch = "x86_64")]
mod attention_avx512_backward;
#[cfg(target_arch = "x86_64")]
mod attention_avx512_forward;
#[cfg(target_arch = "x86_64")]
mod attention_avx512_lanes;
mod attention_backward;
#[cfg(target_arch = "x86_64")]
mod attention_runs;
#[cfg(target_arch = "x86_64")]
mod bf16;
mod cached;
mod columns;
#[cfg(target_arch = "x86_64")]
mod few_rows;
mod frozen;
mod frozen_head;
#[cfg(target_arch = "x86_64")]
mod group;
mod key_values;
#[cfg(target_arch = "x86_64")]
mod key_values_avx512;
mod lanes;
mod lasting;
mod logps;
mod matmul;
mod norm;
mod packed;
#[cfg(target_arch = "x86_64")]
mod panels;
mod parallel;
mod plan;
mod processor;
mod rope;
mod rope_attention;
mod rounded;
mod rows;
mod small;
mod swiglu;
mod team;
#[cfg(test)]
mod testing;
mod vocabulary_kl;

pub use attention::{AttentionInput, attention, attention_forward};
pub use attention_backward::{AttentionSaved, attention_backward};
pub use cached::{CachedContext, attend_cached};
pub use columns::add_into;
pub use frozen::{
    FrozenGradients, FrozenGroup, FrozenLinear, FrozenMlp, FrozenOutputs, FrozenPanels,
    FrozenSaved, FrozenWanted, LowRankUpdate, MlpGradients, MlpOutputs, MlpSaved, MlpWanted,
    Prologue,
};
pub use frozen_head::frozen_token_logps;
pub use key_values::{KeyValues, StepContext, append_step, attend_step};
pub use logps::{HeadShape, TokenLogps, token_logps_backward, token_logps_forward};
pub use matmul::{Precision, ProductShape, Store, bf16_available, matmul_nn, matmul_nt, matmul_tn};
pub use norm::{RmsNormGradients, rms_norm_backward, rms_norm_forward};
pub use packed::PackedWeight;
pub use parallel::{EvenBlocks, for_each_item, with_scratch_parts, zeros};
pub use plan::{AttentionPlan, AttentionShape, Span};
pub use processor::{Processor, allowed_processor, limit_processor, processor};
pub use rope::RopeTable;
pub use rope_attention::{RotatedRows, rope_attention, rope_attention_backward};
pub use rounded::RoundedFloats;
pub use rows::{argmax, log_sum_exp};
pub use swiglu::{
    GATE_BLOCK, swiglu_backward, swiglu_forward, swiglu_interleaved_forward,
    swiglu_joined_backward, swiglu_joined_forward,
};
pub use team::with_team;
pub use vocabulary_kl::{HeadInput, VocabularyKl, vocabulary_kl_backward, vocabulary_kl_forward};
