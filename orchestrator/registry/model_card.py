"""The model card of a registered folder: README.md with the metadata that the Hub reads, and how the model was made."""

import math
import re
from collections.abc import Mapping

from trainers.credentials import hide_credentials
from trainers.job.schema import Job
from trainers.run.describe import interval
from trainers.run.folder import Evaluation
from trainers.storage import Folder

CARD = "README.md"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
PIPELINES = {
    "pretrain": "text-generation",
    "sft": "text-generation",
    "mlm": "fill-mask",
    "classify": "text-classification",
    "tag": "token-classification",
    "extract": "question-answering",
    "similarity": "sentence-similarity",
}
"""What the Hub calls a task; it knows none for seq2seq."""


def write_card(source: Folder, job: Job, best: Evaluation, lineage: Mapping[str, str]) -> None:
    """Put a card into an exported folder that has none, such as one that the base model brought along."""
    if not source.exists(CARD):
        source.write_bytes(CARD, card_text(job, best, lineage).encode())


def card_text(job: Job, best: Evaluation, lineage: Mapping[str, str]) -> str:
    """Metadata, then a page."""
    from huggingface_hub import ModelCardData
    from huggingface_hub.repocard_data import EvalResult

    name, told = job.registry.model or job.name, {k: v for k, v in best.metrics.items() if math.isfinite(v)}
    data = hide_credentials(job.data.eval_paths[0] if job.data.eval_paths else job.data.train_paths[0])
    data_name = data.rstrip("/").rpartition("/")[2] or data
    results = [
        EvalResult(task_type=PIPELINES.get(job.task, job.task), dataset_type="private", dataset_name=data_name,
                   metric_type=metric.partition("/")[0], metric_name=metric, metric_value=value)
        for metric, value in told.items()
    ]  # fmt: skip
    metadata = ModelCardData(
        library_name="transformers",
        pipeline_tag=PIPELINES.get(job.task),
        base_model=job.model.path if HUB_ID.fullmatch(job.model.path) else None,
        tags=["tuneyard", job.task],
        model_name=name if results else None,
        eval_results=results or None,
    )
    between = {metric: interval(*pair) for metric, pair in best.intervals.items()}
    rows = "\n".join(f"| {metric} | {value:.4g} | {between.get(metric, '')} |" for metric, value in told.items())
    made = "\n".join(f"- {key}: {value}" for key, value in lineage.items() if "\n" not in value)
    return f"""---
{metadata.to_yaml()}
---

# {name}

Fine-tuned by Tuneyard for the task `{job.task}`: the checkpoint of step
{best.step:,}, the best of its run on {best.rows:,} evaluation rows.

| metric | value | 95 % interval |
| --- | --- | --- |
{rows}

## How it was made

{made}

```yaml
{lineage.get("job", "").strip()}
```
"""
