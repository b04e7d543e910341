"""Whether rows say anything: training rows to tell apart, and evaluation rows that give the metric of the job."""

from collections.abc import Mapping

import pyarrow as pa
import pyarrow.compute as pc

from trainers.errors import DataError
from trainers.job.schema import Job
from trainers.shards.manifest import ShardManifest, Shards, shards_folder
from trainers.storage import Folder
from trainers.tasks import SET, choose_metric, load_task
from trainers.tasks.labels import name_labels
from trainers.tasks.metrics.classes import MOST_SCORED

CORRELATIONS = ("spearman", "pearson")


def single_class(job: Job, labels: Mapping[str, int], rows: int) -> str | None:
    """Why training rows with these labels, each with its number of rows, teach nothing; None where they do."""
    if not labels or (len(labels) > 1 if job.task == "tag" else min(labels.values()) < rows):
        return None
    kind, field = ("tag", "tags") if job.task == "tag" else ("label", "label")
    shown = " and ".join(map(repr, list(labels)[:5]))
    alone = " alone" if job.task == "tag" or job.data.multi_label else ""
    return (
        f"data.train: all {rows:,} rows have the {kind} {shown}{alone}, so there is nothing to tell apart; "
        f"add rows with other {kind}s, or name the right column for {field} in data.columns"
    )


def single_score(job: Job, manifest: ShardManifest) -> str | None:
    """Why the scores of a split say nothing: they are all the same."""
    if job.task != "similarity":
        return None
    folder = shards_folder(Folder(job.storage), manifest.key)
    seen: set[float] = set()
    for shard in manifest.shards:
        with folder.open_input(shard.file) as stream:
            seen.update(pc.min_max(pa.ipc.open_file(stream).read_all()["score"]).as_py().values())
        if len(seen - {None}) > 1:
            return None
    score = next(iter(seen - {None}), None)
    return None if score is None else (
        f"data.{manifest.split}: all {manifest.total('rows'):,} rows have the score {score:g}, so there is nothing to "
        "correlate; add rows with other scores, or name the right column for score in data.columns"
    )  # fmt: skip


def metric_refusal(job: Job, shards: Shards, model_path: str) -> str | None:
    """Why evaluation rows cannot give the metric that chooses the best checkpoint, or one that guards it; None where
    they can. A head of the model's own may know labels beside those of the rows."""
    wanted = [("evaluate.metric", choose_metric(job)[0], shards.eval)]
    for guard in job.evaluate.guards:
        metric, _, name = guard.partition(SET)
        wanted.append((f"evaluate.guards.{guard}", metric, shards.held[name]))
    for field, metric, held in wanted:
        if why := _undefined(job, metric, held, shards.train, model_path):
            return f"{field}: {metric} is not defined: {why}"
    return None


def _undefined(job: Job, metric: str, held: ShardManifest, train: ShardManifest, model_path: str) -> str | None:
    """Why the rows of an evaluation set cannot give a metric of the task's, with the remedy."""
    where = f"add rows to data.{held.split}, or choose another metric"
    if metric in job.evaluate.metrics:
        return None
    if metric in CORRELATIONS and (same := single_score(job, held)):
        return f"{same}; or choose another metric, such as loss"
    if job.task == "extract" and metric.startswith("best_") and _all_answered(job, held):
        return f"every question of data.{held.split} has an answer, so there is no threshold to choose; use " + (
            metric.removeprefix("best_")
        )
    if job.task != "classify" or metric != "auroc":
        return None
    task, rows = load_task(job.task), held.total("rows")
    name_labels(task, train.labels, model_path)
    if len(task.labels) > MOST_SCORED and not job.data.multi_label:
        return f"it is computed for up to {MOST_SCORED} classes, and here are {len(task.labels)}; choose another metric"
    lacking = [name for name in task.labels if not held.labels.get(name)]
    everywhere = [name for name, count in held.labels.items() if count == rows]
    if not lacking and not everywhere:
        return None
    what = f"no evaluation row has {lacking[:5]}" if lacking else f"every evaluation row has {everywhere[:5]}"
    of_head = lacking and lacking[0] not in train.labels
    return f"{what}{', which the head of model.path knows' if of_head else ''}; {where}"


def _all_answered(job: Job, manifest: ShardManifest) -> bool:
    """Whether every question of a split has an answer."""
    folder = shards_folder(Folder(job.storage), manifest.key)
    for shard in manifest.shards:
        with folder.open_input(shard.file) as stream:
            if pc.min(pc.list_value_length(pa.ipc.open_file(stream).read_all()["answers"])).as_py() == 0:
                return False
    return True


def check_metric(job: Job, shards: Shards, model_path: str) -> None:
    """Refuse before the training what would leave its checkpoints without a metric. Raises DataError."""
    if refusal := metric_refusal(job, shards, model_path):
        raise DataError(refusal)
