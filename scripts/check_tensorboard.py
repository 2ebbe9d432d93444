"""Does TensorBoard read the events of a run, and are they the run's metrics?

    python scripts/check_tensorboard.py RUN     # a run made with --tensorboard true
    python scripts/check_tensorboard.py --bytes

With RUN, reads the events with TensorBoard's own reader and compares every scalar of every step with `metrics.jsonl`:
each step once, in order, each value the f32 nearest to the line's. Exit status: 0 if all agree, 1 if not. With `--bytes`,
prints two records made by TensorBoard's own protobufs and writer: the unit test of `pivotal-train/src/event_file.rs`
holds them.
"""

import argparse
import io
import json
import pathlib
import sys

import numpy
from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter


def known_bytes() -> list[str]:
    events = [
        Event(wall_time=1_700_000_000.25, file_version="brain.Event:2"),
        Event(
            wall_time=1_700_000_001.5,
            step=300,
            summary=Summary(
                value=[
                    Summary.Value(tag="kl/k1", simple_value=-0.125),
                    Summary.Value(tag="loss", simple_value=0.6931471805599453),
                ]
            ),
        ),
    ]
    printed = []
    for event in events:
        buffer = io.BytesIO()
        RecordWriter(buffer).write(event.SerializeToString())
        printed.append(buffer.getvalue().hex())
    return printed


def scalars(prefix: str, value) -> dict[str, float]:
    if isinstance(value, dict):
        found = {}
        for key, inner in value.items():
            found |= scalars(f"{prefix}/{key}" if prefix else key, inner)
        return found
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return {prefix: value}
    return {}


def check(run: pathlib.Path) -> int:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    expected = [(line.pop("step"), scalars("", line)) for line in lines]
    (path,) = (run / "tensorboard").iterdir()
    events = list(LegacyEventFileLoader(str(path)).Load())
    if events[0].file_version != "brain.Event:2":
        print(f"the first event has version {events[0].file_version!r}")
        return 1
    found = [
        (event.step, {value.tag: value.simple_value for value in event.summary.value}) for event in events[1:]
    ]
    if [step for step, _ in found] != [step for step, _ in expected]:
        print(f"steps {[step for step, _ in found]}, expected {[step for step, _ in expected]}")
        return 1
    values = 0
    for (step, scalars_found), (_, scalars_expected) in zip(found, expected):
        nearest = {tag: float(numpy.float32(value)) for tag, value in scalars_expected.items()}
        if scalars_found != nearest:
            print(f"step {step}: {scalars_found}, expected {nearest}")
            return 1
        values += len(nearest)
    accumulator = EventAccumulator(str(run / "tensorboard"))
    accumulator.Reload()
    tags = sorted({tag for _, of_step in expected for tag in of_step})
    # Scalars may appear as such or as tensors, by the reader's version.
    shown = sorted(accumulator.Tags()["scalars"] + accumulator.Tags()["tensors"])
    if shown != tags:
        print(f"TensorBoard shows {shown}, expected {tags}")
        return 1
    print(f"{len(found)} steps, {values} values, {len(tags)} tags: all agree")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", type=pathlib.Path)
    parser.add_argument("--bytes", action="store_true")
    arguments = parser.parse_args()
    if arguments.bytes:
        print("\n".join(known_bytes()))
        return 0
    if arguments.run is None:
        parser.error("give a run or --bytes")
    return check(arguments.run)


if __name__ == "__main__":
    sys.exit(main())
