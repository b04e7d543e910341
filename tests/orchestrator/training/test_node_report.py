"""The port on which ranks meet is one that nothing else on the machine takes meanwhile."""

import socket
from pathlib import Path

import pytest

from orchestrator.training import node_report
from orchestrator.training.node_report import EPHEMERAL, FIRST_PORT, free_port


def test_no_outgoing_connection_can_take_the_port() -> None:
    first = int(EPHEMERAL.read_text().split()[0])
    ports = [free_port() for _ in range(50)]
    assert all(FIRST_PORT <= port < first for port in ports) and len(set(ports)) > 25


def test_a_port_that_is_taken_is_not_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as other:
        taken = free_port()
        other.bind(("", taken))
        for first, end in [(taken, taken + 1), (taken, taken), (taken + 1, taken)]:  # one port, none, fewer than none
            monkeypatch.setattr(node_report, "FIRST_PORT", first)
            monkeypatch.setattr(node_report, "EPHEMERAL", tmp_path / f"{end}")
            (tmp_path / f"{end}").write_text(f"{end}\t60999\n")
            assert free_port() not in (0, taken)
