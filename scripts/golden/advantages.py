"""Advantages, whitening and KL estimates in float64, from their definitions, by torch.

Writes crates/pivotal-credit/tests/golden/: gae.json, whiten.json, group_advantages.json, kl.json.

GAE is the definition's double sum (Schulman et al. 2015, Eq. 16), not the recursion that trainers run; the group's standard
deviation is `torch.std` and the leave-one-out mean is taken over the others one by one, as GRPOTrainer and RLOOTrainer of
TRL define them inside methods that cannot be called alone. Inputs are multiples of 1/64: the same numbers in float32.
"""

import torch
from fixture import golden_directory, header, numbers, write_json

torch.set_default_dtype(torch.float64)
torch.set_num_threads(1)


def exact(value):
    return numbers(value, 15)


def draws(generator, *shape, scale: float = 2.0):
    return torch.round(scale * 64 * torch.randn(*shape, generator=generator)) / 64


def gae_case(generator, tokens: int, gamma: float, lam: float, mask, final_value: float) -> dict:
    rewards, values = draws(generator, tokens), draws(generator, tokens)
    own = [t for t in range(tokens) if mask[t]]
    next_values = [values[t] for t in own[1:]] + [torch.tensor(final_value)]
    errors = [rewards[t] + gamma * after - values[t] for t, after in zip(own, next_values)]
    advantages = torch.zeros(tokens)
    for place, t in enumerate(own):
        advantages[t] = sum((gamma * lam) ** step * error for step, error in enumerate(errors[place:]))
    return {
        "gamma": gamma, "gae_lambda": lam, "final_value": final_value,
        "rewards": exact(rewards), "values": exact(values), "response_mask": mask,
        "advantages": exact(advantages),
        "returns_of_own_tokens": exact([(advantages[t] + values[t]).item() for t in own]),
    }


def write_gae(directory) -> None:
    generator = torch.Generator().manual_seed(18)
    masks = [[1] * 7, [1, 1, 1, 0, 0, 1, 1], [1, 1, 1, 1, 0, 0, 0], [0, 0, 1, 0, 1, 1, 0], [0] * 7]
    cases = [
        gae_case(generator, 7, gamma, lam, mask, final_value)
        for gamma, lam in ((1.0, 0.95), (0.99, 0.9), (0.5, 0.0), (0.75, 1.0))
        for mask in masks
        for final_value in (0.0, 1.25)
    ]
    content = header("advantages.py", "arXiv:1506.02438, Eq. 16, as a double sum over the model's own tokens")
    write_json(directory / "gae.json", content | {"cases": cases})


def write_whiten(directory) -> None:
    generator = torch.Generator().manual_seed(19)
    cases = []
    for lengths in ((3, 3, 3), (1, 5), (2,), (9, 4, 7, 1)):
        rows = [draws(generator, length) + 3 for length in lengths]
        masks = [(torch.rand(length, generator=generator) < 0.8).tolist() for length in lengths]
        masks[0][0] = masks[-1][-1] = True
        own = torch.cat([row[torch.tensor(mask)] for row, mask in zip(rows, masks)])
        for correction, variance in ((0, "biased"), (1, "bessel")):
            if len(own) < 2:
                continue
            spread = torch.var(own, correction=correction)
            for mean in ("removed", "kept"):
                shift = own.mean() if mean == "kept" else 0.0
                whitened = [(row - own.mean()) * torch.rsqrt(spread + 1e-8) + shift for row in rows]
                cases.append({
                    "variance": variance, "mean": mean, "values": [exact(row) for row in rows],
                    "response_masks": [[int(flag) for flag in mask] for mask in masks],
                    "whitened_own": [exact(row[torch.tensor(mask)]) for row, mask in zip(whitened, masks)],
                })
    content = header("advantages.py", "torch.var(correction=0 or 1); (x - mean)·rsqrt(var + 1e-8), as TRL's masked_whiten had it")
    write_json(directory / "whiten.json", content | {"cases": cases})


def write_groups(directory) -> None:
    generator = torch.Generator().manual_seed(25)
    cases = []
    for size in (2, 4, 8):
        scores = draws(generator, 3, size)
        scores[1] = scores[1, 0]
        mean = scores.mean(dim=1, keepdim=True)
        for correction, variance in ((0, "biased"), (1, "bessel")):
            std = torch.std(scores, dim=1, keepdim=True, correction=correction)
            batch_std = torch.std(scores, correction=correction)
            others = torch.stack([
                torch.stack([row[[j for j in range(size) if j != i]].mean() for i in range(size)]) for row in scores
            ])
            cases.append({
                "size": size, "variance": variance, "epsilon": 1e-4, "scores": exact(scores.flatten()),
                "group_normalised": exact(((scores - mean) / (std + 1e-4)).flatten()),
                "batch_normalised": exact(((scores - mean) / (batch_std + 1e-4)).flatten()),
                "mean_only": exact((scores - mean).flatten()),
                "leave_one_out": exact((scores - others).flatten()),
            })
    content = header("advantages.py", "the definitions of trl.GRPOTrainer (scale_rewards group, batch, none) and trl.RLOOTrainer")
    content |= {"shapes": "three groups of `size` scores, one after the other; the second is all alike"}
    write_json(directory / "group_advantages.json", content | {"cases": cases})


def write_kl(directory) -> None:
    generator = torch.Generator().manual_seed(21)
    cases = []
    for scale in (0.1, 1.0, 3.0):
        logits, reference = draws(generator, 5, scale=scale), draws(generator, 5, scale=scale)
        logits.requires_grad_(True)
        policy, anchor = torch.distributions.Categorical(logits=logits), torch.distributions.Categorical(logits=reference)
        delta = policy.logits - anchor.logits
        k2, k3 = delta**2 / 2, torch.exp(-delta) - 1 + delta
        forward = torch.distributions.kl_divergence(policy, anchor)
        backward = torch.distributions.kl_divergence(anchor, policy)
        (gradient,) = torch.autograd.grad(forward, logits, retain_graph=True)
        (reversed_gradient,) = torch.autograd.grad(backward, logits, retain_graph=True)
        sampled = {}
        for name, estimate in (("k1", delta), ("k2", k2), ("k3", k3)):
            # What an estimator gives as a loss, in expectation: tokens are drawn, and the draw carries no gradient.
            (found,) = torch.autograd.grad((policy.probs.detach() * estimate).sum(), logits, retain_graph=True)
            sampled[f"{name}_loss_gradient"] = exact(found)
        cases.append({
            "logits": exact(logits.detach()), "reference_logits": exact(reference),
            "kl": exact(forward.item()), "kl_gradient": exact(gradient), "reversed_kl_gradient": exact(reversed_gradient),
            "log_ratios": exact(delta.detach()), "probabilities": exact(policy.probs.detach()),
            "k2": exact(k2.detach()), "k3": exact(k3.detach()),
        } | sampled)
    content = header("advantages.py", "torch.distributions.kl_divergence and autograd, by enumeration over five tokens")
    write_json(directory / "kl.json", content | {"cases": cases})


if __name__ == "__main__":
    directory = golden_directory("pivotal-credit")
    write_gae(directory)
    write_whiten(directory)
    write_groups(directory)
    write_kl(directory)
