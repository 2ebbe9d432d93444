"""Values and gradients of the losses, in float64, from TRL's code wherever TRL has the formula.

Writes crates/pivotal-loss/tests/golden/: dpo.json, masked_dpo.json, dpo_variants.json, sft.json, bradley_terry.json.
All log-probabilities are in nats; every gradient is by the policy's (or the reward model's) numbers.
"""

import torch
import trl_losses
from fixture import golden_directory, header, numbers, write_json

torch.set_default_dtype(torch.float64)
torch.set_num_threads(1)
DIGITS = 15


def draws(seed: int, *lengths: int):
    generator = torch.Generator().manual_seed(seed)
    return [-3.0 * torch.rand(length, generator=generator) ** 2 for length in lengths]


def exact(value):
    return numbers(value, DIGITS)




def dpo_case(beta: float, chosen: float, rejected: float, reference_chosen: float, reference_rejected: float) -> dict:
    policy = [torch.tensor([value], requires_grad=True) for value in (chosen, rejected)]
    reference = (torch.tensor([reference_chosen]), torch.tensor([reference_rejected]))
    loss = trl_losses.dpo_loss([policy], [reference], [([1], [1])], beta)
    loss.backward()
    return {
        "beta": beta,
        "chosen_logps": chosen,
        "rejected_logps": rejected,
        "reference_chosen_logps": reference_chosen,
        "reference_rejected_logps": reference_rejected,
        "margin": exact(beta * ((chosen - reference_chosen) - (rejected - reference_rejected))),
        "loss": exact(loss.item()),
        "chosen_reward": exact(beta * (chosen - reference_chosen)),
        "rejected_reward": exact(beta * (rejected - reference_rejected)),
        "chosen_gradient": exact(policy[0].grad.item()),
        "rejected_gradient": exact(policy[1].grad.item()),
    }


def write_dpo(directory) -> None:
    cases = []
    for beta in (0.01, 0.1, 0.5, 1.0, 5.0):
        # Quarters and eighths: the inputs are the same numbers in float32.
        for chosen, rejected, reference_chosen, reference_rejected in (
            (-30.0, -42.0, -30.0, -42.0),
            (-30.25, -41.5, -32.125, -40.75),
            (-55.5, -20.25, -30.5, -21.0),
            (-0.125, -0.25, -0.5, -0.0625),
        ):
            cases.append(dpo_case(beta, chosen, rejected, reference_chosen, reference_rejected))
    # beta 1 and a zero reference: the margin is the log-probabilities' own difference.
    for margin in (2.0**-10, -(2.0**-10), 1.0, -1.0, 20.0, -20.0, 200.0, -200.0, 700.0, -700.0, 1e4, -1e4):
        cases.append(dpo_case(1.0, -50.0, -50.0 - margin, -50.0, -50.0))
    content = header("losses.py", f"{trl_losses.DPO_METHOD}, loss_type sigmoid, label_smoothing 0")
    content |= {
        "shapes": "one pair a case; gradients are of `loss` by chosen_logps and rejected_logps",
        "cases": cases,
    }
    write_json(directory / "dpo.json", content)




def masked_pairs() -> list[dict]:
    lengths = [(6, 4), (3, 9), (5, 5), (1, 2), (7, 3)]
    keeps = [
        ([1, 1, 1, 1, 1, 1], [1, 1, 1, 1]),
        ([0, 1, 0], [1, 1, 0, 0, 0, 1, 1, 0, 1]),
        ([0, 0, 0, 0, 0], [0, 1, 1, 0, 1]),
        ([0], [0, 0]),
        ([1, 0, 0, 0, 0, 0, 1], [0, 0, 0]),
    ]
    pairs = []
    for seed, ((chosen, rejected), keep) in enumerate(zip(lengths, keeps, strict=True), start=40):
        policy_chosen, policy_rejected, reference_chosen, reference_rejected = draws(
            seed, chosen, rejected, chosen, rejected
        )
        pairs.append(
            {
                "policy": (policy_chosen, policy_rejected),
                "reference": (reference_chosen, reference_rejected),
                "keep": keep,
            }
        )
    return pairs


def normalised(log_ratios, keep, normalisation: str):
    """The sum, mean or length-rescaled sum of the kept log-ratios. An empty mask gives 0 under each of the three."""
    mask = torch.tensor(keep, dtype=torch.float64)
    total, kept = (mask * log_ratios).sum(), mask.sum().clamp(min=1.0)
    return {"sum": total, "kept_mean": total / kept, "rescaled_sum": total * len(keep) / kept}[normalisation]


def pair_row(pair: dict, policy) -> dict:
    row = {}
    for index, side in enumerate(("chosen", "rejected")):
        row |= {
            f"{side}_token_logps": exact(policy[index]),
            f"reference_{side}_token_logps": exact(pair["reference"][index]),
            f"{side}_keep": pair["keep"][index],
        }
    return row


