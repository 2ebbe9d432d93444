"""Values and gradients of the losses on sampled responses, and of KTO and TDPO, in float64.

Writes crates/pivotal-loss/tests/golden/: ppo.json, kl.json, value.json, kto.json, tdpo.json. From TRL's code where TRL has
the formula; what is transcribed names its source. Log-probabilities are in nats.
"""

import torch
import trl_losses
from fixture import golden_directory, header, numbers, write_json
from tdpo import tdpo_loss

torch.set_default_dtype(torch.float64)
torch.set_num_threads(1)
DIGITS = 15
KEEPS = [
    [[1, 1, 1], [1, 1, 1, 1, 1]],
    [[1, 0, 1, 1], [0, 1], [0, 0, 0, 0, 1, 1, 0]],
    [[0, 0, 0], [0, 1, 1, 1, 0], [1]],
    [[0, 0], [0]],
]


def exact(value):
    return numbers(value, DIGITS)


def rows(generator, keep, scale: float = 1.0, shift: float = 0.0):
    return [scale * torch.randn(len(row), generator=generator) + shift for row in keep]


def leaves(values):
    return [row.clone().requires_grad_() for row in values]


def gradients(values):
    return [exact(row.grad if row.grad is not None else torch.zeros_like(row)) for row in values]


def kept_mean(values, keep):
    """The mean over kept tokens of all rows; 0 where none is kept."""
    mask = torch.tensor([kept for row in keep for kept in row], dtype=torch.float64)
    return (torch.cat(list(values)) * mask).sum() / mask.sum().clamp(min=1.0)


def former_ppo(new, old, advantages, clip: float):
    """`pg_losses`, `pg_losses2`, `pg_loss_max` of TRL's former PPOTrainer.train, transcribed."""
    ratio = torch.exp(new - old)
    return torch.max(-advantages * ratio, -advantages * torch.clamp(ratio, 1.0 - clip, 1.0 + clip))


def former_value(values, old, returns, clip: float):
    """`vf_losses1`, `vf_losses2`, `vf_loss_max` of TRL's former PPOTrainer.train, transcribed; the flags are `vf_clipfrac`'s."""
    clipped = torch.clamp(values, old - clip, old + clip)
    losses1, losses2 = torch.square(values - returns), torch.square(clipped - returns)
    return 0.5 * torch.max(losses1, losses2), losses2 > losses1


def estimates(delta):
    """Schulman's k1, k2, k3 of a log-ratio."""
    return {"k1": delta, "k2": delta.square() / 2, "k3": torch.exp(-delta) - 1 + delta}


def write_ppo(directory) -> None:
    generator = torch.Generator().manual_seed(110)
    cases = []
    reductions = {"bnpo": "token_mean", "grpo": "response_mean", "dr_grpo": "constant_length"}
    settings = [(0.2, 0.2, None, 0.0), (0.2, 0.28, None, 0.04), (0.1, 0.3, 1.5, 0.0), (1.0, 3.0, 6.0, 0.1)]
    for loss_type, reduction in reductions.items():
        for low, high, dual, kl_coef in settings:
            for keep in KEEPS:
                # Some tokens are where they were, some far off: a ratio of e^-12 and of e^9.
                old = rows(generator, keep, 1.0, -3.0)
                moves = rows(generator, keep, 0.5)
                moves[0][0], moves[-1][-1] = 0.0, 9.0
                if len(keep) > 1 and len(keep[1]) > 1:
                    moves[1][1] = -12.0
                new = leaves([before + move for before, move in zip(old, moves, strict=True)])
                reference = rows(generator, keep, 1.0, -3.0)
                advantages = rows(generator, keep)
                advantages[0][-1] = 0.0
                max_tokens = 9
                loss, metrics = trl_losses.grpo_loss(
                    new, old, advantages, keep, loss_type, low, high,
                    dual=dual, beta=kl_coef, reference=reference, max_tokens=max_tokens,
                )
                if dual is None and kl_coef == 0.0 and reduction == "token_mean":
                    theirs = [former_ppo(*row, low) for row in zip(new, old, advantages, strict=True)]
                    torch.testing.assert_close(loss, kept_mean(theirs, keep), rtol=1e-14, atol=1e-15)
                loss.backward()
                kept = sum(map(sum, keep))
                ours = [estimates(before - after.detach()) for before, after in zip(old, new, strict=True)]
                cases.append(
                    {
                        "reduction": reduction,
                        "low": low,
                        "high": high,
                        "dual": dual,
                        "kl_coef": kl_coef,
                        "max_tokens": max_tokens,
                        "token_logps": [exact(row) for row in new],
                        "old_token_logps": [exact(row) for row in old],
                        "reference_token_logps": [exact(row) for row in reference],
                        "advantages": [exact(row) for row in advantages],
                        "keep": keep,
                        "loss": exact(loss.item()),
                        "gradient": gradients(new),
                        "clipped_low": round(metrics["clip_ratio/low_mean"] * kept),
                        "clipped_high": round(metrics["clip_ratio/high_mean"] * kept),
                        "kl_from_old": {
                            name: exact(kept_mean([row[name] for row in ours], keep).item()) for name in ("k1", "k2", "k3")
                        },
                    }
                )
    content = header(
        "onpolicy.py",
        f"{trl_losses.GRPO_METHOD} with advantages for each token: loss_type bnpo is token_mean, grpo response_mean over all "
        "responses, dr_grpo constant_length; `dual` is its delta, `kl_coef` its beta (k3); kl_from_old: Schulman's formulas",
    )
    content |= {"shapes": "one batch a case, which is the whole step; ragged [responses][tokens]", "cases": cases}
    write_json(directory / "ppo.json", content)


