"""Reads a job file: YAML to a checked `Job`, with every problem found reported at once.

Owns overrides, relative paths and the wording of messages; the schema is `schema.py`'s. Begin at `load_job`.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from trainers.credentials import hide_credentials, take_out
from trainers.errors import JobError
from trainers.job.draft import Draft, make_job
from trainers.job.explain import explain, meant, unknown_key
from trainers.job.schema import TASK_FIELDS, Job
from trainers.job.task_fields import PACKING_TASKS, PLACE, PROMPT_FIELDS, SPLITTING_TASKS, For

UNSHARED = {
    "neftune_alpha": "whose noise goes by the length of what a worker has",
    "distill": "whose teacher reads whole sequences",
    "compile": "whose workers exchange within a layer",
}
"""Settings of the section `train` that do not go with sequences shared by workers, and why."""


def load_job(path: str | Path, overrides: Sequence[str] = ()) -> Job:
    """Read a job file, apply `section.key=value` overrides, and check it.

    Relative paths in the file are taken from the file's own folder, so the same file means the same job from anywhere.

    Raises:
        JobError: with every problem found at once.
    """
    return read_draft(path, overrides).require()


def read_draft(path: str | Path, overrides: Sequence[str] = ()) -> Draft:
    """Read a job file as far as it can be read. Raises JobError where it is no YAML mapping."""
    path = Path(path)
    raw = read_yaml(path)
    problems = [f"--set {hide_credentials(problem)}" for item in overrides if (problem := _override(raw, item))]
    return draft_job(raw, str(path), path.absolute().parent, problems)


def parse_job(raw: dict[str, Any], where: str = "job", base: Path | None = None) -> Job:
    """Check a job given as plain data; credentials in its URIs are taken out. Raises JobError with every problem.

    Args:
        raw: the job.
        where: what messages call it.
        base: the folder that relative paths are taken from; None leaves them.
    """
    return draft_job(raw, where, base).require()


def draft_job(raw: dict[str, Any], where: str, base: Path | None, problems: Sequence[str] = ()) -> Draft:
    """Check a job given as plain data; credentials in its URIs are taken out.

    Args:
        problems: what is known to be wrong already.
    """
    raw = take_out(raw)
    across = _cross_problems(raw)
    job, error, broken = make_job(raw, base)
    broken += [*meant(error), *(place for problem in across if "." in (place := problem.partition(":")[0]))]
    found = [*problems, *explain(error), *across]
    return Draft(job, tuple(dict.fromkeys(found)), tuple(dict.fromkeys(broken)), where)


def _cross_problems(raw: dict[str, Any]) -> list[str]:
    """Rules over several fields, read off the raw data so that they are reported beside the fields' own problems."""
    names = ("data", "train", "scale", "evaluate")
    section = {name: value if isinstance(value := raw.get(name), dict) else {} for name in names}
    data, train, workers, task = section["data"], section["train"], section["scale"].get("workers"), raw.get("task")
    problems = []
    if bool(data.get("eval")) == (data.get("eval_fraction") is not None):
        problems.append("data: give either eval (files) or eval_fraction (a share of the training rows), one of them")
    for key in ("train", "eval"):
        entries = data[key] if isinstance(data.get(key), list) else [data.get(key)]
        problems += [f"data.{key}: {problem}" for entry in entries if isinstance(entry, dict)
                     for problem in _entry_problems(entry, key, task)]  # fmt: skip
    if train.get("activation_offload") and train.get("activation_checkpointing") == "none":
        problems.append("train.activation_offload: needs train.activation_checkpointing, which is none")
    if train.get("activation_offload") and section["scale"].get("gpus_per_worker") == 0:
        problems.append("train.activation_offload: without GPUs all activations lie in host memory; leave it out")
    if train.get("compile") and str(train.get("deepspeed", "")).startswith("zero3"):
        problems.append("train.compile: not under ZeRO-3, whose hooks stand between a layer's operators; leave it out")
    if train.get("compile") and train.get("feed_forward_tiles") is True:
        problems.append(
            "train.compile: not with train.feed_forward_tiles, which cut a layer up; leave out one of the two"
        )
    problems += _sharing_problems(data, train)
    if section["evaluate"].get("early_stopping") and section["evaluate"].get("while_training") is False:
        problems.append("evaluate.early_stopping: nothing is evaluated while_training; leave out one of the two")
    if section["evaluate"].get("on") == "ranks" and section["evaluate"].get("while_training") is False:
        problems.append("evaluate.on: the ranks evaluate while they train; leave out while_training: false")
    if (train.get("epochs") is None) == (train.get("steps") is None):
        problems.append("train: give either epochs or steps, one of them")
    if (
        isinstance(workers, dict)
        and isinstance(low := workers.get("min"), int)
        and isinstance(high := workers.get("max"), int)
        and low > high
    ):
        problems.append(f"scale.workers: min ({low}) is larger than max ({high})")
    if task in TASK_FIELDS and isinstance(data.get("columns"), dict):
        known = TASK_FIELDS[task][0] + TASK_FIELDS[task][1]
        problems += [unknown_key(f"data.columns.{key}", key, known) for key in data["columns"] if key not in known]
    if task in TASK_FIELDS and task not in PACKING_TASKS and data.get("packing"):
        problems.append(f"data.packing: {task} reads one row a sequence; leave packing out")
    if task == "extract" and data.get("overlong") == "truncate":
        problems.append("data.overlong: extract reads long contexts in windows (split); choose split, drop or error")
    problems += _misplaced(raw, str(task)) if task in TASK_FIELDS else []
    if task in TASK_FIELDS and task not in SPLITTING_TASKS and data.get("overlong") == "split":
        problems.append(
            f"data.overlong: split cuts one row into several, which {task} cannot use; choose truncate, drop or error"
        )
    return problems


