"""Nothing takes the device for the host: self-tests, training losses, evaluation and saving on a device that refuses
what a card refuses. One process does it all, since its torch is changed for good."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest

from tests.device import work
from tests.ranks import rank_context

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    with ProcessPoolExecutor(1, rank_context()) as pool:
        return pool.submit(work.look, str(tmp_path_factory.mktemp("far"))).result()


def test_the_device_refuses_what_a_card_refuses(seen: dict[str, dict[str, Any]]) -> None:
    refused = seen["refusals"]["both"]
    assert len(refused) == 4, refused
    assert all("numpy" in text for text in refused[:2]) and all("same device" in text for text in refused[2:])


def test_every_self_test_passes(seen: dict[str, dict[str, Any]]) -> None:
    assert seen["self-tests"] == {name: [] for name in work.CHECKED}


def test_every_training_loss_and_its_gradient_are_the_host_s(seen: dict[str, dict[str, Any]]) -> None:
    for name, found in seen["losses"].items():
        assert isinstance(found, list), f"{name}: {found}"
        assert found[1] == pytest.approx(found[0], rel=1e-5), name


def test_every_evaluation_gives_the_host_s_metrics(seen: dict[str, dict[str, Any]]) -> None:
    for name, found in seen["evaluations"].items():
        assert isinstance(found, list), f"{name}: {found}"
        ranks = [
            metrics.pop("spearman", 0.0) for metrics in found
        ]  # rounding may swap two scores that are nearly equal
        assert ranks[1] == pytest.approx(ranks[0], abs=5e-3), name
        assert found[1] == pytest.approx(found[0], rel=1e-5), name


def test_a_warm_evaluator_leaves_nothing_on_the_device_and_goes_to_the_next(seen: dict[str, dict[str, Any]]) -> None:
    assert seen["warm"]["tag"] == {"on": ["cpu", "far", "far"], "between": ["cpu"], "alike": True}


def test_weights_are_copied_and_exported_as_they_are(seen: dict[str, dict[str, Any]]) -> None:
    assert seen["saves"]["copy and export"] == {"changed": [], "moved": 0.0, "tied": "true"}


def test_the_host_waits_once_a_step_whatever_the_task(seen: dict[str, dict[str, Any]]) -> None:
    assert seen["waits"] == {name: ["tolist"] for name in seen["losses"]}
