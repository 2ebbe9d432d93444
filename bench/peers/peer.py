"""What the peers' scripts share: their arguments, reading, timing and the one JSON line that each prints."""

import argparse
import importlib.metadata
import json
import os
import pathlib
import resource
import time
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

Row = dict[str, str]


def parser(description: str, precisions: bool = True) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=description.splitlines()[0])
    made.add_argument("--model", type=pathlib.Path, required=True, help="directory with bf16/ and f32/ (model.py)")
    made.add_argument("--data", type=pathlib.Path, required=True, help="JSONL with prompt, chosen, rejected")
    made.add_argument("--threads", type=int, default=2)
    made.add_argument("--limit", type=int, default=0, help="this many rows, evenly spread over the file; 0 takes all")
    if precisions:
        made.add_argument("--precision", choices=["bf16", "f32"], default="bf16")
    return made


def spread(rows: list[Any], limit: int) -> list[Any]:
    """`limit` of the rows, evenly spread, in their order; all of them where the limit is 0 or no limit."""
    if limit <= 0 or limit >= len(rows):
        return rows
    return [rows[index * len(rows) // limit] for index in range(limit)]


def read_rows(path: pathlib.Path, limit: int = 0) -> list[Row]:
    lines = path.read_text(encoding="utf-8").splitlines()
    return spread([json.loads(line) for line in lines if line.strip()], limit)


def peak_bytes() -> int:
    """Largest resident set of this process so far; Linux counts it in KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def versions(*packages: str) -> dict[str, str]:
    return {package: importlib.metadata.version(package) for package in packages}


class Clock:
    """Seconds since it was started; asked before that, it fails."""

    def __init__(self) -> None:
        self.started: float | None = None

    def start(self) -> None:
        self.started = time.perf_counter()

    def seconds(self) -> float:
        if self.started is None:
            raise RuntimeError("nothing was timed: the run ended within its warm-up step")
        return time.perf_counter() - self.started


def report(suite: str, tool: str, packages: tuple[str, ...], unit: str, count: int, tokens: int, seconds: float,
           settings: dict[str, Any], **further: Any) -> None:  # fmt: skip
    """Prints the JSON line. `unit` is `pairs` or `sequences`; `tokens` counts real ones, padding apart."""
    line = {
        "suite": suite,
        "tool": tool,
        "versions": versions(*packages),
        unit: count,
        "tokens": tokens,
        "seconds": seconds,
        f"{unit}_per_second": count / seconds,
        "tokens_per_second": tokens / seconds,
        "peak_bytes": peak_bytes(),
        **further,
        "settings": settings,
    }
    print(json.dumps(line), flush=True)
