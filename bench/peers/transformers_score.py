"""transformers scoring both responses of every pair, forward only: pairs a second, peak memory.

Usage: transformers_score.py --model DIRECTORY --data pairs.jsonl [--precision bf16|f32] [--limit N] [--log-ratio]

Every response token's log-probability (or, with --values, a value head's output), rows sorted by length and padded on
the right. The head is applied to response positions alone, which is more than transformers does by itself. Prompt and
response are tokenised apart, as Pivotal's benchmark does. --log-ratio scores twice, with a LoRA adapter and without.
"""

import contextlib
import time

import peer
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

Sequence = tuple[list[int], int]
"""Token ids, and how many of them are the prompt's."""


def sequences_of(rows: list[peer.Row], tokenizer, limit: int) -> list[Sequence]:
    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    made = []
    for row in rows:
        prompt = ids(row["prompt"])
        for response in (row["chosen"], row["rejected"]):
            made.append(((prompt + ids(response) + [tokenizer.eos_token_id])[:limit], len(prompt)))
    return sorted(made, key=lambda sequence: len(sequence[0]))


def score(model, head: torch.Tensor | None, batch: list[Sequence], padding: int) -> torch.Tensor:
    """One number for each response token of the batch: its log-probability in nats, or its value."""
    longest = max(len(ids) for ids, _ in batch)
    token_ids = torch.tensor([ids + [padding] * (longest - len(ids)) for ids, _ in batch])
    lengths = torch.tensor([len(ids) for ids, _ in batch])
    prompts = torch.tensor([prompt for _, prompt in batch])
    positions = torch.arange(longest)
    attention_mask = (positions < lengths[:, None]).long()
    hidden = model.model(input_ids=token_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
    response = (positions >= prompts[:, None]) & (positions < lengths[:, None])
    if head is not None:
        return hidden[response] @ head
    # A position's logits are those of the token after it.
    logits = model.lm_head(hidden[:, :-1][response[:, 1:]]).float()
    return torch.log_softmax(logits, dim=-1).gather(-1, token_ids[:, 1:][response[:, 1:]][:, None])[:, 0]


def main() -> None:
    parser = peer.parser(__doc__)
    parser.add_argument("--batch", type=int, default=8, help="sequences in a forward pass")
    parser.add_argument("--max-tokens", type=int, default=512)
    parser.add_argument("--values", action="store_true", help="a value head in the place of the vocabulary's")
    parser.add_argument("--log-ratio", action="store_true", help="with a LoRA adapter of rank 16 and without")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    directory = arguments.model / arguments.precision
    dtype = torch.bfloat16 if arguments.precision == "bf16" else torch.float32
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, attn_implementation="sdpa").eval()
    passes = [contextlib.nullcontext]
    if arguments.log_ratio:
        adapted = get_peft_model(
            model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"), autocast_adapter_dtype=False
        ).eval()
        model = adapted.get_base_model()
        passes.append(adapted.disable_adapter)
    head = torch.full((model.config.hidden_size,), 0.01, dtype=dtype) if arguments.values else None

    rows = peer.read_rows(arguments.data, arguments.limit)
    sequences = sequences_of(rows, tokenizer, arguments.max_tokens)
    batches = [sequences[start : start + arguments.batch] for start in range(0, len(sequences), arguments.batch)]
    with torch.inference_mode():
        score(model, head, batches[-1], tokenizer.pad_token_id)
        begun = time.perf_counter()
        total = 0.0
        for entered in passes:
            with entered():
                for batch in batches:
                    total += score(model, head, batch, tokenizer.pad_token_id).sum().item()
        seconds = time.perf_counter() - begun

    settings = {
        "precision": arguments.precision, "batch": arguments.batch, "max_tokens": arguments.max_tokens,
        "values": arguments.values, "log_ratio": arguments.log_ratio, "attention": "sdpa", "threads": arguments.threads,
    }  # fmt: skip
    tokens = sum(len(ids) for ids, _ in sequences)
    peer.report("annotate", "transformers", ("torch", "transformers", "peft"), "pairs", len(rows), tokens, seconds,
                settings, summed=total)  # fmt: skip


if __name__ == "__main__":
    main()
