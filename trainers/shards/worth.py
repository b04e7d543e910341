"""Whether rows say anything: training rows to tell apart, and evaluation rows that give the metric of the job."""

from collections.abc import Mapping

import pyarrow as pa
import pyarrow.compute as pc

from trainers.errors import DataError
from trainers.job.schema import Job
from trainers.shards.manifest import ShardManifest, Shards, shards_folder
from trainers.storage import Folder
from trainers.tasks import choose_metric

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


def metric_refusal(job: Job, shards: Shards) -> str | None:
    """Why the evaluation rows cannot give the metric that chooses the best checkpoint; None where they can."""
    metric, held = choose_metric(job)[0], shards.eval
    if metric in CORRELATIONS and (same := single_score(job, held)):
        return f"evaluate.metric: {metric} is not defined: {same}; or choose another metric, such as loss"
    if metric != "auroc":
        return None
    rows = held.total("rows")
    lacking = [name for name in shards.train.labels if not held.labels.get(name)]
    everywhere = [name for name, count in held.labels.items() if count == rows]
    if lacking or everywhere:
        what = f"no evaluation row has {lacking[:5]}" if lacking else f"every evaluation row has {everywhere[:5]}"
        return f"evaluate.metric: auroc is not defined: {what}; add rows to data.eval, or choose another metric"
    return None


def check_metric(job: Job, shards: Shards) -> None:
    """Refuse before the training what would leave its checkpoints without the metric. Raises DataError."""
    if refusal := metric_refusal(job, shards):
        raise DataError(refusal)
