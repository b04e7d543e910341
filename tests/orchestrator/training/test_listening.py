"""What a node agent takes in of its rank server, whose word comes while ranks are launched and as they end."""

from types import SimpleNamespace
from typing import Any

from orchestrator.training import node_agent as agent


def listening(said: list[bytes], ranks: dict[int, Any]) -> tuple[Any, Any]:
    """A node agent that knows these ranks, and a rank server that says something and ends."""
    kept: Any = agent.NodeAgent.__new__(agent.NodeAgent)
    server: Any = agent._Server(SimpleNamespace(stdout=iter(said), wait=lambda: 1))  # type: ignore[arg-type]
    kept._ranks, kept._servers = ranks, [server]
    return kept, server


def test_a_rank_is_born_while_others_are_launched() -> None:
    ranks: dict[int, Any] = {}

    class Files:
        def __str__(self) -> str:
            ranks[len(ranks)] = SimpleNamespace(files="its own", server=None, exit=None)  # by the thread that launches
            return "first"

    ranks[0] = SimpleNamespace(files=Files(), server=None, exit=None, process=None)
    kept, server = listening([b'{"pid": 7, "files": "first"}'], ranks)
    kept._listen(server)
    assert ranks[0].process == 7 and len(ranks) == 2


def test_a_rank_server_that_ended_is_let_go_of_before_its_ranks_count_as_ended() -> None:
    """Whoever waits for their ends starts others at once, and would ask it for them."""
    kept, server = listening([], {})
    kept._ranks[0] = SimpleNamespace(server=server, exit=None)
    at_the_end: list[list[Any]] = []
    kept._note_end = lambda *_: at_the_end.append(list(kept._servers))
    kept._listen(server)
    assert at_the_end == [[]]
