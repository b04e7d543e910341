"""The identity of a split's shards: what they were made from, as a key with a digest for each part.

Two jobs that read the same bytes in the same way share shards; the number of workers never counts. Needs neither Ray
nor torch nor a tokenizer, so that every launcher can find the shards. Begin at `plan_splits`.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any

import xxhash

from trainers.errors import JobError
from trainers.job.load import task_fields
from trainers.job.schema import TASK_FIELDS, Job
from trainers.shards.drop_budget import check_shards
from trainers.shards.duplicates import DedupMode
from trainers.shards.manifest import ShardManifest, ShardRecord, Shards, read_manifest, shards_folder
from trainers.sources import readers
from trainers.sources.files import SourceFile, entries_of, find_sources, source_key
from trainers.sources.formats.columnar import declared_classes
from trainers.storage import Folder
from trainers.tasks.options import task_options
from trainers.tokenizer.encoder import NO_TOKENIZER, tokenizer_files

ENCODER_VERSION = 8
"""Raised whenever the same inputs would give other shards."""
SplitName = str
"""train, eval, or eval_sets.NAME."""
BESIDE = "eval_sets."
Sources = Mapping[SplitName, tuple[SourceFile, ...]]
LABEL_FIELDS = ("label", "tags")


@dataclass(frozen=True)
class SplitPlan:
    """One split of a job: its files, its share of their rows, and its identity."""

    name: SplitName
    sources: tuple[SourceFile, ...]
    fraction: float | None
    """Share of the rows held out for eval, where both splits are read from the same files."""
    key_parts: Mapping[str, str]
    """Digest of each thing that decides what the shards hold."""
    dedup: DedupMode | None = None
    """Which repeats are left out."""
    eval_key: str | None = None
    """Shards whose rows are left out of this split."""
    entries: tuple[int, ...] = ()
    """For each source the entry of data.train that names it, where a mixture tells them apart."""
    label_column: str | None = None
    """The column whose declared classes give the labels their order."""

    @property
    def key(self) -> str:
        """16 hexadecimal characters."""
        return _digest(sorted(self.key_parts.items()))

    def unit_digest(self, unit: readers.Unit) -> str:
        """Digest of all that decides a unit's shard; without dedup the other files of the split do not count."""
        alone = {} if self.dedup else {"sources": "", "mixture": ""}
        source = self.sources[unit.file]
        identity = [source.digest, source.format, source.compression, unit.file, *astuple(unit.span)]
        return _digest([sorted({**self.key_parts, **alone}.items()), identity])

    def holds(self, file: int, row: int) -> bool:
        """Whether a row belongs to this split, by a hash of its file's content and its place there."""
        if self.fraction is None:
            return True
        draw = xxhash.xxh3_64_intdigest(f"{self.sources[file].digest}:{row}".encode())
        return (draw < self.fraction * 2**64) == (self.name == "eval")


Splits = tuple[SplitPlan, ...]
"""The train and the eval split, and those of data.eval_sets."""


def split_names(job: Job) -> tuple[SplitName, ...]:
    """The splits that have files of their own, as they are called below `data`."""
    held_out = job.data.eval_fraction is not None and not job.data.eval
    return ("train", *(() if held_out else ("eval",)), *(f"{BESIDE}{name}" for name in job.data.eval_sets))


def find_split(job: Job, name: SplitName) -> tuple[SourceFile, ...]:
    """The files of one of `split_names`, the content of each read once. Raises JobError with every path that names
    nothing."""
    beside = {f"{BESIDE}{each}": paths for each, paths in job.data.eval_sets.items()}
    patterns = {"train": job.data.train_paths, "eval": job.data.eval_paths, **beside}[name]
    try:
        return find_sources(patterns, job.data.format, f"data.{name}", task=job.task)
    except JobError as error:
        raise JobError([f"data.{name}: {problem}" for problem in error.problems]) from error


def split_sources(job: Job, find: Callable[[Job, SplitName], tuple[SourceFile, ...]] = find_split) -> Sources:
    """The files of all splits, each as `find` gives them. Raises JobError with every problem: paths that name nothing,
    where `find_split` looks for them."""
    sources: dict[SplitName, tuple[SourceFile, ...]] = {}
    problems: list[str] = []
    for name in split_names(job):
        try:
            sources[name] = find(job, name)
        except JobError as error:
            problems += error.problems
    if problems:
        raise JobError(problems)
    return with_eval(sources)


def with_eval(sources: Sources) -> Sources:
    """Where the evaluation rows are held out, their files are those of the training."""
    return {"train": sources["train"], "eval": sources["train"], **sources}


