"""All families, each in every task it has a head for, in two processes. Begin at `run_matrix`."""

import os
from dataclasses import dataclass
from pathlib import Path

from tests.architectures.families import FAMILIES
from tests.architectures.single import Cell, Samples, adapted_layers, empty_model, keeps_apart, kind_of, look_at
from tests.ranks import run_ranks
from trainers.architecture import stateful_layers
from trainers.verification.packing import PackingDecision


@dataclass(frozen=True)
class Matrix:
    """What was seen."""

    cells: tuple[Cell, ...]
    packing: dict[str, PackingDecision]
    """Whether packed documents of a decoder see each other."""
    adapted: dict[str, tuple[str, ...]]
    """Last parts of the names of the layers that get adapters by default."""
    stateful: tuple[str, ...]
    """Families with layers that carry a state from token to token."""


def run_matrix(folder: Path, families: tuple[str, ...] = tuple(FAMILIES)) -> Matrix:
    """Each of two processes looks at half of the families; they have no process group."""
    halves = run_ranks(_look, 2, str(folder), families, patience_s=1800)
    cells = tuple(cell for half in halves for cell in half.cells)
    packing, adapted = ({**getattr(halves[0], name), **getattr(halves[1], name)} for name in ("packing", "adapted"))
    return Matrix(cells, packing, adapted, halves[0].stateful + halves[1].stateful)


def _look(folder: str, families: tuple[str, ...]) -> Matrix:
    rank = int(os.environ["RANK"])
    samples = Samples(Path(folder), f"looking {rank}")
    mine = families[rank::2]
    packing = {family: keeps_apart(family, samples) for family in mine if kind_of(family) == "decoder"}
    cells = tuple(cell for family in mine for cell in look_at(family, samples, packing.get(family)))
    stateful = tuple(family for family in mine if stateful_layers(empty_model(family, samples)))
    return Matrix(cells, packing, {family: adapted_layers(family, samples) for family in mine}, stateful)
