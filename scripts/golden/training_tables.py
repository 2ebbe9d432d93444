"""Five optimizer steps of SFT, DPO and Bradley-Terry training on the tiny tied Llama, in float64.

Writes crates/pivotal-train/tests/golden/: dpo_steps.json, tdpo_steps.json, sft_steps.json, reward_steps.json. Run tiny_models.py and
lora.py first. One batch of four fixed pairs a step, torch.optim.AdamW (learning rate constant, no weight decay, no
gradient clipping), every parameter trained unless a table says otherwise. `losses[k]` is the loss before update k, so
`losses` has one more entry than there are updates.
"""

import torch
import trl_losses
from fixture import golden_directory, header, numbers, write_json
from float64 import load_float64, to_float64
from peft import PeftModel
from tdpo import tdpo_loss
from transformers import AutoModelForCausalLM, LlamaForSequenceClassification

torch.set_num_threads(1)
STEPS = 5
OPTIMIZER = {"lr": 1e-3, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.0}
BETA = 0.1
CENTER = 0.01
EOS = 2

BASE = golden_directory("pivotal-model") / "llama"


def pairs() -> list[dict]:
    """Prompts of 1 to 9 tokens; responses of 1 to 12, most ending in EOS; the third pair's share their beginning."""
    generator = torch.Generator().manual_seed(7)

    def draw(length):
        return torch.randint(4, 100, (length,), generator=generator).tolist()

    shared = draw(3)
    return [
        {"prompt": [1, *draw(4)], "chosen": [*draw(6), EOS], "rejected": [*draw(3), EOS]},
        {"prompt": [1], "chosen": [*draw(4), EOS], "rejected": draw(12)},
        {"prompt": [1, *draw(8)], "chosen": [*shared, *draw(2), EOS], "rejected": [*shared, *draw(5), EOS]},
        {"prompt": [1, *draw(2)], "chosen": [EOS], "rejected": [*draw(2), EOS]},
    ]


# One full mask, several mixed ones and, in the last pair, an empty one.
KEEPS = [
    {"chosen": [0, 1, 1, 1, 0, 0, 1], "rejected": [1, 1, 0, 1]},
    {"chosen": [1, 1, 1, 1, 1], "rejected": [0, 0, 0, 1, 1, 0, 1, 1, 1, 0, 0, 1]},
    {"chosen": [0, 0, 0, 1, 1, 0], "rejected": [0, 0, 0, 1, 0, 0, 1, 1, 1]},
    {"chosen": [1], "rejected": [0, 0, 0]},
]
SIDES = ("chosen", "rejected")


