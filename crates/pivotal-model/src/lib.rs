//! The decoder family (Llama, Mistral, Qwen2) and its files.
//!
//! [`load`] reads a Hugging Face directory or a GGUF file into a [`Checkpoint`]: a checked [`DecoderConfig`], every
//! weight as `f32` under its Hugging Face name, the tokenizer's source, the chat template and the special ids.
//! [`save`] writes such a directory back; [`LoraAdapter`] is peft's format, in and out. No file is trusted: every length
//! is checked against the bytes that are there before anything is allocated from it.

mod adapter;
mod checkpoint;
mod config;
mod decoder;
mod error;
mod lora;
mod parameter;
mod projection;
mod reward_model;
mod save;

pub use adapter::{AdapterTask, LoraAdapter, LoraModule};
pub use checkpoint::{Checkpoint, HostTensor, load, read_tensors, tensors_to_bytes};
pub use config::{DecoderConfig, Family, RopeScaling, SpecialIds};
pub use decoder::Decoder;
pub use error::{Error, GgufFault, Result};
pub use lora::LoraSpec;
pub use parameter::{Parameter, Parameters, Visitor};
pub use reward_model::{HeadInit, RewardModel};
pub use save::save;
