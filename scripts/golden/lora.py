"""A random LoRA adapter on the tiny tied Llama, written by peft, with its logits and gradients in float64.

Writes crates/pivotal-model/tests/golden/llama/adapter/: adapter_config.json, adapter_model.safetensors, golden.json,
gradients.safetensors (every LoRA matrix). Run tiny_models.py first.
"""

import json
import warnings

import torch
from fixture import golden_directory, header, numbers, write_json
from float64 import check_gradient, load_float64, to_float64, token_logps
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def main() -> None:
    base = golden_directory("pivotal-model") / "llama"
    directory = base / "adapter"
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, local_files_only=True)
    config = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, bias="none", target_modules=TARGETS, task_type="CAUSAL_LM")
    model = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(20)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                # peft starts B at zero; a random B is what makes the scale alpha / r visible.
                scale = 0.5 if "lora_B" in name else 1.0 / parameter.shape[-1] ** 0.5
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it looks for the base model's config on the hub, which it need not find
        model.save_pretrained(directory)
    (directory / "README.md").unlink(missing_ok=True)
    written = json.loads((directory / "adapter_config.json").read_text())
    # peft writes where the base lay on this machine, and the targets in the order of a set.
    written["base_model_name_or_path"] = "tiny-llama"
    written["target_modules"] = sorted(written["target_modules"])
    (directory / "adapter_config.json").write_text(json.dumps(written, indent=2) + "\n")

    base_model = load_float64(base)
    model = PeftModel.from_pretrained(base_model, directory, is_trainable=True)
    to_float64(model.get_base_model())
    golden = json.loads((base / "golden.json").read_text())
    token_ids = golden["sequences"][1]["token_ids"][:40]
    short_ids = golden["sequences"][0]["token_ids"]

    def scalar():
        return token_logps(model, token_ids).mean()

    mean = scalar()
    mean.backward()
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not trainable or not all("lora_" in name for name in trainable):
        raise AssertionError("only the adapter's matrices may carry a gradient")
    for part, index in (("layers.0.self_attn.q_proj.lora_A", (1, 2)), ("layers.1.mlp.down_proj.lora_B", (5, 3))):
        check_gradient(model, scalar, next(name for name in trainable if part in name), index)
    # Under the adapter file's own names, so that weight and gradient are found by the same key.
    gradients = {name.replace(".default.", "."): value.grad.float().contiguous() for name, value in trainable.items()}
    saved = load_file(directory / "adapter_model.safetensors")
    if sorted(gradients) != sorted(saved) or sorted(saved) != sorted(get_peft_model_state_dict(model)):
        raise AssertionError("the gradients' names are not those of adapter_model.safetensors")
    save_file(gradients, directory / "gradients.safetensors")

    with torch.no_grad():
        logits = model(torch.tensor([short_ids]), use_cache=False).logits[0]
        with model.disable_adapter():
            base_logits = model(torch.tensor([short_ids]), use_cache=False).logits[0]
        stored = torch.tensor(golden["sequences"][0]["logits"], dtype=torch.float64)
        if (base_logits - stored).abs().max() > 1e-6:
            raise AssertionError("with the adapter off the model is not the base")
        content = header("lora.py", "peft LoraModel over transformers, float64 (see float64.py)")
        content |= {
            "sequences": [
                {
                    "token_ids": short_ids,
                    "token_logps": numbers(token_logps(model, short_ids), 10),
                    "logits": numbers(logits, 9),
                },
                {"token_ids": token_ids, "token_logps": numbers(token_logps(model, token_ids), 10)},
            ],
            "largest_change_of_a_logit": numbers((logits - base_logits).abs().max().item(), 6),
            "gradients": {
                "file": "gradients.safetensors",
                "of": "mean of token_logps of token_ids, by every LoRA matrix",
                "token_ids": token_ids,
                "mean": numbers(mean.item(), 12),
            },
        }
        merged = model.merge_and_unload()
        difference = (merged(torch.tensor([short_ids]), use_cache=False).logits[0] - logits).abs().max().item()
        print(f"  merged differs from adapted by {difference:.2e}")
    write_json(directory / "golden.json", content)


if __name__ == "__main__":
    main()