def write_kl(directory) -> None:
    generator = torch.Generator().manual_seed(120)
    cases = []
    for name in ("k2", "k3", "straight_through"):
        for scale in (1e-3, 0.3, 3.0):
            for keep in KEEPS[:3]:
                reference = rows(generator, keep, 1.0, -3.0)
                policy = leaves([row + scale * torch.randn(len(row), generator=generator) for row in reference])
                terms = [estimates(new - frozen) for new, frozen in zip(policy, reference, strict=True)]
                if name == "straight_through":
                    losses = [row["k3"].detach() + row["k2"] - row["k2"].detach() for row in terms]
                else:
                    losses = [row[name] for row in terms]
                loss = kept_mean(losses, keep)
                loss.backward()
                cases.append(
                    {
                        "name": name,
                        "token_logps": [exact(row) for row in policy],
                        "reference_token_logps": [exact(row) for row in reference],
                        "keep": keep,
                        "loss": exact(loss.item()),
                        "gradient": gradients(policy),
                    }
                )
    content = header("onpolicy.py", "Schulman's k2 and k3 in torch; straight_through: the value of k3, the gradient of k2")
    content |= {"shapes": "one batch a case, its mean over kept tokens; ragged [responses][tokens]", "cases": cases}
    write_json(directory / "kl.json", content)


def write_value(directory) -> None:
    generator = torch.Generator().manual_seed(130)
    cases = []
    for clip in (None, 0.2, 1.0):
        for keep in KEEPS:
            old, returns = rows(generator, keep), rows(generator, keep, 2.0)
            values = leaves([row + 0.6 * torch.randn(len(row), generator=generator) for row in old])
            if clip is None:
                losses = [0.5 * torch.square(value - target) for value, target in zip(values, returns, strict=True)]
                flags = [torch.zeros(len(row)) for row in values]
            else:
                both = [former_value(*row, clip) for row in zip(values, old, returns, strict=True)]
                losses, flags = [loss for loss, _ in both], [flag.double() for _, flag in both]
            loss = kept_mean(losses, keep)
            loss.backward()
            kept = sum(map(sum, keep))
            cases.append(
                {
                    "clip": clip,
                    "values": [exact(row) for row in values],
                    "old_values": [exact(row) for row in old],
                    "returns": [exact(row) for row in returns],
                    "keep": keep,
                    "loss": exact(loss.item()),
                    "gradient": gradients(values),
                    "clipped": round(kept_mean(flags, keep).item() * kept),
                }
            )
    content = header("onpolicy.py", "TRL's former PPOTrainer.train (vf_losses1, vf_losses2, vf_loss, vf_clipfrac), transcribed")
    content |= {"shapes": "one batch a case, its mean over kept tokens; clip null: the plain loss", "cases": cases}
    write_json(directory / "value.json", content)


