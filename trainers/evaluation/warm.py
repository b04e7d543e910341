"""What an evaluation leaves in its process for the next one of the same run: the evaluation sets in batches, the
tokenizer and the model, whose weights are swapped for those of the next export. Begin at `open_warm`.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from trainers.evaluation.evaluate import Loaded, SetBatches, load_for_scoring, plan_sets
from trainers.model.world import free_memory, pick_device
from trainers.pretrained import weight_files
from trainers.run.record import Run

MOST_BYTES = 2 * 2**30
"""A larger model is not kept: between evaluations its memory belongs to others, and reading it takes what time there
is."""
_kept: dict[str, tuple[Loaded, SetBatches]] = {}
"""At most one, by run."""


def open_warm(run: Run, path: str) -> tuple[Loaded, SetBatches]:
    """The model of a folder and the batches to score; what is left of the last evaluation of this run is used."""
    kept = _kept.pop(_identity(run, path), None)
    _kept.clear()
    if kept:
        loaded, batches = kept
        if swap_weights(loaded.model, Path(path)):
            device = pick_device(run.job.scale.gpus_per_worker, run.job.scale.cpus_per_worker)
            return replace(loaded, model=loaded.model.to(device), device=device), batches
    task = run.load_task()
    loaded = load_for_scoring(run.job, task, path)
    return loaded, plan_sets(run.job, task, run.open_held(task), loaded.encoder)


def keep_warm(run: Run, path: str, loaded: Loaded, batches: SetBatches) -> None:
    """Leave them for the next evaluation, off the device."""
    held: dict[int, int] = {tensor.data_ptr(): tensor.nbytes for tensor in loaded.model.state_dict().values()}
    spread = hasattr(loaded.model, "hf_device_map")  # over devices, and lies where it must
    if sum(held.values()) <= MOST_BYTES and not spread:
        loaded.model.to("cpu")
        _kept[_identity(run, path)] = loaded, batches
    if loaded.device.type != "cpu":
        free_memory()  # torch would hold what the model had of the device; looking for cycles takes 0.3 s


def _identity(run: Run, path: str) -> str:
    """The pretrained folder is no export: it has other settings, and no head where that is new."""
    return f"{run.folder} {run.job.model_dump_json()} {path == run.model.path}"


def swap_weights(model: Any, folder: Path) -> bool:
    """Give a model the weights of a folder; False, and nothing is changed, where these are not all and only its own."""
    import torch
    from safetensors import safe_open

    own = model.state_dict()
    there: dict[str, tuple[Path, list[int]]] = {}
    for file in weight_files(folder):
        with safe_open(file, "pt") as weights:
            there |= {name: (file, weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118
    if any(name not in own or list(own[name].shape) != shape for name, (_, shape) in there.items()):
        return False
    given = {own[name].data_ptr() for name in there}
    if any(tensor.data_ptr() not in given for tensor in own.values()):  # tied weights stand in a folder once
        return False
    with torch.no_grad():
        for file in dict.fromkeys(file for file, _ in there.values()):
            with safe_open(file, "pt") as weights:
                for name in weights.keys():  # noqa: SIM118
                    own[name].copy_(weights.get_tensor(name))
    return True
