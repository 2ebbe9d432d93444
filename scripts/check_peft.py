"""Does peft read an adapter that Pivotal wrote, and does it compute the same token log-probabilities?

    python scripts/check_peft.py --base MODEL --adapter DIRECTORY --logps LOGPS.jsonl --tolerance 1e-3

MODEL is a Hugging Face directory or a .gguf file. Each line of LOGPS.jsonl is what `pivotal logps` prints: `token_ids`
of a whole sequence and `token_logps` in nats of its last tokens (all but the first, or a response's alone; nulls are
skipped). Computes in float64 and prints the largest absolute difference. Exit status: 0 within the tolerance, 1 above
it or an adapter whose keys peft does not know, 2 for an unusable input.
"""

import argparse
import json
import math
import pathlib
import sys
import warnings

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent / "golden"))

import torch  # noqa: E402
from float64 import to_float64, token_logps  # noqa: E402
from peft import PeftModel, get_peft_model_state_dict  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402


def load_base(path: pathlib.Path):
    where = {"pretrained_model_name_or_path": str(path)}
    if path.suffix == ".gguf":
        where = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    return AutoModelForCausalLM.from_pretrained(
        **where, dtype=torch.float32, attn_implementation="sdpa", local_files_only=True
    )


def load_adapted(base: pathlib.Path, adapter: pathlib.Path):
    """The base with the adapter on it, in float64; refuses an adapter of which peft ignores or misses a tensor."""
    with warnings.catch_warnings():
        # peft only warns where a key of the file is missing, and then runs without that matrix.
        warnings.filterwarnings("error", message=".*missing adapter keys.*")
        model = PeftModel.from_pretrained(load_base(base), adapter, autocast_adapter_dtype=False)
    written = load_file(adapter / "adapter_model.safetensors")
    loaded = get_peft_model_state_dict(model)
    if sorted(written) != sorted(loaded):
        only_written = sorted(set(written) - set(loaded))[:3]
        only_loaded = sorted(set(loaded) - set(written))[:3]
        raise ValueError(f"keys only in the file: {only_written}; keys only peft expects: {only_loaded}")
    for name, tensor in written.items():
        if not torch.equal(tensor.float(), loaded[name].float()):
            raise ValueError(f"`{name}` was not loaded as it was written")
    to_float64(model.get_base_model())
    return model


def read_rows(path: pathlib.Path):
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        row = json.loads(line)
        token_ids, logps = row["token_ids"], row["token_logps"]
        if len(logps) > len(token_ids):
            raise ValueError(f"line {number}: {len(logps)} token_logps for {len(token_ids)} token_ids")
        if len(logps) == len(token_ids):
            if logps[0] is not None:
                raise ValueError(f"line {number}: the first token has no prefix, so its log-probability must be null")
            logps = logps[1:]
        yield number, token_ids, logps


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", type=pathlib.Path, required=True, help="Hugging Face directory or .gguf file")
    parser.add_argument("--adapter", type=pathlib.Path, required=True, help="directory of adapter_config.json")
    parser.add_argument("--logps", type=pathlib.Path, required=True, help="JSON lines of `pivotal logps`")
    parser.add_argument("--tolerance", type=float, required=True, help="largest absolute difference allowed, nats")
    arguments = parser.parse_args()

    try:
        rows = list(read_rows(arguments.logps))
    except (OSError, KeyError, ValueError) as error:
        print(f"{arguments.logps}: {error!r}", file=sys.stderr)
        return 2
    try:
        model = load_adapted(arguments.base, arguments.adapter)
    except (ValueError, UserWarning) as error:
        print(f"peft does not read the adapter as it was written: {error}", file=sys.stderr)
        return 1

    largest, where, compared = 0.0, "", 0
    with torch.no_grad():
        for number, token_ids, logps in rows:
            expected = token_logps(model, token_ids).tolist()[len(token_ids) - 1 - len(logps) :]
            first = len(token_ids) - len(logps)
            for offset, (ours, theirs) in enumerate(zip(logps, expected, strict=True)):
                if ours is None:
                    continue
                compared += 1
                difference = abs(ours - theirs)
                # A NaN compares as smaller than everything: it must not pass.
                if not math.isfinite(difference) or difference > largest:
                    largest = difference if math.isfinite(difference) else math.inf
                    where = f"line {number}, token {first + offset}: pivotal {ours}, peft {theirs}"
    if compared == 0:
        print(f"{arguments.logps}: no token to compare", file=sys.stderr)
        return 2
    print(f"{compared} tokens of {len(rows)} sequences, largest absolute difference {largest:.3e} nats ({where})")
    return 0 if largest <= arguments.tolerance else 1


if __name__ == "__main__":
    sys.exit(main())
