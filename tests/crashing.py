"""Jobs that do nothing but save, to be killed and damaged, and what the next start makes of what is left.

Two kinds: `start_light` runs the real buffers, writer processes and commits on made-up values without torch.distributed
(a tenth of a second to start, so hundreds of injections are cheap); `start_engines` runs real ranks with a ZeRO-3
engine, saving with ours or with DeepSpeed's `save_checkpoint`. Both come out of a fork server that has torch loaded.
"""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orchestrator.training.node_report import free_port
from tests.ranks import rank_context
from tests.thread_ranks import Alone
from trainers.checkpoint.choosing import choose_checkpoint
from trainers.checkpoint.cleaning import remove_checkpoint
from trainers.checkpoint.reading import committed_steps
from trainers.checkpoint.records import CheckpointState, Save, SaveRequest
from trainers.checkpoint.retention import deletable
from trainers.run.folder import step_name
from trainers.storage import TEMPORARY, Folder

WORLD = 2
KINDS = ("weight", "exp_avg", "exp_avg_sq")
PATIENCE_S = 200.0
"""For what writers do: at their priority a busy machine gives them a hundredth of a processor."""


@dataclass
class Launched:
    """The processes of one job."""

    folder: Path
    ranks: list[Any]
    barrier: Any = None
    """Kept, because a barrier ends with the last process that holds it."""

    def writers(self) -> list[int]:
        """Writer processes, by rank, as far as they have said so."""
        return [int(path.read_text()) for path in sorted(self.folder.glob("writer-*"))]

    def said(self) -> list[dict[str, Any]]:
        """What rank 0 was told of its saves."""
        path = self.folder / "said.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines() if line] if path.exists() else []

    def join(self) -> list[int | None]:
        """Wait for the ranks; their exit codes."""
        for rank in self.ranks:
            rank.join(timeout=400)
        return [rank.exitcode for rank in self.ranks]

    def kill(self) -> None:
        """End every rank as a launcher would once one has died, and see their writers go by themselves."""
        for rank in self.ranks:
            rank.kill()
        self.join()
        deadline = time.monotonic() + PATIENCE_S
        while any(is_alive(writer) for writer in self.writers()):
            assert time.monotonic() < deadline, "a writer outlived its rank"
            time.sleep(0.01)


def is_alive(process: int) -> bool:
    """Whether a process exists and is no zombie."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def start_light(
    folder: Path, checkpoints: Path | Folder | list[Path], steps: int, values: int, first: int = 0, keep: int = 3
) -> Launched:
    """A job of two ranks that saves steps first+1 ... steps, each rank `values` numbers of each kind.

    Args:
        checkpoints: where to; or a view of that folder for each rank.
    """
    places = [_folder(each) for each in (checkpoints if isinstance(checkpoints, list) else [checkpoints] * WORLD)]
    context = rank_context()
    folder.mkdir(parents=True, exist_ok=True)
    barrier = context.Barrier(WORLD)
    ranks = [
        context.Process(
            target=_light_rank, args=(folder, places[rank], rank, first, steps, values, keep, barrier), daemon=True
        )
        for rank in range(WORLD)
    ]
    for rank in ranks:
        rank.start()
    return Launched(folder, ranks, barrier)


def _folder(place: Path | Folder) -> Folder:
    """What a rank is given: a fork of an older process, to which only a `Folder` brings a bucket's credentials."""
    return place if isinstance(place, Folder) else Folder(str(place))


def _light_rank(
    folder: Path, checkpoints: Folder, rank: int, first: int, steps: int, values: int, keep: int, barrier: Any
) -> None:
    from trainers.checkpoint.host_buffer import HostBuffer
    from trainers.checkpoint.slices import Piece, RankShare
    from trainers.checkpoint.writer_link import WriterLink
    from trainers.tensor_file import TensorSpec

    now = [0]
    pieces = [
        Piece(TensorSpec(f"{kind}/w", "float32", (values,)), lambda kind=kind: values_of(kind, now[0], rank, values))
        for kind in KINDS
    ]
    buffer = HostBuffer(RankShare(tuple(pieces), {"w": rank * values}))
    link = WriterLink(buffer.descriptor)
    _note_writer(folder, rank, link.process.pid)
    for step in range(first + 1, steps + 1):
        barrier.wait(PATIENCE_S)  # as the collectives of a step would
        now[0] = step
        buffer.copy_beside(lambda _: None).wait()
        state = _state(step, values) if rank == 0 else None
        save = Save(id=f"{folder.name}-{step}", rank=rank, world_size=WORLD)
        place = checkpoints / step_name(step)
        link.send(SaveRequest(save=save, step=step, folder=place.uri, total_bytes=2 * buffer.num_bytes, state=state))
        report = link.hear(PATIENCE_S)
        _note_writer(folder, rank, link.process.pid)
        if rank == 0:
            assert report is not None
            with (folder / "said.jsonl").open("a") as stream:
                stream.write(report.model_dump_json() + "\n")
            for old in deletable(committed_steps(checkpoints), keep, ()):
                remove_checkpoint(checkpoints, old)
    link.close()


