"""Pivotal beside its peers: the same rows, fresh processes, both in turn, ratios of each round.

Usage: compare.py SUITE... --share VENV/share/peers --json FILE [--pivotal FILE] [--precision bf16|f32] [--rounds R]
                  [--limit N] [--keep all|FRACTION] [--llama-cpp] [--peer-arguments "..."] [--touch GIB]

Suites: dpo, sft, reward, annotate, generate. Rows that some tool would not keep whole are left out, --limit takes that
many of the others, evenly spread, and both sides read them from one file. Prints a Markdown table of medians, with
least and greatest, and of the ratios' medians; FILE gets every reading. Where a reading fails, its status and the end
of its messages are noted, the others go on, and the exit status is 1.
"""

import argparse
import dataclasses
import json
import pathlib
import platform
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import peer
import rows
import tables
from tables import Reading

HERE = pathlib.Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
STDERR_LINES = 12
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Peer:
    """A peer's measurement of a suite, and which of Pivotal's it stands beside (the beginning of its variant)."""

    tool: str
    variant: str
    script: str
    arguments: tuple[str, ...] = ()


TRAINING = ("dpo", "sft", "reward")
SHAPES = {
    "16 prompts x 1": ("--prompts", "16", "--samples", "1"),
    "8 prompts x 8": ("--prompts", "8", "--samples", "8"),
}
PEERS = {
    "dpo": [Peer("TRL", "", "trl_dpo.py")],
    "sft": [Peer("TRL", "", "trl_sft.py")],
    "reward": [Peer("TRL", "", "trl_reward.py")],
    "annotate": [
        Peer("transformers", "one model", "transformers_score.py"),
        Peer("transformers", "log-ratio", "transformers_score.py", ("--log-ratio",)),
    ],
    "generate": [Peer("transformers", shape, "transformers_generate.py", how) for shape, how in SHAPES.items()],
}
LLAMA_CPP = [
    Peer(f"llama.cpp {weights}", shape, "llama_cpp_generate.py", (*how, "--weights", weights))
    for shape, how in SHAPES.items()
    for weights in ("BF16", "Q8_0")
]


class Failed(Exception):
    """A command's status (below 0: the signal) and messages; no status where what it printed cannot be used."""

    def __init__(self, status: int | None, messages: str) -> None:
        super().__init__(status, messages)
        self.status = status
        self.messages = messages


def attempt(read: Callable[..., T], *arguments: Any) -> T | Reading:
    """What was read; or, in its place, that it failed and how."""
    try:
        return read(*arguments)
    except Failed as failed:
        last = failed.messages.splitlines()[-STDERR_LINES:]
        print("\n".join([*last, f"failed, status {failed.status}"]), file=sys.stderr, flush=True)
        return {"failed": True, "status": failed.status, "stderr": last}


def run(command: list[str], touch_gib: float) -> str:
    """What the command printed."""
    if touch_gib > 0:
        touched = run([sys.executable, str(HERE / "touch.py"), str(touch_gib)], 0.0)
        print(f"touched {touch_gib} GiB in {touched.strip()} s", file=sys.stderr, flush=True)
    print("+ " + shlex.join(command), file=sys.stderr, flush=True)
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise Failed(done.returncode, done.stderr)
    return done.stdout


def last_line(printed: str) -> Reading:
    try:
        return json.loads(printed.splitlines()[-1])
    except (IndexError, json.JSONDecodeError) as error:
        raise Failed(None, f"the last line it printed is no JSON: {error}") from error


def run_peer(which: Peer, data: pathlib.Path, arguments: argparse.Namespace, suite: str) -> Reading:
    llama = which.script == "llama_cpp_generate.py"
    command = [sys.executable, str(HERE / which.script), "--data", str(data), "--threads", str(arguments.threads)]
    command += ["--model", str(gguf(arguments) if llama else arguments.share / "model"), *which.arguments]
    if not llama:
        command += ["--precision", arguments.precision]
    if suite in TRAINING:
        command += ["--batch", str(arguments.batch), "--max-tokens", str(arguments.max_tokens)]
        command += shlex.split(arguments.peer_arguments)
    return last_line(run(command, arguments.touch))


def run_pivotal(suite: str, data: pathlib.Path, arguments: argparse.Namespace) -> list[Reading]:
    with tempfile.TemporaryDirectory() as directory:
        out = pathlib.Path(directory) / "bench.json"
        command = [str(arguments.pivotal), "--threads", str(arguments.threads), "bench", suite]
        command += ["--model", str(gguf(arguments)), "--data", str(data), "--precision", arguments.precision]
        command += ["--batch", str(arguments.batch), "--max-tokens", str(arguments.max_tokens)]
        command += ["--keep", arguments.keep, "--json", str(out)]
        run(command, arguments.touch)
        results = json.loads(out.read_text(encoding="utf-8"))["results"]
    # A suite's own figures lie one level down.
    return [result | result.get("figures", {}) for result in results]


def gguf(arguments: argparse.Namespace) -> pathlib.Path:
    return arguments.share / "SmolLM2-135M-Instruct.Q4_1.gguf"