def write_masked_dpo(directory) -> None:
    cases = []
    for normalisation in ("sum", "kept_mean", "rescaled_sum"):
        for beta in (0.1, 2.0):
            for pair in masked_pairs():
                policy = tuple(row.clone().requires_grad_() for row in pair["policy"])
                ratios = [
                    normalised(policy[side] - pair["reference"][side], pair["keep"][side], normalisation)
                    for side in (0, 1)
                ]
                loss = -torch.nn.functional.logsigmoid(beta * (ratios[0] - ratios[1]))
                trl_type = {"sum": "sigmoid", "kept_mean": "sigmoid_norm"}.get(normalisation)
                if trl_type is not None:
                    theirs = trl_losses.dpo_loss([policy], [pair["reference"]], [pair["keep"]], beta, trl_type)
                    torch.testing.assert_close(loss, theirs, rtol=1e-14, atol=1e-15)
                    loss = theirs
                loss.backward()
                cases.append(
                    {"normalisation": normalisation, "beta": beta}
                    | pair_row(pair, policy)
                    | {
                        "loss": exact(loss.item()),
                        "chosen_log_ratio": exact(ratios[0].item()),
                        "rejected_log_ratio": exact(ratios[1].item()),
                        "chosen_gradient": exact(policy[0].grad),
                        "rejected_gradient": exact(policy[1].grad),
                    }
                )
    content = header(
        "losses.py",
        f"{trl_losses.DPO_METHOD} with keep as completion_mask: sigmoid for `sum`, sigmoid_norm for `kept_mean`; "
        "`rescaled_sum` (Σ·T/ΣM, T the response's tokens) is Pivotal's own, its gradient autograd's",
    )
    content |= {
        "shapes": "one pair a case; token arrays [response tokens]; keep 1 = counts; a log-ratio is the normalised one",
        "cases": cases,
    }
    write_json(directory / "masked_dpo.json", content)


def write_variants(directory) -> None:
    cases = []

    def add(name: str, reference: str, scalars: dict, compute) -> None:
        for pair in masked_pairs():
            policy = tuple(row.clone().requires_grad_() for row in pair["policy"])
            loss = compute(policy, pair).sum()
            loss.backward()
            gradients = [row.grad if row.grad is not None else torch.zeros_like(row) for row in policy]
            cases.append(
                {"name": name, "reference": reference, **scalars}
                | pair_row(pair, policy)
                | {
                    "loss": exact(loss.item()),
                    "chosen_gradient": exact(gradients[0]),
                    "rejected_gradient": exact(gradients[1]),
                }
            )

    def trl(loss_type, beta, label_smoothing=0.0):
        return lambda policy, pair: trl_losses.dpo_loss(
            [policy], [pair["reference"]], [pair["keep"]], beta, loss_type, label_smoothing
        )

    def ratios(policy, pair, normalisation="sum"):
        return [
            normalised(policy[side] - pair["reference"][side], pair["keep"][side], normalisation)[None]
            for side in (0, 1)
        ]

    def conservative(policy, pair):
        return trl_losses.cpo_loss(*ratios(policy, pair), 0.3, "sigmoid", label_smoothing=0.1)

    def ipo_summed(policy, pair):
        return trl_losses.cpo_loss(*ratios(policy, pair), 0.25, "ipo")

    def simpo(policy, pair):
        means = [normalised(policy[side], pair["keep"][side], "kept_mean")[None] for side in (0, 1)]
        return trl_losses.cpo_loss(*means, 2.0, "simpo", simpo_gamma=0.5)

    add("hinge", f"{trl_losses.DPO_METHOD} hinge", {"beta": 0.3}, trl("hinge", 0.3))
    add("ipo_length_normalised", f"{trl_losses.DPO_METHOD} ipo", {"beta": 0.25}, trl("ipo", 0.25))
    add("ipo_summed", f"{trl_losses.CPO_METHOD} ipo, of summed log-ratios", {"beta": 0.25}, ipo_summed)
    add("cdpo", f"{trl_losses.CPO_METHOD} sigmoid, of log-ratios", {"beta": 0.3, "label_smoothing": 0.1}, conservative)
    add("robust", f"{trl_losses.DPO_METHOD} robust", {"beta": 0.3, "label_smoothing": 0.1}, trl("robust", 0.3, 0.1))
    # In TRL `simpo_gamma` is the target margin itself: -log σ(beta·(mean_w − mean_l) − simpo_gamma).
    add("simpo", f"{trl_losses.CPO_METHOD} simpo, kept means", {"beta": 2.0, "simpo_gamma": 0.5}, simpo)
    content = header("losses.py", "each case names its own")
    content |= {"shapes": "as masked_dpo.json; simpo ignores the reference", "cases": cases}
    write_json(directory / "dpo_variants.json", content)




