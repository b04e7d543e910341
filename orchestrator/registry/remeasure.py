"""`tuneyard registry verify --metric`: the metrics of a registered version, computed again from its folder and the
evaluation rows of its run. Weights that were changed together with their digests are found by this alone.
"""

import math
from collections.abc import Mapping

import yaml

from orchestrator.registry.read import ModelVersion
from trainers.errors import EvaluationError
from trainers.evaluation.device import computed_on
from trainers.evaluation.evaluate import evaluate_model
from trainers.job.load import parse_job
from trainers.job.schema import Job
from trainers.model.world import pick_device
from trainers.records import Record
from trainers.run.record import job_task
from trainers.shards.dataset import ShardSet
from trainers.shards.keys import BESIDE
from trainers.shards.manifest import ShardManifest, read_manifest, shards_folder
from trainers.storage import Folder
from trainers.tasks import SET

TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}
"""On another device or with another torch: how far a metric may lie from the recorded one, as a share of it, or as it
is where it lies below 1. By the type that the model computes in."""


class MetricCheck(Record):
    """One metric of a version, computed again."""

    metric: str
    recorded: float
    again: float | None
    """None where it was not computed again."""
    state: str
    """ok, not computed with the reason, or what is wrong."""


class Remeasured(Record):
    """What `remeasure` found."""

    recorded_on: str
    computed_on: str
    tolerance: float
    """0: the same device, processor and torch, so every bit must be the same."""
    rows: int
    metrics: list[MetricCheck]

    @property
    def different(self) -> list[str]:
        """Metrics that are not as they were recorded."""
        return [check.metric for check in self.metrics if check.state.startswith("differs")]


def remeasure(version: ModelVersion) -> Remeasured:
    """Evaluate a version's folder again, on the rows that it was chosen by.

    Raises:
        EvaluationError: where these rows are not there any more.
    """
    job = parse_job(yaml.safe_load(version.lineage["job"]))
    own = set(job.evaluate.metrics)
    job = job.model_copy(update={"evaluate": job.evaluate.model_copy(update={"metrics": {}})})
    storage = Folder(version.run).parent.parent
    task = job_task(job, _shards(storage, version, "train"), version.source)
    found: dict[str, float] = {}
    rows = 0
    for name in ("", *job.data.eval_sets):
        manifest = _shards(storage, version, f"{BESIDE}{name}" if name else "eval")
        shards = ShardSet(shards_folder(storage, manifest.key), manifest, task)
        numbers = evaluate_model(job, task, version.source, shards)[1]
        found |= {f"{metric}{name and SET}{name}": value for metric, value in task.measure(numbers).items()}
        rows += len(next(iter(numbers.values())))
    here = computed_on(pick_device(job.scale.gpus_per_worker))
    tolerance = 0.0 if here == version.computed_on else TOLERANCE[job.model.dtype]
    skipped = dict.fromkeys(own, "not computed: the job's own metric, whose code is not run from a registry")
    checks = [_check(metric, value, found, tolerance, _skipped(metric, job, skipped))
              for metric, value in version.metrics.items()]  # fmt: skip
    return Remeasured(
        recorded_on=version.computed_on or "unknown", computed_on=here, tolerance=tolerance, rows=rows, metrics=checks
    )


def _shards(storage: Folder, version: ModelVersion, split: str) -> ShardManifest:
    key = version.lineage.get(f"data.{split}.key")
    folder = shards_folder(storage, key or "unknown")
    manifest = read_manifest(folder) if key else None
    if manifest is None:
        raise EvaluationError(
            f"the metrics of {version.model} version {version.version} cannot be computed again: the {split} shards "
            f"{folder} are not there any more. `tuneyard shard` with the run's job file writes them again from the "
            f"same data; the job stands in {version.run}/job.yaml"
        )
    return manifest


def _skipped(metric: str, job: Job, own: Mapping[str, str]) -> str | None:
    """Why a metric is not computed again, or None."""
    name, _, place = metric.partition(SET)
    if place and place not in job.data.eval_sets:
        return "not computed: `tuneyard evaluate --lm-eval` asks the task again"
    return own.get(name)


def _check(metric: str, recorded: float, found: Mapping[str, float], tolerance: float, why: str | None) -> MetricCheck:
    again = found.get(metric)
    if again is None:
        return MetricCheck(metric=metric, recorded=recorded, again=None, state=why or "differs: it is not defined now")
    apart = abs(again - recorded)
    if again == recorded or (math.isnan(again) and math.isnan(recorded)):
        state = "ok"
    elif apart <= tolerance * max(1.0, abs(recorded)):
        state = "ok, within the tolerance"
    else:
        state = f"differs by {again - recorded:+.4g}"
    return MetricCheck(metric=metric, recorded=recorded, again=again, state=state)