def run_ceiling(arguments: argparse.Namespace) -> Reading:
    command = [sys.executable, str(HERE / "ceiling.py"), "--threads", str(arguments.threads)]
    return last_line(run(command, arguments.touch))["gflops"]


def beside(ours: list[Reading], which: Peer) -> Reading:
    """Pivotal's reading of what the peer measures."""
    found = [one for one in ours if one["variant"].startswith(which.variant)]
    if len(found) != 1:
        raise Failed(None, f"{len(found)} of Pivotal's measurements begin with `{which.variant}`")
    return found[0]


def same_work(suite: str, mine: Reading, theirs: Reading) -> Reading:
    """The peer's reading, if it counts what Pivotal's does."""
    counts = [one.get("pairs") or one.get("sequences") for one in (mine, theirs)]
    if suite != "generate" and counts[0] != counts[1]:
        raise Failed(None, f"it took {counts[1]} rows, Pivotal {counts[0]}")
    if suite == "generate" and mine["tokens"] != theirs["tokens"]:
        raise Failed(None, f"it made {theirs['tokens']} new tokens, Pivotal {mine['tokens']}")
    return theirs


def measure(suite: str, data: pathlib.Path, arguments: argparse.Namespace) -> Iterator[Reading]:
    """`{peer, pivotal}` readings, round by round; the two take turns at going first."""
    peers = PEERS[suite] + (LLAMA_CPP if suite == "generate" and arguments.llama_cpp else [])
    for number in range(arguments.rounds):
        ours = attempt(run_pivotal, suite, data, arguments) if number % 2 == 0 else []
        theirs = [attempt(run_peer, which, data, arguments, suite) for which in peers]
        ours = ours or attempt(run_pivotal, suite, data, arguments)
        for which, reading in zip(peers, theirs, strict=True):
            mine = ours if tables.failed(ours) else attempt(beside, ours, which)
            if not tables.failed(mine) and not tables.failed(reading):
                reading = attempt(same_work, suite, mine, reading)
            yield {"suite": suite, "tool": which.tool, "round": number, "variant": which.variant,
                   "pivotal": mine, "peer": reading}  # fmt: skip


def gib(text: str) -> float:
    """So many GiB, where they can be had without another process losing its own."""
    wanted = float(text)
    lines = pathlib.Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    available = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")) / 2**20
    if not 0 <= wanted < available:
        raise argparse.ArgumentTypeError(f"{wanted} GiB, of which {available:.1f} are available")
    return wanted


def arguments_of() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("suites", nargs="+", choices=list(PEERS), metavar="SUITE")
    parser.add_argument("--share", type=pathlib.Path, required=True, help="what setup.sh left: VENV/share/peers")
    parser.add_argument("--pivotal", type=pathlib.Path, default=REPOSITORY / "target/release/pivotal")
    parser.add_argument("--json", type=pathlib.Path, required=True, help="the file to write")
    parser.add_argument("--precision", choices=["bf16", "f32"], default="bf16")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--max-tokens", type=int, default=512)
    parser.add_argument("--keep", default="all", help="share of response tokens that Pivotal's loss uses")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--limit", type=int, default=0, help="rows, evenly spread, in whole batches; 0 takes all")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--llama-cpp", action="store_true", help="llama.cpp beside transformers in `generate`")
    parser.add_argument("--peer-arguments", default="", help="further arguments of the TRL scripts")
    parser.add_argument("--touch", type=gib, default=0.0, metavar="GIB", help="touch this much memory before a reading")
    arguments = parser.parse_args()
    if not arguments.pivotal.is_file():
        parser.error(f"{arguments.pivotal} is not there: build it, or name another with --pivotal")
    return arguments


def main() -> None:
    arguments = arguments_of()
    length = rows.Length(arguments.share / "model" / arguments.precision)
    read = peer.read_rows(arguments.share / "pairs.jsonl")
    taken, choice = rows.choose(read, length, arguments.max_tokens, arguments.batch, arguments.limit)
    # Paths are one machine's own.
    settings = {name: value for name, value in vars(arguments).items() if not isinstance(value, pathlib.Path)}
    ceilings: list[Reading] = []
    found: list[Reading] = []
    content = {"machine": platform.processor() or platform.machine(), "settings": settings,
               "rows": dataclasses.asdict(choice), "torch_ceilings_gflops": ceilings, "readings": found}  # fmt: skip
    with tempfile.TemporaryDirectory() as directory:
        data = pathlib.Path(directory) / "rows.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in taken), encoding="utf-8")
        try:
            ceilings.append(attempt(run_ceiling, arguments))
            for suite in arguments.suites:
                for reading in measure(suite, data, arguments):
                    found.append(reading)
                ceilings.append(attempt(run_ceiling, arguments))
        finally:
            arguments.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(f"{arguments.precision}, keep {arguments.keep}, {arguments.rounds} rounds, {arguments.threads} threads. "
          f"{choice.sentence()}\n")  # fmt: skip
    print(tables.table(found) + "\n")
    print(tables.shares(found))
    print(tables.ceilings(ceilings, arguments.precision))
    if failures := tables.failures(found, ceilings):
        print("\n" + "\n".join(failures))
        raise SystemExit(f"{len(failures)} readings failed")


if __name__ == "__main__":
    main()
