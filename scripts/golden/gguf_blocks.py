"""A tiny Llama GGUF with a tensor of every block format, and what the `gguf` package reads in it.

    python scripts/golden/gguf_blocks.py

writes, under crates/pivotal-model/tests/golden/gguf/:
    blocks.gguf        a one-layer decoder; random weights, most of them as random bytes in their block format
    blocks.safetensors the same tensors in f32 under their Hugging Face names: `gguf.quants.dequantize`, and for q and k
                       transformers' own undoing of llama.cpp's row order
    blocks.json        versions, and the formats used
"""

import gguf
import numpy
import torch
from gguf import GGMLQuantizationType as Type
from safetensors.numpy import save_file
from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor

from fixture import golden_directory, header, write_json

# The K formats need rows of 256; everything else is as small as 32-element blocks allow.
VOCAB, HIDDEN, INNER, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 16, 256, 32, 1, 4, 2, 8

NAMES = {
    "attn_norm": ("input_layernorm", (HIDDEN,)),
    "ffn_norm": ("post_attention_layernorm", (HIDDEN,)),
    "attn_q": ("self_attn.q_proj", (HEADS * HEAD_DIM, HIDDEN)),
    "attn_k": ("self_attn.k_proj", (KV_HEADS * HEAD_DIM, HIDDEN)),
    "attn_v": ("self_attn.v_proj", (KV_HEADS * HEAD_DIM, HIDDEN)),
    "attn_output": ("self_attn.o_proj", (HIDDEN, HEADS * HEAD_DIM)),
    "ffn_gate": ("mlp.gate_proj", (INNER, HIDDEN)),
    "ffn_up": ("mlp.up_proj", (INNER, HIDDEN)),
    "ffn_down": ("mlp.down_proj", (HIDDEN, INNER)),
}

FORMATS = {
    "token_embd": Type.Q8_0,
    "output": Type.Q6_K,
    "blk.0.attn_norm": Type.BF16,
    "blk.0.ffn_norm": Type.F16,
    "blk.0.attn_q": Type.Q4_K,
    "blk.0.attn_k": Type.Q5_K,
    "blk.0.attn_v": Type.Q5_0,
    "blk.0.attn_output": Type.Q5_1,
    "blk.0.ffn_gate": Type.Q4_0,
    "blk.0.ffn_up": Type.Q4_1,
    "blk.0.ffn_down": Type.Q8_0,
}

# Offsets of the f16 scales and minima in each block: random bytes there could be infinite.
HALVES = {
    Type.Q4_0: [0], Type.Q4_1: [0, 2], Type.Q5_0: [0], Type.Q5_1: [0, 2], Type.Q8_0: [0],
    Type.Q4_K: [0, 2], Type.Q5_K: [0, 2], Type.Q6_K: [208],
}


def encode(rng: numpy.random.Generator, shape: tuple, kind: Type) -> numpy.ndarray:
    """Random content in a format: quantised blocks are random bits under small scales, so that every bit is met."""
    if kind not in HALVES:
        return gguf.quants.quantize(rng.standard_normal(shape, dtype=numpy.float32), kind)
    block, size = gguf.GGML_QUANT_SIZES[kind]
    count = int(numpy.prod(shape)) // block
    blocks = rng.integers(0, 256, (count, size), dtype=numpy.uint8)
    for offset in HALVES[kind]:
        halves = (rng.standard_normal((count, 1)) * 0.01).astype(numpy.float16)
        blocks[:, offset : offset + 2] = halves.view(numpy.uint8)
    return blocks.reshape(*shape[:-1], shape[-1] // block * size)


def main() -> None:
    torch.set_num_threads(1)
    rng = numpy.random.default_rng(20250102)
    directory = golden_directory("pivotal-model") / "gguf"
    directory.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(directory / "blocks.gguf", "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_key_length(HEAD_DIM)
    writer.add_vocab_size(VOCAB)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(["<|end|>"] + [chr(97 + index) for index in range(13)] + ["ab", "abc"])
    writer.add_token_types([3] + [1] * 15)
    writer.add_token_merges(["a b", "ab c"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_add_bos_token(False)
    writer.add_chat_template("{% for message in messages %}{{ message.content }}{% endfor %}")

    shapes = {"token_embd": (VOCAB, HIDDEN), "output": (VOCAB, HIDDEN), "output_norm": (HIDDEN,)}
    renamed = {
        "token_embd": "model.embed_tokens",
        "output": "lm_head",
        "output_norm": "model.norm",
    }
    for layer in range(LAYERS):
        for name, (path, shape) in NAMES.items():
            shapes[f"blk.{layer}.{name}"] = shape
            renamed[f"blk.{layer}.{name}"] = f"model.layers.{layer}.{path}"
    processor = LlamaTensorProcessor(
        {"num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS}
    )
    expected, formats = {}, {}
    for name, shape in shapes.items():
        kind = FORMATS.get(name, Type.F32)
        data = encode(rng, shape, kind)
        writer.add_tensor(f"{name}.weight", data, raw_dtype=kind)
        values = gguf.quants.dequantize(data, kind).reshape(shape)
        values = processor.process(values, f"{name}.weight").weights
        expected[f"{renamed[name]}.weight"] = numpy.ascontiguousarray(values, dtype=numpy.float32)
        formats[f"{name}.weight"] = kind.name
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    save_file(expected, directory / "blocks.safetensors")
    write_json(directory / "blocks.json", header("gguf_blocks.py", "gguf.quants.dequantize") | {"formats": formats})


if __name__ == "__main__":
    main()
