#!/usr/bin/env python3
"""What a run of `pivotal reject`, `ppo` or `grpo` did to its held-out prompts: Markdown tables, and a curve as SVG.

    scripts/on_policy_curve.py --data fixtures/verifiable/held_out.jsonl [--svg FILE] [--compare A B] NAME=RUN...

Reads evaluation_rollouts.jsonl and timings.jsonl of each run directory. Intervals are 95 % percentile intervals of a bootstrap over
prompts (10,000 draws, one fixed seed), paired: a draw takes a prompt's score before and after together, or in both runs together.
They say how far other prompts of the kind would move the number, not how far another seed of training would. Standard library only.
"""

import argparse
import collections
import html
import json
import pathlib
import random

DRAWS = 10_000


class Run:
    def __init__(self, name, path):
        self.name, self.path = name, path
        self.passed = collections.defaultdict(dict)  # step (of reject: round) -> row -> 1 if every check holds
        for line in (path / "evaluation_rollouts.jsonl").read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            self.passed[record["step"]][record["id"]] = float(record["checks"] == 1.0)
        self.first, self.last = min(self.passed), max(self.passed)
        self.timings = [json.loads(line) for line in (path / "timings.jsonl").read_text(encoding="utf-8").splitlines()]

    def change(self, rows):
        return change(self.passed[self.first], self.passed[self.last], rows)

    def seconds(self, part, until=None):
        steps = (line for line in self.timings if until is None or line["step"] <= until)
        return sum(line[f"{part}_seconds"] for line in steps)

    def minutes(self, until=None):
        return sum(self.seconds(part, until) for part in ("generation", "scoring", "update")) / 60


def mean(values):
    return sum(values) / len(values)


def interval(values):
    """The bootstrap interval of the mean of `values`."""
    draw = random.Random(1)
    means = sorted(mean(draw.choices(values, k=len(values))) for _ in range(DRAWS))
    return means[DRAWS * 25 // 1000], means[DRAWS * 975 // 1000 - 1]


def change(before, after, rows):
    """Mean before and after, and their difference with its interval, over `rows`."""
    differences = [after[row] - before[row] for row in rows]
    low, high = interval(differences)
    return (f"{mean([before[row] for row in rows]):.3f} → {mean([after[row] for row in rows]):.3f}, "
            f"{mean(differences):+.3f} ({low:+.3f} to {high:+.3f})")


def table(head, lines):
    rule = ["---"] * len(head)
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, rule, *lines]) + "\n"


def report(runs, rows, comparisons):
    ids = sorted(rows)
    parts = ("generation", "scoring", "update")
    shares = lambda run: ", ".join(f"{run.seconds(part) / max(60 * run.minutes(), 1e-9):.0%}" for part in parts)
    print(table(
        ["run", "steps", f"held-out prompts of which every check holds ({len(ids)}), start → end", "minutes",
         "sampling, scoring, update", "tokens sampled"],
        [[run.name, str(run.last), run.change(ids), f"{run.minutes():.1f}", shares(run),
          f"{sum(line['sampled_tokens'] for line in run.timings):,}"] for run in runs]))
    for column in ("kind", "wording"):
        names = list(dict.fromkeys(rows[row][column] for row in ids))
        picked = {name: [row for row in ids if rows[row][column] == name] for name in names}
        print(table(
            [column] + [run.name for run in runs],
            [[f"{name} ({len(of)})"] + [run.change(of) for run in runs] for name, of in picked.items()]))
    by_name = {run.name: run for run in runs}
    for one, other in comparisons:
        one, other = by_name[one], by_name[other]
        print(f"{one.name} → {other.name} at the end: {change(one.passed[one.last], other.passed[other.last], ids)}")


COLOURS = [("#0b6b8f", "#63bce0"), ("#a8480f", "#f0a06a"), ("#4d6b1f", "#a7cc6c"), ("#7a3f8f", "#cf9be0")]
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 640, 340, 46, 150, 28, 40


