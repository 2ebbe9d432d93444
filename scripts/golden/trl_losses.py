"""TRL's own loss code, called with log-probabilities that we choose.

TRL computes its losses inside trainer methods. Each function here calls that method unbound, on an object that carries
just the settings the method reads and on a "model" that returns the given numbers: no formula is copied.
"""

from collections import defaultdict
from types import SimpleNamespace

import torch
from trl import DPOTrainer, GRPOTrainer, KTOTrainer, RewardTrainer
from trl.experimental.cpo import CPOTrainer

DPO_METHOD = "trl.DPOTrainer._compute_loss"
CPO_METHOD = "trl.experimental.cpo.CPOTrainer.cpo_loss"
REWARD_METHOD = "trl.RewardTrainer.compute_loss"
GRPO_METHOD = "trl.GRPOTrainer._compute_loss"
KTO_METHOD = "trl.KTOTrainer._compute_loss"


class _OneProcess:
    """What TRL asks of its accelerator, when there is one process."""

    device = torch.device("cpu")

    def gather(self, tensor):
        return tensor

    def reduce(self, tensor, reduction):
        return tensor

    gather_for_metrics = gather
    num_processes = 1


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


def padded(rows, fill: float = 0.0):
    """Ragged rows as one matrix, `fill` behind each."""
    longest = max(len(row) for row in rows)
    return torch.stack([torch.nn.functional.pad(row, (0, longest - len(row)), value=fill) for row in rows])


def grpo_loss(token_logps, old, advantages, keep, loss_type: str, low: float, high: float, *, dual=None, beta=0.0,
              reference=None, max_tokens: int = 1):
    """TRL's GRPO loss of one batch of ragged rows, and the metrics TRL takes of it.

    `advantages` are one number a token, as TRL's subclasses may give them; `keep` is its completion mask. One prompt token
    stands before each response.
    """
    mask = padded([torch.as_tensor(row, dtype=torch.get_default_dtype()) for row in keep])
    logps = padded(token_logps)
    settings = _settings(
        loss_type=loss_type,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level="token",
        epsilon_low=low,
        epsilon_high=high,
        beta=beta,
        use_vllm=False,
        _entropy_bonus_enabled=False,
        current_gradient_accumulation_steps=1,
        max_completion_length=max_tokens,
        args=SimpleNamespace(delta=dual, use_bias_correction_kl=False, steps_per_generation=1),
        _get_per_token_logps_and_entropies=lambda *_, **__: (logps, torch.zeros_like(logps), None),
    )
    rows, longest = mask.shape
    inputs = {
        "prompt_ids": torch.zeros((rows, 1), dtype=torch.long),
        "prompt_mask": torch.ones((rows, 1), dtype=torch.long),
        "completion_ids": torch.zeros((rows, longest), dtype=torch.long),
        "completion_mask": mask,
        "advantages": padded(advantages),
        "old_per_token_logps": padded(old),
    }
    if reference is not None:
        inputs["ref_per_token_logps"] = padded(reference)
    loss = GRPOTrainer._compute_loss(settings, settings.model, inputs)
    return loss, {name: values[0] for name, values in settings._metrics["train"].items()}


def kto_loss(token_logps, reference, keep, desirable, mismatched, mismatched_reference, beta: float, weights):
    """TRL's KTO loss, the mean over responses, and the baseline it found.

    `token_logps`, `reference` and `keep` are ragged rows; `mismatched` the summed log-probabilities of responses behind other
    prompts, under the policy, and `mismatched_reference` under the reference. One prompt token stands before each response.
    """
    mask = padded([torch.as_tensor(row, dtype=torch.long) for row in keep])
    logps = padded(token_logps) * mask
    rows, longest = mask.shape
    ids = torch.zeros((rows, longest + 1), dtype=torch.long)
    kl_ids = torch.ones((len(mismatched), 2), dtype=torch.long)

    def model(input_ids, **_):
        if input_ids is kl_ids:
            return SimpleNamespace(log_probs=mismatched[:, None])
        return SimpleNamespace(
            log_probs=logps, entropy=torch.zeros_like(logps), mean_logits=torch.zeros_like(logps), aux_loss=None
        )

    model.training = True
    settings = _settings(
        loss_type="kto",
        calculate_KL=True,
        precompute_ref_logps=True,
        beta=beta,
        desirable_weight=weights[0],
        undesirable_weight=weights[1],
    )
    settings._compute_kl_logps = lambda *args: KTOTrainer._compute_kl_logps(settings, *args)
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "completion_mask": torch.nn.functional.pad(mask, (1, 0)),
        "label": torch.tensor(desirable),
        "ref_logps": (padded(reference) * mask).sum(-1),
        "KL_input_ids": kl_ids,
        "KL_attention_mask": torch.ones_like(kl_ids),
        "KL_completion_mask": torch.ones_like(kl_ids),
        "ref_KL_logps": mismatched_reference,
    }
    # TRL moves every tensor to its device, which on one device returns the same object.
    loss = KTOTrainer._compute_loss(settings, model, inputs, False)
    return loss, settings._metrics["train"]["kl"][0]
