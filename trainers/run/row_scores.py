"""What an evaluation said of each row: evals/step-XXXXXXXX.arrow. Torch-free.

Metrics are sums over these numbers, so keeping them lets two checkpoints be compared row by row long after the models
are gone. Knows the file's form; what the columns mean is the task's business.
"""

import json
from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa

from trainers.errors import EvaluationError
from trainers.records import Array
from trainers.run.folder import step_name
from trainers.storage import Folder

ROW = "row"
"""Column with the place of a document in the evaluation split."""


def row_scores_name(step: int, name: str = "") -> str:
    """Path of the file inside the run folder; name: of an evaluation set beside the deciding one."""
    return f"evals/{step_name(step)}{name and '.'}{name}.arrow"


LABELS = b"labels"


def write_row_scores(
    run: Folder, step: int, rows: Array, row_scores: Mapping[str, Array], labels: Sequence[str] = (), name: str = ""
) -> None:
    """Store what `Task.score` returned for all documents, sorted by row.

    Args:
        run: the run folder.
        step: the checkpoint that was evaluated.
        rows: int [documents], the documents' places in the evaluation split, each once, in any order.
        row_scores: the task's numbers, each [documents], aligned with `rows`.
        labels: names of the classes, kept beside the numbers.
        name: of an evaluation set beside the deciding one.

    Raises:
        EvaluationError: where a row stands twice or a column is of another length.
    """
    rows = np.asarray(rows, dtype=np.int64)
    lengths = {name: len(values) for name, values in row_scores.items() if len(values) != len(rows)}
    if lengths:
        raise EvaluationError(f"evaluation of step {step}: {len(rows)} rows, but columns of length {lengths}")
    order = np.argsort(rows, kind="stable")
    if len(np.unique(rows)) != len(rows):
        twice = rows[order][1:][np.diff(rows[order]) == 0]
        raise EvaluationError(f"evaluation of step {step} scored rows more than once: {twice[:10].tolist()}")
    table = pa.table({ROW: rows[order], **{name: np.asarray(values)[order] for name, values in row_scores.items()}})
    table = table.replace_schema_metadata({LABELS: json.dumps(list(labels)).encode()})
    with run.open_output(row_scores_name(step, name)) as stream, pa.ipc.new_file(stream, table.schema) as writer:
        writer.write_table(table)


def read_labels(run: Folder, step: int) -> list[str]:
    """Names of the classes of one evaluation; none where it is missing or its task has none."""
    try:
        with run.open_input(row_scores_name(step)) as stream:
            metadata = pa.ipc.open_file(stream).schema.metadata or {}
    except (OSError, pa.ArrowException):
        return []
    names: list[str] = json.loads(metadata.get(LABELS, b"[]"))
    return names


def read_row_scores(run: Folder, step: int, name: str = "") -> dict[str, Array]:
    """The columns of one evaluation, `row` among them, sorted by row.

    Args:
        name: of an evaluation set beside the deciding one.

    Raises:
        EvaluationError: where the file is missing or damaged.
    """
    file = row_scores_name(step, name)
    try:
        with run.open_input(file) as stream:
            table = pa.ipc.open_file(stream).read_all()
            return {column: _values(table[column].combine_chunks()) for column in table.column_names}
    except FileNotFoundError:
        raise EvaluationError(
            f"{run / file} is missing, so step {step} cannot be compared; `tuneyard evaluate` writes it again"
        ) from None
    except (pa.ArrowException, OSError) as error:
        raise EvaluationError(f"{run / file} is damaged ({error}); `tuneyard evaluate` writes it again") from error


def _values(column: pa.Array) -> Array:
    """A column's numbers or texts, [rows]; pyarrow's own `to_numpy` imports pandas, 0.3 s of CPU."""
    if pa.types.is_integer(column.type) or pa.types.is_floating(column.type):
        return np.from_dlpack(column).copy()
    return np.array(column.to_pylist(), dtype=bool if pa.types.is_boolean(column.type) else object)
