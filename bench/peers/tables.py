"""What compare.py prints of its readings. A failed one is `{failed, status, stderr}` in the place of the reading."""

import statistics
from typing import Any

Reading = dict[str, Any]

METRICS = {
    "pairs/s": lambda reading: reading.get("pairs_per_second") or reading.get("sequences_per_second"),
    "tokens/s, decoding": lambda reading: reading.get("decoding_tokens_per_second"),
    "tokens/s, with prefill": lambda reading: reading["tokens_per_second"],
}
SIDES = ("pivotal", "peer")


def failed(reading: Any) -> bool:
    return isinstance(reading, dict) and reading.get("failed", False)


def middle(values: list[float], digits: int) -> str:
    if not values:
        return "–"
    return f"{statistics.median(values):,.{digits}f} ({min(values):,.{digits}f}–{max(values):,.{digits}f})"


def rate(readings: list[Reading], name: str, digits: int) -> str:
    """The readings' median, and how many of them failed with which status."""
    good = [METRICS[name](one) for one in readings if not failed(one)]
    bad = [str(one["status"]) for one in readings if failed(one)]
    text = f"{len(bad)} of {len(readings)} failed: status {', '.join(dict.fromkeys(bad))}" if bad else ""
    return "; ".join(part for part in (middle(good, digits) if good else "", text) if part)


def one_of(readings: list[Reading], key: str) -> Any:
    """What the first good reading says."""
    return next((one[key] for one in readings if not failed(one)), None)


def table(readings: list[Reading]) -> str:
    lines = [
        "| suite | peer | measure | Pivotal | peer | ratio | peak memory, GB | its ratio | tokens | peer's |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    keys = dict.fromkeys((one["suite"], one["variant"], one["tool"]) for one in readings)
    for suite, variant, tool in keys:
        rows = [one for one in readings if (one["suite"], one["variant"], one["tool"]) == (suite, variant, tool)]
        ours, theirs = ([one[side] for one in rows] for side in SIDES)
        both = [one for one in rows if not any(failed(one[side]) for side in SIDES)]
        label = one_of(ours, "variant") or variant
        peaks = [[one["peak_bytes"] / 1e9 for one in side if not failed(one)] for side in (ours, theirs)]
        peak = " against ".join(f"{statistics.median(side):.2f}" if side else "–" for side in peaks)
        memory = [one["peer"]["peak_bytes"] / one["pivotal"]["peak_bytes"] for one in both]
        tokens = [one_of(side, "tokens") for side in (ours, theirs)]
        counts = " | ".join("–" if count is None else f"{count:,}" for count in tokens)
        names = ["pairs/s"] if suite != "generate" else ["tokens/s, decoding", "tokens/s, with prefill"]
        for name in names:
            digits = 2 if name == "pairs/s" else 0
            ratios = [METRICS[name](one["pivotal"]) / METRICS[name](one["peer"]) for one in both]
            lines.append(
                f"| {', '.join(filter(None, (suite, label)))} | {tool} | {'responses/s' if suite == 'sft' else name} "
                f"| {rate(ours, name, digits)} | {rate(theirs, name, digits)} | **{middle(ratios, 2)}** "
                f"| {peak} | {middle(memory, 1)} | {counts} |"
            )
    return "\n".join(lines)


def shares(readings: list[Reading]) -> str:
    lines = []
    good = [one for one in readings if not failed(one["pivotal"])]
    for suite, variant in dict.fromkeys((one["suite"], one["pivotal"]["variant"]) for one in good):
        rows = [one["pivotal"] for one in good if (one["suite"], one["pivotal"]["variant"]) == (suite, variant)]
        found = [row["share_of_ceiling"] for row in rows if row.get("share_of_ceiling") is not None]
        if found:
            percent = middle([100 * share for share in found], 0)
            lines.append(f"Pivotal, {suite}, {variant}: {percent} % of its own ceiling.")
    return "\n".join(lines)


def ceilings(found: list[Reading], precision: str) -> str:
    good = [one[precision] for one in found if not failed(one)]
    return "\n".join(
        f"PyTorch's {precision} product {shape}: {middle([one[shape] for one in good], 0)} GFLOP/s."
        for shape in (good[0] if good else {})
    )


def failures(readings: list[Reading], products: list[Reading]) -> list[str]:
    """A line for every reading that failed: which it was, its status, and the end of its messages."""
    found = []
    for one in readings:
        found.append((f"Pivotal, {one['suite']}, round {one['round']}", one["pivotal"]))
        found.append((f"{one['tool']}, {one['suite']} {one['variant']}, round {one['round']}", one["peer"]))
    found += [(f"PyTorch's products, {number}", one) for number, one in enumerate(products)]
    lines = [
        f"Failed: {name.replace(' ,', ',')}: status {one['status']}: {' / '.join(one['stderr'][-3:])}"
        for name, one in found
        if failed(one)
    ]
    # One process of Pivotal's stands beside several of the peers'.
    return list(dict.fromkeys(lines))