def write_sft(directory) -> None:
    generator = torch.Generator().manual_seed(70)
    batches = [
        [[1, 1, 1]],
        [[1, 0, 1, 1], [1, 1], [0, 0, 0, 0, 1, 1, 0]],
        [[0, 0, 0], [0, 1, 1, 1, 0]],
        [[0, 0], [0]],
    ]
    cases = []
    for keeps in batches:
        lengths = [len(keep) for keep in keeps]
        logits = torch.randn((sum(lengths), 11), generator=generator)
        targets = torch.randint(0, 11, (sum(lengths),), generator=generator)
        mask = torch.tensor([kept for keep in keeps for kept in keep], dtype=torch.float64)
        token_logps = logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0].detach().requires_grad_()
        kept = int(mask.sum())
        # With nothing kept the step has no loss and no gradient (torch's own mean would be 0/0).
        loss = -(mask * token_logps).sum() / max(kept, 1)
        loss.backward()
        if kept:
            theirs = torch.nn.functional.cross_entropy(logits, targets.masked_fill(mask == 0, -100), ignore_index=-100)
            torch.testing.assert_close(loss, theirs, rtol=1e-14, atol=1e-15)
        cases.append(
            {
                "token_logps": [exact(row) for row in token_logps.split(lengths)],
                "keep": keeps,
                "kept_tokens": kept,
                "loss": exact(loss.item()),
                "gradient": [exact(row) for row in token_logps.grad.split(lengths)],
            }
        )
    content = header("losses.py", "torch.nn.functional.cross_entropy, ignore_index -100; 0 by definition where none is kept")
    content |= {
        "shapes": "one batch a case; ragged [responses][tokens]; one denominator for the whole batch",
        "cases": cases,
    }
    write_json(directory / "sft.json", content)




def aggregate(values, aggregation: str):
    return {"mean": values.mean(), "sum": values.sum(), "last": values[-1]}[aggregation]


def write_bradley_terry(directory) -> None:
    generator = torch.Generator().manual_seed(90)
    pairs = [
        tuple(scale * torch.randn(length, generator=generator) + shift for length in lengths)
        for lengths, scale, shift in (((5, 3), 1.0, 0.0), ((1, 1), 1.0, 0.5), ((4, 8), 3.0, -1.0), ((6, 6), 0.01, 2.0))
    ]
    pairs.append((torch.full((3,), 0.75), torch.full((2,), 0.75)))
    pairs.append((torch.full((2,), 100.0), torch.full((4,), -100.0)))
    pairs.append((torch.full((2,), -100.0), torch.full((4,), 100.0)))
    cases = []
    for aggregation in ("mean", "sum", "last"):
        for center, token_l2 in ((0.0, 0.0), (0.01, 0.0), (0.0, 0.05), (0.02, 0.1)):
            for original in pairs:
                chosen, rejected = (values.clone().requires_grad_() for values in original)
                scores = aggregate(chosen, aggregation), aggregate(rejected, aggregation)
                ranking = trl_losses.reward_loss(scores[0][None], scores[1][None], None)
                centred = trl_losses.reward_loss(scores[0][None], scores[1][None], center)
                square = torch.cat([chosen, rejected]).pow(2).mean()
                loss = centred + token_l2 * square
                loss.backward()
                cases.append(
                    {
                        "aggregation": aggregation,
                        "center": center,
                        "token_l2": token_l2,
                        "chosen_values": exact(original[0]),
                        "rejected_values": exact(original[1]),
                        "chosen_score": exact(scores[0].item()),
                        "rejected_score": exact(scores[1].item()),
                        "ranking_loss": exact(ranking.item()),
                        "squared_score_sum": exact(((scores[0] + scores[1]) ** 2).item()),
                        "mean_squared_value": exact(square.item()),
                        "loss": exact(loss.item()),
                        "chosen_gradient": exact(chosen.grad),
                        "rejected_gradient": exact(rejected.grad),
                    }
                )
    content = header(
        "losses.py",
        f"{trl_losses.REWARD_METHOD} with center_rewards_coefficient, of the aggregated scores; "
        "token_l2 is Pivotal's own: times the mean of v² over the tokens of both responses together",
    )
    content |= {
        "formula": "loss = ranking_loss + center·squared_score_sum + token_l2·mean_squared_value",
        "shapes": "one pair a case; values [response tokens]; gradients of `loss` by each value",
        "cases": cases,
    }
    write_json(directory / "bradley_terry.json", content)


def main() -> None:
    directory = golden_directory("pivotal-loss")
    write_dpo(directory)
    write_masked_dpo(directory)
    write_variants(directory)
    write_sft(directory)
    write_bradley_terry(directory)


if __name__ == "__main__":
    main()
