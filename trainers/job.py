"""The job file: what a user asks for, as frozen records.

Owns the schema, its defaults and the rules that need nothing but the file itself. Whether files exist, columns match
and batches divide is checked by the stages that look. Imports neither torch nor transformers, so `tuneyard --help`
stays quick. Begin at `Job`, then `load_job`.
"""

import difflib
import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from trainers.errors import JobError
from trainers.storage import is_remote

TaskName = Literal["pretrain", "sft", "classify"]
Overlong = Literal["truncate", "split", "drop", "error"]
FormatName = Literal["jsonl", "json", "csv", "tsv", "parquet", "arrow", "text"]
Strings = Annotated[tuple[str, ...], Field(strict=False)]

BRANCHES = ("Elastic", "int", "constrained-int")
"""Names that pydantic puts into a location for the branch of a union; no key of ours."""

TASK_FIELDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "pretrain": (("text",), ()),
    "sft": (("messages",), ("prompt", "completion")),
    "classify": (("text", "label"), ("text_pair",)),
}
"""For each task its required and its optional fields; `data.columns` maps a field to the data's column."""


class Section(BaseModel):
    """Base of every section: frozen, strict about types, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, protected_namespaces=())


class ModelSection(Section):
    """Which pretrained model, and how it is held in memory."""

    path: str
    """Hub id, or a folder with config.json, safetensors and a tokenizer."""
    revision: str | None = None
    """Hub revision (branch, tag or commit)."""
    gguf_file: str | None = None
    """File name inside `path`; its weights are dequantized once into safetensors."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Type of the working weights and activations; the optimizer always keeps fp32."""
    attention: str = "auto"
    """Attention backend as transformers names it, or auto."""
    freeze: Strings = ()
    """Shell-style patterns over parameter names that stay as they are, e.g. "base_model.*"."""
    trust_remote_code: bool = False
    """Run Python code that the model repository ships."""


class DataSection(Section):
    """Which rows, and how they become sequences."""

    train: Strings
    """Paths, globs or folders; local or s3://, gs://, hdfs://."""
    eval: Strings = ()
    """The same for evaluation; or `eval_fraction`."""
    eval_fraction: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Share of the training rows held out for evaluation, chosen by a hash of each row's place."""
    format: FormatName | None = None
    """Read every file as this format; null tells it from the name."""
    columns: dict[str, str] = {}
    """The task's field: the data's column, where they differ."""
    max_length: Annotated[int, Field(ge=8)] = 512
    """Longest sequence, in tokens, special tokens included."""
    overlong: Overlong | None = None
    """What happens to longer ones; null means split for pretrain and truncate for the others."""
    packing: bool | None = None
    """Several documents a sequence, none seeing another; null means yes for pretrain and sft."""
    max_drop_fraction: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of rows that may be dropped before the data is refused."""


class TrainSection(Section):
    """The optimization."""

    global_batch_size: Annotated[int, Field(ge=1)]
    """Sequences an optimizer step, over all ranks."""
    micro_batch_size: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Sequences a forward pass on one rank."""
    epochs: Annotated[float, Field(gt=0)] | None = None
    """Passes over the data; or `steps`."""
    steps: Annotated[int, Field(ge=1)] | None = None
    """Optimizer steps."""
    learning_rate: Annotated[float, Field(gt=0)]
    """Peak learning rate of AdamW."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Decay after the warm-up, down to zero at the last step."""
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.03
    """Share of the steps over which the learning rate rises linearly."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """Decoupled weight decay; never on biases and norms."""
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    """Global gradient norm above which gradients are scaled down; 0 turns clipping off."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Orders the data, initializes new layers and drives dropout."""
    deepspeed: str = "zero3"
    """A name in ds_configs/ or the path of a JSON file."""


class Elastic(Section):
    """A range of world sizes."""

    min: Annotated[int, Field(ge=1)]
    max: Annotated[int, Field(ge=1)]


class ScaleSection(Section):
    """How many workers, and what each takes."""

    workers: Annotated[int, Field(ge=1)] | Elastic = 1
    """Ranks of the training; a range lets the run go on with fewer and grow back."""
    gpus_per_worker: Annotated[int, Field(ge=0)] | Literal["auto"] = "auto"
    """auto: one where the cluster has GPUs, else none."""
    cpus_per_worker: Annotated[int, Field(ge=1)] = 1
    """Also the number of threads of each rank on CPU."""
    max_failures: Annotated[int, Field(ge=0)] = 3
    """Restarts of the workers before the job fails."""

    @property
    def max_workers(self) -> int:
        """The largest allowed world size."""
        return self.workers if isinstance(self.workers, int) else self.workers.max

    @property
    def min_workers(self) -> int:
        """The smallest allowed world size."""
        return self.workers if isinstance(self.workers, int) else self.workers.min


