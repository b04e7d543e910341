"""Every listed family in each of its tasks: its first losses are plain transformers', packed and not, and no self-test
raises an alarm where nothing is wrong."""

from pathlib import Path
from typing import Any

import pytest

from tests.architectures.document import DOCUMENT, document_of, read_tested
from tests.architectures.families import FAMILIES
from tests.architectures.matrix import Matrix, run_matrix
from tests.architectures.single import kind_of
from tests.architectures.trained import train_all
from tests.architectures.trials import DRAWING, Outcome, Trial, every_trial, trials_of
from trainers.model import fit  # pytest would take tested_families for a test

pytestmark = [pytest.mark.slow, pytest.mark.timeout(4500)]
"""As long as `run_matrix` and `train_all` wait at the most. Looking alone takes a rank over 77 s of a processor, and
a busy machine gave it 7 % of one."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("matrix")


@pytest.fixture(scope="module")
def matrix(folder: Path) -> Matrix:
    return run_matrix(folder)


@pytest.fixture(scope="module")
def outcomes(folder: Path, matrix: Matrix) -> list[Outcome]:
    return train_all(folder, matrix, trials_of(matrix.cells))


def test_sixty_families_and_more_are_listed(matrix: Matrix) -> None:
    assert len(FAMILIES) >= 60
    assert {cell.family for cell in matrix.cells} == set(FAMILIES)


def test_first_losses_are_those_of_plain_transformers(matrix: Matrix) -> None:
    compared = [cell for cell in matrix.cells if cell.loss_error is not None]
    assert [cell for cell in compared if not (cell.loss_error or 0.0) <= 1e-5] == []
    assert compared == [cell for cell in matrix.cells if not cell.refused] and len(compared) > 450


def test_rows_are_longer_than_the_windows(matrix: Matrix) -> None:
    """So that a window, a chunk or a sink that is left out would show in a loss."""
    assert [cell for cell in matrix.cells if not cell.beyond] == []


def test_no_self_test_raises_an_alarm(matrix: Matrix) -> None:
    assert {f"{cell.family} {cell.task}": cell.failed for cell in matrix.cells if cell.failed} == {}


def test_the_document_says_what_was_seen(matrix: Matrix) -> None:
    """docs/models.md and families.json: `make models` writes both anew."""
    assert read_tested(matrix) == fit.tested_families()
    assert DOCUMENT.read_text(encoding="utf-8") == document_of(matrix)


def test_every_family_meets_every_value_and_every_kind_of_family_every_pair(matrix: Matrix) -> None:
    """The design of the trials covers what it says."""
    whole, chosen = every_trial(matrix.cells, tuple(FAMILIES)), trials_of(matrix.cells)
    assert {trial.family for trial in chosen} == set(FAMILIES)
    for family in FAMILIES:
        for axis in ("way", "packed"):
            assert values(chosen, family, axis) == values(whole, family, axis), (family, axis)
        assert any(trial.resumes for trial in chosen if trial.family == family), family
    for kind in ("decoder", "encoder", "pair"):
        for pair in (("task", "way"), ("task", "packed"), ("way", "packed")):
            assert values(chosen, kind, *pair) == values(whole, kind, *pair), (kind, pair)
    resumed = [trial for trial in chosen if trial.resumes]
    assert {(trial.way, trial.ranks) for trial in resumed} == {(trial.way, trial.ranks) for trial in whole}
    assert {(trial.packed, trial.ranks) for trial in resumed} == {(trial.packed, trial.ranks) for trial in whole}


def values(trials: list[Trial], of: str, *axes: str) -> set[tuple[Any, ...]]:
    """Combinations of values that the trials of a family, or of a kind of families, take on some axes."""
    own = [trial for trial in trials if of in (trial.family, kind_of(trial.family))]
    return {tuple(getattr(trial, axis) for axis in axes) for trial in own}


def test_every_trial_trains_saves_and_exports(outcomes: list[Outcome]) -> None:
    assert {outcome.trial.name: outcome.error for outcome in outcomes if outcome.error} == {}


def test_at_the_other_size_a_checkpoint_goes_on_with_the_same_loss(outcomes: list[Outcome]) -> None:
    told = [each for each in outcomes if each.trial.family not in DRAWING]
    assert {each.trial.name: each.loss_error for each in told if not each.loss_error <= 1e-5} == {}


def test_exports_reload_in_plain_transformers_with_every_key_and_the_same_logits(outcomes: list[Outcome]) -> None:
    assert {each.trial.name: each.keys for each in outcomes if each.keys} == {}
    assert {each.trial.name: each.logits_error for each in outcomes if not each.logits_error <= 1e-5} == {}
