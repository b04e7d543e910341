"""A committed checkpoint as a Hugging Face folder that plain from_pretrained opens.

Streams: 4 MiB of a tensor in memory at a time (whole tensors where adapters are merged). The folder counts as written
once `tuneyard.json` is there, which is after the result was opened again and every name and shape compared.
"""

import json
import shutil
import tempfile
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

from trainers.checkpoint.damage import find_damage
from trainers.checkpoint.local_copies import LocalCopies
from trainers.checkpoint.reading import CheckpointReader
from trainers.checkpoint.records import FileRecord
from trainers.checkpoint.tensor_file import TensorSpec, write_parts
from trainers.errors import EvaluationError
from trainers.job.schema import Job
from trainers.model.lora import PREFIX, merged_reader, merged_shapes
from trainers.records import Record
from trainers.storage import Folder
from trainers.tasks import Task
from trainers.tokenizer.encoder import load_encoder

PROVENANCE = "tuneyard.json"
SHARD_BYTES = 5_000_000_000
PART = 1 << 20
"""Values of a weight in memory at once: 4 MiB in fp32."""
INDEX = "model.safetensors.index.json"
COPIED = (
    "tokenizer*",
    "special_tokens*",
    "added_tokens*",
    "chat_template*",
    "vocab*",
    "merges*",
    "*.model",
    "generation_config.json",
)


class Provenance(Record):
    """tuneyard.json: where the folder's weights come from. Its existence says that the export is whole."""

    schema_version: int = 1
    step: int
    checkpoint: str
    dtype: str
    train_key: str
    job: str
    files: dict[str, FileRecord]


def export_checkpoint(checkpoint: Folder, out: Folder, job: Job, task: Task, model_path: str) -> Provenance:
    """Write one checkpoint as a model folder; an export that is already there is left as it is.

    Args:
        task: knowing its labels.
        model_path: the pretrained folder, for config and tokenizer.

    Raises:
        EvaluationError: where the checkpoint is damaged or the result would not load as the same model.
    """
    if out.exists(PROVENANCE):
        return Provenance.model_validate_json(out.read_bytes(PROVENANCE))
    stored = LocalCopies(checkpoint)
    damage = find_damage(stored)
    if damage:
        raise EvaluationError(f"{checkpoint} cannot be exported: {damage}")
    reader = CheckpointReader(stored)
    config = task.load_config(model_path, load_encoder(model_path).pad_id, job.model.trust_remote_code)
    _copy_side_files(Path(model_path), out)
    config.dtype = job.model.dtype
    out.write_bytes("config.json", _config_json(config, task, job).encode())
    specs = _specs(reader, job, dict(reader.buffers()))
    files = _write_weights(reader, job, specs, out)
    _reopen(out, task.head_class(config), specs)
    provenance = Provenance(
        step=reader.state.step,
        checkpoint=str(checkpoint),
        dtype=job.model.dtype,
        train_key=reader.state.train_key,
        job=reader.state.job,
        files=files,
    )
    out.write_bytes(PROVENANCE, provenance.model_dump_json(indent=1).encode())
    return provenance


def _config_json(config: Any, task: Task, job: Job) -> str:
    """config.json with the architecture named, as save_pretrained would write it."""
    config.architectures = [type(_on_meta(config, task, job.model.trust_remote_code)).__name__]
    return str(config.to_json_string(use_diff=True))


def _on_meta(config: Any, task: Task, trust_remote_code: bool) -> Any:
    import torch
    import transformers

    with torch.device("meta"):
        return getattr(transformers, task.head_class(config)).from_config(config, trust_remote_code=trust_remote_code)


def _copy_side_files(source: Path, out: Folder) -> None:
    for pattern in COPIED:
        for file in sorted(source.glob(pattern)):
            out.write_bytes(file.name, file.read_bytes())


def _specs(reader: CheckpointReader, job: Job, buffers: dict[str, Any]) -> list[TensorSpec]:
    shapes = merged_shapes(reader.state.shapes) if job.model.lora else reader.state.shapes
    weights = [TensorSpec(name, job.model.dtype, tuple(shape)) for name, shape in shapes.items()]
    buffers = {name.removeprefix(PREFIX): buffer for name, buffer in buffers.items()}
    extra = [TensorSpec(name, str(t.dtype).removeprefix("torch."), tuple(t.shape)) for name, t in buffers.items()]
    return weights + extra


def _write_weights(reader: CheckpointReader, job: Job, specs: list[TensorSpec], out: Folder) -> dict[str, FileRecord]:
    """One safetensors file, or several with an index where there is more than SHARD_BYTES."""
    import torch

    buffers = {name.removeprefix(PREFIX): buffer for name, buffer in reader.buffers()}
    shapes = reader.state.shapes

    def read(name: str) -> Any:
        return reader.read("weight", name, 0, prod(shapes[name])).view(shapes[name])

    merged = merged_reader(shapes, read, job.model.lora) if job.model.lora else None

    def parts(name: str) -> Iterator[Any]:
        if name in buffers:
            yield buffers[name]
        elif merged:
            yield merged(name).to(getattr(torch, dtypes[name]))
        else:
            size = prod(shapes[name])
            for start in range(0, size, PART):
                yield reader.read("weight", name, start, min(start + PART, size)).to(getattr(torch, dtypes[name]))

    dtypes = {spec.name: spec.dtype for spec in specs}
    groups = _group(specs)
    files: dict[str, FileRecord] = {}
    for number, group in enumerate(groups, 1):
        name = "model.safetensors" if len(groups) == 1 else f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        with out.open_output(name) as stream:
            digest = write_parts(stream, group, parts, {"format": "pt"})
        files[name] = FileRecord(bytes=digest.bytes, digest=digest.digest)
    if len(groups) > 1:
        places = {spec.name: name for name, group in zip(files, groups, strict=True) for spec in group}
        total = sum(spec.num_bytes for spec in specs)
        out.write_json(INDEX, {"metadata": {"total_size": total}, "weight_map": places})
    return files


def _group(specs: list[TensorSpec]) -> list[list[TensorSpec]]:
    groups: list[list[TensorSpec]] = [[]]
    size = 0
    for spec in specs:
        if groups[-1] and size + spec.num_bytes > SHARD_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(spec)
        size += spec.num_bytes
    return groups


def _reopen(out: Folder, head: str, specs: list[TensorSpec]) -> None:
    """Open the folder as a user would, on the meta device, and compare names and shapes; tied weights must be tied."""
    import transformers

    auto = getattr(transformers, head)
    with tempfile.TemporaryDirectory(prefix="tuneyard-") as scratch:
        path = out.path if out.is_local else _download(out, Path(scratch))
        model, info = auto.from_pretrained(path, device_map="meta", output_loading_info=True)
    wrong = {
        kind: sorted(map(str, info[kind]))
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")
        if info[kind]
    }
    loaded = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
    written = {spec.name: spec.shape for spec in specs}
    differing = [name for name, shape in loaded.items() if written.get(name) != shape]
    if wrong or differing:
        raise EvaluationError(
            f"the export {out} does not load as the model that was trained: {json.dumps(wrong)} {differing}"
        )


def _download(source: Folder, target: Path) -> Path:
    for name in source.list():
        with source.open_input(name) as stream, (target / name).open("wb") as file:
            shutil.copyfileobj(stream, file)
    return target
