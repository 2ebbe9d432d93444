"""Tiny random checkpoints of each decoder family, with their logits, token log-probabilities and full gradients.

Writes crates/pivotal-model/tests/golden/<family>/: config.json, safetensors, golden.json and, for three families,
gradients.safetensors. No weight is a one or a zero by default: norms and biases are random, so that a loader that
forgets one shows.
"""

import json
import shutil

import torch
from fixture import golden_directory, header, numbers, write_json
from float64 import check_gradient, load_float64, token_logps
from safetensors.torch import load_file, save_file
from tiny_tokenizer import write_tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config

VOCAB = 100
SHARED = {"num_hidden_layers": 2, "max_position_embeddings": 256, "pad_token_id": 3, "bos_token_id": 1, "eos_token_id": 2}

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    # At base 500000 and 64 positions the wavelengths 6.3, 32.4 and 167 fall into the three bands: kept, blended, divided.
    "original_max_position_embeddings": 64,
}

FAMILIES = {
    "llama": LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=56, num_attention_heads=4, num_key_value_heads=4,
        rms_norm_eps=1e-5, tie_word_embeddings=True, rope_theta=10000.0, **SHARED,
    ),
    "llama3": LlamaConfig(
        vocab_size=VOCAB + 3, hidden_size=64, intermediate_size=72, num_attention_heads=4, num_key_value_heads=2,
        rms_norm_eps=1e-5, tie_word_embeddings=False, rope_theta=500000.0, rope_scaling=dict(LLAMA3_ROPE), **SHARED,
    ),
    "qwen2": Qwen2Config(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2,
        rms_norm_eps=1e-6, tie_word_embeddings=True, rope_theta=1000000.0, use_sliding_window=False, **SHARED,
    ),
    "mistral": MistralConfig(
        # head_dim is not hidden_size / num_attention_heads here, as in Mistral-Nemo; one key-value head in all.
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=1,
        head_dim=16, rms_norm_eps=1e-5, tie_word_embeddings=False, rope_theta=10000.0, sliding_window=None, **SHARED,
    ),
}  # fmt: skip

WITH_GRADIENTS = ("llama", "llama3", "qwen2")
# Loaders meet both: checkpoints published before transformers 5 keep `rope_theta` and `rope_scaling` at the top.
OLD_ROPE_KEYS = ("llama", "llama3")


def randomise(model, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        with torch.no_grad():
            if name.endswith("norm.weight"):
                parameter.copy_(1.0 + 0.3 * noise)
            elif name.endswith("bias"):
                parameter.copy_(0.4 * noise)
            elif "embed_tokens" in name or "lm_head" in name:
                parameter.copy_(0.4 * noise)
            else:
                parameter.copy_(1.2 * noise / parameter.shape[-1] ** 0.5)


def sequences(vocab: int, seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)

    def draw(length):
        return torch.randint(4, vocab, (length,), generator=generator).tolist()

    return [[1, *draw(11)], [1, *draw(96)], [1, 7, 7, 7, 7, 9, 2], draw(2)]


def write_config(directory, config, family: str) -> None:
    written = json.loads((directory / "config.json").read_text())
    written.pop("transformers_version", None)
    if family in OLD_ROPE_KEYS:
        (directory / "config.rope_parameters.json").write_text(json.dumps(written, indent=2) + "\n")
        rope = written.pop("rope_parameters")
        written["rope_theta"] = rope.pop("rope_theta")
        written["rope_scaling"] = rope if rope["rope_type"] != "default" else None
        if "dtype" in written:
            written["torch_dtype"] = written.pop("dtype")
    (directory / "config.json").write_text(json.dumps(written, indent=2) + "\n")


def write_golden(directory, family: str, seed: int) -> None:
    model = load_float64(directory)
    inputs = sequences(model.config.vocab_size, seed)
    rows = []
    with torch.no_grad():
        plain = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, local_files_only=True)
        for position, token_ids in enumerate(inputs):
            ids = torch.tensor([token_ids])
            logits = model(ids, use_cache=False).logits[0]
            # The patched model must still be transformers' model.
            difference = (plain(ids, use_cache=False).logits[0].double() - logits).abs().max().item()
            if difference > 2e-4:
                raise AssertionError(f"{family}: float64 and float32 logits differ by {difference}")
            print(f"  {family} sequence {position}: float32 differs from float64 by {difference:.2e}")
            row = {"token_ids": token_ids, "token_logps": numbers(token_logps(model, token_ids), 10)}
            if len(token_ids) <= 12:
                row["logits"] = numbers(logits, 9)
            else:
                row["last_logits"] = numbers(logits[-1], 9)
            rows.append(row)
    content = header("tiny_models.py", "transformers AutoModelForCausalLM, float64 (see float64.py)")
    content |= {
        "inverse_frequencies": numbers(model.model.rotary_emb.inv_freq, 9),
        "sequences": rows,
    }
    if family in WITH_GRADIENTS:
        token_ids = inputs[1][:48]

        def scalar():
            return token_logps(model, token_ids).sum()

        total = scalar()
        total.backward()
        check_gradient(model, scalar, "model.layers.0.self_attn.k_proj.weight", (3, 5))
        check_gradient(model, scalar, "model.layers.1.input_layernorm.weight", (7,))
        check_gradient(model, scalar, "model.embed_tokens.weight", (token_ids[3], 2))
        gradients = {name: parameter.grad.float().contiguous() for name, parameter in model.named_parameters()}
        save_file(gradients, directory / "gradients.safetensors")
        content["gradients"] = {
            "file": "gradients.safetensors",
            "of": "sum of token_logps of token_ids, by every parameter; a tied head is summed into the embedding",
            "token_ids": token_ids,
            "sum": numbers(total.item(), 12),
        }
    write_json(directory / "golden.json", content)


def main() -> None:
    for seed, (family, config) in enumerate(FAMILIES.items(), start=1):
        directory = golden_directory("pivotal-model") / family
        # Only what this script writes: lora.py keeps its adapter in here.
        for stale in directory.glob("*.safetensors"):
            stale.unlink()
        model = AutoModelForCausalLM.from_config(config).float()
        randomise(model, seed)
        model.save_pretrained(directory, max_shard_size="60KB" if family == "mistral" else "1GB")
        (directory / "generation_config.json").unlink(missing_ok=True)
        write_config(directory, config, family)
        write_tokenizer(directory)
        write_golden(directory, family, seed)

    source = golden_directory("pivotal-model") / "llama"
    directory = golden_directory("pivotal-model") / "llama_bf16"
    directory.mkdir(exist_ok=True)
    rounded = {name: tensor.bfloat16() for name, tensor in load_file(source / "model.safetensors").items()}
    save_file(rounded, directory / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config["torch_dtype"] = "bfloat16"
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / name, directory / name)
    write_golden(directory, "llama_bf16", 1)


if __name__ == "__main__":
    main()
