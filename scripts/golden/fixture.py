"""How every golden file is written: one header, one number format, one place under the crates."""

import importlib.metadata
import json
import math
import pathlib
import platform

import numpy
import torch

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]


def golden_directory(crate: str) -> pathlib.Path:
    """`crates/<crate>/tests/golden`, made if it is missing."""
    directory = REPOSITORY / "crates" / crate / "tests" / "golden"
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def header(script: str, reference: str) -> dict:
    """Who made a file, with which versions, and whose formula was called."""
    packages = ["torch", "transformers", "trl", "peft", "tokenizers", "safetensors", "gguf", "numpy"]
    return {
        "made_by": f"scripts/golden/{script}",
        "reference": reference,
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in packages},
    }


def numbers(value, digits: int = 12):
    """Nested lists of floats rounded to `digits` significant digits; a non-finite number is our own bug."""
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().tolist()
    if isinstance(value, numpy.ndarray):
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        return [numbers(item, digits) for item in value]
    if isinstance(value, bool) or isinstance(value, int):
        return value
    if not math.isfinite(value):
        raise ValueError(f"a golden number is {value}")
    return float(f"{value:.{digits}g}") + 0.0  # never -0.0


def write_json(path: pathlib.Path, content: dict) -> None:
    """One key a line at the top two levels, arrays of numbers on one line: small, and a diff stays readable."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_render(content, 0) + "\n", encoding="utf-8")
    print(f"{path.relative_to(REPOSITORY)}: {path.stat().st_size} bytes")


def _render(value, depth: int) -> str:
    indent, close = "  " * (depth + 1), "  " * depth
    if isinstance(value, dict) and value and depth < 4:
        rows = [f"{indent}{json.dumps(key)}: {_render(item, depth + 1)}" for key, item in value.items()]
        return "{\n" + ",\n".join(rows) + f"\n{close}}}"
    if isinstance(value, list) and value and isinstance(value[0], (dict, str)) and depth < 4:
        rows = [indent + _render(item, depth + 1) for item in value]
        return "[\n" + ",\n".join(rows) + f"\n{close}]"
    return json.dumps(value, ensure_ascii=False, allow_nan=False)
