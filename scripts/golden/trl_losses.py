"""TRL's own loss code, called with log-probabilities that we choose.

TRL computes its losses inside trainer methods. Each function here calls that method unbound, on an object that carries
just the settings the method reads and on a "model" that returns the given numbers: no formula is copied.
"""

from collections import defaultdict
from types import SimpleNamespace

import torch
from trl import DPOTrainer, RewardTrainer
from trl.experimental.cpo import CPOTrainer

DPO_METHOD = "trl.DPOTrainer._compute_loss"
CPO_METHOD = "trl.experimental.cpo.CPOTrainer.cpo_loss"
REWARD_METHOD = "trl.RewardTrainer.compute_loss"


class _OneProcess:
    """What TRL asks of its accelerator, when there is one process."""

    device = torch.device("cpu")

    def gather(self, tensor):
        return tensor

    gather_for_metrics = gather


def _settings(**more):
    return SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=_OneProcess(),
        aux_loss_enabled=False,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
        **more,
    )


def dpo_loss(policy, reference, keep, beta: float, loss_type: str = "sigmoid", label_smoothing: float = 0.0):
    """TRL's DPO loss, the mean over pairs.

    `policy` and `reference` are lists of (chosen, rejected) per-token log-probabilities; `keep` the same of 0/1 lists,
    given to TRL as its completion mask. One prompt token stands before each response, as TRL shifts the mask by one.
    """
    rows = [pair[side] for side in (0, 1) for pair in policy]
    masks = [torch.as_tensor(pair[side], dtype=torch.long) for side in (0, 1) for pair in keep]
    longest = max(len(row) for row in rows)

    def pad(row):
        return torch.nn.functional.pad(row, (0, longest - len(row)))

    mask = torch.stack([pad(row) for row in masks])
    token_logps = torch.stack([pad(row) for row in rows]) * mask
    shape = (len(rows), longest)
    # Only `log_probs` enters the loss; the others feed TRL's metrics.
    outputs = SimpleNamespace(
        log_probs=token_logps,
        entropy=torch.zeros(shape),
        mean_logits=torch.zeros(shape),
        is_top1=torch.zeros(shape, dtype=torch.bool),
    )
    completion_mask = torch.nn.functional.pad(mask, (1, 0))
    reference_rows = [pair[side] for side in (0, 1) for pair in reference]
    reference_logps = (torch.stack([pad(row) for row in reference_rows]) * mask).sum(dim=1)
    reference_chosen, reference_rejected = reference_logps.chunk(2)
    inputs = {
        "input_ids": torch.zeros((len(rows), longest + 1), dtype=torch.long),
        "attention_mask": torch.ones((len(rows), longest + 1), dtype=torch.long),
        "completion_mask": completion_mask,
        "ref_chosen_logps": reference_chosen,
        "ref_rejected_logps": reference_rejected,
    }
    settings = _settings(
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=[loss_type],
        loss_weights=[1.0],
        label_smoothing=label_smoothing,
        beta=beta,
        use_weighting=False,
    )
    return DPOTrainer._compute_loss(settings, lambda **_: outputs, inputs, False)


def cpo_loss(chosen, rejected, beta: float, loss_type: str, label_smoothing: float = 0.0, simpo_gamma: float = 0.0):
    """TRL's CPO loss of each pair; of log-ratios with `sigmoid` it is conservative DPO, of means with `simpo` SimPO."""
    settings = _settings(
        loss_type=loss_type, beta=beta, label_smoothing=label_smoothing, simpo_gamma=simpo_gamma, alpha=0.0
    )
    return CPOTrainer.cpo_loss(settings, chosen, rejected)[0]


def reward_loss(chosen_scores, rejected_scores, center: float):
    """TRL's Bradley-Terry loss with centring, the mean over pairs."""
    settings = _settings(args=SimpleNamespace(center_rewards_coefficient=center))
    logits = torch.cat([chosen_scores, rejected_scores])[:, None]
    inputs = {"attention_mask": torch.ones((len(logits), 1), dtype=torch.long)}
    return RewardTrainer.compute_loss(settings, lambda **_: SimpleNamespace(logits=logits), inputs)