def response_logps(model, prompt: list[int], response: list[int]) -> torch.Tensor:
    """Log-probability in nats of each response token, `[response]`; the first one comes from the last prompt token."""
    ids = torch.tensor([prompt + response])
    logits = model(ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(-1, torch.tensor(response)[:, None])[:, 0]


def response_values(model, head, prompt: list[int], response: list[int]) -> torch.Tensor:
    """Value of each response token from the hidden state at that token, after the final norm, `[response]`."""
    hidden = model.model(torch.tensor([prompt + response]), use_cache=False).last_hidden_state[0, len(prompt) :]
    return hidden @ head[0]


def train(parameters, loss_of, steps: int = STEPS) -> dict:
    parameters = [parameter for parameter in parameters if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, **(OPTIMIZER | {"betas": tuple(OPTIMIZER["betas"])}))
    losses, gradient_norms = [], []
    for step in range(steps + 1):
        optimizer.zero_grad()
        loss = loss_of()
        losses.append(loss.item())
        loss.backward()
        gradients = [parameter.grad.flatten() for parameter in parameters if parameter.grad is not None]
        gradient_norms.append(torch.linalg.vector_norm(torch.cat(gradients)).item())
        if step < steps:
            optimizer.step()
    return {"losses": numbers(losses), "gradient_norms": numbers(gradient_norms)}


def both_precisions(name: str, run) -> dict:
    """The table in float64, and how far torch's own float32 is from it: the room a float32 engine needs."""
    table = run(torch.float64)
    single = run(torch.float32)
    difference = max(abs(a - b) for a, b in zip(table["losses"], single["losses"], strict=True))
    print(f"  {name}: {['%.9f' % loss for loss in table['losses']]}, float32 within {difference:.1e}")
    return table | {"float32_difference": numbers(difference, 2)}


def load(dtype):
    if dtype == torch.float64:
        return load_float64(BASE)
    return AutoModelForCausalLM.from_pretrained(BASE, dtype=dtype, local_files_only=True).eval()


def with_adapter(model, dtype):
    adapted = PeftModel.from_pretrained(model, BASE / "adapter", is_trainable=True, autocast_adapter_dtype=False)
    if dtype == torch.float64:
        to_float64(adapted.get_base_model())
    return adapted


def dpo_table(keeps, adapter: bool):
    batch = pairs()

    def run(dtype):
        policy = load(dtype)
        if adapter:
            # The policy starts at the adapter, the reference is the base under it.
            policy = with_adapter(policy, dtype)
        reference_model = load(dtype)
        with torch.no_grad():
            reference = [
                tuple(response_logps(reference_model, pair["prompt"], pair[side]) for side in SIDES) for pair in batch
            ]

        def token_logps():
            return [tuple(response_logps(policy, pair["prompt"], pair[side]) for side in SIDES) for pair in batch]

        def loss_of():
            return trl_losses.dpo_loss(
                token_logps(), reference, [tuple(keep[side] for side in SIDES) for keep in keeps], BETA
            )

        table = train(policy.parameters(), loss_of)
        with torch.no_grad():
            final = token_logps()
        table["final_token_logps"] = [
            {side: numbers(row, 10) for side, row in zip(SIDES, pair, strict=True)} for pair in final
        ]
        table["reference_token_logps"] = [
            {side: numbers(row, 10) for side, row in zip(SIDES, pair, strict=True)} for pair in reference
        ]
        return table

    return run


def response_distributions(model, prompt: list[int], response: list[int]) -> torch.Tensor:
    """Log-probabilities of the whole vocabulary before each response token, `[response, vocab]`."""
    ids = torch.tensor([prompt + response])
    return model(ids, use_cache=False).logits[0, len(prompt) - 1 : -1].log_softmax(-1)


def tdpo_table(keeps, adapter: bool, alpha):
    """As `dpo_table`, with the authors' loss; `alpha` None is TDPO1. Also D of each response before each update."""
    batch = pairs()

    def run(dtype):
        policy = load(dtype)
        if adapter:
            policy = with_adapter(policy, dtype)
        reference_model = load(dtype)

        def of_response(pair, side, keep):
            logps = response_distributions(policy, pair["prompt"], pair[side])
            with torch.no_grad():
                reference = response_distributions(reference_model, pair["prompt"], pair[side])
            tokens = torch.tensor(pair[side])[:, None]
            mask = torch.tensor(keep[side], dtype=dtype)
            log_ratio = (logps - reference).gather(-1, tokens)[:, 0]
            kl = (reference.exp() * (reference - logps)).sum(-1)
            return (log_ratio * mask).sum(), (kl * mask).sum()

        divergences = []

        def loss_of():
            losses, kls = [], []
            for pair, keep in zip(batch, keeps, strict=True):
                (chosen, chosen_kl), (rejected, rejected_kl) = (of_response(pair, side, keep) for side in SIDES)
                losses.append(tdpo_loss(chosen, rejected, chosen_kl, rejected_kl, BETA, alpha))
                kls.append([chosen_kl.item(), rejected_kl.item()])
            divergences.append([sum(side) / len(batch) for side in zip(*kls, strict=True)])
            return torch.stack(losses).mean()

        table = train(policy.parameters(), loss_of)
        return table | {"mean_kls": [numbers(row) for row in divergences]}

    return run


def sft_table(keeps):
    batch = pairs()

    def run(dtype):
        policy = load(dtype)

        def loss_of():
            total, kept = 0.0, 0
            for pair, keep in zip(batch, keeps, strict=True):
                mask = torch.tensor(keep["chosen"], dtype=dtype)
                total = total - (mask * response_logps(policy, pair["prompt"], pair["chosen"])).sum()
                kept += int(mask.sum())
            return total / kept

        return train(policy.parameters(), loss_of)

    return run


def reward_table(start_head, aggregation: str):
    batch = pairs()

    def run(dtype):
        model = load(dtype)
        head = start_head.to(dtype).clone().requires_grad_()

        def score(pair, side):
            values = response_values(model, head, pair["prompt"], pair[side])
            return {"mean": values.mean(), "sum": values.sum(), "last": values[-1]}[aggregation]

        def loss_of():
            scores = [torch.stack([score(pair, side) for pair in batch]) for side in SIDES]
            return trl_losses.reward_loss(*scores, CENTER)

        with torch.no_grad():
            values = [
                {side: numbers(response_values(model, head, pair["prompt"], pair[side]), 10) for side in SIDES}
                for pair in batch
            ]
        table = train([*model.parameters(), head], loss_of)
        return table | {"initial_values": values, "final_head": numbers(head, 10)}

    return run


def check_value_head(start_head) -> None:
    """transformers' own reward-model class gives our value at the last token."""
    classifier = LlamaForSequenceClassification.from_pretrained(BASE, num_labels=1, dtype=torch.float32)
    with torch.no_grad():
        classifier.score.weight.copy_(start_head)
    classifier = to_float64(classifier)
    ours = load_float64(BASE)
    for pair in pairs():
        for side in SIDES:
            theirs = classifier(torch.tensor([pair["prompt"] + pair[side]])).logits[0, 0]
            value = response_values(ours, start_head.double(), pair["prompt"], pair[side])[-1]
            torch.testing.assert_close(value, theirs, rtol=1e-12, atol=1e-12)


def all_kept() -> list[dict]:
    return [{side: [1] * len(pair[side]) for side in SIDES} for pair in pairs()]


def pair_rows() -> list[dict]:
    return [{f"{key}_token_ids": ids for key, ids in pair.items()} for pair in pairs()]


def main() -> None:
    directory = golden_directory("pivotal-train")
    shared = {
        "model": "crates/pivotal-model/tests/golden/llama",
        "optimizer": {"name": "AdamW", **OPTIMIZER},
        "batch": "all four pairs in every step; the loss is their mean (SFT: one denominator over all kept tokens)",
        "pairs": pair_rows(),
    }

    tables = {}
    for name, keeps, adapter in (
        ("unmasked", all_kept(), False),
        ("masked", KEEPS, False),
        ("lora_unmasked", all_kept(), True),
        ("lora_masked", KEEPS, True),
    ):
        tables[name] = {
            "trained": "the LoRA matrices of llama/adapter" if adapter else "every parameter",
            "reference": "the base without the adapter" if adapter else "the start",
            "keep": keeps,
            **both_precisions(f"dpo {name}", dpo_table(keeps, adapter)),
        }
    content = header("training_tables.py", f"{trl_losses.DPO_METHOD}, torch.optim.AdamW, float64 (see float64.py)")
    write_json(directory / "dpo_steps.json", content | shared | {"beta": BETA, "tables": tables})

    tables = {}
    for name, keeps, adapter, alpha in (
        ("tdpo1_unmasked", all_kept(), False, None),
        ("tdpo1_masked", KEEPS, False, None),
        ("tdpo2_masked", KEEPS, False, 0.5),
        ("tdpo1_lora_masked", KEEPS, True, None),
        ("tdpo2_lora_masked", KEEPS, True, 2.0),
    ):
        tables[name] = {
            "trained": "the LoRA matrices of llama/adapter" if adapter else "every parameter",
            "reference": "the base without the adapter" if adapter else "the start",
            "alpha": alpha,
            "keep": keeps,
            **both_precisions(name, tdpo_table(keeps, adapter, alpha)),
        }
    content = header(
        "training_tables.py",
        "the authors' tdpo_loss (arXiv:2404.11999, trainers.py) over whole distributions, torch.optim.AdamW, float64",
    )
    content |= {"mean_kls": "before each update, [chosen, rejected]: sequential divergence over kept tokens, mean over pairs"}
    write_json(directory / "tdpo_steps.json", content | shared | {"beta": BETA, "tables": tables})

    tables = {
        name: {"keep": keeps, **both_precisions(f"sft {name}", sft_table(keeps))}
        for name, keeps in (("unmasked", all_kept()), ("masked", KEEPS))
    }
    content = header(
        "training_tables.py",
        "-Σ M log π / ΣM on the chosen responses, torch.optim.AdamW, float64 (see float64.py)",
    )
    write_json(directory / "sft_steps.json", content | shared | {"tables": tables})

    generator = torch.Generator().manual_seed(33)
    start_head = torch.randn((1, 32), generator=generator) / 33**0.5
    check_value_head(start_head)
    tables = {
        aggregation: both_precisions(f"reward {aggregation}", reward_table(start_head, aggregation))
        for aggregation in ("mean", "sum", "last")
    }
    content = header(
        "training_tables.py",
        f"{trl_losses.REWARD_METHOD}, value head as transformers.LlamaForSequenceClassification, "
        "torch.optim.AdamW, float64 (see float64.py)",
    )
    content |= shared | {
        "center": CENTER,
        "score.weight": numbers(start_head, 9),
        "trained": "every parameter of the decoder and score.weight; the tied embedding only as the input embedding",
        "tables": tables,
    }
    write_json(directory / "reward_steps.json", content)


if __name__ == "__main__":
    main()
