"""What the three TRL scripts share: settings, model, the data with its warm-up batch, and the timed run.

The first optimizer step repeats the first batch and is not timed; the timed steps then see every row once, in the
file's order. A step's time holds all that the trainer does from one step to the next: collating, forward, backward,
clipping, AdamW.
"""

import argparse
import pathlib
import tempfile
from typing import Any

import peer
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoTokenizer, PreTrainedTokenizerBase, TrainerCallback

LORA_RANK = 16
LORA_ALPHA = 32
PACKAGES = ("torch", "transformers", "trl", "peft")


def parser(description: str) -> argparse.ArgumentParser:
    made = peer.parser(description)
    made.add_argument("--steps", type=int, default=0, help="timed steps at most; 0 takes all rows")
    made.add_argument("--batch", type=int, default=4)
    made.add_argument("--max-tokens", type=int, default=512)
    made.add_argument("--lr", type=float, default=1e-4)
    made.add_argument("--gradient-checkpointing", action="store_true")
    made.add_argument("--attention", choices=["sdpa", "eager"], default="sdpa")
    made.add_argument("--weights", choices=["bf16", "f32"], help="type of the frozen weights; the precision if absent")
    made.add_argument("--no-autocast", action="store_true", help="bf16 without autocast: the weights' type decides")
    made.add_argument("--sort", action="store_true", help="rows sorted by length: less padding, another training order")
    return made


class StepTimer(TrainerCallback):
    """Starts the clock at the end of the warm-up step; reads it at the end of each later one."""

    def __init__(self) -> None:
        self.clock = peer.Clock()
        self.seconds = 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1:
            self.clock.start()
        else:
            self.seconds = self.clock.seconds()


def rows_of(arguments: argparse.Namespace) -> list[peer.Row]:
    rows = peer.read_rows(arguments.data, arguments.limit)
    if arguments.sort:
        rows = sorted(rows, key=lambda row: len(row["prompt"]) + max(len(row["chosen"]), len(row["rejected"])))
    if arguments.steps:
        rows = rows[: arguments.steps * arguments.batch]
    return rows


def with_warm_up(rows: list[peer.Row], batch: int) -> Dataset:
    if len(rows) < batch:
        raise SystemExit(f"{len(rows)} rows are fewer than a batch of {batch}")
    return Dataset.from_list(rows[:batch] + rows)


def model_source(arguments: argparse.Namespace) -> tuple[pathlib.Path, dict[str, Any]]:
    weights = arguments.weights or arguments.precision
    dtype = torch.bfloat16 if weights == "bf16" else torch.float32
    return arguments.model / weights, {"dtype": dtype, "attn_implementation": arguments.attention}


def tokenizer_of(arguments: argparse.Namespace) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(model_source(arguments)[0])


def lora(**further: Any) -> LoraConfig:
    return LoraConfig(r=LORA_RANK, lora_alpha=LORA_ALPHA, lora_dropout=0.0, target_modules="all-linear", **further)


def training_arguments(arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        "output_dir": tempfile.mkdtemp(prefix="trl-"),
        "use_cpu": True,
        "bf16": arguments.precision == "bf16" and not arguments.no_autocast,
        "per_device_train_batch_size": arguments.batch,
        "gradient_accumulation_steps": 1,
        "gradient_checkpointing": arguments.gradient_checkpointing,
        "max_length": arguments.max_tokens,
        "num_train_epochs": 1,
        "learning_rate": arguments.lr,
        "train_sampling_strategy": "sequential",
        "dataloader_pin_memory": False,
        "logging_steps": 10,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": 1,
    }


def settings(arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        "precision": arguments.precision,
        "weights": arguments.weights or arguments.precision,
        "autocast": arguments.precision == "bf16" and not arguments.no_autocast,
        "batch": arguments.batch,
        "max_tokens": arguments.max_tokens,
        "lora_rank": LORA_RANK,
        "lora_alpha": LORA_ALPHA,
        "gradient_checkpointing": arguments.gradient_checkpointing,
        "attention": arguments.attention,
        "sorted": arguments.sort,
        "threads": arguments.threads,
    }


def clipped(lengths: list[int], limit: int) -> int:
    return sum(min(length, limit) for length in lengths)


def timed(trainer: Any, expected_rows: int) -> tuple[float, float]:
    """Seconds of all steps but the first, and the mean training loss of all.

    Refuses a trainer that dropped rows: the work would not be the same.
    """
    if len(trainer.train_dataset) != expected_rows:
        raise SystemExit(f"TRL kept {len(trainer.train_dataset)} of {expected_rows} rows: raise --max-tokens")
    timer = StepTimer()
    trainer.add_callback(timer)
    loss = trainer.train().training_loss
    if timer.seconds == 0.0:
        raise SystemExit("no step was timed: the run has one step only")
    return timer.seconds, loss

