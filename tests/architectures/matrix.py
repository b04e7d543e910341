"""All families: alone in a process first, then as ranks of ZeRO-3. Begin at `run_matrix`."""

import os
from dataclasses import dataclass
from pathlib import Path

from tests.architectures.families import FAMILIES, write_model
from tests.architectures.single import Cell, Samples, keeps_apart, kind_of, look_at
from tests.architectures.trained import Outcome, choose_trials, run_trials
from tests.ranks import run_ranks


@dataclass(frozen=True)
class Matrix:
    """What was seen."""

    cells: tuple[Cell, ...]
    outcomes: tuple[Outcome, ...]
    apart: dict[str, str]
    """Why packed documents are kept apart or not, by decoder; empty where they are."""


def run_matrix(folder: Path, families: tuple[str, ...] = tuple(FAMILIES)) -> Matrix:
    """Three launches: two ranks look at half of the families each; two ranks start every other trial; one finishes
    those and starts the others; two finish the others."""
    seen = run_ranks(_look, 2, str(folder), families, patience_s=1800)
    apart = {**seen[0][1], **seen[1][1]}
    trials = [
        trial for trial in choose_trials({family: not why for family, why in apart.items()}) if trial.family in families
    ]
    first, second = ([trial for trial in trials if trial.start_size == size] for size in (2, 1))
    started = run_ranks(run_trials, 2, str(folder), ("start", first), patience_s=1800)
    alone = run_ranks(run_trials, 1, str(folder), ("finish", first), ("start", second), patience_s=1800)
    ended = run_ranks(run_trials, 2, str(folder), ("finish", second), patience_s=1800)
    outcomes = [outcome for of_rank in (*started, *alone, *ended) for outcome in of_rank]
    return Matrix(tuple(seen[0][0] + seen[1][0]), tuple(outcomes), apart)


def _look(folder: str, families: tuple[str, ...]) -> tuple[list[Cell], dict[str, str]]:
    rank = int(os.environ["RANK"])
    samples = Samples(Path(folder), f"looking {rank}")
    mine = families[rank::2]
    for family in mine:
        write_model(family, samples.folder / "models" / family, samples.words[kind_of(family)])
    cells = [cell for family in mine for cell in look_at(family, samples)]
    return cells, {family: keeps_apart(family, samples) for family in mine if kind_of(family) == "decoder"}
