"""What small training data comes to, counted before it is sharded: every row is encoded, none is written."""

from collections import Counter
from itertools import islice

import numpy as np
import pyarrow as pa

from orchestrator.planning.preflight import CheckedJob
from trainers.batching.packing import pack_rows
from trainers.errors import DataError
from trainers.shards.worth import single_class
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
        DataError: where a file is damaged, or the data stage would refuse the rows.
    """
    job, split = checked.job, checked.splits[0]
    size = sum(source.size for source in split.sources)
    if size > MOST_BYTES or split.dedup or split.eval_key or job.data.is_mixture:
        return None
    encoder, task = load_encoder(checked.model.path, job.model.trust_remote_code), load_task(job.task)
    rows = (fields for unit in plan_units(split.sources)
            for row, fields in read_unit(unit, split.sources[unit.file], task_columns(job))
            if split.holds(unit.file, row))  # fmt: skip
    parts, outcomes, labels = [np.zeros(0, np.int64)], Counter[str](), Counter[str]()
    while chunk := list(islice(rows, ROWS_AT_ONCE)):
        settled = ["dropped:malformed" if fields is None else None for fields in chunk]
        batch = encode_rows(task, [fields or {} for fields in chunk], encoder, encode_rules(job), settled)
        parts.append(batch.tokens.lengths)
        outcomes.update(batch.outcomes[code] for code in batch.codes.tolist())
        labels.update(task.count_labels(pa.record_batch(dict(batch.extra))) if task.has_labels else {})
    lengths = np.concatenate(parts)
    if single := single_class(job, labels, len(lengths)):
        raise DataError(single)
    _check_dropped(outcomes, job.data.max_drop_fraction)
    sequences = len(pack_rows(lengths, job.data.max_length, job.train.seed)) if job.packing else len(lengths)
    return len(lengths), int(lengths.sum()), sequences


def _check_dropped(outcomes: Counter[str], allowed: float) -> None:
    """Refuse what the data stage would refuse, in a sentence. Raises DataError."""
    dropped = {name.partition(":")[2]: count for name, count in outcomes.most_common() if name.startswith("dropped:")}
    count, total = sum(dropped.values()), outcomes.total()
    if count and (count == total or count > allowed * total):
        reasons = "; ".join(f"{reason} ({number:,})" for reason, number in dropped.items())
        raise DataError(
            f"data.train: {count:,} of {total:,} rows cannot be used: {reasons}. `tuneyard show JOB --reason dropped` "
            "shows them; data.max_drop_fraction allows for some"
        )
