"""Which files a split is read from: patterns to files, each with its format, compression and content digest.

Knows names and bytes, nothing of rows. Begin at `find_sources`.
"""

import difflib
import fnmatch
import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

import pyarrow as pa
import pyarrow.fs as pafs
import xxhash

from trainers.errors import JobError
from trainers.job.schema import PAIR, FormatName
from trainers.sources.hub import SCHEME, arrow_files
from trainers.sources.splits import check_one_split
from trainers.storage import filesystem_of, is_remote

SUFFIXES: dict[str, FormatName] = {
    **dict.fromkeys(("jsonl", "ndjson"), "jsonl"),
    **dict.fromkeys(("arrow", "feather"), "arrow"),
    **dict.fromkeys(("conll", "conllu", "iob", "iob2", "bio"), "conll"),
    **dict.fromkeys(("txt", "text"), "text"),
    **{name: name for name in ("json", "csv", "tsv", "parquet")},
}
COMPRESSIONS = {"gz": "gzip", "zst": "zstd"}
COLUMNAR: frozenset[FormatName] = frozenset({"parquet", "arrow"})
"""Formats that compress inside the file, so never as a whole."""
WHOLE_DIGEST_BYTES = 2**30
END_BYTES = 2**20
BLOCK_BYTES = 4 * 2**20
RECORDS = ("dataset_info.json", "state.json")
"""What `datasets` writes beside the data that it saves."""
WILDCARD = re.compile(r"[*?\[]")


@dataclass(frozen=True)
class SourceFile:
    """One input file."""

    uri: str
    """Absolute local path, or URI."""
    format: FormatName
    compression: str | None
    """gzip, zstd, or None."""
    size: int
    """Bytes as stored."""
    digest: str
    """xxh3-128 of the content; past 1 GiB of size, modification time and the first and last MiB."""


@dataclass(frozen=True)
class _Named:
    """A file that a pattern names, before it is read."""

    uri: str
    info: pafs.FileInfo

    @property
    def name(self) -> str:
        return str(self.info.base_name)


def find_sources(
    patterns: Sequence[str], format: FormatName | None, where: str, digests: bool = True, task: str = ""
) -> tuple[SourceFile, ...]:
    """The files that paths, globs and folders name, sorted by name, each once.

    Args:
        patterns: absolute paths or URIs; `*`, `?`, `[]` match within a name, `**` matches folders. A folder stands for
            the files of a known format below it; names that begin with a dot or an underscore are passed over.
        format: read every file as this; None tells it from the name.
        where: the key of the job file that the patterns come from, for messages.
        digests: read every file for its digest; without, it is empty.
        task: what the rows are for: plain text has no tags, so text files are columns for `tag`.

    Raises:
        JobError: with every pattern that names nothing and every file whose format cannot be told.
    """
    problems: list[str] = []
    named: dict[str, tuple[_Named, FormatName, str | None]] = {}
    pairs: dict[str, tuple[_Named, _Named]] = {}
    for pattern in patterns:
        try:
            if PAIR in pattern:
                pairs |= {PAIR.join(file.uri for file in pair): pair for pair in _resolve_pairs(pattern)}
                continue
            for file in _resolve(pattern, format):
                kind = None if pattern.startswith(SCHEME) else format
                form, compression = _kind(file.uri, file.name, kind)
                named[file.uri] = (file, "conll" if (form, task) == ("text", "tag") else form, compression)
        except JobError as error:
            problems += error.problems
    if problems:
        raise JobError(problems, where)
    sources = [_source(*named[uri], where, digests) for uri in named]
    sources += [_parallel(uri, *pairs[uri], where, digests) for uri in pairs]
    return tuple(sorted(sources, key=lambda source: source.uri))


def entries_of(sources: Sequence[SourceFile], patterns: Sequence[str], format: FormatName | None) -> tuple[int, ...]:
    """For each source the first of the patterns that names it."""
    entry: dict[str, int] = {}
    for place, pattern in enumerate(patterns):
        found = _resolve_pairs(pattern) if PAIR in pattern else [(named,) for named in _resolve(pattern, format)]
        for names in found:
            entry.setdefault(PAIR.join(named.uri for named in names), place)
    return tuple(entry[source.uri] for source in sources)


