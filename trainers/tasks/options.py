"""What tasks need to know of a job, as one small record of plain values; the job itself is never handed to a task."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from trainers.job.schema import Job


@dataclass(frozen=True)
class TaskOptions:
    """Choices of a job that change what a task computes. The meaning of each stands in `trainers.job.schema`."""

    seed: int = 0
    dropout: float | None = None
    label_smoothing: float = 0.0
    multi_label: bool = False
    class_weights: Mapping[str, float] | str | None = None
    mask_fraction: float = 0.15
    whole_words: bool = False
    objective: str = "regression"
    score_range: tuple[float, float] = (0.0, 1.0)
    window_overlap: int = 128
    no_answer_threshold: float = 0.0
    prompt: str | None = None
    max_target_length: int = 128
    chat_template: str | None = None
    generate: Mapping[str, Any] | None = None
    """Arguments of transformers' generate."""
    bleu_tokenize: str = "13a"
    label_counts: Mapping[str, int] = field(default_factory=dict)
    """Training rows by label."""


DEFAULTS = TaskOptions()


def task_options(job: Job) -> TaskOptions:
    """The choices of a job; `label_counts` is left to whoever knows the shards."""
    data, train, evaluate = job.data, job.train, job.evaluate
    return TaskOptions(
        seed=train.seed,
        dropout=job.model.dropout,
        label_smoothing=train.label_smoothing,
        multi_label=data.multi_label,
        class_weights=train.class_weights,
        mask_fraction=train.mask.fraction,
        whole_words=train.mask.whole_words,
        objective=train.objective,
        score_range=data.score_range,
        window_overlap=data.window_overlap,
        no_answer_threshold=evaluate.no_answer_threshold,
        prompt=data.prompt,
        max_target_length=data.max_target_length,
        chat_template=read_template(data.chat_template),
        generate=evaluate.generate.model_dump() if evaluate.generate else None,
        bleu_tokenize=evaluate.bleu_tokenize,
    )


def read_template(template: str | None) -> str | None:
    """A chat template given as text or as the path of a .jinja file. Raises JobError where there is no such file."""
    if template is None or not template.endswith(".jinja"):
        return template
    from pathlib import Path

    from trainers.errors import JobError

    try:
        return Path(template).read_text(encoding="utf-8")
    except OSError as error:
        raise JobError(f"data.chat_template: {template} cannot be read: {error.strerror}") from error
