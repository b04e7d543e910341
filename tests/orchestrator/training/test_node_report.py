"""The port on which ranks meet is one that nothing else on the machine takes meanwhile; how a rank ended is told from
its own part of the log."""

import socket
from pathlib import Path
from typing import Any

import pytest

from orchestrator.training import node_report
from orchestrator.training.failure_cause import find_cause
from orchestrator.training.node_agent import NodeAgent
from orchestrator.training.node_report import EPHEMERAL, FIRST_PORT, free_port

MISMATCH = """terminate called after throwing an instance of 'gloo::EnforceNotMet'
  what():  [enforce fail at pair.cc:446] op.preamble.length <= op.nbytes. collective mismatch
Fatal Python error: Aborted

Current thread 0x00007f (most recent call first):
  File "/x/trainers/training/loop.py", line 270 in _settle
"""


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


def test_the_cause_is_not_read_from_what_an_earlier_launch_wrote_into_the_log(tmp_path: Path) -> None:
    log, agent = tmp_path / "rank-00000.log", NodeAgent(1)
    server: Any = None
    for before, after, expected in [("", "", "SIGKILL"), (MISMATCH, "", "SIGKILL"), (MISMATCH, MISMATCH, "mismatch")]:
        log.write_text(before)
        agent._launched += 1
        rank = agent._ranks[0] = agent._prepare(0, str(log), server)
        with log.open("a") as file:
            file.write(after)
        agent._note_end(rank, -9 if expected == "SIGKILL" else -6, 0)
        assert rank.exit is not None and rank.exit.log_tail == after
        assert expected in str(find_cause([rank.exit]))
        agent.kill()
    agent.close()
