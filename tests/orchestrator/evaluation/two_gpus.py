"""Evaluations as Ray tasks of a node that is said to have two GPUs, the last once the process of the others has ended;
prints what was seen.

python -m tests.orchestrator.evaluation.two_gpus RUN.json EXPORT EXPORT
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import ray

from orchestrator.evaluation import one_gpu
from orchestrator.evaluation.task import _with_resources, score
from orchestrator.ray_session import gpu_memory, smallest_gpu
from orchestrator.training.kept_agents import Room
from tests.ray_head import init_ray
from trainers.evaluation import warm
from trainers.model import world
from trainers.run.record import Run


def scored(run: Run, path: str, idle_s: float) -> dict[str, Any]:
    """One evaluation, and where it ran."""
    one_gpu.IDLE_S = idle_s
    kept = bool(warm._kept)
    loss = np.concatenate([one["loss_sum"] for one in score(run, path, 0)[""].numbers]).sum()
    (gpu,) = ray.get_runtime_context().get_accelerator_ids()["GPU"]
    return {"process": os.getpid(), "kept": kept, "gpu": gpu, "device": str(world.pick_device("auto")),
            "claimed": world._claimed[0], "loss": float(loss),
            "job": os.environ.get("OF_THE_JOB")}  # fmt: skip


class Holder:
    """Has a GPU as long as it lives."""

    def gpu(self) -> str:
        return str(ray.get_runtime_context().get_accelerator_ids()["GPU"][0])


def main() -> None:
    run, gpus, *paths = sys.argv[1:]
    options = {"num_gpus": int(gpus) or None, "runtime_env": {"env_vars": {"OF_THE_JOB": "yes"}}}
    init_ray(num_cpus=2, **options)
    room = Room(ray.nodes()[0]["NodeID"], 1, int(ray.cluster_resources()["GPU"]))
    all_gpus = ray.get(room.gpus())
    room.release()
    of = Run.model_validate_json(Path(run).read_text())
    task = _with_resources(of, 1, scored)
    found = [ray.get(task.remote(of, paths[0], 600.0))]
    held = hold_all_but_another(found[0]["gpu"]) if ray.cluster_resources()["GPU"] > 1 else []
    found.append(ray.get(task.remote(of, paths[1], 0.5)))
    deadline = time.monotonic() + 60
    while psutil.pid_exists(found[-1]["process"]) and time.monotonic() < deadline:
        time.sleep(0.1)
    found.append(ray.get(task.remote(of, paths[1], 60.0)))
    os.environ["PATH"] = "/nowhere"  # Ray's processes keep theirs
    memory = {"driver": gpu_memory(), "smallest": smallest_gpu(ray)}
    print(json.dumps({"evaluations": found, "memory": memory, "held": len(held), "room": all_gpus}))


def hold_all_but_another(gpu: str) -> list[Any]:
    """Leave one GPU free, which is not this one. Who holds the others does so as long as it is referred to."""
    there = range(int(ray.cluster_resources()["GPU"]))
    holders = [ray.remote(num_cpus=0, num_gpus=1)(Holder).remote() for _ in there]
    held = {ray.get(holder.gpu.remote()): holder for holder in holders}
    ray.kill(held.pop(min(held.keys() - {gpu})))
    return list(held.values())


if __name__ == "__main__":
    main()
