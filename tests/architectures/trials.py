"""Which family trains how in the tests: see `trials_of`."""

from collections import Counter
from dataclasses import dataclass
from itertools import product
from typing import Any

from tests.architectures.families import FAMILIES
from tests.architectures.single import Cell, kind_of, tasks_of
from trainers.job.sections import LoraSection

WAYS: dict[str, dict[str, Any]] = {
    "full": {},
    "adapters": {"lora": LoraSection(rank=2)},
    "frozen": {"freeze": ("*.0.*",)},
}
"""Options of the model by the way that it is trained."""
SPREAD = ("gpt2", "gemma3", "qwen3_moe", "mamba2", "roberta", "pegasus", "m2m_100")
"""Families that differ in what training meets: transposed weights, a multimodal wrapper, experts, states that are
carried along, no token types, weights made while loading, layers dropped at random."""
DRAWING = ("phimoe",)
"""Families that draw their experts at random while training, each rank by itself: no two losses are the same."""


@dataclass(frozen=True)
class Trial:
    """One model to train."""

    family: str
    task: str
    way: str
    packed: bool
    ranks: int
    """With which it begins."""
    resumes: bool
    """Whether it goes on at the other size."""

    @property
    def name(self) -> str:
        return f"{self.family} {self.task} {self.way}{' packed' if self.packed else ''} from {self.ranks}"


@dataclass(frozen=True)
class Outcome:
    """What became of a trial."""

    trial: Trial
    loss: float = 0.0
    """Of the second step."""
    loss_error: float = 0.0
    """Relative, of the second step's loss at the other size."""
    logits_error: float = 0.0
    """Of the export in plain transformers, as a share of the largest."""
    keys: tuple[str, ...] = ()
    """Missing and unexpected ones."""
    error: str = ""


def trials_of(cells: tuple[Cell, ...], families: tuple[str, ...] = tuple(FAMILIES)) -> list[Trial]:
    """A covering design of family x task x way x packing x ranks, with an export in each trial.

    Every family trains in each of WAYS: in full begun by one rank or by two and resumed at the other size, with
    adapters and with a frozen layer by one rank alone; those of SPREAD resume in each. Once it packs, where it can.
    Within each kind of family (decoders, encoders, encoder-decoders) every task meets every way, packed and not; over
    all, every way is resumed from one rank and from two, packed and not. Which goes with which turns from family to
    family. What is left out is the whole product, `every_trial`; that each family's first loss is right in each of its
    tasks, packed and not, needs no engine and is looked at in full (`single.py`).

    The folders of encoders have no head for mlm, which adapters would leave as it was drawn, so that is refused.
    """
    trials: list[Trial] = []
    seen: Counter[str] = Counter()
    for family in families:
        tasks, packs = _tasks(family, cells)
        turn = seen[kind_of(family)]
        seen[kind_of(family)] += bool(tasks)
        for at, way in enumerate(WAYS if tasks else ()):
            able = [task for task in tasks if _can(way, task)]
            packed = bool(packs) and at == turn % 3
            task = (
                packs[turn // 3 % len(packs)] if packed else able[((turn // 3 if packs else turn) + 2 * at) % len(able)]
            )
            resumes = way == "full" or family in SPREAD
            shift = SPREAD.index(family) if family in SPREAD else turn // 3
            trials.append(Trial(family, task, way, packed, 2 - (shift + at) % 2 if resumes else 1, resumes))
    return trials


def every_trial(cells: tuple[Cell, ...], families: tuple[str, ...]) -> list[Trial]:
    """The whole product."""
    return [
        Trial(family, task, way, packed, ranks, True)
        for family in families
        for tasks, packs in [_tasks(family, cells)]
        for task, way in product(tasks, WAYS)
        if _can(way, task)
        for packed, ranks in product((False, True) if task in packs else (False,), (1, 2))
    ]


def _tasks(family: str, cells: tuple[Cell, ...]) -> tuple[list[str], list[str]]:
    """Those that a family has passed, and those of them that it packs in."""
    own = [cell for cell in cells if cell.family == family and not cell.refused and not cell.failed]
    packs = {cell.task for cell in own if cell.packed}
    tasks = [task for task in tasks_of(family) if any(cell.task == task for cell in own)]
    return tasks, [task for task in tasks if task in packs]


def _can(way: str, task: str) -> bool:
    return not (way == "adapters" and task == "mlm")
