"""Writes a job file out of another program's configuration. Begin at `import_job`."""

from pathlib import Path
from typing import Any

import yaml

from orchestrator.importing.axolotl import import_axolotl
from orchestrator.importing.defaults import tell_assumed
from orchestrator.importing.draft import Draft
from orchestrator.importing.llamafactory import import_llamafactory
from trainers.errors import JobError
from trainers.job.load import load_job

KINDS = {"base_model": ("axolotl", import_axolotl), "model_name_or_path": ("LLaMA-Factory", import_llamafactory)}
"""By the key that names the model there."""


def import_job(path: Path, out: Path) -> dict[str, str]:
    """Write a job file that `load_job` takes.

    Returns:
        What is to say of the keys that had no counterpart, or one that is to be looked at.

    Raises:
        JobError: a file of neither program, one that exists, or a result that is no job.
    """
    source = _read(path)
    kind = next((key for key in KINDS if key in source), None)
    if kind is None:
        raise JobError(f"{path} is neither axolotl's (base_model) nor LLaMA-Factory's (model_name_or_path)")
    if out.exists():
        raise JobError(f"{out} exists and is left as it is; name another file")
    program, fill = KINDS[kind]
    draft = Draft(source, path.absolute().parent, out.absolute().parent)
    draft.set("name", out.stem)
    fill(draft)
    draft.job.setdefault("train", {}).setdefault("learning_rate", 5e-5)
    tell_assumed(draft, program)
    listed = "".join(f"#   {key}: {what}\n" for key, what in draft.told.items())
    head = f"# From {path.name} ({program}).\n" + (f"# To look at, or without counterpart:\n{listed}" if listed else "")
    out.write_text(head + yaml.safe_dump(draft.job, sort_keys=False, allow_unicode=True), encoding="utf-8")
    try:
        load_job(out, ())
    except JobError:
        out.rename(out.with_name(f"{out.name}.refused"))
        raise
    return draft.told


def _read(path: Path) -> dict[str, Any]:
    try:
        source = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise JobError(f"{path} cannot be read: {str(error).splitlines()[0]}") from error
    if not isinstance(source, dict):
        raise JobError(f"{path} holds no configuration")
    return source