def _note_writer(folder: Path, rank: int, process: int) -> None:
    partial = folder / f".writer-{rank}"
    partial.write_text(str(process))
    partial.rename(folder / f"writer-{rank}")


def values_of(kind: str, step: int, rank: int, count: int) -> Any:
    """What a light rank's share of a kind holds after a step."""
    import torch

    return torch.arange(count, dtype=torch.float32).remainder_(9973) + (step * 100 + KINDS.index(kind) * 10 + rank)


def _state(step: int, values: int) -> CheckpointState:
    return CheckpointState(
        step=step, world_size=WORLD, zero_stage=3, shapes={"w": [WORLD * values]}, trainable=("w",), tokens=step,
        train_key="k", job="j",
    )  # fmt: skip


@dataclass
class Found:
    """What the next start makes of a folder of checkpoints."""

    step: int
    told: list[Any] = field(default_factory=list)


def next_start(checkpoints: Path | Folder, values: int) -> Found:
    """What a light job's next start loads. Raises AssertionError where a single value of it is wrong."""
    found = Found(0)
    reader = choose_checkpoint(_folder(checkpoints), Alone(), found.told.append)
    if reader is None:
        return found
    found.step = reader.state.step
    check_values(reader, values)
    return found


def check_values(reader: Any, values: int) -> None:
    """Raises AssertionError where a value is not that of the step."""
    step = reader.state.step
    for kind in KINDS:
        for rank in range(WORLD):
            read = reader.read(kind, "w", rank * values, (rank + 1) * values)
            assert read.equal(values_of(kind, step, rank, values)), f"damaged values of step {step} loaded"


def wait_for_bytes(checkpoint: Path, name: str, offset: int, alive: Callable[[], bool]) -> bool:
    """Return once a file being written has grown to an offset, or has its name; False if the job ended first."""
    while alive():
        with contextlib.suppress(OSError):
            for entry in os.scandir(checkpoint):
                ends = entry.name.startswith(TEMPORARY) and entry.name.endswith(name)
                if entry.name == name or (ends and entry.stat().st_size >= offset):
                    return True
    return False


def damage_file(path: Path, how: str, dice: random.Random) -> None:
    """Truncate a file, flip one of its bits, or remove it."""
    if how == "missing":
        path.unlink()
        return
    size = path.stat().st_size
    with path.open("r+b") as stream:
        if how == "truncated":
            stream.truncate(dice.randrange(size))
            return
        at = dice.randrange(size)
        stream.seek(at)
        byte = stream.read(1)[0]
        stream.seek(at)
        stream.write(bytes([byte ^ (1 << dice.randrange(8))]))


