"""TRL's DPO with LoRA on preference pairs: pairs a second, peak memory.

Usage: trl_dpo.py --model DIRECTORY --data pairs.jsonl [--precision bf16|f32] [--limit N] [--steps N]

The reference is the policy with its adapter switched off, computed within the step (TRL's default, and what a single
epoch costs) or, with --precompute, before the first step: `precompute_seconds` is then reported and counted in.
"""

import time

import peer
import torch
import trl_run
from transformers import AutoModelForCausalLM
from trl import DPOConfig, DPOTrainer


def main() -> None:
    parser = trl_run.parser(__doc__)
    parser.add_argument("--precompute", action="store_true", help="reference log-probabilities before training")
    parser.add_argument("--padding-free", action="store_true", help="TRL 1.16 warns and pads all the same")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    rows = trl_run.rows_of(arguments)
    directory, how = trl_run.model_source(arguments)
    config = DPOConfig(
        **trl_run.training_arguments(arguments),
        beta=0.1,
        precompute_ref_log_probs=arguments.precompute,
        padding_free=arguments.padding_free,
    )
    begun = time.perf_counter()
    trainer = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(directory, **how),
        args=config,
        train_dataset=trl_run.with_warm_up(rows, arguments.batch),
        processing_class=trl_run.tokenizer_of(arguments),
        peft_config=trl_run.lora(),
    )
    prepared = time.perf_counter() - begun
    seconds, loss = trl_run.timed(trainer, len(rows) + arguments.batch)

    timed_rows = trainer.train_dataset.select(range(arguments.batch, len(rows) + arguments.batch))
    prompts = [len(ids) for ids in timed_rows["prompt_ids"]]
    tokens = 0
    for responses in (timed_rows["chosen_ids"], timed_rows["rejected_ids"]):
        lengths = [prompt + len(ids) for prompt, ids in zip(prompts, responses, strict=True)]
        tokens += trl_run.clipped(lengths, arguments.max_tokens)
    further = {"prompt_tokens_once": sum(prompts), "mean_loss": loss}
    if arguments.precompute:
        # Loading and tokenising are in it too: small beside the forward passes, and stated apart.
        further["precompute_seconds"] = prepared
        seconds += prepared
    made = trl_run.settings(arguments) | {"precompute": arguments.precompute, "padding_free": trainer.padding_free}
    peer.report("dpo", "trl", trl_run.PACKAGES, "pairs", len(rows), tokens, seconds, made, **further)


if __name__ == "__main__":
    main()
