"""A committed checkpoint as a Hugging Face folder that plain from_pretrained opens.

It has all that the training had: the chat template and the token that ends a turn, label names, the model's own code.
Streams: 4 MiB of a tensor in memory at a time (whole tensors where adapters are merged or experts taken apart). The
folder counts as written once `tuneyard.json` is there: the result was opened again, every name and shape compared.
"""

import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

import xxhash

from trainers.architecture import (
    Weight,
    published_weights,
    token_types,
    write_weights,
)
from trainers.checkpoint.adapters import merged_weights, trained_weight
from trainers.checkpoint.damage import find_damage
from trainers.checkpoint.local_copies import LocalCopies
from trainers.checkpoint.reading import CheckpointReader
from trainers.checkpoint.records import FileRecord
from trainers.errors import EvaluationError
from trainers.job.schema import Job
from trainers.model.lora import PREFIX
from trainers.records import Record
from trainers.storage import TEMPORARY, Folder
from trainers.tasks import Task
from trainers.tasks.base import Serving
from trainers.tensor_file import FileDigest, spec_of
from trainers.tokenizer.encoder import load_encoder

PROVENANCE = "tuneyard.json"
OLD_SCRATCH = ".tuneyard-"
"""Prefix of scratch folders that killed exports of an earlier version left among the files."""
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
        model_path: the pretrained folder, for config, tokenizer, code, and the weights that adapters leave alone.

    Raises:
        EvaluationError: where the checkpoint is damaged or the result would not load as the same model.
        OSError: where it cannot be read now.
    """
    if out.exists(PROVENANCE):  # what a killed try left is written over, file by file: another may be at it now
        return Provenance.model_validate_json(out.read_bytes(PROVENANCE))
    reader, encoder = open_checkpoint(checkpoint), load_encoder(model_path, job.model.trust_remote_code)
    config = task.load_config(model_path, encoder.pad_id, job.model.trust_remote_code)
    config.dtype = job.model.dtype
    empty = on_meta(config, task, job.model.trust_remote_code)
    config.architectures = [type(empty).__name__]
    write_settings(task.serving(encoder), config, Path(model_path), out, job.model.trust_remote_code)
    takes_types = token_types(config) > 1 and "token_type_ids" in signature(empty.forward).parameters
    if takes_types and any(encoder.encode([("a", "b")])[0].type_ids):
        _name_token_types(out, encoder.tokenizer.model_input_names)
    out.write_json("config.json", _config_of(config, Path(model_path)))
    with _scratch(out) as scratch:
        weights = _weights(reader, job, task, config, model_path, empty, scratch)
        written = write_weights(published_weights(empty, weights), out, {"format": "pt"})
    _reopen(out, task.head_class(config), weights, job.model.trust_remote_code)
    return write_provenance(checkpoint, reader, out, job.model.dtype, written)


def open_checkpoint(checkpoint: Folder) -> CheckpointReader:
    """A checkpoint whose digests are right. Raises EvaluationError where it is damaged, OSError where it is away."""
    stored = LocalCopies(checkpoint)
    damage = find_damage(stored)
    if damage:
        raise EvaluationError(f"{checkpoint} cannot be exported: {damage}")
    return CheckpointReader(stored)


def write_provenance(
    checkpoint: Folder, reader: CheckpointReader, out: Folder, dtype: str, written: Mapping[str, FileDigest]
) -> Provenance:
    """Say that the folder is whole, and what is in it.

    Args:
        written: digests of the weight files.
    """
    files = {name: FileRecord(bytes=file.bytes, digest=file.digest) for name, file in written.items()}
    for name in out.list():
        if name.startswith(OLD_SCRATCH):
            out.delete(name)
        elif name not in files:
            files[name] = _record(out, name)
    state = reader.state
    provenance = Provenance(
        step=state.step, checkpoint=str(checkpoint), dtype=dtype, train_key=state.train_key, job=state.job, files=files
    )
    out.write_bytes(PROVENANCE, provenance.model_dump_json(indent=1).encode())
    return provenance


def _scratch(out: Folder) -> Any:
    """A folder that goes again, on the disk that the export needs anyway where it is local; hidden, for it stays where
    the process is killed."""
    return tempfile.TemporaryDirectory(dir=out.path if out.is_local else None, prefix=TEMPORARY)


def clear_leftovers(out: Folder) -> None:
    """Delete what killed exports left in a folder that is whole."""
    for path in out.path.glob(f"{TEMPORARY}*") if out.is_local else ():
        out.delete(path.name)


def _record(folder: Folder, name: str) -> FileRecord:
    data = folder.read_bytes(name)
    return FileRecord(bytes=len(data), digest=xxhash.xxh3_128_hexdigest(data))


def on_meta(config: Any, task: Task, trust_remote_code: bool) -> Any:
    """The model that a configuration describes, without values."""
    import torch
    import transformers

    with torch.device("meta"):
        return getattr(transformers, task.head_class(config)).from_config(config, trust_remote_code=trust_remote_code)


def _config_of(config: Any, source: Path) -> dict[str, Any]:
    """What config.json says. Numbers of the pretrained folder's that transformers 5 keeps under another name (such as
    rope_theta) stand beside it, for other readers look for them."""
    before, known = json.loads((source / "config.json").read_text(encoding="utf-8")), config.to_dict().keys()
    kept = {name: value for name, value in before.items() if isinstance(value, int | float) and name not in known}
    return {**kept, **json.loads(config.to_json_string(use_diff=True))}


def _copy_side_files(source: Path, out: Folder, trust_remote_code: bool) -> None:
    for pattern in (*COPIED, *(("*.py",) if trust_remote_code else ())):
        for file in sorted(source.glob(pattern)):
            out.write_bytes(file.name, file.read_bytes())


def write_settings(serving: Serving, config: Any, source: Path, out: Folder, trust_remote_code: bool) -> None:
    """What lies beside the weights, with the template and the end tokens of the training in place of the pretrained
    folder's."""
    _copy_side_files(source, out, trust_remote_code)
    if serving.chat_template is not None:
        out.write_bytes("chat_template.jinja", serving.chat_template.encode())
        if "tokenizer_config.json" in out.list():
            settings = out.read_json("tokenizer_config.json")
            settings.pop("chat_template", None)
            out.write_json("tokenizer_config.json", settings)
    generation = trained_generation(serving, config, source)
    if generation is not None:
        out.write_bytes("generation_config.json", generation.to_json_string(use_diff=True).encode())


