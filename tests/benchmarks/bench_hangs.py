"""A hundred hangs in real ranks: is the right rank named, with phase and line, and how soon after the threshold?

    python tests/benchmarks/bench_hangs.py [--hangs 100]

One training of two ranks; at every third step (the loader works one ahead) one of them is stopped (SIGSTOP), sleeps in
the loader, loops for ever in the forward pass, or leaves out an exchange; each time the controller must find it, say so
and go on.
"""

import argparse
import random
import statistics
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from tests.conftest import make_tokenizer
from tests.recovery import events_of, losses, run_training
from tests.tiny import film_rows, make_bert, shard_locally, tiny_job

KINDS = {"stop": "step", "sleep_loader": "data", "endless_forward": "step", "skip": "settle"}
"""Phase in which the rank is found: after leaving out an exchange it waits in the next."""
HANG_AFTER_S = 2.0


def main() -> None:
    """Hang, count, print the table."""
    import ray

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hangs", type=int, default=100)
    arguments = parser.parse_args()
    draw = random.Random(0)
    faults = [
        {"kind": list(KINDS)[number % 4], "rank": draw.randrange(2), "step": 3 * number + 1}
        for number in range(arguments.hangs)
    ]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = make_bert(folder / "model", make_tokenizer(folder / "tokenizer"))
        job = tiny_job(
            folder, model, "classify", film_rows(120), train={"steps": 3 * arguments.hangs + 2},
            scale={"workers": 2, "max_failures": 100, "hang_after_s": HANG_AFTER_S}, checkpoint={"every_steps": 1},
            evaluate={"while_training": False},
        )  # fmt: skip
        shard_locally(job)
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        undisturbed, run = losses(run_training(job, "undisturbed")), run_training(job, "hanging", *faults)
        ray.shutdown()
        right, delays = score(run, faults)
        print("| fault | injected | named rightly |\n| --- | --- | --- |")
        for kind in KINDS:
            print(f"| {kind} | {sum(one['kind'] == kind for one in faults)} | {right[kind]} |")
        print(f"named after the threshold: median {statistics.median(delays):.1f} s, longest {max(delays):.1f} s")
        print(f"losses equal to the undisturbed run: {losses(run) == undisturbed}")


def score(run: Path, faults: list[dict[str, Any]]) -> tuple[Counter[str], list[float]]:
    """How many were named with rank, phase and line, by kind; seconds from the threshold to each report."""
    right, delays = Counter[str](), []
    hangs = {event.step: event for event in events_of(run, "hang")}
    progress = [event.time for kind in ("step", "start") for event in events_of(run, kind)]
    for fault in faults:
        event = hangs.get(fault["step"] + 1)
        if event is None:
            continue
        named = event.rank == fault["rank"] and event.phase == KINDS[fault["kind"]]
        right[fault["kind"]] += named and ".py:" in event.line
        delays.append(event.time - max(time for time in progress if time < event.time) - HANG_AFTER_S)
    return right, delays


if __name__ == "__main__":
    main()
