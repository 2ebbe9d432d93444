"""transformers sampling: tokens a second while decoding, and with the prompts' prefill.

Usage: transformers_generate.py --model DIRECTORY --data pairs.jsonl [--prompts 16] [--samples 1] [--new-tokens 64]

The first prompts of the file, padded on the left; temperature 1, no top-k or top-p; every sample runs to its full
length. Several samples of a prompt are `num_return_sequences`, which transformers prefills once each.
"""

import time

import peer
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, StoppingCriteria, StoppingCriteriaList


class Stamps(StoppingCriteria):
    """Never stops anything; notes when each token was there."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: object, **kwargs: object) -> torch.Tensor:
        self.seconds.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


def main() -> None:
    parser = peer.parser(__doc__)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--samples", type=int, default=1)
    parser.add_argument("--new-tokens", type=int, default=64)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(1)

    directory = arguments.model / arguments.precision
    dtype = torch.bfloat16 if arguments.precision == "bf16" else torch.float32
    tokenizer = AutoTokenizer.from_pretrained(directory, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, attn_implementation="sdpa").eval()
    prompts = [row["prompt"] for row in peer.read_rows(arguments.data, arguments.limit)][: arguments.prompts]
    if len(prompts) < arguments.prompts:
        raise SystemExit(f"{arguments.data} has {len(prompts)} prompts, {arguments.prompts} are asked for")
    inputs = tokenizer(prompts, padding=True, add_special_tokens=False, return_tensors="pt")

    def generate(new_tokens: int) -> tuple[torch.Tensor, list[float]]:
        stamps = Stamps()
        begun = time.perf_counter()
        made = model.generate(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"],
            do_sample=True, temperature=1.0, top_k=0, top_p=1.0, num_return_sequences=arguments.samples,
            min_new_tokens=new_tokens, max_new_tokens=new_tokens, pad_token_id=tokenizer.pad_token_id,
            stopping_criteria=StoppingCriteriaList([stamps]),
        )  # fmt: skip
        return made, [stamp - begun for stamp in stamps.seconds]

    with torch.inference_mode():
        generate(2)
        made, stamps = generate(arguments.new_tokens)
    count = arguments.prompts * arguments.samples
    if made.shape != (count, inputs["input_ids"].shape[1] + arguments.new_tokens):
        raise SystemExit(f"unexpected shape {tuple(made.shape)}")
    settings = {
        "precision": arguments.precision, "prompts": arguments.prompts, "samples": arguments.samples,
        "new_tokens": arguments.new_tokens, "temperature": 1.0, "attention": "sdpa", "threads": arguments.threads,
    }  # fmt: skip
    peer.report(
        "generate", "transformers", ("torch", "transformers"), "sequences", count, count * arguments.new_tokens,
        stamps[-1], settings, prefill_seconds=stamps[0], prompt_tokens=int(inputs["attention_mask"].sum()),
        decoding_tokens_per_second=count * (arguments.new_tokens - 1) / (stamps[-1] - stamps[0]),
    )  # fmt: skip


if __name__ == "__main__":
    main()
