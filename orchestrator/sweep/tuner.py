"""Ray Tune as the hands of a sweep: it runs legs as processes, as many beside each other as the cluster holds.

What to run comes from `Desk`, and what is known stands in the sweep's own record: Tune's is pickled, so it is never
read, and gone with the command. A trial of Tune's is one leg. It takes no cores: Tune would hold them, and the node
agents would wait for ever.
"""

import logging
import os
from typing import Any, Protocol

import ray
from ray import tune
from ray.tune.search import Searcher

from orchestrator.sweep.leg import STOP, Leg, LegEnd, run_leg
from orchestrator.training.placement import slots_of
from trainers.job.schema import Job
from trainers.storage import Folder

TUNE = "tune"
"""Folder for what Tune writes, in the sweep's; all nodes must see it."""
NO_CORES = {"CPU": 0, "memory": 1}
"""Tune wants a process to take something: a byte."""
QUIET = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "86400",
    "RAY_AIR_NEW_OUTPUT": "0",
}


class Desk(Protocol):
    """Gives out legs and takes them back."""

    def next_leg(self) -> tuple[int, Leg] | None:
        """The trial to train now, with its leg; None where none can until one comes back."""

    def take(self, number: int, end: LegEnd | None) -> None:
        """A leg has ended; None where its process died without a word."""

    def say(self, number: int, line: str) -> None:
        """A leg tells something."""

    def wants_stop(self) -> bool:
        """Whether the user or the machine wants the sweep to stop."""


class Legs(Searcher):  # type: ignore[misc]
    """Tune asks for its next trial here: the next leg."""

    def __init__(self, desk: Desk) -> None:
        super().__init__()
        self._desk = desk
        self._out: dict[str, tuple[int, Any]] = {}
        """Trial and leg by Tune's name of it."""

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def set_search_properties(self, *_: Any, **__: Any) -> bool:
        """The space is the desk's."""
        return True

    def suggest(self, trial_id: str) -> Any:
        """The next leg; None makes Tune ask again."""
        found = None if self._desk.wants_stop() else self._desk.next_leg()
        if found is None:
            return None if self._out else Searcher.FINISHED
        number, leg = found
        self._out[trial_id] = number, ray.put(leg)  # as an object: JSON would not hold the credentials of storage
        return {"number": number, "leg": self._out[trial_id][1]}

    def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
        """A leg has come back."""
        end = None if error or not result or not result.get("end") else LegEnd.model_validate_json(result["end"])
        self._desk.take(self._out.pop(trial_id)[0], end)

    def save(self, checkpoint_path: str) -> None:
        """The sweep's record is kept elsewhere."""

    def restore(self, checkpoint_path: str) -> None:
        """Never asked for."""


class Messenger(tune.Callback):  # type: ignore[misc]
    """Takes what legs tell to the desk, and the wish to stop to the legs."""

    def __init__(self, desk: Desk, folder: Folder) -> None:
        self._desk, self._folder = desk, folder
        self._told = False

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: Any, **_: Any) -> None:
        """A leg's line."""
        if result.get("line"):
            self._desk.say(trial.config["number"], result["line"])

    def on_step_begin(self, iteration: int, trials: Any, **_: Any) -> None:
        """A round of Tune's loop."""
        if not self._told and self._desk.wants_stop():
            self._folder.write_bytes(STOP, b"")
            self._told = True


def run_legs(desk: Desk, folder: Folder, at_once: int) -> None:
    """Run legs until the desk has none and all have come back."""
    os.environ.update(QUIET)
    for name in ("ray.tune", "ray.train"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    _clear(folder)
    plan = tune.TuneConfig(
        search_alg=Legs(desk), num_samples=-1, max_concurrent_trials=at_once,
        reuse_actors=True,  # the next leg finds a process with its imports done
    )  # fmt: skip
    place = tune.RunConfig(
        name=TUNE, storage_path=str(folder.path.absolute()), verbose=0, callbacks=[Messenger(desk, folder)]
    )
    try:
        tune.Tuner(tune.with_resources(_leg, NO_CORES), tune_config=plan, run_config=place).fit()
    finally:
        _clear(folder)


def trials_at_once(job: Job, gpus: int) -> int:
    """Trials that the cluster holds beside each other, each with all its workers."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    slots = sum(slots_of(node, job.scale.cpus_per_worker, gpus) for node in nodes)
    return max(slots // job.scale.max_workers, 1)


def _clear(folder: Folder) -> None:
    folder.delete(STOP)
    folder.delete(TUNE)


def _leg(config: dict[str, Any]) -> None:
    """What Tune runs, in a process beside that of the command, which runs more legs after it."""
    end = run_leg(ray.get(config["leg"]), lambda line: tune.report({"line": line, "end": None}))
    tune.report({"line": None, "end": end.model_dump_json()})