class CheckpointSection(Section):
    """When the state is saved, and how much of it stays."""

    every_steps: Annotated[int, Field(ge=1)] = 100
    """Optimizer steps between checkpoints; the last step is always saved."""
    keep: Annotated[int, Field(ge=1)] = 3
    """Newest checkpoints that stay, beside the best one and those being evaluated."""


class EarlyStopping(Section):
    """When to stop before the last step."""

    patience: Annotated[int, Field(ge=1)]
    """Evaluations without a new best before training stops."""


class EvaluateSection(Section):
    """How checkpoints are judged."""

    metric: str | None = None
    """The metric that chooses the best checkpoint; null means the task's own."""
    mode: Literal["max", "min"] | None = None
    """Whether larger or smaller is better; null means what the metric implies."""
    while_training: bool = True
    """Evaluate beside the trainers when resources are free; otherwise after them."""
    batch_size: Annotated[int, Field(ge=1)] = 32
    """Sequences a forward pass."""
    early_stopping: EarlyStopping | None = None


class RegistrySection(Section):
    """Where the best model is registered."""

    model: str | None = None
    """Name in the registry; null means the job's name."""
    uri: str | None = None
    """An MLflow tracking server; null means SQLite under storage."""
    promote: Literal["if_better", "always", "never"] = "if_better"
    """When the new version takes the alias champion."""


class Job(Section):
    """A whole job; paths are absolute once it is loaded."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")]
    task: TaskName
    model: ModelSection
    data: DataSection
    train: TrainSection
    scale: ScaleSection = ScaleSection()
    checkpoint: CheckpointSection = CheckpointSection()
    evaluate: EvaluateSection = EvaluateSection()
    registry: RegistrySection = RegistrySection()
    storage: str = "runs"
    """Folder or bucket shared by all nodes."""

    @property
    def packing(self) -> bool:
        """Whether several documents share a sequence."""
        return self.task != "classify" if self.data.packing is None else self.data.packing

    @property
    def overlong(self) -> Overlong:
        """What happens to rows longer than `data.max_length`."""
        return self.data.overlong or ("split" if self.task == "pretrain" else "truncate")

    def column(self, field: str) -> str:
        """The data's name for a field of the task."""
        return self.data.columns.get(field, field)

    def identity(self) -> str:
        """Digest of all that changes the trained weights; where and how large the job runs does not."""
        parts = self.model_dump(mode="json", include={"task", "model", "data", "train"})
        parts["evaluate"] = self.evaluate.model_dump(include={"metric", "mode"})
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def load_job(path: str | Path, overrides: Sequence[str] = ()) -> Job:
    """Read a job file, apply `section.key=value` overrides, and check it.

    Relative paths in the file are taken from the file's own folder, so the same file means the same job from anywhere.

    Raises:
        JobError: with every problem found at once.
    """
    path = Path(path)
    raw = _read_yaml(path)
    problems = [problem for item in overrides if (problem := _override(raw, item))]
    if problems:
        raise JobError(problems, "--set")
    return parse_job(_absolute(raw, path.absolute().parent), str(path))


def parse_job(raw: dict[str, Any], where: str = "job") -> Job:
    """Check a job given as plain data. Raises JobError with every problem."""
    problems, job = _cross_problems(raw), None
    try:
        job = Job.model_validate(raw)
    except ValidationError as error:
        problems = [_explain(detail) for detail in error.errors() if not _other_branch(detail)] + problems
    if problems or job is None:
        raise JobError(list(dict.fromkeys(problems)), where)
    return job