def source_key(sources: Sequence[SourceFile]) -> str:
    """Digest of what the files hold and how they are read, in order; where they lie does not count."""
    lines = (f"{source.digest} {source.format} {source.compression}" for source in sources)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def format_of(name: str) -> FormatName | None:
    """The format a file name tells, its compression suffix aside; None where it tells none."""
    parts = PurePosixPath(name).name.lower().split(".")
    if len(parts) > 2 and parts[-1] in COMPRESSIONS:
        parts.pop()
    return SUFFIXES.get(parts[-1]) if len(parts) > 1 else None


def compression_of(name: str) -> str | None:
    return COMPRESSIONS.get(name.lower().rpartition(".")[2])


def _kind(uri: str, name: str, format: FormatName | None) -> tuple[FormatName, str | None]:
    form, compression = format or format_of(name), compression_of(name)
    if form is None:
        known = ", ".join(SUFFIXES)
        raise JobError(
            f"{uri}: its name tells no format. Set data.format, or name it one of {known} (or those .gz, .zst)"
        )
    if compression and form in COLUMNAR:
        raise JobError(
            f"{uri}: {form} is compressed inside the file, never as a whole. Unpack it with its own tool first"
        )
    return form, compression


def _source(named: _Named, format: FormatName, compression: str | None, where: str, digests: bool) -> SourceFile:
    try:
        digest = _digest(named) if digests else ""
    except (OSError, pa.ArrowException) as error:
        raise JobError(f"{named.uri} cannot be read: {error}", where) from error
    return SourceFile(named.uri, format, compression, int(named.info.size), digest)


def _parallel(uri: str, first: _Named, second: _Named, where: str, digests: bool) -> SourceFile:
    """Two text files as one source."""
    parts = [_source(one, "text", compression_of(one.name), where, digests) for one in (first, second)]
    digest = xxhash.xxh3_128_hexdigest(" ".join(f"{part.digest} {part.compression}" for part in parts).encode())
    return SourceFile(uri, "parallel", None, sum(part.size for part in parts), digest if digests else "")


def _resolve_pairs(pattern: str) -> list[tuple[_Named, _Named]]:
    """The files of a parallel text: of two globs, each with the one at its place among the sorted. Raises JobError."""
    sides = [sorted(_resolve(part, "text"), key=lambda named: named.uri) for part in pattern.split(PAIR)]
    if len(sides) != 2 or len(sides[0]) != len(sides[1]):
        raise JobError(f"{pattern}: {' and '.join(str(len(side)) for side in sides)} files; parallel texts are pairs")
    return list(zip(*sides, strict=True))


def _digest(named: _Named) -> str:
    fs, path = filesystem_of(named.uri)
    hasher, size = xxhash.xxh3_128(), int(named.info.size)
    with fs.open_input_file(path) as stream:
        if size <= WHOLE_DIGEST_BYTES:
            while block := stream.read(BLOCK_BYTES):
                hasher.update(block)
        else:
            hasher.update(f"{size} {named.info.mtime_ns}".encode())
            hasher.update(stream.read(END_BYTES))
            stream.seek(size - END_BYTES)
            hasher.update(stream.read(END_BYTES))
    return str(hasher.hexdigest())


def _resolve(pattern: str, format: FormatName | None) -> list[_Named]:
    if pattern.startswith(SCHEME):
        return [_Named(file, _look(file)) for file in arrow_files(pattern)]
    try:
        return _resolve_place(pattern, format)
    except (OSError, pa.ArrowException) as error:
        raise JobError(f"{pattern} cannot be read: {error}") from error


def _resolve_place(pattern: str, format: FormatName | None) -> list[_Named]:
    place, question, query = pattern.partition("?") if is_remote(pattern) else (_tidy(pattern), "", "")
    options = question + query  # of a URI, such as an endpoint
    wild = WILDCARD.search(place)
    if not wild or not is_remote(place):
        info = _look(place + options)
        if info.type == pafs.FileType.File:
            return [_Named(place + options, info)]
        if info.type == pafs.FileType.Directory:
            return _under(place, options, _folder_files(place + options, info.path, format))
        if not wild:
            raise JobError(f"{pattern}: no such file or folder{_hint(place, options)}")
    root = place[: place.rfind("/", 0, wild.start())]
    fs, base = filesystem_of((root or "/") + options)
    infos = list(_expand(fs, base, place[len(root) + 1 :].split("/")))
    if not infos:
        raise JobError(f"{pattern}: matches no file{_hint(place, options)}")
    return _under(root, options, infos)


