"""Keeps the ranks of one node: starts them, reads their heartbeat and events, and sees how each one ends.

A Ray actor, one a node, that lives through every restart. Ranks are processes of their own, which know nothing of Ray:
forks of a rank server that has the imports done (see trainers/worker/rank_server.py), so that a restart costs the
loading of the model and no more. Begin reading at `NodeAgent.launch`.
"""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

from orchestrator.training.node_report import (
    INTERFACES,
    NodeInfo,
    NodeReport,
    RankExit,
    free_bytes,
    free_port,
    interface_of,
    oom_kills,
)
from trainers.credentials import travelling
from trainers.records import StopReason
from trainers.run.events import Event, FailedEvent, parse_events
from trainers.run.record import Run
from trainers.worker.heartbeat import HeartbeatPage
from trainers.worker.rank_spec import Mode, RankSpec, events_file, heartbeat_file, stacks_file
from trainers.worker.stack_dump import read_stacks

STACKS_WAIT_S, KILL_WAIT_S = 1.0, 5.0
GPU_KILL_WAIT_S = 90.0
"""A killed rank is gone once its GPU memory is free and its pinned pages are released: 10 s for 13 GB on an H200."""
LOG_TAIL_BYTES = 64 << 10
"""The stacks of a crash and the list of loaded modules after them take some 20 kB."""


@dataclass
class _Rank:
    """One living or ended rank."""

    rank: int
    files: Path
    events: int
    """File descriptor of the reading end."""
    heartbeat: HeartbeatPage
    log: str | None
    oom_kills: int
    server: "_Server"
    process: int | None = None
    log_from: int = 0
    """Where its part of the log begins: earlier launches wrote the rest."""
    rest: bytes = b""
    failed: FailedEvent | None = None
    exit: RankExit | None = None


@dataclass
class _Server:
    """A rank server process and what it said."""

    process: "subprocess.Popen[bytes]"
    ready: threading.Event = field(default_factory=threading.Event)


