"""Which family trains how in the tests: see `trials_of`."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

from tests.architectures.families import FAMILIES
from tests.architectures.single import Cell, tasks_of
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
    """Every family trains in full, begun by one rank or by two and resumed at the other size; with adapters by one rank
    alone, and every third with its first layer frozen. Those of SPREAD do all three and resume in each.

    Tasks, ranks and packing turn from trial to trial, so that each is met by many families. The folders of encoders
    have no head for mlm, which adapters would leave as it was drawn, so that is refused.
    """
    trials: list[Trial] = []
    turns: Counter[str] = Counter()
    for index, family in enumerate(families):
        own = [cell for cell in cells if cell.family == family and not cell.refused and not cell.failed]
        tasks = [task for task in tasks_of(family) if any(cell.task == task for cell in own)]
        packs = {cell.task for cell in own if cell.packed}
        ways = [way for way in WAYS if way != "frozen" or family in SPREAD or index % 3 == 0]
        for turn, way in enumerate(ways if tasks else ()):
            able = [task for task in tasks if not (way == "adapters" and task == "mlm")]
            task = able[(index + 3 * turn) % len(able)]
            resumes = way == "full" or family in SPREAD
            packed = task in packs and turns[task] % 3 < 2
            ranks = 2 - (index + turn) % 2 if resumes else 1
            trials.append(Trial(family, task, way, packed, ranks, resumes))
            turns[task] += 1
    return trials