def _sharing_problems(data: dict[str, Any], train: dict[str, Any]) -> Iterator[str]:
    """What cannot go with sequences that several workers share."""
    if train.get("sequence_parallel") in (None, 1):
        return
    if data.get("packing") is False:
        yield "train.sequence_parallel: needs data.packing, which tells documents by their bounds; leave packing out"
    for key, why in UNSHARED.items():
        if train.get(key):
            yield f"train.{key}: not with train.sequence_parallel, {why}; leave out one of the two"


def _entry_problems(entry: dict[str, Any], key: str, task: Any) -> Iterator[str]:
    """What is wrong with an entry of the data that is more than a path."""
    weight, tokens = entry.get("weight"), entry.get("tokens")
    given = {name for name in ("path", "source", "target") if entry.get(name) is not None}
    if given not in ({"path"}, {"source", "target"}):
        yield f"an entry has {', '.join(sorted(given)) or 'no path'}; give a path, or source and target"
    elif "source" in given and task != "seq2seq":
        yield f"source and target are for seq2seq, not {task}; give a path"
    if weight is not None and tokens is not None:
        yield f"{entry.get('path')} has a weight and a number of tokens; give one of them"
    elif key == "eval" and (weight is not None or tokens is not None):
        yield f"{entry.get('path')} has a weight or a number of tokens, which are for data.train alone"


def _misplaced(raw: dict[str, Any], task: str) -> list[str]:
    """Fields that another task than this one uses, and ranges that cannot be."""
    problems = []
    for section, key, mark in task_fields():
        if task not in mark.tasks and isinstance(raw.get(section), dict) and _is_set(raw[section], section, key):
            listed = ", ".join(mark.tasks)
            problems.append(f"{section}.{key}: means nothing to task {task} (it is for {listed}); leave it out")
    data = raw["data"] if isinstance(raw.get("data"), dict) else {}
    if "score_range" in data and not _is_range(data["score_range"]):
        problems.append(f"data.score_range: must be [lowest, highest], lowest above -100, got {data['score_range']!r}")
    if task == "seq2seq" and isinstance(data.get("prompt"), str):
        problems += _prompt_problems(data["prompt"])
    return problems


def _prompt_problems(prompt: str) -> list[str]:
    held = PLACE.findall(prompt)
    problems = [
        unknown_key(f"data.prompt: {{{name}}}", name, PROMPT_FIELDS) for name in held if name not in PROMPT_FIELDS
    ]
    if held.count("source") != 1:
        problems.append("data.prompt: must hold {source} once, where the source text goes")
    return problems


def _is_set(values: dict[str, Any], section: str, key: str) -> bool:
    """Whether a field is given and says something else than its default, as a resolved job file does for each."""
    default = _section(section).model_fields[key].default
    plain = default.model_dump() if isinstance(default, BaseModel) else default
    value = tuple(values[key]) if isinstance(values.get(key), list) else values.get(key)
    return value is not None and value != plain


def task_fields() -> Iterator[tuple[str, str, For]]:
    """Section, key and mark of every field that is for some tasks only."""
    for section in ("data", "train", "evaluate"):
        for key, field in _section(section).model_fields.items():
            yield from ((section, key, mark) for mark in field.metadata if isinstance(mark, For))


def _section(name: str) -> type[BaseModel]:
    annotation = Job.model_fields[name].annotation
    assert isinstance(annotation, type) and issubclass(annotation, BaseModel)
    return annotation


def _is_range(value: Any) -> bool:
    numbers = isinstance(value, list | tuple) and len(value) == 2 and all(isinstance(v, int | float) for v in value)
    return numbers and -100 < value[0] < value[1]


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """YAML with 1e-5 as a number and keys that are names (both as YAML 1.2 has it); duplicate keys refused."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:bool":  # YAML 1.1 reads `on` as true
                key.tag = "tag:yaml.org,2002:str"
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} stands twice", node.start_mark)
        return dict(super().construct_mapping(node, deep))


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def parse_yaml(text: str) -> Any:
    """The values of a YAML text. Raises yaml.YAMLError."""
    return yaml.load(text, _Loader)


def read_yaml(path: Path) -> dict[str, Any]:
    try:
        raw = parse_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise JobError("no such job file; `tuneyard init quickstart` writes one to start from", str(path)) from None
    except (OSError, UnicodeDecodeError) as error:
        raise JobError(f"cannot be read as text: {error}", str(path)) from None
    except yaml.YAMLError as error:
        raise JobError(f"is not valid YAML: {hide_credentials(str(error))}", str(path)) from None
    if not isinstance(raw, dict):
        raise JobError("a job file is a mapping of keys to values", str(path))
    return raw


def _override(raw: dict[str, Any], item: str) -> str | None:
    """Apply one `section.key=value` in place; returns the problem, if any."""
    name, equals, text = item.partition("=")
    *sections, key = name.strip().split(".")
    if not equals or not key:
        return f"{item!r} is not of the form section.key=value"
    section_values = raw
    for section in sections:
        nested = section_values.setdefault(section, {})
        if not isinstance(nested, dict):
            nested = section_values[section] = {}
        section_values = nested
    try:
        section_values[key] = parse_yaml(text)
    except yaml.YAMLError as error:
        return f"{item!r}: the value is not valid YAML: {error}"
    if section_values[key] is not None and sections == ["train"] and key in ("epochs", "steps"):
        # the two exclude each other: the later word counts
        section_values.pop("steps" if key == "epochs" else "epochs", None)
    return None