def svg(runs, ids):
    """Share of held-out prompts of which every check holds, against minutes of training, with the interval of each mean."""
    longest = max(run.minutes() for run in runs)
    x = lambda minutes: LEFT + (WIDTH - LEFT - RIGHT) * minutes / longest
    y = lambda score: TOP + (HEIGHT - TOP - BOTTOM) * (1 - score)
    point = lambda minutes, score: f"{x(minutes):.1f},{y(score):.1f}"
    style = ["svg{background:#fcfcfb;font:12px system-ui,sans-serif}text{fill:#1d2126}.quiet{fill:#656c75}.rule{stroke:#d9dcdf}"]
    dark = ["svg{background:#15181c}text{fill:#e4e6e8}.quiet{fill:#9aa2ab}.rule{stroke:#343a41}"]
    parts, labels = [], []
    for tick in range(0, 11, 2):
        parts.append(f'<line class="rule" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(tick / 10):.1f}" y2="{y(tick / 10):.1f}"/>'
                     f'<text class="quiet" x="{LEFT - 6}" y="{y(tick / 10) + 4:.1f}" text-anchor="end">{tick / 10:.1f}</text>')
    every = next(step for step in (1, 2, 5, 10, 20, 50, 100, 1000) if longest / step <= 8)
    for tick in range(0, int(longest) + 1, every):
        parts.append(f'<text class="quiet" x="{x(tick):.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{tick}</text>')
    for index, run in enumerate(runs):
        steps = sorted(run.passed)
        at = [run.minutes(step) for step in steps]
        means = [mean([run.passed[step][row] for row in ids]) for step in steps]
        bounds = [interval([run.passed[step][row] for row in ids]) for step in steps]
        band = [point(m, high) for m, (_, high) in zip(at, bounds)] + [point(m, low) for m, (low, _) in reversed(list(zip(at, bounds)))]
        light, night = COLOURS[index % len(COLOURS)]
        style.append(f".s{index}{{stroke:{light};fill:{light}}}")
        dark.append(f".s{index}{{stroke:{night};fill:{night}}}")
        parts.append(f'<polygon class="s{index}" points="{" ".join(band)}" style="stroke:none;fill-opacity:.13"/>'
                     f'<polyline class="s{index}" points="{" ".join(map(point, at, means))}" style="fill:none" stroke-width="2"/>')
        parts += [f'<circle class="s{index}" cx="{x(m):.1f}" cy="{y(value):.1f}" r="3"><title>step {step}: {value:.3f}</title></circle>'
                  for step, m, value in zip(steps, at, means)]
        labels.append([y(means[-1]), index, f"{run.name} {means[0]:.2f} → {means[-1]:.2f}", x(at[-1])])
    labels.sort()
    for before, label in zip(labels, labels[1:]):
        label[0] = max(label[0], before[0] + 16)
    parts += [f'<text x="{WIDTH - RIGHT + 8}" y="{height + 4:.1f}"><tspan class="s{index}" style="stroke:none">●</tspan> {html.escape(text)}</text>'
              for height, index, text, _ in labels]
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
            f'aria-label="Share of held-out prompts of which every check holds, against minutes of training">\n<style>{"".join(style)}'
            f'@media(prefers-color-scheme:dark){{{"".join(dark)}}}</style>\n'
            f'<text x="{LEFT}" y="16">Share of held-out prompts of which every check holds (95 % interval over prompts)</text>\n'
            + "\n".join(parts) + f'\n<text class="quiet" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 8}" text-anchor="middle">'
            "minutes of sampling, scoring and updates</text>\n</svg>\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="NAME=RUN")
    parser.add_argument("--data", type=pathlib.Path, required=True)
    parser.add_argument("--svg", type=pathlib.Path)
    parser.add_argument("--compare", nargs=2, action="append", default=[], metavar=("A", "B"))
    arguments = parser.parse_args()
    lines = arguments.data.read_text(encoding="utf-8").splitlines()
    rows = {row: json.loads(line) for row, line in enumerate(lines, 1)}
    runs = [Run(name, pathlib.Path(path)) for name, path in (run.split("=", 1) for run in arguments.runs)]
    report(runs, rows, arguments.compare)
    if arguments.svg:
        arguments.svg.write_text(svg(runs, sorted(rows)), encoding="utf-8")


if __name__ == "__main__":
    main()