def write_kto(directory) -> None:
    generator = torch.Generator().manual_seed(140)
    cases = []
    keeps = [*KEEPS[:3], [[1, 1], [1, 0, 1]]]
    labels = [[True, False], [False, True, False], [True, True, False], [False, False]]
    for beta, weights in ((0.1, (1.0, 1.0)), (0.5, (1.0, 1.5)), (20.0, (0.7, 1.0))):
        for keep, desirable in zip(keeps, labels, strict=True):
            for shift in (2.0, -2.0):
                policy, reference = leaves(rows(generator, keep, 1.0, -3.0)), rows(generator, keep, 1.0, -3.0)
                mismatched_reference = 3.0 * torch.randn(3, generator=generator) - 20.0
                mismatched = mismatched_reference + torch.randn(3, generator=generator) + shift
                loss, baseline = trl_losses.kto_loss(
                    policy, reference, keep, desirable, mismatched, mismatched_reference, beta, weights
                )
                loss.backward()
                cases.append(
                    {
                        "beta": beta,
                        "desirable_weight": weights[0],
                        "undesirable_weight": weights[1],
                        "token_logps": [exact(row) for row in policy],
                        "reference_token_logps": [exact(row) for row in reference],
                        "keep": keep,
                        "desirable": desirable,
                        "mismatched_logps": exact(mismatched),
                        "reference_mismatched_logps": exact(mismatched_reference),
                        "baseline": exact(baseline),
                        "loss": exact(loss.item()),
                        "gradient": gradients(policy),
                    }
                )
    content = header("onpolicy.py", f"{trl_losses.KTO_METHOD}, loss_type kto, the mean over responses")
    content |= {"shapes": "one batch a case; ragged [responses][tokens]; mismatched_* [rows], summed", "cases": cases}
    write_json(directory / "kto.json", content)


def write_tdpo(directory) -> None:
    generator = torch.Generator().manual_seed(150)
    keeps = [
        ([1, 1, 1], [1, 1]),
        ([0, 1, 0, 1], [1, 1, 0]),
        ([0, 0], [0, 1, 1]),
        ([0], [0, 0]),
    ]
    vocab, cases = 5, []
    for beta, alpha in ((0.1, None), (1.0, None), (0.1, 0.5), (1.0, 1.0), (0.5, 0.0)):
        for keep in keeps:
            sides = []
            for side in (0, 1):
                shape = (len(keep[side]), vocab)
                logits = torch.randn(shape, generator=generator, requires_grad=True)
                reference_logits = torch.randn(shape, generator=generator)
                tokens = torch.randint(0, vocab, shape[:1], generator=generator)
                # The authors' `_tdpo_get_batch_logps`, transcribed.
                logps, reference_ps = logits.log_softmax(-1), reference_logits.softmax(-1)
                kl = (reference_ps * (reference_ps.log() - logps)).sum(-1)
                token_logps = logps.gather(-1, tokens[:, None])[:, 0]
                reference_logps = reference_ps.log().gather(-1, tokens[:, None])[:, 0]
                kl.retain_grad()
                token_logps.retain_grad()
                mask = torch.tensor(keep[side], dtype=torch.float64)
                sides.append(
                    {
                        "margin": ((token_logps - reference_logps) * mask).sum(),
                        "kl": (kl * mask).sum(),
                        "row": {
                            "logits": logits,
                            "reference_logits": reference_logits,
                            "tokens": tokens.tolist(),
                            "token_logps": token_logps,
                            "reference_token_logps": reference_logps,
                            "token_kl": kl,
                            "keep": keep[side],
                        },
                    }
                )
            chosen, rejected = sides
            loss = tdpo_loss(chosen["margin"], rejected["margin"], chosen["kl"], rejected["kl"], beta, alpha)
            loss.backward()
            case = {"beta": beta, "alpha": alpha, "loss": exact(loss.item())}
            for name, side in (("chosen", chosen), ("rejected", rejected)):
                row = side["row"]
                derivatives = {
                    f"{of}_gradient": row[of].grad if row[of].grad is not None else torch.zeros_like(row[of])
                    for of in ("token_logps", "token_kl", "logits")
                }
                case[name] = {key: exact(value) for key, value in (row | derivatives).items()} | {
                    "reward": exact(beta * (side["margin"] + side["kl"]).item()),
                }
            cases.append(case)
    content = header(
        "onpolicy.py", "the authors' tdpo_loss and _tdpo_get_batch_logps (arXiv:2404.11999, trainers.py), transcribed in torch"
    )
    content |= {"shapes": "one pair a case; logits [tokens][vocab]; alpha null: TDPO1; gradients of `loss`", "cases": cases}
    write_json(directory / "tdpo.json", content)


def main() -> None:
    directory = golden_directory("pivotal-loss")
    write_ppo(directory)
    write_kl(directory)
    write_value(directory)
    write_kto(directory)
    write_tdpo(directory)


if __name__ == "__main__":
    main()
