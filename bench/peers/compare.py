"""Pivotal beside its peers: the same rows, fresh processes, both in turn, ratios of each round.

Usage: compare.py SUITE... --share VENV/share/peers --json FILE [--pivotal FILE] [--precision bf16|f32] [--rounds R]
                  [--limit N] [--keep all|FRACTION] [--llama-cpp] [--peer-arguments "..."]

Suites: dpo, sft, reward, annotate, generate. --limit takes that many rows, evenly spread over the file, and writes them
to a file that both sides read. Prints a Markdown table of medians, with least and greatest, and of the ratios' medians;
FILE gets every reading.
"""

import argparse
import dataclasses
import json
import pathlib
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
from typing import Any

import peer

HERE = pathlib.Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
Reading = dict[str, Any]


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
METRICS = {
    "pairs/s": lambda reading: reading.get("pairs_per_second") or reading.get("sequences_per_second"),
    "tokens/s, decoding": lambda reading: reading.get("decoding_tokens_per_second"),
    "tokens/s, with prefill": lambda reading: reading["tokens_per_second"],
}


def run(command: list[str]) -> str:
    """What the command printed; its messages are shown where it fails."""
    print("+ " + shlex.join(command), file=sys.stderr, flush=True)
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{done.stderr[-4000:]}\nstatus {done.returncode}: {shlex.join(command)}")
    return done.stdout


def run_peer(which: Peer, data: pathlib.Path, arguments: argparse.Namespace, suite: str) -> Reading:
    llama = which.script == "llama_cpp_generate.py"
    command = [sys.executable, str(HERE / which.script), "--data", str(data), "--threads", str(arguments.threads)]
    command += ["--model", str(gguf(arguments) if llama else arguments.share / "model"), *which.arguments]
    if not llama:
        command += ["--precision", arguments.precision]
    if suite in TRAINING:
        command += ["--batch", str(arguments.batch), "--max-tokens", str(arguments.max_tokens)]
        command += shlex.split(arguments.peer_arguments)
    return json.loads(run(command).splitlines()[-1])


def run_pivotal(suite: str, data: pathlib.Path, arguments: argparse.Namespace) -> list[Reading]:
    with tempfile.TemporaryDirectory() as directory:
        out = pathlib.Path(directory) / "bench.json"
        command = [str(arguments.pivotal), "--threads", str(arguments.threads), "bench", suite]
        command += ["--model", str(gguf(arguments)), "--data", str(data), "--precision", arguments.precision]
        command += ["--batch", str(arguments.batch), "--max-tokens", str(arguments.max_tokens)]
        command += ["--keep", arguments.keep, "--json", str(out)]
        run(command)
        results = json.loads(out.read_text(encoding="utf-8"))["results"]
    # A suite's own figures lie one level down.
    return [result | result.get("figures", {}) for result in results]


def gguf(arguments: argparse.Namespace) -> pathlib.Path:
    return arguments.share / "SmolLM2-135M-Instruct.Q4_1.gguf"


def ceiling(threads: int) -> Reading:
    return json.loads(run([sys.executable, str(HERE / "ceiling.py"), "--threads", str(threads)]))["gflops"]


def subset(arguments: argparse.Namespace, directory: str) -> pathlib.Path:
    rows = peer.read_rows(arguments.share / "pairs.jsonl", arguments.limit)
    if len(rows) % arguments.batch:
        raise SystemExit(f"{len(rows)} rows make no whole batches of {arguments.batch}")
    path = pathlib.Path(directory) / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def measure(suite: str, data: pathlib.Path, arguments: argparse.Namespace) -> list[Reading]:
    """A list of `{peer, pivotal}` readings; the two take turns at going first."""
    peers = PEERS[suite] + (LLAMA_CPP if suite == "generate" and arguments.llama_cpp else [])
    found: list[Reading] = []
    for round_number in range(arguments.rounds):
        ours = run_pivotal(suite, data, arguments) if round_number % 2 == 0 else []
        theirs = [run_peer(which, data, arguments, suite) for which in peers]
        ours = ours or run_pivotal(suite, data, arguments)
        for which, reading in zip(peers, theirs, strict=True):
            beside = [one for one in ours if one["variant"].startswith(which.variant)]
            if len(beside) != 1:
                raise SystemExit(f"{len(beside)} of Pivotal's measurements of {suite} begin with `{which.variant}`")
            counts = [one.get("pairs") or one.get("sequences") for one in (beside[0], reading)]
            if suite != "generate" and counts[0] != counts[1]:
                raise SystemExit(f"{suite}: Pivotal took {counts[0]} rows, {which.tool} {counts[1]}")
            if suite == "generate" and beside[0]["tokens"] != reading["tokens"]:
                raise SystemExit(f"{suite}: {beside[0]['tokens']} new tokens against {reading['tokens']}")
            found.append({"suite": suite, "tool": which.tool, "round": round_number, "variant": beside[0]["variant"],
                          "pivotal": beside[0], "peer": reading})  # fmt: skip
    return found


