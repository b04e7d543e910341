"""Faults for tests, in real rank processes: Python loads this file at its start where this folder is on PYTHONPATH.

A run folder's `faults.json` lists what goes wrong: `{"kind", "rank", "step"}`, each once unless it says `"always"`.
Kinds: stop (SIGSTOP), kill, oom (in the control group `cgroup`, which has a memory limit), sleep_loader, raise, memory,
endless_forward, nan, slow (`seconds` a step), skip (all ranks exchange a number after the backward pass, this one not),
mismatch (it leaves out the exchange of losses), wait (until there is a `file`), linger (each step of a launch after its
first three takes `seconds`, but for the one in which the rank is asked to stop), kill_evaluating (once the ranks
evaluate after that step). `committed`: a step whose checkpoint must be committed before the fault happens; the rank
waits for it.
Without that file nothing is changed.
"""

import importlib.abc
import importlib.machinery
import json
import os
import signal
import sys
import time
from pathlib import Path


class _AfterRank(importlib.abc.MetaPathFinder):
    """Patches trainers.worker.rank once it is imported."""

    def find_spec(self, name, path, target=None):
        if name != "trainers.worker.rank":
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            run_rank = module.run_rank
            module.run_rank = lambda run, hooks: (_install(run.folder, hooks), run_rank(run, hooks))[1]

        spec.loader.exec_module = exec_module
        return spec


def _install(run, hooks):
    """Put the faults of this run in place."""
    if not run.is_local or not (run.path / "faults.json").exists():
        return
    import torch

    from trainers.batching import batches
    from trainers.evaluation import evaluate
    from trainers.training import loop

    rank = int(os.environ["RANK"])
    everyones = json.loads((run.path / "faults.json").read_text())
    faults = [fault for fault in everyones if fault["rank"] == rank]
    skips = [fault | {"rank": rank} for fault in everyones if fault["kind"] == "skip" and fault["rank"] != rank]
    now = {"step": -1, "made": 0}
    seed_step, make, micro = loop.seed_step, batches.StepSource._make, loop.run_micro_batches
    agree, score = loop._settle, evaluate.EvaluationBatches.score

    def due(*kinds):
        return [fault for fault in faults if fault["kind"] in kinds and _due(run.path, fault, now["step"])]

    def seed_step_(seed, step, rank):
        now["step"], now["made"] = step, now["made"] + 1
        seed_step(seed, step, rank)

    def make_(self, step):
        for fault in faults:
            if fault["kind"] == "sleep_loader" and _due(run.path, fault, step):
                time.sleep(3600)
        return make(self, step)

    def micro_(engine, objective, batch, world, before_update):
        total = micro(engine, objective, batch, world, before_update)
        if any(_due(run.path, fault, now["step"]) for fault in skips):
            torch.distributed.recv(torch.zeros(1))  # what the faulty rank does not send
        due("skip")
        return total * float("nan") if due("nan") else total

    def agree_(*arguments):
        if not due("mismatch"):
            return agree(*arguments)
        return 0.0, 0.0, [0.0] * int(os.environ["WORLD_SIZE"]), loop.NOTHING

    def score_(self, number, model, device, group=None):
        for fault in due("kill_evaluating") if number else ():  # not the first batch of all
            _happen(fault | {"kind": "kill"})
        return score(self, number, model, device, group)

    def forward(objective):
        step_loss = objective.step_loss

        def step_loss_(*batch):
            for fault in due("stop", "kill", "oom", "raise", "memory", "endless_forward", "slow", "wait"):
                _happen(fault)
            for fault in due("linger") if now["made"] > 3 else ():
                _linger(fault["seconds"], hooks)
            return step_loss(*batch)

        return step_loss_

    train = loop.train

    def train_(engine, objective, *rest):
        objective.step_loss, now["made"] = forward(objective), 0
        return train(engine, objective, *rest)

    loop.seed_step, batches.StepSource._make, loop.run_micro_batches, loop._settle = seed_step_, make_, micro_, agree_
    evaluate.EvaluationBatches.score = score_
    sys.modules["trainers.worker.rank"].train = train_


def _due(run, fault, step):
    """Whether a fault happens now; what happens once leaves a mark."""
    if fault.get("always"):
        return step >= fault["step"]
    mark = Path(run) / f"fault-{fault['kind']}-{fault['rank']}-{fault['step']}"
    if step != fault["step"] or mark.exists():
        return False
    mark.touch()
    marker = Path(run) / "checkpoints" / f"step-{fault.get('committed', 0):08d}" / "COMMITTED"
    while "committed" in fault and not marker.exists():
        time.sleep(0.01)
    return True


def _linger(seconds, hooks):
    until = time.monotonic() + seconds
    while time.monotonic() < until and hooks.stop_reason() is None:
        time.sleep(0.02)


def _happen(fault):
    kind = fault["kind"]
    if kind == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif kind == "oom":
        (Path(fault["cgroup"]) / "cgroup.procs").write_text(str(os.getpid()))
        hoard = [bytearray(os.urandom(1 << 20)) for _ in range(1 << 10)]
        raise AssertionError(f"{len(hoard)} MiB were granted")
    elif kind == "raise":
        raise ValueError("the third layer is not on speaking terms with the fourth")
    elif kind == "memory":
        raise MemoryError("cannot allocate 1 TiB")
    elif kind == "slow":
        time.sleep(fault["seconds"])
    elif kind == "wait":
        while not Path(fault["file"]).exists():
            time.sleep(0.01)
    elif kind == "endless_forward":
        while True:
            sum(range(100_000))


sys.meta_path.insert(0, _AfterRank())