def _cross_problems(raw: dict[str, Any]) -> list[str]:
    """Rules over several fields, read off the raw data so that they are reported beside the fields' own problems."""
    section = {name: value if isinstance(value := raw.get(name), dict) else {} for name in ("data", "train", "scale")}
    data, train, workers, task = (
        section["data"],
        section["train"],
        section["scale"].get("workers"),
        raw.get("task"),
    )
    problems = []
    if bool(data.get("eval")) == (data.get("eval_fraction") is not None):
        problems.append("data: give either eval (files) or eval_fraction (a share of the training rows), one of them")
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
        problems += [_unknown(f"data.columns.{key}", key, known) for key in data["columns"] if key not in known]
    if task == "classify" and data.get("packing"):
        problems.append("data.packing: classify reads one row a sequence; leave packing out")
    if task in TASK_FIELDS and task != "pretrain" and data.get("overlong") == "split":
        problems.append(
            f"data.overlong: split cuts one row into several, which {task} cannot use; choose truncate, drop or error"
        )
    return problems


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """YAML with 1e-5 as a number (YAML 1.2) and duplicate keys refused."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} stands twice", node.start_mark)
        return dict(super().construct_mapping(node, deep))


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except FileNotFoundError:
        raise JobError("no such job file; `tuneyard init quickstart` writes one to start from", str(path)) from None
    except (OSError, UnicodeDecodeError) as error:
        raise JobError(f"cannot be read as text: {error}", str(path)) from None
    except yaml.YAMLError as error:
        raise JobError(f"is not valid YAML: {error}", str(path)) from None
    if not isinstance(raw, dict):
        raise JobError("a job file is a mapping of keys to values", str(path))
    return raw


def _override(raw: dict[str, Any], item: str) -> str | None:
    """Apply one `section.key=value` in place; returns the problem, if any."""
    name, equals, text = item.partition("=")
    *sections, key = name.strip().split(".")
    if not equals or not key:
        return f"{item!r} is not of the form section.key=value"
    place = raw
    for section in sections:
        nested = place.setdefault(section, {})
        if not isinstance(nested, dict):
            nested = place[section] = {}
        place = nested
    try:
        place[key] = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        return f"{item!r}: the value is not valid YAML: {error}"
    if sections == ["train"] and key in (
        "epochs",
        "steps",
    ):  # the two exclude each other: the later word counts
        place.pop("steps" if key == "epochs" else "epochs", None)
    return None


def _absolute(raw: dict[str, Any], base: Path) -> dict[str, Any]:
    """The same job with every path made absolute; values of a wrong type are left for the schema to refuse."""

    def local(value: Any) -> Any:
        if not isinstance(value, str) or is_remote(value):
            return value
        return str((base / Path(value.removeprefix("file://")).expanduser()).resolve())

    def section(name: str) -> dict[str, Any]:
        value = raw.get(name)
        return dict(value) if isinstance(value, dict) else {}

    data, model, train = section("data"), section("model"), section("train")
    for key in ("train", "eval"):
        value = data.get(key)
        if isinstance(value, str):
            data[key] = [local(value)]
        elif isinstance(value, list):
            data[key] = [local(item) for item in value]
    if isinstance(model.get("path"), str) and names_folder(model["path"], base):
        model["path"] = local(model["path"])
    if isinstance(train.get("deepspeed"), str) and train["deepspeed"].endswith(".json"):
        train["deepspeed"] = local(train["deepspeed"])
    sections = {"data": data, "model": model, "train": train}
    return {
        **raw,
        **{name: value for name, value in sections.items() if value},
        "storage": local(raw.get("storage", "runs")),
    }


def names_folder(path: str, base: Path = Path()) -> bool:
    """Whether `model.path` means a folder: it exists as one, or does not have the form of a hub id."""
    return (base / Path(path).expanduser()).is_dir() or not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", path)


def _other_branch(detail: ErrorDetails) -> bool:
    """Whether this error is about the branch of a union that the value was not meant for."""
    shape: dict[str, Any] = {"int_type": dict, "model_type": (int, str, float), "string_type": dict, "literal_error": int}
    in_union = any(str(part) in BRANCHES or "[" in str(part) for part in detail["loc"])
    return in_union and isinstance(detail["input"], shape.get(detail["type"], ()))


def _explain(detail: ErrorDetails) -> str:
    """One pydantic error as a line a user can act on."""
    location = [str(part) for part in detail["loc"] if part not in BRANCHES and "[" not in str(part)]
    where = ".".join(location)
    if detail["type"] == "extra_forbidden":
        return _unknown(where, location[-1], _known_keys(location[:-1]))
    if detail["type"] == "missing":
        return f"{where}: required, and missing"
    return f"{where}: {detail['msg'].replace('Input should be', 'must be', 1)}, got {detail['input']!r}"


def _unknown(where: str, key: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(sorted(known))}"
    return f"{where}: unknown key; {hint}"


def _known_keys(location: Sequence[str]) -> list[str]:
    model: type[BaseModel] = Job
    for part in location:
        annotation = model.model_fields[part].annotation if part in model.model_fields else None
        options: tuple[Any, ...] = (annotation, *get_args(annotation))
        nested = [one for one in options if isinstance(one, type) and issubclass(one, BaseModel)]
        if not nested:
            return []
        model = nested[0]
    return list(model.model_fields)