def middle(values: list[float], digits: int) -> str:
    return f"{statistics.median(values):,.{digits}f} ({min(values):,.{digits}f}–{max(values):,.{digits}f})"


def table(readings: list[Reading]) -> str:
    lines = [
        "| suite | peer | measure | Pivotal | peer | ratio | peak memory, GB | its ratio | tokens | peer's |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    keys = dict.fromkeys((one["suite"], one["variant"], one["tool"]) for one in readings)
    for suite, variant, tool in keys:
        rows = [one for one in readings if (one["suite"], one["variant"], one["tool"]) == (suite, variant, tool)]
        names = ["pairs/s"] if suite != "generate" else ["tokens/s, decoding", "tokens/s, with prefill"]
        ours_peak, theirs_peak = ([one[side]["peak_bytes"] for one in rows] for side in ("pivotal", "peer"))
        for name in names:
            ours, theirs = ([METRICS[name](one[side]) for one in rows] for side in ("pivotal", "peer"))
            digits = 2 if name == "pairs/s" else 0
            ratios = [mine / other for mine, other in zip(ours, theirs, strict=True)]
            memory = [other / mine for mine, other in zip(ours_peak, theirs_peak, strict=True)]
            lines.append(
                f"| {suite}, {variant} | {tool} | {'responses/s' if suite == 'sft' else name} "
                f"| {middle(ours, digits)} | {middle(theirs, digits)} | **{middle(ratios, 2)}** "
                f"| {statistics.median(ours_peak) / 1e9:.2f} against {statistics.median(theirs_peak) / 1e9:.2f} "
                f"| {middle(memory, 1)} | {rows[0]['pivotal']['tokens']:,} | {rows[0]['peer']['tokens']:,} |"
            )
    return "\n".join(lines)


def shares(readings: list[Reading]) -> str:
    lines = []
    for suite, variant in dict.fromkeys((one["suite"], one["variant"]) for one in readings):
        rows = [one["pivotal"] for one in readings if (one["suite"], one["variant"]) == (suite, variant)]
        found = [row["share_of_ceiling"] for row in rows if row.get("share_of_ceiling") is not None]
        if found:
            percent = middle([100 * share for share in found], 0)
            lines.append(f"Pivotal, {suite}, {variant}: {percent} % of its own ceiling.")
    return "\n".join(lines)


def main() -> None:
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
    parser.add_argument("--limit", type=int, default=0, help="rows, evenly spread; 0 takes all")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--llama-cpp", action="store_true", help="llama.cpp beside transformers in `generate`")
    parser.add_argument("--peer-arguments", default="", help="further arguments of the TRL scripts")
    arguments = parser.parse_args()

    found: list[Reading] = []
    with tempfile.TemporaryDirectory() as directory:
        data = subset(arguments, directory)
        ceilings = [ceiling(arguments.threads)]
        for suite in arguments.suites:
            found += measure(suite, data, arguments)
            ceilings.append(ceiling(arguments.threads))
    # Paths are one machine's own.
    settings = {name: value for name, value in vars(arguments).items() if not isinstance(value, pathlib.Path)}
    content = {"machine": platform.processor() or platform.machine(), "settings": settings,
               "torch_ceilings_gflops": ceilings, "readings": found}  # fmt: skip
    arguments.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(f"{arguments.precision}, keep {arguments.keep}, {arguments.rounds} rounds, {arguments.threads} threads\n")
    print(table(found) + "\n")
    print(shares(found))
    for shape in ceilings[0][arguments.precision]:
        readings = [one[arguments.precision][shape] for one in ceilings]
        print(f"PyTorch's {arguments.precision} product {shape}: {middle(readings, 0)} GFLOP/s.")


if __name__ == "__main__":
    main()
