"""What PyTorch's matrix products reach on this machine, in GFLOP/s.

Usage: ceiling.py [--threads 2] [--repeats 7]

1024 rows through a layer of SmolLM2-135M's feed-forward (576 -> 1536) and through its vocabulary (576 -> 49152).
"""

import argparse
import json
import statistics
import time

import peer
import torch

SHAPES = [(1024, 576, 1536), (1024, 576, 49152)]


def gflops(shape: tuple[int, int, int], dtype: torch.dtype, repeats: int) -> float:
    rows, inner, columns = shape
    left, right = torch.randn(rows, inner).to(dtype), torch.randn(columns, inner).to(dtype)
    product = 2 * rows * inner * columns
    # A tenth of a second or so a reading.
    count = max(1, int(2e10 / product))
    readings = []
    for repeat in range(repeats + 1):
        begun = time.perf_counter()
        for _ in range(count):
            torch.nn.functional.linear(left, right)
        if repeat:
            readings.append(count * product / (time.perf_counter() - begun) / 1e9)
    return statistics.median(readings)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    found = {
        name: {"x".join(map(str, shape)): gflops(shape, dtype, arguments.repeats) for shape in SHAPES}
        for name, dtype in (("bf16", torch.bfloat16), ("f32", torch.float32))
    }
    print(json.dumps({"suite": "ceiling", "tool": "torch", "versions": peer.versions("torch"), "gflops": found}))


if __name__ == "__main__":
    main()
