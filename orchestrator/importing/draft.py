"""What an import comes to: the job as far as it is known, and what is said of every key. Begin at `Draft`."""

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Source = Mapping[str, Any]


@dataclass
class Draft:
    """A job that takes shape, key by key; whatever is not taken is told."""

    source: Source
    folder: Path
    """Of the file that is imported."""
    out: Path
    """Folder of the job file, from which its relative paths are taken."""
    job: dict[str, Any] = field(default_factory=dict)
    told: dict[str, str] = field(default_factory=dict)
    """By key: why it has no counterpart, or what to look at."""
    assumed: dict[str, Any] = field(default_factory=dict)
    """By field of the job: the value that it has because the file says nothing."""

    def set(self, place: str, value: Any) -> None:
        """Give a field of the job its value."""
        *sections, name = place.split(".")
        held = self.job
        for section in sections:
            held = held.setdefault(section, {})
        held[name] = value

    def get(self, place: str) -> Any:
        """The value of a field of the job; None where it has none."""
        held: Any = self.job
        for name in place.split("."):
            held = held.get(name) if isinstance(held, dict) else None
        return held

    def tell(self, key: str, what: str) -> None:
        """Say something of a key that the file has."""
        if self.source.get(key) is not None:
            self.told[key] = what

    def find(self, path: str) -> Path:
        """A path as the other program means it, from the working directory; one beside the imported file where there is
        none."""
        beside = self.folder / path
        return beside if beside.exists() and not Path(path).exists() else Path.cwd() / path

    def local(self, path: str) -> str:
        """A path as the job file holds it."""
        if Path(path).is_absolute() or "://" in path:
            return path
        return os.path.relpath(self.find(path), self.out)

    def model(self, value: Any) -> None:
        """The model's folder, where there is one of that name; else the name is the hub's."""
        path = str(value)
        self.set("model.path", self.local(path) if self.find(path).is_dir() else path)

    def columns(self, named: Iterable[Mapping[str, str]], key: str) -> None:
        """data.columns of what each data set names; it holds for all of them."""
        each = [dict(one) for one in named]
        merged = {field: column for one in each for field, column in one.items()}
        if merged:
            self.set("data.columns", merged)
        if any(one != merged for one in each):
            self.add(key, "they name their columns differently, data.columns holds for all: rename some in the files")

    def add(self, key: str, what: str) -> None:
        """Say one thing more of a key."""
        self.told[key] = "; ".join(filter(None, (self.told.get(key), what)))


Rule = str | Callable[[Draft, Any], None] | None
"""Of one key: the job's field that takes its value; what to do with it; or None: it says what this program does anyway,
or what has no effect on the trained model."""


def apply(draft: Draft, rules: Mapping[str, Rule], refused: Mapping[str, str]) -> None:
    """Take every key of the source by its rule; keys of `refused`, and those nobody knows, are told.

    Args:
        refused: by key: what this program does not do, or does in another way.
    """
    for key, value in draft.source.items():
        if value is None:
            continue
        rule = rules.get(key, "")
        if key in refused:
            if value not in (False, 0, "", [], {}):
                draft.tell(key, refused[key])
        elif rule == "":
            draft.tell(key, "no counterpart is known")
        elif isinstance(rule, str):
            draft.set(rule, value)
        elif rule is not None:
            rule(draft, value)


def number(place: str) -> Rule:
    """A rule for a number, which YAML reads as a text where it is written like 2e-5."""
    return lambda draft, value: draft.set(place, float(value))


def when(wanted: Any, place: str, value: Any) -> Rule:
    """A rule that sets a field where the key has a certain value, and else does nothing."""

    def rule(draft: Draft, found: Any) -> None:
        if found == wanted:
            draft.set(place, value)

    return rule


def chosen(place: str, known: Mapping[str, Any], key: str, otherwise: str) -> Rule:
    """A rule for a word: the value that stands for it here; any other is told."""

    def rule(draft: Draft, found: Any) -> None:
        word = str(found).lower()
        if word in known:
            if known[word] is not None:
                draft.set(place, known[word])
        else:
            draft.tell(key, otherwise)

    return rule


