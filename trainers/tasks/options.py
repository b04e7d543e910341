"""What tasks need to know of a job, as one small record of plain values; the job itself is never handed to a task."""

from pathlib import Path

from trainers.errors import JobError
from trainers.job.schema import Job
from trainers.job.sections import DataOptions, EvaluateOptions, TrainOptions


class TaskOptions(DataOptions, TrainOptions, EvaluateOptions):
    """Choices of a job that change what a task computes; each is declared in `trainers.job.sections`."""

    packing: bool = False
    """Whether several documents share a sequence."""
    pack_length: int = 0
    """Positions that every batch of packs has at least, for layers that are compiled."""
    dropout: float | None = None
    label_counts: dict[str, int] = {}
    """Training rows by label."""
    label_rows: int = 0
    """Training rows; one with several labels counts for each of them above, and once here."""


DEFAULTS = TaskOptions()


def task_options(job: Job) -> TaskOptions:
    """The choices of a job; of the data nothing is known."""
    sections = ((DataOptions, job.data), (TrainOptions, job.train), (EvaluateOptions, job.evaluate))
    values = {name: getattr(section, name) for options, section in sections for name in options.model_fields}
    values["chat_template"] = read_template(job.data.chat_template)
    return TaskOptions(packing=job.packing, dropout=job.model.dropout, **values)


def read_template(template: str | None) -> str | None:
    """A chat template given as text or as the path of a .jinja file. Raises JobError where there is no such file."""
    if template is None or not template.endswith(".jinja"):
        if template is not None and "{" not in template:
            raise JobError(
                f"data.chat_template: {template[:60]!r} is no template (nothing in it is in braces); give a Jinja "
                "template, or the path of one that ends in .jinja"
            )
        return template
    try:
        return Path(template).read_text(encoding="utf-8")
    except OSError as error:
        raise JobError(f"data.chat_template: {template} cannot be read: {error.strerror}") from error
