"""TRL's Bradley-Terry reward model with LoRA on preference pairs: pairs a second, peak memory.

Usage: trl_reward.py --model DIRECTORY --data pairs.jsonl [--precision bf16|f32] [--limit N] [--steps N]

One score a sequence, read at its last token; Pivotal's gives every token a value and pools them, which costs no matrix
product more worth speaking of.
"""

import peer
import torch
import trl_run
from transformers import AutoModelForSequenceClassification
from trl import RewardConfig, RewardTrainer


def main() -> None:
    arguments = trl_run.parser(__doc__).parse_args()
    torch.set_num_threads(arguments.threads)

    rows = trl_run.rows_of(arguments)
    directory, how = trl_run.model_source(arguments)
    tokenizer = trl_run.tokenizer_of(arguments)
    trainer = RewardTrainer(
        model=AutoModelForSequenceClassification.from_pretrained(
            directory, num_labels=1, pad_token_id=tokenizer.pad_token_id, **how
        ),
        args=RewardConfig(**trl_run.training_arguments(arguments), center_rewards_coefficient=0.01),
        train_dataset=trl_run.with_warm_up(rows, arguments.batch),
        processing_class=tokenizer,
        peft_config=trl_run.lora(task_type="SEQ_CLS", modules_to_save=["score"]),
    )
    seconds, loss = trl_run.timed(trainer, len(rows) + arguments.batch)

    timed_rows = trainer.train_dataset.select(range(arguments.batch, len(rows) + arguments.batch))
    tokens = sum(len(ids) for column in ("chosen_ids", "rejected_ids") for ids in timed_rows[column])
    further = {"mean_loss": loss}
    peer.report("reward", "trl", trl_run.PACKAGES, "pairs", len(rows), tokens, seconds, trl_run.settings(arguments),
                **further)  # fmt: skip


if __name__ == "__main__":
    main()