def _under(root: str, options: str, infos: Sequence[pafs.FileInfo]) -> list[_Named]:
    """Files found below a folder, each named in the folder's own way."""
    root = root.rstrip("/")
    base = filesystem_of((root or "/") + options)[1].rstrip("/")
    return [_Named(root + info.path[len(base) :] + options, info) for info in infos]


def _look(uri: str) -> pafs.FileInfo:
    fs, path = filesystem_of(uri)
    return fs.get_file_info(path)


def _tidy(uri: str) -> str:
    """Local paths as the file system writes them, so that one file has one name."""
    return uri if is_remote(uri) else filesystem_of(uri)[1]


def _list(fs: pafs.FileSystem, base: str, recursive: bool = False) -> list[pafs.FileInfo]:
    return list(fs.get_file_info(pafs.FileSelector(base or "/", recursive=recursive, allow_not_found=True)))


def _expand(fs: pafs.FileSystem, base: str, segments: Sequence[str]) -> Iterator[pafs.FileInfo]:
    """Files below `base` whose path matches the segments, as a shell would match them."""
    head, *tail = segments
    if head == "**":
        for folder in (base, *_folders(fs, base)):
            yield from _expand(fs, folder, tail or ["*"])
        return
    for info in _list(fs, base):
        if not fnmatch.fnmatchcase(info.base_name, head) or (info.base_name[0] == "." and head[0] != "."):
            continue
        if not tail and info.type == pafs.FileType.File:
            yield info
        elif tail and info.type == pafs.FileType.Directory:
            yield from _expand(fs, info.path, tail)


def _folders(fs: pafs.FileSystem, base: str) -> list[str]:
    infos = [info for info in _list(fs, base, recursive=True) if info.type == pafs.FileType.Directory]
    return [info.path for info in infos if not _hidden(info.path[len(base) :], (".",))]


def _hidden(relative: str, marks: tuple[str, ...] = (".", "_")) -> bool:
    return any(part.startswith(marks) for part in relative.split("/") if part)


def _folder_files(pattern: str, path: str, format: FormatName | None) -> list[pafs.FileInfo]:
    """Data files below a folder; refused where they are of several formats, as a README.txt beside data would be."""
    fs, _ = filesystem_of(pattern)
    infos = [info for info in _list(fs, path, recursive=True) if info.type == pafs.FileType.File]
    infos = [info for info in infos if not _hidden(info.path[len(path) :])]
    check_one_split(pattern, [info.path[len(path) :].lstrip("/") for info in infos])
    infos = [info for info in infos if info.base_name not in RECORDS] or infos
    kinds = {kind for info in infos if (kind := format_of(info.base_name))}
    wanted = format or (next(iter(kinds)) if len(kinds) == 1 else None)
    chosen = [info for info in infos if wanted and format_of(info.base_name) == wanted]
    if chosen:
        return chosen
    listed = ", ".join(sorted(kinds)) or "no file of a known format"
    if wanted is None and kinds:
        raise JobError(
            f"{pattern}: the folder holds several formats ({listed}). Set data.format or use a glob such as *.jsonl"
        )
    asked = f"no {format} file" if format else "no data file"
    raise JobError(f"{pattern}: {asked} in this folder (it holds {listed}). Use a glob to name files of other names")


def _hint(path: str, options: str = "") -> str:
    """What exists nearest to a path that does not: a similar name in the same folder, or the folder that is missing."""
    parent, _, name = path.rstrip("/").rpartition("/")
    if not parent or parent.endswith(":/"):
        return ""
    if _look(parent + options).type != pafs.FileType.Directory:
        return f"; the folder {parent} does not exist" + _hint(parent, options)
    fs, inner = filesystem_of(parent + options)
    names = sorted(info.base_name for info in _list(fs, inner))
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if near:
        return f"; did you mean {parent}/{near[0]}?"
    return f"; {parent} holds {', '.join(names[:5]) or 'nothing'}{', ...' if len(names) > 5 else ''}"
