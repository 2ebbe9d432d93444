"""A model nine times as large as SmolLM2-135M, to measure with: TinyLlama's shape, random weights in bf16.

Usage: large_model.py --tokenizer DIRECTORY --out DIRECTORY

The tokenizer is copied from the first directory, which must have SmolLM2's 49,152 token ids; `setup.sh` leaves one in
VENV/share/peers/model/bf16. The weights are 2.3 GB in three files.
"""

import argparse
import shutil
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49_152, hidden_size=2048, intermediate_size=5632, num_hidden_layers=22,
        num_attention_heads=32, num_key_value_heads=4, max_position_embeddings=2048, rms_norm_eps=1e-5,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(arguments.out, max_shard_size="1GB")
    for name in TOKENIZER_FILES:
        if (arguments.tokenizer / name).is_file():
            shutil.copy(arguments.tokenizer / name, arguments.out / name)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e9:.2f} billion weights in {arguments.out}")


if __name__ == "__main__":
    main()