def plan_splits(job: Job, model_path: str, sources: Sources | None = None) -> Splits:
    """The splits of a job: train, eval, and those beside.

    Args:
        job: the job.
        model_path: folder of the prepared model, for its tokenizer.
        sources: the files of all, where the caller has read them.

    Raises:
        JobError: with every path that names nothing.
    """
    sources, tokenizer = sources or split_sources(job), _tokenizer_digest(Path(model_path))
    evaluation = _plan(job, "eval", sources["eval"], tokenizer)
    beside = [_plan(job, name, files, tokenizer) for name, files in sources.items() if name.startswith(BESIDE)]
    return _training_plan(job, _plan(job, "train", sources["train"], tokenizer), evaluation), evaluation, *beside


def _training_plan(job: Job, plan: SplitPlan, evaluation: SplitPlan) -> SplitPlan:
    """The training split with what applies to it alone; only what is asked for becomes a part of the key."""
    parts = dict(plan.key_parts)
    entries: tuple[int, ...] = ()
    if job.data.dedup:
        parts["dedup"] = job.data.dedup
    if job.data.decontaminate == "drop":
        parts["decontaminate"] = evaluation.key
    if job.data.is_mixture:
        entries = entries_of(plan.sources, job.data.train_paths, job.data.format)
        parts["mixture"] = _digest(entries)
    eval_key = evaluation.key if job.data.decontaminate == "drop" else None
    return replace(plan, key_parts=parts, dedup=job.data.dedup, eval_key=eval_key, entries=entries)


def load_shards(job: Job, splits: Splits) -> Shards | None:
    """The committed shards of a job's splits, or None where they have not been written.

    Raises:
        DataError: where the shards are damaged, or the job refuses what they hold.
    """
    storage = Folder(job.storage)
    manifests = {plan.name: read_manifest(shards_folder(storage, plan.key)) for plan in splits}
    shards = gather_shards({name: found for name, found in manifests.items() if found})
    if shards is None or None in manifests.values():
        return None
    check_shards(job, shards)
    return shards


def gather_shards(manifests: Mapping[SplitName, ShardManifest]) -> Shards | None:
    """Shards from manifests by split; None where train or eval is missing."""
    if not {"train", "eval"} <= manifests.keys():
        return None
    beside = {name.removeprefix(BESIDE): one for name, one in manifests.items() if name.startswith(BESIDE)}
    return Shards(train=manifests["train"], eval=manifests["eval"], beside=beside)


def manifest_of(
    plan: SplitPlan,
    task: str,
    records: Mapping[int, ShardRecord],
    library: str = "tokenizers",
    fallback_reason: str | None = None,
) -> ShardManifest:
    """The manifest of a finished split, from the records of its shards by number."""
    return ShardManifest(
        key=plan.key,
        key_parts=dict(plan.key_parts),
        split=plan.name,
        task=task,
        sources=tuple(source.uri for source in plan.sources),
        shards=tuple(records[index] for index in sorted(records)),
        tokenizer=library,
        fallback_reason=fallback_reason,
        entries=plan.entries,
        class_names=_declared(plan),
    )


def _declared(plan: SplitPlan) -> tuple[str, ...]:
    """The classes that the sources declare for the labels: each once, in the order of the files."""
    if plan.label_column is None:
        return ()
    names = (name for source in plan.sources for name in declared_classes(source, plan.label_column))
    return tuple(dict.fromkeys(names))


def _plan(job: Job, name: SplitName, sources: tuple[SourceFile, ...], tokenizer: str) -> SplitPlan:
    fraction = None if name.startswith(BESIDE) else job.data.eval_fraction
    parts = {
        "sources": source_key(sources),
        "tokenizer": tokenizer,
        "columns": _digest([job.task, readers.task_columns(job)]),
        "length": _digest([job.data.max_length, job.overlong]),
        "form": _digest(_form(job)),
        "encoder": _digest([ENCODER_VERSION, readers.UNIT_BYTES]),
        "split": _digest([name, fraction]),
    }
    label = next((field for field in LABEL_FIELDS if field in TASK_FIELDS[job.task][0]), None)
    return SplitPlan(name, sources, fraction, parts, label_column=job.column(label) if label else None)


def _form(job: Job) -> list[Any]:
    """Choices that change how a row is written down, beside its length: of `train` only what is for this task."""
    options = task_options(job).model_dump(mode="json")
    return [
        options[key] if section == "data" or job.task in mark.tasks else None
        for section, key, mark in task_fields()
        if mark.shapes_shards
    ]


def _tokenizer_digest(folder: Path) -> str:
    held = tokenizer_files(folder)
    if not held:
        raise JobError(NO_TOKENIZER.format(folder=folder))
    return _digest([[name, xxhash.xxh3_128_hexdigest((folder / name).read_bytes())] for name in held])


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
