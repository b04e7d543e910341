"""hf://DATASET[/CONFIG][@REVISION]:SPLIT and hf:///FOLDER:SPLIT: data sets as the `datasets` library knows them.

The library downloads or builds once and keeps Arrow files; those are then read like any other.
"""

import re
from pathlib import Path
from typing import Any

from trainers.errors import JobError

SCHEME = "hf://"
FORM = f"{SCHEME}DATASET[/CONFIG][@REVISION]:SPLIT or {SCHEME}/FOLDER:SPLIT"


def arrow_files(uri: str) -> list[str]:
    """The Arrow files of one split. Raises JobError where there is no such data set or split."""
    body, colon, split = uri.removeprefix(SCHEME).rpartition(":")
    if not colon or not body or not re.fullmatch(r"\w[\w.]*", split):
        raise JobError(f"{uri}: name a data set and one whole split, as in {FORM}")
    dataset = _load(uri, body, split)
    files = [str(one["filename"]) for one in dataset.cache_files]
    if not files or getattr(dataset, "_indices", None) is not None:
        raise JobError(f"{uri}: the data set is not held in Arrow files of its own; save it with save_to_disk first")
    return files


def _load(uri: str, body: str, split: str) -> Any:
    import datasets

    name_or_folder, _, revision = body.partition("@")
    parts = name_or_folder.split("/")
    local = name_or_folder.startswith("/")
    try:
        if local and (Path(name_or_folder) / "dataset_dict.json").is_file():
            return datasets.load_from_disk(name_or_folder)[split]
        if local and (Path(name_or_folder) / "state.json").is_file():
            return datasets.load_from_disk(name_or_folder)
        name, config = (name_or_folder, None) if local else ("/".join(parts[:2]), "/".join(parts[2:]) or None)
        return datasets.load_dataset(name, config, split=split, revision=revision or None)
    except Exception as error:  # a dozen unrelated types; all mean: not available
        first = str(error).splitlines()[0] if str(error) else ""
        raise JobError(
            f"{uri}: no such data set or split ({type(error).__name__}: {first}). Check the spelling, the network, "
            f"or HF_TOKEN for gated data sets; the form is {FORM}"
        ) from error
