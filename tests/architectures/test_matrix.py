"""Every listed family in each of its tasks: its first losses are plain transformers', packed and not, and no self-test
raises an alarm where nothing is wrong."""

from pathlib import Path

import pytest

from tests.architectures.document import DOCUMENT, REFUSED, document_of, read_tested
from tests.architectures.families import FAMILIES
from tests.architectures.matrix import Matrix, run_matrix
from tests.architectures.single import OF_DECODERS, OF_ENCODERS, PACKED
from tests.architectures.trained import train_all
from tests.architectures.trials import DRAWING, SPREAD, WAYS, Outcome
from trainers.model import families

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("matrix")


@pytest.fixture(scope="module")
def matrix(folder: Path) -> Matrix:
    return run_matrix(folder)


@pytest.fixture(scope="module")
def outcomes(folder: Path, matrix: Matrix) -> list[Outcome]:
    return train_all(folder, matrix)


def test_sixty_families_and_more_are_listed(matrix: Matrix) -> None:
    assert len(FAMILIES) >= 60
    assert {cell.family for cell in matrix.cells} == set(FAMILIES)


def test_first_losses_are_those_of_plain_transformers(matrix: Matrix) -> None:
    compared = [cell for cell in matrix.cells if cell.loss_error is not None]
    assert [cell for cell in compared if not (cell.loss_error or 0.0) <= 1e-5] == []
    assert len(compared) > 350


def test_no_self_test_raises_an_alarm(matrix: Matrix) -> None:
    alarms = {f"{cell.family} {cell.task}": cell.failed for cell in matrix.cells if cell.failed}
    assert {name.split()[0] for name in alarms} == set(REFUSED), alarms  # what must be refused is


def test_the_document_says_what_was_seen(matrix: Matrix) -> None:
    """docs/models.md and families.json: `make models` writes both anew."""
    assert read_tested(matrix) == families.tested_families()
    assert DOCUMENT.read_text(encoding="utf-8") == document_of(matrix)


def test_families_train_in_every_way_with_one_rank_and_with_two(outcomes: list[Outcome]) -> None:
    trials = [outcome.trial for outcome in outcomes]
    for family in FAMILIES:
        ways = {trial.way for trial in trials if trial.family == family and (trial.way != "full" or trial.resumes)}
        assert ways >= (set(WAYS) if family in SPREAD else {"full", "adapters"}), family
    for task in {*OF_DECODERS, *OF_ENCODERS}:
        own = [trial for trial in trials if trial.task == task]
        assert len({trial.family for trial in own}) >= 3, task
        assert 2 in {trial.ranks for trial in own if trial.resumes}, task
        assert {trial.packed for trial in own} == ({True, False} if task in PACKED else {False}), task
    assert {outcome.trial.name: outcome.error for outcome in outcomes if outcome.error} == {}


def test_at_the_other_size_a_checkpoint_goes_on_with_the_same_loss(outcomes: list[Outcome]) -> None:
    told = [each for each in outcomes if each.trial.family not in DRAWING]
    assert {each.trial.name: each.loss_error for each in told if not each.loss_error <= 1e-5} == {}


def test_exports_reload_in_plain_transformers_with_every_key_and_the_same_logits(outcomes: list[Outcome]) -> None:
    assert {each.trial.name: each.keys for each in outcomes if each.keys} == {}
    assert {each.trial.name: each.logits_error for each in outcomes if not each.logits_error <= 1e-5} == {}
