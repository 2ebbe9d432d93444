"""Hugging Face decoders computed in 64-bit floats from end to end.

`model.double()` is not enough: transformers computes the root mean square, the rotary table and the eager softmax in
float32 whatever the model's type is. The two patches here keep its formulas and drop those casts; attention goes
through `sdpa`, which computes in the operands' own type. The inverse rotary frequencies stay the float32 numbers that
transformers computes: they are part of the model's definition.
"""

import types

import torch
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import MistralRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

torch.set_num_threads(1)
torch.use_deterministic_algorithms(True)


def _rms_norm(self, hidden):
    mean_square = hidden.pow(2).mean(-1, keepdim=True)
    return self.weight * (hidden * torch.rsqrt(mean_square + self.variance_epsilon))


@torch.no_grad()
def _rotary(self, hidden, position_ids):
    angles = position_ids[..., None].to(hidden.dtype) * self.inv_freq.to(hidden.dtype)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling


def to_float64(model):
    """The same model in float64, every operation of its forward pass included."""
    rotary = model.model.rotary_emb
    inverse_frequencies = rotary.inv_freq.clone()
    model = model.double().eval()
    # `double()` would also widen this buffer; restoring it first keeps the float32 numbers either way.
    rotary.inv_freq = inverse_frequencies
    rotary.forward = types.MethodType(_rotary, rotary)
    for module in model.modules():
        if isinstance(module, (LlamaRMSNorm, Qwen2RMSNorm, MistralRMSNorm)):
            module.forward = types.MethodType(_rms_norm, module)
    return model


def load_float64(directory):
    """A checkpoint directory as a float64 model."""
    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="sdpa", local_files_only=True
    )
    return to_float64(model)


def token_logps(model, token_ids: list[int]) -> torch.Tensor:
    """Log-probability in nats of every token after the first, `[time - 1]`."""
    logits = model(torch.tensor([token_ids]), use_cache=False).logits[0]
    targets = torch.tensor(token_ids[1:])
    return logits[:-1].log_softmax(-1).gather(-1, targets[:, None])[:, 0]


def check_gradient(model, scalar, name: str, index: tuple, step: float = 1e-6, tolerance: float = 1e-7) -> None:
    """Central differences of `scalar()` by one number of parameter `name`, against the gradient already in it.

    A float32 cast left between that parameter and the scalar makes the quotient wrong by 1e-1 and more, so this also
    proves that the path is float64.
    """
    parameter = dict(model.named_parameters())[name]
    with torch.no_grad():
        start = parameter[index].item()
        parameter[index] = start + step
        above = scalar().item()
        parameter[index] = start - step
        below = scalar().item()
        parameter[index] = start
    measured, computed = (above - below) / (2 * step), parameter.grad[index].item()
    if abs(measured - computed) > tolerance * max(1.0, abs(computed)):
        raise AssertionError(f"gradient of `{name}`{list(index)}: measured {measured}, computed {computed}")
