"""What a committed set of shards says of itself. Torch-free: the controller, the trainers and the tools all read it."""

from collections.abc import Iterable, Mapping

from pydantic import BaseModel, ConfigDict

from trainers.errors import DataError
from trainers.storage import Folder

MANIFEST = "manifest.json"
KEPT, TRUNCATED, SPLIT = "kept", "truncated", "split"


class Record(BaseModel):
    """Base of the records that stages leave behind as JSON: frozen, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")


class ShardRecord(Record):
    """One committed shard: `file` holds the sequences, `ledger` one line per input row."""

    file: str
    ledger: str
    source: int
    """The file it was read from, as an index into the manifest's sources."""
    rows: int
    """Sequences in `file` (a split input row gives several)."""
    tokens: int
    targets: int
    """Tokens, or rows, that the loss is taken over."""
    bytes: int
    digest: str
    """xxh3-128 of `file`."""
    outcomes: dict[str, int]
    """Input rows by outcome: kept, truncated, split, dropped:REASON, or removed:REASON where the job asked for that."""
    tokens_lost: int
    """Tokens cut off from truncated rows."""
    labels: dict[str, int] = {}
    """Rows by label, where the task has one."""


class ShardManifest(Record):
    """A whole split, committed by the existence of this record beside its shards."""

    schema_version: int = 1
    key: str
    key_parts: dict[str, str]
    """Digest of each input that the key is made of; a miss names the part that changed."""
    split: str
    """train or eval."""
    task: str
    sources: tuple[str, ...]
    """The files read; `file` in shards and ledgers is an index into this."""
    shards: tuple[ShardRecord, ...]
    tokenizer: str = "tokenizers"
    """The library that made the ids; which one never changes them."""
    fallback_reason: str | None = None
    """Where a quicker library was caught giving other ids, so that the split was written without it."""
    entries: tuple[int, ...] = ()
    """For each source the entry of data.train that names it, where a mixture tells them apart."""

    def total(self, name: str) -> int:
        """Sum of one numeric field (rows, tokens, targets, bytes, tokens_lost) over the shards."""
        return sum(int(getattr(shard, name)) for shard in self.shards)

    @property
    def outcomes(self) -> dict[str, int]:
        """Input rows by outcome, over all shards."""
        return add_counts(shard.outcomes for shard in self.shards)

    @property
    def labels(self) -> dict[str, int]:
        """Rows by label, over all shards, in sorted order of the label."""
        return dict(sorted(add_counts(shard.labels for shard in self.shards).items()))

    @property
    def rows_in(self) -> int:
        """Input rows: every one is in `outcomes` exactly once."""
        return sum(self.outcomes.values())

    @property
    def dropped(self) -> int:
        """Input rows that could not be used."""
        return sum(count for outcome, count in self.outcomes.items() if outcome.startswith("dropped:"))

    @property
    def removed(self) -> int:
        """Input rows left out because the job asked for it: duplicates, or rows of the evaluation set."""
        return sum(count for outcome, count in self.outcomes.items() if outcome.startswith("removed:"))


class Shards(Record):
    """The two splits of a job, ready to train on."""

    train: ShardManifest
    eval: ShardManifest


def add_counts(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """Sum several dictionaries of counts."""
    total: dict[str, int] = {}
    for one in counts:
        for name, count in one.items():
            total[name] = total.get(name, 0) + count
    return total


def shards_folder(storage: Folder, key: str) -> Folder:
    """Where the shards of a key live; shared by all runs of the storage."""
    return storage / "shards" / key


def read_manifest(folder: Folder) -> ShardManifest | None:
    """The manifest of a committed set, or None where there is none yet. Raises DataError where it is damaged."""
    try:
        data = folder.read_bytes(MANIFEST)
    except FileNotFoundError:
        return None
    try:
        return ShardManifest.model_validate_json(data)
    except ValueError as error:
        raise DataError(
            f"{folder / MANIFEST} is damaged or of another version: {error}. Remove {folder} to shard again"
        ) from error


def check_labels(shards: Shards) -> None:
    """Refuse evaluation rows whose label training never saw. Raises DataError."""
    unseen = {label: count for label, count in shards.eval.labels.items() if label not in shards.train.labels}
    if unseen:
        listed = ", ".join(f"{label!r} ({count} rows)" for label, count in list(unseen.items())[:10])
        known = ", ".join(repr(label) for label in list(shards.train.labels)[:10])
        raise DataError(
            f"labels in data.eval that data.train never shows: {listed}. Known: {known}. "
            "Correct the labels, remove those rows, or add training rows with them"
        )