def deepspeed(draft: Draft, value: Any) -> None:
    """A DeepSpeed file by the stage in its name; this program derives the rest from the job."""
    name = Path(str(value)).name.lower()
    stage = next((stage for stage in ("1", "2", "3") if f"z{stage}" in name or f"zero{stage}" in name), None)
    if stage is None:
        draft.tell("deepspeed", "its stage does not show in its name; train.deepspeed is auto")
        return
    draft.set("train.deepspeed", f"zero{stage}" + ("-cpu-offload" if stage == "3" and "offload" in name else ""))


def batch(draft: Draft, micro: str, size: int, steps: int) -> None:
    """The global batch of one worker; how many there are, the other programs learn from their launcher.

    Args:
        micro: the key that names `size`.
        size: sequences of a forward pass.
        steps: forward passes of an optimizer step.
    """
    draft.set("train.micro_batch_size", size)
    draft.set("train.global_batch_size", size * steps)
    draft.told[micro] = (
        f"train.global_batch_size is {size * steps}, as on one GPU; there each GPU adds as many: set it, and "
        "scale.workers, by your number of GPUs"
    )


def checkpointing(draft: Draft, value: Any) -> None:
    """Layers are computed again in the backward pass, or not."""
    draft.set("train.activation_checkpointing", "full" if value else "none")


def lora_section(values: Mapping[str, Any]) -> dict[str, Any]:
    """model.lora of the values that are given."""
    given = {name: value for name, value in values.items() if value is not None}
    for name in given:
        if name in ("alpha", "dropout"):
            given[name] = float(given[name])
        elif name == "target_modules" and isinstance(given[name], str):
            words = [word.strip() for word in given[name].split(",")]
            given[name] = ["all-linear"] if words in (["all"], ["all-linear"]) else words
    return given


def warmup(draft: Draft, scheduler: str, most: int | None = None) -> None:
    """The share of warm-up: of steps where the steps of the whole training are known; none where the rate is constant.

    Args:
        scheduler: the key that names the schedule.
        most: steps of a warm-up that the file does not ask for.
    """
    steps, total = float(draft.source.get("warmup_steps") or 0), int(draft.source.get("max_steps") or 0)
    if str(draft.source.get(scheduler)).lower() == "constant":
        draft.set("train.warmup_ratio", 0.0)
    elif 0 < steps < 1:  # transformers takes it as a share
        draft.set("train.warmup_ratio", steps)
    elif steps and total > 0:
        draft.set("train.warmup_ratio", min(round(steps / total, 6), 0.99))
    elif steps:
        ratio = draft.get("train.warmup_ratio")
        draft.tell("warmup_steps", f"train.warmup_ratio is {ratio}, a share of the steps: set it by the number that "
                                   "`tuneyard plan` tells")  # fmt: skip
    elif most and draft.source.get("warmup_steps") is not None:
        draft.set("train.warmup_ratio", 0.0)
    elif most and draft.source.get("warmup_ratio") is None:
        ratio = draft.get("train.warmup_ratio")
        if total > 0:
            draft.set("train.warmup_ratio", round(min(int(ratio * total), most) / total, 6))
        else:
            draft.told["warmup_ratio"] = f"train.warmup_ratio is {ratio}; there it is at most {most} steps"


SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant", "constant_with_warmup": "constant"}
NO_SCHEDULE = "not here; train.schedule is cosine (or linear, constant)"
ADAMW = dict.fromkeys(("adamw_torch", "adamw_torch_fused", "adamw_hf", "adamw_apex_fused", "adamw"), None)
LIGER = "no counterpart; a large vocabulary's loss is computed in chunks anyway"
NO_OPTIMIZER = "the optimizer is AdamW with fp32 states"
SHARE = 0.05
"""Of the rows, where the file names no share for evaluation: of 120 rows some are drawn in 998 cases of 1,000."""
NO_SHARE = f"there are no evaluation rows by share: data.eval_fraction is {SHARE}, for a checkpoint is chosen by them"
