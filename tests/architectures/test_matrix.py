"""Every listed family in each of its tasks: its first losses are plain transformers', packed and not, and no self-test
raises an alarm where nothing is wrong."""

import pytest

from tests.architectures.document import DOCUMENT, REFUSED, document_of, read_tested
from tests.architectures.families import FAMILIES
from tests.architectures.matrix import Matrix, run_matrix
from trainers.model import families

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def matrix(tmp_path_factory: pytest.TempPathFactory) -> Matrix:
    return run_matrix(tmp_path_factory.mktemp("matrix"))


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
