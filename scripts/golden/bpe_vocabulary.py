"""Token ids under each pre-tokenizer rule, by the `tokenizers` library, on a vocabulary cut down from SmolLM2's.

Usage: bpe_vocabulary.py SmolLM2.gguf

The vocabulary keeps the single characters, the first 1,500 merges and three special tokens. Added are a user-defined token
and merges of digits, which SmolLM2's own cannot have: without them no text tells the digit rules apart.
The rules are written as the `tokenizer.json` of GPT-2, SmolLM2, Llama 3 and Qwen 2 have them. Chats are rendered by
transformers' own compiled template.
"""

import sys

import gguf
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers.utils.chat_template_utils import _compile_jinja_template

from fixture import golden_directory, header, write_json

MERGES = 1500
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
USER_DEFINED = "<tool>"
DIGIT_MERGES = ["1 2", "12 3", "4 5", "45 6", "3 4", "123 4", "Ġ 4", "Ġ4 2", "2 2"]
TEXTS = [
    "", " ", "  ", "\n", "\n\n", " \n ", "\r\n", "\t\tx", "a", " a", "a ", "a  b", "the  the", "trailing   ",
    "1", "12", "123", "1234", "1234567890", "x1y22z333", " 42", "3.14159", "1,000,000", "½ ² Ⅷ ٣٤",
    "it's we'll I'M THEY'RE 'tis", "don't  can't", "Hello, world!", "hello_world(x)[0] = {}", "!!??", "a.b.c",
    "naïve café", "cafe\u0301", "Straße", "日本語の文", "Привет мир", "שלום", "हिन्दी", "👍🏽 family 👨‍👩‍👧", "\u00a0nbsp\u2003em",
    "def f(n):\n    return n + 1\n", "line one\n\n\nline four", "end.\n", "A<|im_end|>B", "<|im_start|>user\nhi<|im_end|>\n",
    "use <tool> now", "\u0000nul", "e\u0301\u0301", "ﬁ ligature", "the quick brown fox jumps over the lazy dog",
]
TEMPLATES = {
    "smollm": "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "blocks": "{{- bos_token }}\n{%- if messages[0].role == 'system' %}\n    {%- set system = messages[0]['content'] | trim %}\n    {%- set rest = messages[1:] %}\n{%- else %}\n    {%- set system = '' %}\n    {%- set rest = messages %}\n{%- endif %}\n[{{ system }}]\n{% for message in rest %}\n    {% if message.role == 'user' %}\nU: {{ message.content.strip() }}\n    {% elif message.role == 'assistant' %}\n        {% generation %}\nA: {{ message['content'] | trim }}{{ eos_token }}\n        {% endgeneration %}\n    {% endif %}\n{% endfor %}\n{%- if add_generation_prompt %}\nA: {% endif %}",
    "python": "{% set ns = namespace(count=0) %}{% for m in messages if m.role != 'system' %}{% set ns.count = ns.count + 1 %}{% if ns.count > 2 %}{% break %}{% endif %}{{ m.content.split(' ')[0].upper() }}|{{ m | tojson }}|{{ {'a': [1, 'é<&>'], 'b': none, 'c': true} | tojson }}|{{ {'k': [1, 2]} | tojson(indent=2) }}|{{ 'x' if loop.first else 'y' }}{% endfor %}{{ messages | length }} {{ messages[-1].content.startswith('No') }}",
}
CHATS = [
    [("user", "What is 2 + 2?")],
    [("user", " padded \n"), ("assistant", "  fine  ")],
    [("system", " Be brief. "), ("user", "Hi"), ("assistant", "Hello"), ("user", "Bye <b>&</b>")],
]


def pattern(digits: str) -> Regex:
    return Regex(
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|" + digits
        + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


def build(rule: str, vocabulary: dict, merges: list) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=rule == "llama-bpe"))
    byte_level = pre_tokenizers.ByteLevel
    tokenizer.pre_tokenizer = {
        "gpt-2": lambda: byte_level(add_prefix_space=False),
        "smollm": lambda: pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), byte_level(add_prefix_space=False)]
        ),
        "llama-bpe": lambda: pre_tokenizers.Sequence(
            [pre_tokenizers.Split(pattern(r"\p{N}{1,3}"), "isolated"), byte_level(add_prefix_space=False, use_regex=False)]
        ),
        "qwen2": lambda: pre_tokenizers.Sequence(
            [pre_tokenizers.Split(pattern(r"\p{N}"), "isolated"), byte_level(add_prefix_space=False, use_regex=False)]
        ),
    }[rule]()
    if rule == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    tokenizer.add_tokens([AddedToken(USER_DEFINED, special=False, normalized=False)])
    return tokenizer


def main() -> None:
    fields = gguf.GGUFReader(sys.argv[1]).fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    merges = fields["tokenizer.ggml.merges"].contents()[:MERGES] + DIGIT_MERGES
    single = [token for token in tokens if len(token) == 1]
    kept = SPECIAL + [USER_DEFINED] + single
    for merge in merges:
        union = merge.replace(" ", "")
        if union not in kept:
            kept.append(union)
    # A whole word without merges: only a tokenizer that looks words up first finds it.
    kept.append("Ġjumps" if "Ġjumps" not in kept else "Ġlazy")
    vocabulary = {token: index for index, token in enumerate(kept)}
    pairs = [tuple(merge.split(" ")) for merge in merges]
    cases = {}
    for rule in ["gpt-2", "smollm", "llama-bpe", "qwen2"]:
        tokenizer = build(rule, vocabulary, pairs)
        cases[rule] = [tokenizer.encode(text, add_special_tokens=False).ids for text in TEXTS]
    chats = [[{"role": role, "content": content} for role, content in chat] for chat in CHATS]
    rendered = {
        name: [
            _compile_jinja_template(source).render(
                messages=chat, add_generation_prompt=prompt, bos_token="<s>", eos_token="</s>", tools=None, documents=None
            )
            for chat in chats
            for prompt in (False, True)
        ]
        for name, source in TEMPLATES.items()
    }
    content = header("bpe_vocabulary.py", "tokenizers (ids), transformers' compiled template (chats)") | {
        "tokens": kept,
        "control": SPECIAL,
        "user_defined": [USER_DEFINED],
        "merges": merges,
        "texts": TEXTS,
        "ids": cases,
        "chats": chats,
        "templates": TEMPLATES,
        "rendered": rendered,
    }
    write_json(golden_directory("pivotal-data") / "bpe_vocabulary.json", content)


if __name__ == "__main__":
    main()