def trained_generation(serving: Serving, config: Any, source: Path) -> Any:
    """Settings of generation with the first and end tokens of the training; None where the pretrained folder's stay."""
    from transformers import GenerationConfig

    if not serving.stop_ids and not serving.first_tokens:
        return None
    has_own = (source / "generation_config.json").is_file()
    generation = GenerationConfig.from_pretrained(source) if has_own else GenerationConfig.from_model_config(config)
    generation.update(**dict(serving.first_tokens))
    if not serving.stop_ids:
        return generation
    own = generation.eos_token_id
    known = own if isinstance(own, list) else [] if own is None else [own]
    generation.eos_token_id = list(dict.fromkeys([*known, *serving.stop_ids]))
    return generation


def _name_token_types(out: Folder, names: Sequence[str]) -> None:
    """Have the tokenizer tell the halves of a pair apart as training did; some classes do not by themselves."""
    if "token_type_ids" not in names and "tokenizer_config.json" in out.list():
        settings = out.read_json("tokenizer_config.json")
        out.write_json("tokenizer_config.json", settings | {"model_input_names": [*names, "token_type_ids"]})


def _weights(
    reader: CheckpointReader, job: Job, task: Task, config: Any, model_path: str, empty: Any, scratch: str
) -> dict[str, Weight]:
    """The weights as the model in memory has them, adapters merged, and its persistent buffers; by name.

    Args:
        empty: the model on the meta device.
        scratch: a folder for weights of the pretrained model that have to be converted.
    """
    import torch

    dtype, shapes = getattr(torch, job.model.dtype), reader.state.shapes
    if job.model.lora:
        weights = merged_weights(reader, job, task, config, model_path, empty, scratch)
    else:
        weights = {name: trained_weight(reader, name, name, dtype) for name in shapes}
    for name, buffer in reader.buffers():
        name = name.removeprefix(PREFIX)
        weights[name] = Weight(spec_of(name, buffer), partial(torch.Tensor.detach, buffer), partial(iter, (buffer,)))
    return weights


def _reopen(out: Folder, head: str, weights: dict[str, Weight], trust_remote_code: bool) -> None:
    """Open the folder as a user would, on the meta device, and compare names and shapes; tied weights must be tied."""
    import transformers

    auto = getattr(transformers, head)
    with tempfile.TemporaryDirectory(prefix="tuneyard-") as scratch:
        path = out.path if out.is_local else _download(out, Path(scratch))
        model, info = auto.from_pretrained(
            path, device_map="meta", output_loading_info=True, trust_remote_code=trust_remote_code
        )
    wrong = {
        kind: sorted(map(str, info[kind]))
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")
        if info[kind]
    }
    loaded = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
    differing = [name for name, shape in loaded.items() if name not in weights or weights[name].spec.shape != shape]
    if wrong or differing:
        raise EvaluationError(
            f"the export {out} does not load as the model that was trained: {json.dumps(wrong)} {differing}"
        )


def _download(source: Folder, target: Path) -> Path:
    for name in source.list():
        with source.open_input(name) as stream, (target / name).open("wb") as file:
            shutil.copyfileobj(stream, file)
    return target
