"""The labels of a model's logits, in order: those of its own head where it has one, else as training rows show them.

Also how several labels stand in one text, as csv has them.
"""

import ast
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from trainers.errors import JobError
from trainers.tasks.base import Task

UNNAMED = re.compile(r"LABEL_\d+")
"""What transformers calls a label that nobody named."""
SEPARATORS = (";", "|", ",")
ITEM = r"""(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|-?(?:0|[1-9]\d*))"""
ITEMS = re.compile(rf"\s*(?:{ITEM}\s*(?:,\s*{ITEM}\s*)*,?\s*)?")
"""What stands inside a list as JSON or Python writes it, of quoted names or integers."""
BRACKETS = ("[]", "()", "{}")


def read_list(text: str) -> tuple[list[str], str] | None:
    """Several labels in one text, and what separates them ("" in a written list, or where there is one).

    None where that can be read in more than one way: with two separators, or brackets without a list in them.
    """
    text = text.strip()
    if text[:1] + text[-1:] in BRACKETS[:2] and ITEMS.fullmatch(text[1:-1]):
        return [str(item) for item in ast.literal_eval(f"[{text[1:-1]}]")], ""
    found = [separator for separator in SEPARATORS if separator in text]
    if len(found) > 1 or text[:1] in [pair[0] for pair in BRACKETS]:
        return None
    parts = text.split(found[0]) if found else [text]
    return [part.strip() for part in parts if part.strip()], "".join(found)


def name_labels(task: Task, shown: Iterable[str], model_path: str | None = None) -> None:
    """Give a task its labels.

    Args:
        shown: labels of the training rows, in the order for a new head.
        model_path: the folder of the model. A head of its own keeps its order, so that each logit means what its
            `id2label` says; integers are taken as its indices.

    Raises:
        JobError: where that head knows other labels than the data, or has names for none and another number of outputs.
    """
    task.labels = task.label_set(shown)
    own = head_labels(model_path, task) if model_path and task.has_labels else None
    size = head_size(model_path, task) if model_path and own is None else len(own or ())
    if size and all(name.isdecimal() and int(name) < size for name in task.labels):
        task.labels = tuple(map(str, range(size)))
    if own is None and size and len(task.labels) != size:
        raise JobError(_other_size(task.labels, size, str(model_path)))
    if own is None or own == task.labels or task.labels == tuple(map(str, range(size or 0))):
        return
    unknown = [name for name in task.labels if not task.knows(name, own)]
    if unknown:
        raise JobError(
            f"model.path: the head of {model_path} knows the labels {list(own)[:20]}, not {unknown[:20]}, which the "
            "data shows. Name the labels alike, or remove the head (save the base model alone) for a new one"
        )
    task.labels = own


def check_head(task: Task, shown: Iterable[str], model_path: str, all_shown: bool) -> None:
    """Hold the labels of the first rows against a model's own head, before any shard is written.

    Args:
        all_shown: whether there are no other rows.

    Raises:
        JobError: where no further row could make them fit.
    """
    size, labels = head_size(model_path, task), task.label_set(shown)
    if size is None or all_shown:
        name_labels(task, shown, model_path)
    elif len(labels) > size:
        raise JobError(_other_size(labels, size, model_path))


def _other_size(labels: Sequence[str], size: int, model_path: str) -> str:
    return (
        f"model.path: the head of {model_path} has {size} outputs without names, and the data shows {len(labels)} "
        f"labels, {list(labels[:20])}. Name its outputs in id2label of its config.json, correct the labels, or remove "
        "the head (save the base model alone) for a new one"
    )


def has_head(model_path: str, task: Task) -> bool:
    """Whether a folder has a head of its own for this task's labels."""
    return _head_config(model_path, task) is not None


def head_size(model_path: str, task: Task) -> int | None:
    """Outputs of a folder's head whose labels have no names; None if it has names, or no head for this task."""
    config = _head_config(model_path, task)
    if config is None or head_labels(model_path, task) is not None:
        return None
    return len(config.get("id2label") or ()) or 2  # what transformers does not write down is two


def head_labels(model_path: str, task: Task) -> tuple[str, ...] | None:
    """The named labels of a folder's head, in the order of its logits; None if it has no head for this task."""
    names = (_head_config(model_path, task) or {}).get("id2label") or {}
    labels = tuple(str(names[index]) for index in sorted(names, key=int))
    return None if not labels or all(map(UNNAMED.fullmatch, labels)) else labels


def _head_config(model_path: str, task: Task) -> dict[str, Any] | None:
    """A folder's configuration where the folder has a head for this task that tells labels apart."""
    try:
        config: dict[str, Any] = json.loads((Path(model_path) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    head = task.auto_class.removeprefix("AutoModel")
    has_head = any(str(name).endswith(head) for name in config.get("architectures") or ())
    return config if has_head and task.has_labels else None