class NodeAgent:
    """Survives the restarts of its ranks, and where it is kept, their training."""

    def __init__(self, cpus_per_worker: int) -> None:
        self._folder: Path | None = None
        self._cpus = cpus_per_worker
        self._gpus: tuple[str, ...] = ()
        self._mode: Mode = "fork"
        self._ranks: dict[int, _Rank] = {}
        self._launched = 0
        self._servers: list[_Server] = []

    def begin(self, gpus: tuple[str, ...] | None) -> NodeInfo:
        """Have a process ready for ranks on these GPUs, on cores alone where there are none; say where this is.

        Args:
            gpus: by default those that the agent itself holds.
        """
        import ray

        gpus = own_gpus() if gpus is None else gpus
        if gpus != self._gpus:
            self._end_servers()  # they see other devices
        self._gpus, self._mode = gpus, "become" if gpus else "fork"
        self.warm_up(1)

        address = ray.util.get_node_ip_address()
        node = ray.get_runtime_context().get_node_id()
        named = {name: os.environ[name] for name in INTERFACES if name in os.environ}
        return NodeInfo(node, address, interface_of(address), gpus, named)

    def wait_warm(self, timeout_s: float) -> bool:
        """Whether the processes at hand have their imports done, waited for."""
        return all(server.ready.wait(timeout_s) for server in list(self._servers))

    def free_port(self) -> int:
        """A TCP port for rank 0 to listen on."""
        return free_port()

    def warm_up(self, ranks: int) -> None:
        """Have as many processes at hand as the next launch needs; one is enough where ranks are forks."""
        wanted = 1 if self._mode == "fork" else ranks
        while len(self._servers) < wanted:
            self._servers.append(self._start_server())

    def _start_server(self) -> _Server:
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        environment["OMP_NUM_THREADS"] = str(self._cpus)
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(self._gpus)  # DeepSpeed looks for devices as it is imported
        if self._mode == "fork":
            environment["DS_ACCELERATOR"] = "cpu"
        process = subprocess.Popen(
            [sys.executable, "-m", "trainers.worker", self._mode],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
        )
        server = _Server(process)
        threading.Thread(target=self._listen, args=(server,), daemon=True, name="rank-server").start()
        return server

    def _listen(self, server: _Server) -> None:
        """Take in what a rank server says until it ends."""
        assert server.process.stdout is not None
        for line in server.process.stdout:
            message = json.loads(line)
            if "ready" in message:
                server.ready.set()
            elif "pid" in message:
                for rank in [each for each in self._known() if str(each.files) == message["files"]]:
                    rank.process = message["pid"]
            elif "exit" in message:
                for rank in [each for each in self._known() if each.process == message["exit"]]:
                    self._note_end(rank, message["code"], message["max_rss_bytes"])
        code = server.process.wait()
        with contextlib.suppress(ValueError):
            self._servers.remove(server)  # first: who waits for the ends of the ranks launches others at once
        for rank in [each for each in self._known() if each.server is server and each.exit is None]:
            self._note_end(rank, code, 0)  # it was the rank, or its death took the ranks with it

    def _known(self) -> list[_Rank]:
        """The ranks of this moment, for a thread beside that which launches more."""
        return list(self._ranks.values())

    def launch(self, run: Run, environments: dict[int, dict[str, str]], log_folder: str | None) -> None:
        """Start these ranks. What ran here before is killed and forgotten.

        Args:
            environments: the launcher contract of each rank.
        """
        self.kill()
        self._launched += 1
        self.warm_up(len(environments))
        for index, (number, environment) in enumerate(sorted(environments.items())):
            server = self._servers[0 if self._mode == "fork" else index]
            log = f"{log_folder}/rank-{number:05d}.log" if log_folder else None
            self._ranks[number] = rank = self._prepare(number, log, server)
            spec = RankSpec(environment=environment | travelling(), files=str(rank.files), log=log, run=run)
            assert server.process.stdin is not None
            server.process.stdin.write(spec.model_dump_json().encode() + b"\n")
            server.process.stdin.flush()
        if self._mode == "become":
            del self._servers[: len(environments)]
            self.warm_up(len(environments))  # spares for the next launch

    def _prepare(self, number: int, log: str | None, server: _Server) -> _Rank:
        """The files of a new rank, each attempt's its own."""
        self._folder = self._folder or Path(tempfile.mkdtemp(prefix="tuneyard-agent-"))
        files = self._folder / f"launch-{self._launched}-rank-{number}"
        files.mkdir()
        os.mkfifo(events_file(files))
        events = os.open(events_file(files), os.O_RDONLY | os.O_NONBLOCK)
        heartbeat = HeartbeatPage(heartbeat_file(files))
        heartbeat.beat("start", 0)
        log_from = Path(log).stat().st_size if log is not None and Path(log).exists() else 0
        return _Rank(number, files, events, heartbeat, log, oom_kills(), server, log_from=log_from)

    def report(self) -> NodeReport:
        """What there is to see, without waiting."""
        exits = {number: rank.exit for number, rank in self._ranks.items()}  # before their last events are read
        events = [event for rank in self._ranks.values() for event in _read_events(rank)]
        return NodeReport(
            {number: self._ranks[number].heartbeat.read() for number, end in exits.items() if end is None},
            events,
            [replace(end, failed=self._ranks[number].failed) for number, end in exits.items() if end is not None],
        )

    def _note_end(self, rank: _Rank, code: int, max_rss_bytes: int) -> None:
        rank.exit = RankExit(
            rank=rank.rank,
            code=code,
            at=time.time(),
            failed=None,
            log_tail=_tail(rank.log, rank.log_from),
            max_rss_bytes=max_rss_bytes,
            oom_kills=oom_kills() - rank.oom_kills,
            shm_free_bytes=free_bytes("/dev/shm"),
            node=socket.gethostname(),
        )

    def ask_to_stop(self, reason: StopReason) -> None:
        """Have every rank stop at the end of its step."""
        for rank in self._ranks.values():
            rank.heartbeat.ask_to_stop(reason)

    def stacks(self) -> dict[int, tuple[str, str]]:
        """Of each living rank: its process state as /proc has it (T is stopped), and where each thread stands.

        A stopped process is woken for as long as that takes.
        """
        found = {}
        for number, rank in self._ranks.items():
            if rank.exit is None and rank.process is not None:
                found[number] = read_stacks(rank.process, stacks_file(rank.files), STACKS_WAIT_S)
        return found

    def kill(self) -> None:
        """Kill every rank, wait for their ends, and forget them."""
        for rank in self._ranks.values():
            if rank.exit is None:  # where it is not born yet, its rank server must not bear it later
                with contextlib.suppress(ProcessLookupError):
                    os.kill(rank.process or rank.server.process.pid, signal.SIGKILL)
        deadline = time.monotonic() + (GPU_KILL_WAIT_S if self._gpus else KILL_WAIT_S)
        while any(rank.exit is None for rank in self._ranks.values()) and time.monotonic() < deadline:
            time.sleep(0.01)
        for rank in self._ranks.values():
            os.close(rank.events)
            shutil.rmtree(rank.files, ignore_errors=True)
        self._ranks.clear()

    def rest(self) -> None:
        """Leave nothing behind but the processes that the next training will need."""
        self.kill()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def close(self) -> None:
        """End everything of this node."""
        self.rest()
        self._end_servers()

    def _end_servers(self) -> None:
        for server in self._servers:
            server.process.kill()
        self._servers = []


def _read_events(rank: _Rank) -> list[Event]:
    """Whole lines that have come; a rank's last words are kept apart."""
    data = rank.rest
    with contextlib.suppress(BlockingIOError):
        while chunk := os.read(rank.events, 1 << 16):
            data += chunk
    *lines, rank.rest = data.split(b"\n")
    events = parse_events(lines)
    rank.failed = next((event for event in events if isinstance(event, FailedEvent)), rank.failed)
    return [event for event in events if not isinstance(event, FailedEvent)]


def _tail(log: str | None, begin: int) -> str:
    """The end of what was written after `begin`."""
    if log is None or not Path(log).exists():
        return ""
    with Path(log).open("rb") as file:
        file.seek(max(begin, Path(log).stat().st_size - LOG_TAIL_BYTES))
        return file.read().decode(errors="replace")


def own_gpus() -> tuple[str, ...]:
    """Ids of the GPUs that Ray gave to this actor."""
    import ray

    return tuple(os.environ["CUDA_VISIBLE_DEVICES"].split(",")) if ray.get_gpu_ids() else ()
