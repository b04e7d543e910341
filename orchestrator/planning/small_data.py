"""What small training data comes to, counted before it is sharded: every row is encoded, none is written."""

from itertools import islice

import numpy as np

from orchestrator.planning.preflight import CheckedJob
from trainers.batching.packing import pack_rows
from trainers.sources.readers import plan_units, read_unit, task_columns
from trainers.tasks import encode_rows, encode_rules, load_task
from trainers.tokenizer.encoder import load_encoder

MOST_BYTES = 4 * 2**20
"""Sources up to this are counted, which takes a second at most; larger ones are estimated."""
ROWS_AT_ONCE = 2000


def count_small(checked: CheckedJob) -> tuple[int, int, int] | None:
    """Rows, tokens and sequences of an epoch; None for larger data, and where rows are left out or shown again by what
    the whole set holds.

    Raises:
        DataError: where a file is damaged.
    """
    job, split = checked.job, checked.splits[0]
    size = sum(source.size for source in split.sources)
    if size > MOST_BYTES or split.dedup or split.eval_key or job.data.is_mixture:
        return None
    encoder, task = load_encoder(checked.model.path, job.model.trust_remote_code), load_task(job.task)
    rows = (fields for unit in plan_units(split.sources)
            for row, fields in read_unit(unit, split.sources[unit.file], task_columns(job))
            if fields is not None and split.holds(unit.file, row))  # fmt: skip
    parts = [np.zeros(0, np.int64)]
    while chunk := list(islice(rows, ROWS_AT_ONCE)):
        parts.append(encode_rows(task, chunk, encoder, encode_rules(job)).tokens.lengths)
    lengths = np.concatenate(parts)
    sequences = len(pack_rows(lengths, job.data.max_length, job.train.seed)) if job.packing else len(lengths)
    return len(lengths), int(lengths.sum()), sequences
