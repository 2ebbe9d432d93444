//! The decoder family (Llama, Mistral, Qwen2) and its files.
//!
//! [`load`] reads a Hugging Face directory or a GGUF file into a [`Checkpoint`]: a checked [`DecoderConfig`], every
//! weight as `f32` under its Hugging Face name, the tokenizer's source, the chat template and the special ids.
//! [`save`] writes such a directory back; [`LoraAdapter`] is peft's format, in and out. [`Decoder`] computes hidden states
//! and log-probabilities over a tree-packed batch, [`RewardModel`] gives each token a value, and [`Generator`] samples
//! responses from a key-value cache. No file is trusted: every length
//! is checked against the bytes that are there before anything is allocated from it.

mod adapter;
mod checkpoint;
mod config;
mod decode;
mod decoder;
mod error;
mod frozen;
mod generate;
mod lora;
mod packed_layer;
mod parameter;
mod projection;
mod recompute;
mod reward_model;
mod sampling;
mod save;

pub use adapter::{AdapterTask, LoraAdapter, LoraModule};
pub use checkpoint::{Checkpoint, HostTensor, load, read_tensors, tensors_to_bytes};
pub use config::{DecoderConfig, Family, RopeScaling, SpecialIds};
pub use decode::{Generator, PromptCache, Sequence};
pub use decoder::Decoder;
pub use error::{Error, GgufFault, Result};
pub use generate::{Finish, GenerateSettings, Generation, GenerationStats, Request, StopStrings};
pub use lora::LoraSpec;
pub use parameter::{Parameter, Parameters, Visitor};
pub use projection::PackedWeight;
pub use recompute::ForwardPass;
pub use reward_model::{HeadInit, RewardModel};
pub use sampling::{Drawn, Sampling};
pub use save::save;
