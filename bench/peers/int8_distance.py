"""What 8-bit operands would do to log-probabilities: their distance from f32, beside that of bf16 operands.

Usage: int8_distance.py --model DIRECTORY --data pairs.jsonl [--limit 12]

Weights and inputs of every linear layer are rounded to multiples of a scale, which is the largest magnitude of a group of
neighbours over 127, and multiplied in f32: what a product of 8-bit integers with a scale a group gives, but for the order
of sums. For `inputs only` the weights are in bf16.
"""

import peer
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

GROUPS = (32, 64, 128, 192, 0)


def bf16(x: torch.Tensor) -> torch.Tensor:
    return x.bfloat16().float()


def int8(x: torch.Tensor, group: int) -> torch.Tensor:
    """`x` with each `group` of its last dimension rounded to 8 bits; all of it one group for 0."""
    parts = x.split(group or x.shape[-1], dim=-1)
    scales = [part.abs().amax(-1, keepdim=True).clamp_min(1e-30) / 127 for part in parts]
    return torch.cat([(part / scale).round() * scale for part, scale in zip(parts, scales, strict=True)], dim=-1)


def logps(model, sequences: list[tuple[list[int], list[int]]]) -> torch.Tensor:
    found = []
    for prompt, response in sequences:
        ids = torch.tensor([prompt + response])
        logits = model(ids).logits[0, len(prompt) - 1 : -1]
        found.append(logits.log_softmax(-1).gather(-1, ids[0, len(prompt) :, None])[:, 0])
    return torch.cat(found)


def rounded(model, sequences, of_input, of_weight) -> torch.Tensor:
    linears = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    before = [linear.weight for linear in linears]
    hooks = []
    for linear in linears:
        linear.weight = torch.nn.Parameter(of_weight(linear.weight), requires_grad=False)
        hooks.append(linear.register_forward_pre_hook(lambda _, inputs: (of_input(inputs[0]),)))
    found = logps(model, sequences)
    for linear, weight, hook in zip(linears, before, hooks, strict=True):
        linear.weight = weight
        hook.remove()
    return found


def main() -> None:
    parser = peer.parser(__doc__, precisions=False)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    directory = arguments.model / "f32"
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    rows = peer.read_rows(arguments.data, arguments.limit or 12)
    sequences = [
        (ids(row["prompt"]), ids(row[side]) + [tokenizer.eos_token_id])
        for row in rows
        for side in ("chosen", "rejected")
    ]
    variants = [("bf16", bf16, bf16)]
    for group in GROUPS:
        name = f"int8, groups of {group}" if group else "int8, a scale a row"
        variants.append((name, lambda x, group=group: int8(x, group), lambda x, group=group: int8(x, group)))
    variants.append(("int8, groups of 64, inputs only", lambda x: int8(x, 64), bf16))
    with torch.inference_mode():
        exact = logps(model, sequences)
        print(f"{len(exact)} response tokens; nats\n\n| operands | root mean square | median | largest |\n|---|---|---|---|")
        for name, of_input, of_weight in variants:
            distance = (rounded(model, sequences, of_input, of_weight) - exact).abs()
            square = distance.pow(2).mean().sqrt()
            print(f"| {name} | {square:.4f} | {distance.median():.4f} | {distance.max():.2f} |", flush=True)


if __name__ == "__main__":
    main()
