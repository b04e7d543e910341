"""The labels of a model's logits, in order: those of its own head where it has one, else as training rows show them.

Also how several labels stand in one text, as csv has them.
"""

import ast
import json
import re
from collections.abc import Iterable
from pathlib import Path

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
        JobError: where that head knows other labels than the data.
    """
    task.labels = task.label_set(shown)
    own = head_labels(model_path, task) if model_path and task.has_labels else None
    if own is None or own == task.labels:
        return
    if all(name.isdecimal() and int(name) < len(own) for name in task.labels):
        task.labels = tuple(map(str, range(len(own))))
        return
    unknown = [name for name in task.labels if not task.knows(name, own)]
    if unknown:
        raise JobError(
            f"model.path: the head of {model_path} knows the labels {list(own)[:20]}, not {unknown[:20]}, which the "
            "data shows. Name the labels alike, or remove the head (save the base model alone) for a new one"
        )
    task.labels = own


def head_labels(model_path: str, task: Task) -> tuple[str, ...] | None:
    """The named labels of a folder's head, in the order of its logits; None if it has no head for this task."""
    try:
        config = json.loads((Path(model_path) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    head = task.auto_class.removeprefix("AutoModel")
    names = config.get("id2label") or {}
    if not any(str(name).endswith(head) for name in config.get("architectures") or ()):
        return None
    labels = tuple(str(names[index]) for index in sorted(names, key=int))
    return None if not labels or all(map(UNNAMED.fullmatch, labels)) else labels
