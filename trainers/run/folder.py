"""The run folder: its names, and the records that stages leave in it as JSON. Torch-free.

<storage>/runs/<name>-<hash8>/
    job.yaml shards.json plan.json result.json events.jsonl report.html
    checkpoints/step-00000100/   evals/step-00000100.{json,arrow}   export/step-00000100/   tensorboard/   logs/
"""

import hashlib
import re
from typing import Any, Literal

from trainers.errors import describe, to_record
from trainers.job.schema import Job
from trainers.records import Record
from trainers.run.events import EvaluationEvent
from trainers.shards.manifest import Shards
from trainers.storage import Folder

STEP_NAME = re.compile(r"step-(\d{8})")
RESULT = "result.json"
CLEANED = "cleaned.json"
"""Left in the folder of a run whose checkpoints a sweep deleted, or that starts over, with the time: it begins anew."""
JOB_FILE = "job.yaml"
SHARDS = "shards.json"
"""Keys of the shards that the run is trained and evaluated on, so that nobody clears them away."""


def checkpoints_folder(job: Job, run: Folder) -> Folder:
    """Where a run's checkpoints are: in its folder, or under `checkpoint.storage`."""
    place = run if job.checkpoint.storage is None else Folder(job.checkpoint.storage) / "runs" / run.name
    return place / "checkpoints"


def step_name(step: int) -> str:
    """Folder or file stem of a step."""
    return f"step-{step:08d}"


def parse_step(name: str) -> int | None:
    """The step a name stands for, or None."""
    found = STEP_NAME.match(name)
    return int(found.group(1)) if found else None


def run_folder(job: Job, model_digest: str, shards: Shards) -> Folder:
    """Where this job's run lives. Other data, another model or other settings give another folder."""
    parts = (job.identity(), model_digest, *(split.key for split in shards.all))
    digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()
    return Folder(job.storage) / "runs" / f"{job.name}-{digest[:8]}"


class Evaluation(Record):
    """What became of one checkpoint's evaluation: evals/step-XXXXXXXX.json.

    Beside a successful one, evals/step-XXXXXXXX.arrow holds what `Task.score` said of each evaluation row.
    """

    step: int
    status: Literal["done", "failed"]
    metrics: dict[str, float] = {}
    intervals: dict[str, tuple[float, float]] = {}
    """Of each metric: the 95 % interval of the bootstrap over evaluation rows. One without has a note that says why."""
    notes: dict[str, str] = {}
    """What makes a metric comparable, such as sacreBLEU's signature, by its name."""
    guards: dict[str, float] = {}
    """By how much each metric of evaluate.guards is better than its guard; below 0 or nan: never chosen."""
    error: str | None = None
    cause: dict[str, Any] | None = None
    """The error as `trainers.errors.to_record` gives it."""
    eval_key: str
    """Key of the evaluation shards; only metrics over the same key compare."""
    computed_on: str = ""
    """Kind of device and version of torch, as `trainers.evaluation.device.computed_on` says it; empty where several
    processes shared the rows on GPUs."""
    rows: int = 0
    seconds: float = 0.0


def failed_evaluation(step: int, eval_key: str, error: BaseException) -> Evaluation:
    """The record of an evaluation that ended with an error."""
    cause = to_record(error)
    return Evaluation(step=step, status="failed", error=describe(cause), cause=cause, eval_key=eval_key)


def evaluation_event(record: Evaluation, held_s: float = 0.0) -> EvaluationEvent:
    """An evaluation as an event of the run's log; see there for `held_s`."""
    return EvaluationEvent(
        step=record.step, status=record.status, metrics=record.metrics, error=record.error, held_s=held_s
    )


def write_evaluation(run: Folder, record: Evaluation) -> None:
    """Commit a record."""
    (run / "evals").write_bytes(f"{step_name(record.step)}.json", record.model_dump_json(indent=1).encode())


def read_evaluations(run: Folder, eval_key: str | None = None) -> list[Evaluation]:
    """Committed records, by step; one that cannot be read counts as absent.

    Args:
        eval_key: only those over these evaluation shards.
    """
    folder, records = run / "evals", []
    for name in folder.list():
        if not name.endswith(".json") or parse_step(name) is None:
            continue
        try:
            record = Evaluation.model_validate_json(folder.read_bytes(name))
        except ValueError:
            continue
        records += [record] if eval_key in (None, record.eval_key) else []
    return records


class RegisteredVersion(Record):
    """One version in the model registry."""

    model: str
    version: int
    alias: str | None
    """champion, where this version holds it."""
    step: int
    source: str
    """The exported Hugging Face folder."""
    decision: str
    """Why it was, or was not, promoted."""


class RunResult(Record):
    """result.json: the outcome of a whole run."""

    schema_version: int = 1
    status: Literal["done", "failed", "preempted"]
    error: str | None = None
    best: dict[str, object] | None = None
    """step, metric, value, metrics."""
    registry: RegisteredVersion | None = None
    evaluations: tuple[Evaluation, ...] = ()
    intervals: dict[str, tuple[float, float]] = {}
    """Of each metric of the best: the 95 % interval of the bootstrap over evaluation rows."""
    baselines: dict[str, dict[str, float]] = {}
    """Metrics of answers that need no reading, by what they are."""
    steps: int = 0
    tokens: int = 0
    restarts: int = 0
    goodput: float = 0.0
    """Share of the training stage's wall time that went into steps that were kept."""
    accounting: dict[str, float] = {}
    """Seconds of the run's wall time by what they went into; see trainers/run/goodput.py."""
    seconds: dict[str, float] = {}
    """Wall time by stage."""


def read_result(run: Folder) -> RunResult | None:
    """The committed result, None if there is none. Raises ValueError if it is damaged."""
    try:
        return RunResult.model_validate_json(run.read_bytes(RESULT))
    except FileNotFoundError:
        return None


def promoted_steps(run: Folder) -> set[int]:
    """Steps of this run that were registered."""
    try:
        result = read_result(run)
    except ValueError:
        return set()
    return {result.registry.step} if result and result.registry else set()
