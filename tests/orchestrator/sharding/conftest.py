"""The data stage of these tests runs on the cluster, however small its data."""

import pytest

from orchestrator.sharding import stage


@pytest.fixture(autouse=True)
def on_the_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "SMALL_BYTES", -1)
