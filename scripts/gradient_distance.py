"""How far is the gradient of one run from that of another?

    python scripts/gradient_distance.py RUN REFERENCE [--step 1]

Both are run directories of one recipe, with the same data, seed and settings but for what is compared (`--precision bf16`
and `f32`, say), made with `--checkpoint-every 1`. Reads the first moments of AdamW from the checkpoint after the step: at step 1
they are the gradient times a constant. Prints |RUN - REFERENCE| / |REFERENCE| over all parameters, and the largest of
one parameter. Needs numpy and safetensors. Exit status: 0, or 2 for runs that hold different parameters.
"""

import argparse
import pathlib
import sys

import numpy
from safetensors.numpy import load_file


def moments(run: pathlib.Path, step: int) -> dict:
    tensors = load_file(run / "checkpoints" / f"step-{step:08}" / "optimizer.safetensors")
    return {name: x.astype(numpy.float64) for name, x in tensors.items() if name.endswith(".moment_1")}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=pathlib.Path)
    parser.add_argument("reference", type=pathlib.Path)
    parser.add_argument("--step", type=int, default=1)
    arguments = parser.parse_args()
    found, expected = (moments(run, arguments.step) for run in (arguments.run, arguments.reference))
    if found.keys() != expected.keys() or not found:
        print("the runs hold different parameters, or none", file=sys.stderr)
        return 2
    apart = {name: numpy.square(found[name] - expected[name]).sum() for name in expected}
    length = {name: numpy.square(expected[name]).sum() for name in expected}
    relative = {name: (apart[name] / length[name]) ** 0.5 for name in expected if length[name] > 0}
    worst = max(relative, key=relative.get)
    print(f"relative distance {(sum(apart.values()) / sum(length.values())) ** 0.5:.4f}")
    print(f"largest of a parameter {relative[worst]:.4f}: {worst.removesuffix('.moment_1')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
