"""TDPO's loss (arXiv:2404.11999) as its authors wrote it: `tdpo_loss` of their trainers.py, for the scripts that need it."""

import torch


def tdpo_loss(chosen, rejected, chosen_kl, rejected_kl, beta: float, alpha):
    """The authors' `tdpo_loss` (trainers.py), transcribed; alpha None is TDPO1."""
    if alpha is None:
        logits = chosen - rejected + chosen_kl - rejected_kl
    else:
        logits = chosen - rejected + alpha * (chosen_kl.detach() - rejected_kl)
    return -torch.nn.functional.logsigmoid(beta * logits)
