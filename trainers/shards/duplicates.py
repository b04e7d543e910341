"""Which rows of a split repeat another: fingerprints unit by unit, then duplicates hash range by hash range.

The first row in the order of the files stays, whatever the number of workers. exact compares the texts of rows (see
`text_digest`); near finds rows whose sets of five-word shingles overlap by an estimated 80 % or more with the first row
of their bucket, by MinHash and banding (Broder 1997; Leskovec, Rajaraman and Ullman, "Mining of Massive Datasets",
ch. 3).
No process ever holds more than one range of hashes. Begin at `print_unit`.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import xxhash

from trainers.records import Array
from trainers.sources.text_digest import plain, text_of
from trainers.storage import Folder, load_array, save_array

DedupMode = Literal["exact", "near"]
PERMUTATIONS, BANDS = 128, 16
"""With 8 values a band, a pair of 80 % overlap shares a bucket with a probability of 95 %, one of 50 % with 6 %."""
SIMILAR = 0.8
SHINGLE_WORDS = 5
PRINT = np.dtype([("hash", "<u8"), ("check", "<u8"), ("row", "<i8")])
"""exact: 128 bits of digest in hash and check. near: a bucket's hash, and in check the row's line in the signatures."""
LOCATED = np.dtype([*PRINT.descr, ("unit", "<i4")])
REMOVED = np.dtype([("unit", "<i4"), ("row", "<i8")])
OUTCOMES: Mapping[DedupMode, str] = {"exact": "removed:duplicate", "near": "removed:near_duplicate"}


def print_unit(folder: Folder, unit: int, rows: Iterable[tuple[int, Mapping[str, Any] | None]], mode: DedupMode) -> int:
    """Write the fingerprints of a unit's rows, malformed ones left out, in the order of their hashes.

    Returns:
        The number of fingerprints.
    """
    kept = [(row, text_of(fields)) for row, fields in rows if fields is not None]
    places = np.array([row for row, _ in kept], dtype=np.int64)
    if mode == "exact":
        digests = [xxhash.xxh3_128_intdigest(plain(text)) for _, text in kept]
        prints = np.zeros(len(kept), PRINT)
        prints["hash"] = [digest >> 64 for digest in digests]
        prints["check"] = [digest & (2**64 - 1) for digest in digests]
        prints["row"] = places
    else:
        signatures = np.array([_signature(text) for _, text in kept], dtype=np.uint32).reshape(-1, PERMUTATIONS)
        save_array(folder, _signatures_name(unit), signatures)
        prints = _buckets(signatures, places)
    save_array(folder, _prints_name(unit), np.sort(prints, order=["hash", "check", "row"]))
    return len(prints)


@dataclass(frozen=True)
class DuplicateSearch:
    """The fingerprints of a split, to be looked through in `parts` equal ranges of hashes."""

    folder: Folder
    units: Sequence[int]
    parts: int
    mode: DedupMode


def find_duplicates(search: DuplicateSearch, part: int) -> int:
    """Settle one range of hashes, over all units. Returns the number of rows found to be repeats."""
    slices = [prints for unit in search.units if len(prints := _slice(search, unit, part))]
    prints = np.concatenate([np.zeros(0, LOCATED), *slices])
    prints = prints[np.lexsort((prints["row"], prints["unit"], prints["hash"]))]
    if search.mode == "exact":
        prints = prints[np.lexsort((prints["row"], prints["unit"], prints["check"], prints["hash"]))]
        again = np.zeros(len(prints), bool)
        again[1:] = (prints["hash"][1:] == prints["hash"][:-1]) & (prints["check"][1:] == prints["check"][:-1])
    else:
        again = _alike(search.folder, prints)
    removed = np.zeros(int(again.sum()), REMOVED)
    removed["unit"], removed["row"] = prints["unit"][again], prints["row"][again]
    save_array(search.folder, f"removed-{part:04d}.npy", np.unique(removed))
    return len(removed)


def read_removed(folder: Folder, unit: int, mode: DedupMode) -> dict[int, str]:
    """Rows of a unit that repeat an earlier one, with their outcome."""
    rows: set[int] = set()
    for removed in _all_removed(folder):
        low, high = np.searchsorted(removed["unit"], [unit, unit + 1])
        rows.update(removed["row"][low:high].tolist())
    return dict.fromkeys(sorted(rows), OUTCOMES[mode])


@lru_cache(maxsize=1)
def _all_removed(folder: Folder) -> list[Array]:
    return [load_array(folder, name) for name in folder.list() if name.startswith("removed-")]


def _signature(text: str) -> list[int]:
    from rensa import RMinHash

    words = text.lower().split()
    count = max(len(words) - SHINGLE_WORDS + 1, 1)
    sketch = RMinHash(num_perm=PERMUTATIONS, seed=1)
    sketch.update([" ".join(words[start : start + SHINGLE_WORDS]) for start in range(count)])
    values: list[int] = sketch.digest()
    return values


def _buckets(signatures: Array, places: Array) -> Array:
    bands = np.ascontiguousarray(signatures.reshape(len(signatures), BANDS, -1))
    prints = np.zeros(len(signatures) * BANDS, PRINT)
    prints["hash"] = [
        xxhash.xxh3_64_intdigest(bands[line, band].tobytes(), seed=band)
        for line in range(len(signatures))
        for band in range(BANDS)
    ]
    prints["check"] = np.repeat(np.arange(len(signatures)), BANDS)
    prints["row"] = np.repeat(places, BANDS)
    return prints


def _alike(folder: Folder, prints: Array) -> Array:
    """Which prints are of rows that overlap enough with the first row of their bucket."""
    again = np.zeros(len(prints), bool)
    starts = np.flatnonzero(np.concatenate([[True], prints["hash"][1:] != prints["hash"][:-1]]))
    for start, end in zip(starts.tolist(), [*starts[1:].tolist(), len(prints)], strict=True):
        if end - start > 1:
            first = _signature_of(folder, prints[start])
            for place in range(start + 1, end):
                again[place] = float((_signature_of(folder, prints[place]) == first).mean()) >= SIMILAR
    return again


def _signature_of(folder: Folder, located: Any) -> Array:
    signature: Array = _signatures(folder, int(located["unit"]))[int(located["check"])]
    return signature


@lru_cache(maxsize=64)
def _signatures(folder: Folder, unit: int) -> Array:
    return load_array(folder, _signatures_name(unit))


def _slice(search: DuplicateSearch, unit: int, part: int) -> Array:
    prints = load_array(search.folder, _prints_name(unit))
    bounds = [np.uint64(min(2**64 * edge // search.parts, 2**64 - 1)) for edge in (part, part + 1)]
    low = int(np.searchsorted(prints["hash"], bounds[0]))
    high = int(np.searchsorted(prints["hash"], bounds[1])) if part + 1 < search.parts else len(prints)
    located = np.zeros(high - low, LOCATED)
    for name in PRINT.names or ():
        located[name] = prints[name][low:high]
    located["unit"] = unit
    return located


def _prints_name(unit: int) -> str:
    return f"prints-{unit:05d}.npy"


def _signatures_name(unit: int) -> str:
    return f"signatures-{unit:05d}.npy"
