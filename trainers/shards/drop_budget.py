"""Whether a job accepts what its shards hold: rows at all, rows dropped within budget, labels that training has seen.

The answer depends on the job, not on the shards, so it is asked each time shards are used, also when they were
written long ago for a job with another budget.
"""

from collections import Counter
from collections.abc import Iterator, Sequence

import pyarrow as pa
import pyarrow.compute as pc

from trainers.errors import DataError
from trainers.job.schema import Job
from trainers.shards.manifest import ShardManifest, Shards, check_labels, shards_folder
from trainers.shards.worth import single_class, single_score
from trainers.sources.files import compression_of, format_of
from trainers.storage import Folder, filesystem_of
from trainers.tasks.chat.turns import LEFT_OUT
from trainers.tasks.classify import CUT

EXAMPLES = 10
EXAMPLE_CHARS = 80
OVERLONG = "dropped:overlong", LEFT_OUT
"""Outcomes of rows that were longer than the job allows, where it does not cut them."""


def check_shards(job: Job, shards: Shards) -> None:
    """Refuse shards that this job may not train on, with every reason. Raises DataError."""
    refusals = [refusal for manifest in shards.all if (refusal := _refusal(job, manifest))]
    refusals += [mixed] if (mixed := _mixed_separators(shards.all)) else []
    refusals += [single] if (single := single_class(job, shards.train.labels, shards.train.total("rows"))) else []
    refusals += [same] if (same := single_score(job, shards.train)) else []
    if refusals:
        raise DataError("\n".join(refusals))
    check_labels(shards)


def _mixed_separators(manifests: Sequence[ShardManifest]) -> str | None:
    """Labels in one text that are cut at one character in some rows and at another in others."""
    cuts: Counter[str] = Counter()
    for manifest in manifests:
        cuts.update({note.removeprefix(CUT): count for note, count in manifest.notes.items() if note.startswith(CUT)})
    if len(cuts) < 2:
        return None
    ways = " and ".join(f"{separator} in {count:,} rows" for separator, count in cuts.most_common())
    return f"label: several labels in one text are cut at {ways}; write one of them, or lists as in JSON, in every row"


def _refusal(job: Job, manifest: ShardManifest) -> str | None:
    name = f"data.{manifest.split}"
    if manifest.rows_in == 0:
        files = ", ".join(manifest.sources[:5])
        why = " after data.eval_fraction took its share; give more rows or data.eval" if job.data.eval_fraction else ""
        return f"{name}: the data set is empty: no rows in {files}{why}"
    folder = shards_folder(Folder(job.storage), manifest.key)
    dropped, total = manifest.dropped, manifest.rows_in
    kept = total - dropped - manifest.removed
    if kept == 0:
        return f"{name}: not one of {total:,} rows can be used\n{_account(job, manifest, folder)}"
    if job.overlong == "error" and (count := sum(manifest.outcomes.get(name, 0) for name in OVERLONG)):
        return (
            f"{name}: {count:,} of {total:,} rows are longer than data.max_length ({job.data.max_length} tokens) and "
            f"data.overlong is error. Raise data.max_length, or set data.overlong to truncate or drop\n"
            f"{_account(job, manifest, folder)}"
        )
    if dropped > job.data.max_drop_fraction * total:
        return (
            f"{name}: {dropped:,} of {total:,} rows are dropped ({dropped / total:.2%}), over data.max_drop_fraction "
            f"({job.data.max_drop_fraction:.2%}). Correct the rows, or set data.max_drop_fraction to at least "
            f"{min(-(-dropped * 10_000 // total) / 10_000, 1.0):.4g}\n{_account(job, manifest, folder)}"
        )
    return None


def _account(job: Job, manifest: ShardManifest, folder: Folder) -> str:
    reasons = sorted((outcome, count) for outcome, count in manifest.outcomes.items() if outcome.startswith("dropped:"))
    lines = [f"  {count:>8,}  {outcome.removeprefix('dropped:')}" for outcome, count in reasons]
    for file, row, outcome in _dropped_rows(manifest, folder):
        uri = manifest.sources[file]
        unit, start = _line_start(uri, row, job)
        lines.append(f"  {uri}, {unit} {row}: {outcome.removeprefix('dropped:')}{start}")
    return "\n".join(lines)


def _dropped_rows(manifest: ShardManifest, folder: Folder) -> Iterator[tuple[int, int, str]]:
    """(file, row, outcome) of the first dropped rows, from as few ledgers as hold them."""
    wanted = EXAMPLES
    for shard in manifest.shards:
        if wanted and any(outcome.startswith("dropped:") for outcome in shard.outcomes):
            with folder.open_input(shard.ledger) as stream:
                table = pa.ipc.open_file(stream).read_all()
                outcomes = pc.cast(table["outcome"], pa.string())
                rows = table.filter(pc.starts_with(outcomes, "dropped:")).slice(0, wanted).to_pylist()
            wanted -= len(rows)
            yield from ((row["file"], row["row"], row["outcome"]) for row in rows)


def _line_start(uri: str, row: int, job: Job) -> tuple[str, str]:
    """What a row number counts in this file, and the start of the line where it can be read at once."""
    if (job.data.format or format_of(uri)) not in ("jsonl", "text"):
        return "row", ""
    if compression_of(uri):
        return "byte", ""
    try:
        fs, path = filesystem_of(uri)
        with fs.open_input_file(path) as stream:
            stream.seek(row)
            line = bytes(stream.read(EXAMPLE_CHARS)).partition(b"\n")[0]
    except OSError:  # an example is a courtesy: the data may have moved since
        return "byte", ""
    return "byte", f"  {line.decode(errors='replace')}"
