//! Writes GGUF files, right and wrong ones, byte by byte.

use pivotal_model::{Checkpoint, HostTensor};

/// A GGUF file in the making; the counts and tensor headers can be made to lie.
#[derive(Clone, Default)]
pub(crate) struct Builder {
    metadata: Vec<u8>,
    keys: u64,
    headers: Vec<u8>,
    tensors: u64,
    data: Vec<u8>,
}

fn text(out: &mut Vec<u8>, text: &[u8]) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text);
}

impl Builder {
    /// A metadata key with a value of any type number, as raw bytes.
    pub(crate) fn raw(mut self, key: &str, kind: u32, value: &[u8]) -> Self {
        text(&mut self.metadata, key.as_bytes());
        self.metadata.extend(kind.to_le_bytes());
        self.metadata.extend(value);
        self.keys += 1;
        self
    }

    pub(crate) fn size(self, key: &str, value: usize) -> Self {
        self.raw(key, 4, &(value as u32).to_le_bytes())
    }

    pub(crate) fn float(self, key: &str, value: f32) -> Self {
        self.raw(key, 6, &value.to_le_bytes())
    }

    pub(crate) fn text(self, key: &str, value: &str) -> Self {
        let mut bytes = Vec::new();
        text(&mut bytes, value.as_bytes());
        self.raw(key, 8, &bytes)
    }

    /// A tensor header; dimensions fastest first, as the format has them.
    pub(crate) fn header(mut self, name: &str, dimensions: &[u64], kind: u32, offset: u64) -> Self {
        text(&mut self.headers, name.as_bytes());
        self.headers.extend((dimensions.len() as u32).to_le_bytes());
        for size in dimensions {
            self.headers.extend(size.to_le_bytes());
        }
        self.headers.extend(kind.to_le_bytes());
        self.headers.extend(offset.to_le_bytes());
        self.tensors += 1;
        self
    }

    /// An f32 tensor with its data; shape slowest first.
    pub(crate) fn tensor(mut self, name: &str, shape: &[usize], values: &[f32]) -> Self {
        let offset = self.data.len() as u64;
        let bytes = values.iter().flat_map(|value| value.to_le_bytes());
        self.data.extend(bytes);
        self.data.resize(self.data.len().next_multiple_of(32), 0);
        let dimensions: Vec<u64> = shape.iter().rev().map(|&size| size as u64).collect();
        self.header(name, &dimensions, 0, offset)
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        self.bytes_with_counts(3, self.tensors, self.keys)
    }

    pub(crate) fn bytes_with_counts(&self, version: u32, tensors: u64, keys: u64) -> Vec<u8> {
        let mut bytes = b"GGUF".to_vec();
        bytes.extend(version.to_le_bytes());
        bytes.extend(tensors.to_le_bytes());
        bytes.extend(keys.to_le_bytes());
        bytes.extend(&self.metadata);
        bytes.extend(&self.headers);
        bytes.resize(bytes.len().next_multiple_of(32), 0);
        bytes.extend(&self.data);
        bytes
    }
}

/// The metadata of a decoder, as llama.cpp's converter writes them.
pub(crate) fn metadata(checkpoint: &Checkpoint, architecture: &str) -> Builder {
    let config = &checkpoint.config;
    let key = |suffix: &str| format!("{architecture}.{suffix}");
    Builder::default()
        .text("general.architecture", architecture)
        .size(&key("block_count"), config.layers)
        .size(&key("context_length"), config.max_positions)
        .size(&key("embedding_length"), config.hidden_size)
        .size(&key("feed_forward_length"), config.intermediate_size)
        .size(&key("attention.head_count"), config.heads)
        .size(&key("attention.head_count_kv"), config.kv_heads)
        .size(&key("attention.key_length"), config.head_dim)
        .float(
            &key("attention.layer_norm_rms_epsilon"),
            config.rms_norm_eps as f32,
        )
        .float(&key("rope.freq_base"), config.rope_theta as f32)
        .size("tokenizer.ggml.bos_token_id", 1)
        .size("tokenizer.ggml.eos_token_id", 2)
        .size("tokenizer.ggml.padding_token_id", 3)
}

/// The tensors under llama.cpp's names, q and k in the row order that it gives a Llama.
pub(crate) fn with_tensors(
    mut builder: Builder,
    checkpoint: &Checkpoint,
    interleave: bool,
) -> Builder {
    let config = &checkpoint.config;
    for (name, tensor) in &checkpoint.tensors {
        let heads = match () {
            () if !interleave => None,
            () if name.contains("q_proj") => Some(config.heads),
            () if name.contains("k_proj") => Some(config.kv_heads),
            () => None,
        };
        let values = match heads {
            Some(heads) => interleaved(tensor, heads, config.head_dim),
            None => tensor.values().to_vec(),
        };
        builder = builder.tensor(&ggml_name(name), tensor.shape(), &values);
    }
    builder
}

/// `reshape(heads, 2, head_dim / 2, …).swapaxes(1, 2)` of llama.cpp's `convert_hf_to_gguf.py`.
fn interleaved(tensor: &HostTensor, heads: usize, head_dim: usize) -> Vec<f32> {
    let width = tensor.values().len() / (heads * head_dim);
    let mut out = vec![0.0; tensor.values().len()];
    for (row, values) in tensor.values().chunks_exact(width).enumerate() {
        let (head, within) = (row / head_dim, row % head_dim);
        let (half, pair) = (within / (head_dim / 2), within % (head_dim / 2));
        let to = (head * head_dim + 2 * pair + half) * width;
        out[to..to + width].copy_from_slice(values);
    }
    out
}

fn ggml_name(name: &str) -> String {
    [
        ("model.embed_tokens", "token_embd"),
        ("model.norm", "output_norm"),
        ("lm_head", "output"),
        ("model.layers", "blk"),
        ("input_layernorm", "attn_norm"),
        ("post_attention_layernorm", "ffn_norm"),
        ("self_attn.q_proj", "attn_q"),
        ("self_attn.k_proj", "attn_k"),
        ("self_attn.v_proj", "attn_v"),
        ("self_attn.o_proj", "attn_output"),
        ("mlp.gate_proj", "ffn_gate"),
        ("mlp.up_proj", "ffn_up"),
        ("mlp.down_proj", "ffn_down"),
    ]
    .iter()
    .fold(name.to_owned(), |name, (from, to)| name.replace(from, to))
}
