"""All families, each in every task it has a head for, in two processes. Begin at `run_matrix`."""

import os
from dataclasses import dataclass
from pathlib import Path

from tests.architectures.families import FAMILIES, write_model
from tests.architectures.single import Cell, Samples, keeps_apart, kind_of, look_at
from tests.ranks import run_ranks


@dataclass(frozen=True)
class Matrix:
    """What was seen."""

    cells: tuple[Cell, ...]
    apart: dict[str, str]
    """Why packed documents of a decoder see each other; empty where they do not."""


def run_matrix(folder: Path, families: tuple[str, ...] = tuple(FAMILIES)) -> Matrix:
    """Each of two processes looks at half of the families; they have no process group."""
    seen = run_ranks(_look, 2, str(folder), families, patience_s=1800)
    return Matrix(tuple(seen[0][0] + seen[1][0]), {**seen[0][1], **seen[1][1]})


def _look(folder: str, families: tuple[str, ...]) -> tuple[list[Cell], dict[str, str]]:
    rank = int(os.environ["RANK"])
    samples = Samples(Path(folder), f"looking {rank}")
    mine = families[rank::2]
    for family in mine:
        write_model(family, samples.folder / "models" / family, samples.words[kind_of(family)])
    cells = [cell for family in mine for cell in look_at(family, samples)]
    return cells, {family: keeps_apart(family, samples) for family in mine if kind_of(family) == "decoder"}