@contextlib.contextmanager
def small_disk(place: Path, num_bytes: int) -> Iterator[Path]:
    """A file system of a limited size. Raises OSError where this user may not mount one."""
    place.mkdir(parents=True)
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={num_bytes}", "tmpfs", str(place)], capture_output=True, check=False
    )
    if done.returncode:
        raise OSError(f"cannot mount a small disk: {done.stderr.decode()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def kill(process: int) -> None:
    """SIGKILL, unless it is gone."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, signal.SIGKILL)


def start_engines(folder: Path, saver: str, steps: int, load: bool = False) -> Launched:
    """Two ranks with a ZeRO-3 engine that save after each step with `ours` or `deepspeed`; or load and say what."""
    context = rank_context()
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    for stale in folder.glob("loaded-*"):
        stale.unlink()
    ranks = [
        context.Process(target=_engine_rank, args=(folder, saver, rank, port, steps, load), daemon=True)
        for rank in range(WORLD)
    ]
    for rank in ranks:
        rank.start()
    return Launched(folder, ranks)


def _engine_rank(folder: Path, saver: str, rank: int, port: int, steps: int, load: bool) -> None:
    contract = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": WORLD, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in contract.items()}, DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1")
    import torch

    from trainers.model.world import join_world

    world = join_world(1)
    engine = make_engine(world, width=384)
    agent: Any = OurSaver(engine, folder, world) if saver == "ours" else DeepSpeedSaver(engine, folder)
    if load:
        (folder / f"loaded-{rank}").write_text(json.dumps({"step": agent.load(), "digest": state_digest(engine)}))
    else:
        torch.manual_seed(rank)
        for step in range(1, steps + 1):
            loss = engine(torch.randn(4, 384)).square().mean()
            engine.backward(loss)
            agent.before_update()
            engine.step()
            with (folder / f"digests-{rank}.jsonl").open("a") as stream:
                stream.write(json.dumps({"step": step, "digest": state_digest(engine)}) + "\n")
            agent.save(step)
        agent.finish()
    os._exit(0)


def make_engine(world: Any, width: int = 64, layers: int = 4, model: Any = None, offload: bool = False) -> Any:
    """A ZeRO-3 engine over a model, or a stack of square layers; its state offloaded to host memory, or not."""
    import deepspeed
    import torch

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    torch.manual_seed(0)
    model = model or torch.nn.Sequential(*[torch.nn.Linear(width, width) for _ in range(layers)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    config = {
        "train_batch_size": 4 * world.size,
        "train_micro_batch_size_per_gpu": 4,
        "zero_optimization": {"stage": 3, **({"offload_optimizer": {"device": "cpu"}} if offload else {})},
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
    }
    deepspeed.init_distributed(verbose=False)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
    return engine


def state_digest(engine: Any) -> str:
    """Digest of this rank's weights and, once they exist, moments."""
    import xxhash

    digest = xxhash.xxh3_128()
    for flat in engine.optimizer.fp32_partitioned_groups_flat:
        digest.update(flat.detach().numpy())
        state = engine.optimizer.optimizer.state.get(flat, {})
        for kind in KINDS[1:]:
            if kind in state:
                digest.update(state[kind].numpy())
    return digest.hexdigest()


class OurSaver:
    """The checkpointer as a run uses it."""

    def __init__(self, engine: Any, folder: Path, world: Any) -> None:
        from trainers.checkpoint.checkpointer import Checkpointer, new_attempt

        self._told = folder / "said.jsonl"
        place = Folder(str(folder / "checkpoints"))
        self._it = Checkpointer(engine, place, world, new_attempt(world), "key", "job", self._emit)
        self._rank, self._folder, self._keep = world.rank, folder, 3

    def _emit(self, event: Any) -> None:
        with self._told.open("a") as stream:
            stream.write(json.dumps(dict(event)) + "\n")

    def save(self, step: int) -> None:
        """Save, and go on while it is being written."""
        from trainers.checkpoint.records import Progress

        self._it.save(Progress(step, step))
        assert self._it._writing is not None
        _note_writer(self._folder, self._rank, self._it._writing.link.process.pid)

    def before_update(self) -> None:
        """Wait for the copy."""
        self._it.before_update()

    def finish(self) -> None:
        """Wait for the last commit."""
        self._it.finish()

    def load(self) -> int:
        """The step that was restored; 0 for none."""
        return self._it.resume().step


class DeepSpeedSaver:
    """DeepSpeed's own, as its documentation uses it."""

    def __init__(self, engine: Any, folder: Path) -> None:
        self._engine, self._place = engine, str(folder / "checkpoints")

    def save(self, step: int) -> None:
        """Save to a tag of the step."""
        self._engine.save_checkpoint(self._place, tag=step_name(step), client_state={"step": step})

    def before_update(self) -> None:
        """Its save ended before it returned."""

    def finish(self) -> None:
        """Nothing is in flight."""

    def load(self) -> int:
        """The step that `latest` names; 0 for none."""
        place, state = self._engine.load_checkpoint(self._place)
        return int(state["step"]) if place else 0


def loaded_by(job: Launched) -> tuple[int, str | None]:
    """The step that a loading job restored, and what is wrong with it: it died, or its values are not that step's."""
    codes = job.join()
    if any(codes) or len(list(job.folder.glob("loaded-*"))) < WORLD:
        return 0, f"loading failed with exit codes {codes}"
    said = [json.loads((job.folder / f"loaded-{rank}").read_text()) for rank in range(WORLD)]
    if len({one["step"] for one in said}) > 1:
        return 0, f"ranks loaded different steps: {[one['step'] for one in said]}"
    step = said[0]["step"]
    for rank, one in enumerate(said):
        lines = (job.folder / f"digests-{rank}.jsonl").read_text().splitlines()
        right = [json.loads(line)["digest"] for line in lines if json.loads(line)["step"] == step]
        if step and one["digest"] not in right:
            return step, f"rank {rank} loaded values that are not those of step {step}"
    return step, None


def copy_job(source: Path, target: Path) -> Path:
    """A job's folder again, to be damaged."""
    shutil.copytree(source, target)
    return target
