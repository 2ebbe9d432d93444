"""TRL's SFT with LoRA on prompt and chosen response, loss on the response alone: sequences a second, peak memory.

Usage: trl_sft.py --model DIRECTORY --data pairs.jsonl [--precision bf16|f32] [--limit N] [--steps N]
"""

import argparse

import peer
import torch
import trl_run
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer


def main() -> None:
    parser = trl_run.parser(__doc__)
    parser.add_argument("--loss", choices=["nll", "chunked_nll"], help="TRL's own choice if absent")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in sft_rows(arguments)]
    directory, how = trl_run.model_source(arguments)
    loss = {"loss_type": arguments.loss} if arguments.loss else {}
    config = SFTConfig(
        **trl_run.training_arguments(arguments), **loss, completion_only_loss=True, packing=False, shuffle_dataset=False
    )
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(directory, **how),
        args=config,
        train_dataset=trl_run.with_warm_up(rows, arguments.batch),
        processing_class=trl_run.tokenizer_of(arguments),
        peft_config=trl_run.lora(),
    )
    seconds, loss = trl_run.timed(trainer, len(rows) + arguments.batch)

    timed_rows = trainer.train_dataset.select(range(arguments.batch, len(rows) + arguments.batch))
    tokens = trl_run.clipped([len(ids) for ids in timed_rows["input_ids"]], arguments.max_tokens)
    made = trl_run.settings(arguments) | {"loss": config.loss_type}
    further = {"mean_loss": loss}
    peer.report("sft", "trl", trl_run.PACKAGES, "sequences", len(rows), tokens, seconds, made, **further)


def sft_rows(arguments: argparse.Namespace) -> list[peer.Row]:
    """As the others' rows, sorted by what SFT reads of them."""
    rows = trl_run.rows_of(arguments)
    return sorted(rows, key=lambda row: len(row["prompt"]) + len(row["chosen"])) if arguments.sort else rows


if __name__ == "__main__":
    main()
