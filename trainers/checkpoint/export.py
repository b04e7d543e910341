"""A committed checkpoint as a Hugging Face folder that plain from_pretrained opens.

It has all that the training had: the chat template and the token that ends a turn, label names, the model's own code.
Streams: 4 MiB of a tensor in memory at a time (whole tensors where adapters are merged or experts taken apart). The
folder counts as written once `tuneyard.json` is there: the result was opened again, every name and shape compared.
"""

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from inspect import signature
from math import prod
from pathlib import Path
from typing import Any

import xxhash

from trainers.architecture import token_types, transposed_weights
from trainers.checkpoint.damage import find_damage
from trainers.checkpoint.local_copies import LocalCopies
from trainers.checkpoint.published import Weight, in_parts, published_weights
from trainers.checkpoint.reading import CheckpointReader
from trainers.checkpoint.records import FileRecord
from trainers.checkpoint.tensor_file import TensorSpec, spec_of, write_parts
from trainers.errors import EvaluationError
from trainers.job.schema import Job
from trainers.model.lora import PREFIX, merged_reader, merged_shapes, plain_name, unread_weights
from trainers.pretrained import load_pretrained
from trainers.records import Record
from trainers.storage import Folder
from trainers.tasks import Task
from trainers.tasks.base import Serving
from trainers.tokenizer.encoder import load_encoder

PROVENANCE = "tuneyard.json"
SHARD_BYTES = 5_000_000_000
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
        model_path: the pretrained folder, for config, tokenizer, code, and the weights that adapters leave alone.

    Raises:
        EvaluationError: where the checkpoint is damaged or the result would not load as the same model.
        OSError: where it cannot be read now.
    """
    if out.exists(PROVENANCE):
        return Provenance.model_validate_json(out.read_bytes(PROVENANCE))
    stored = LocalCopies(checkpoint)
    damage = find_damage(stored)
    if damage:
        raise EvaluationError(f"{checkpoint} cannot be exported: {damage}")
    reader, encoder = CheckpointReader(stored), load_encoder(model_path, job.model.trust_remote_code)
    config = task.load_config(model_path, encoder.pad_id, job.model.trust_remote_code)
    config.dtype = job.model.dtype
    empty = on_meta(config, task, job.model.trust_remote_code)
    config.architectures = [type(empty).__name__]
    _copy_side_files(Path(model_path), out, job.model.trust_remote_code)
    _write_settings(task.serving(encoder), config, Path(model_path), out)
    takes_types = token_types(config) > 1 and "token_type_ids" in signature(empty.forward).parameters
    if takes_types and any(encoder.encode([("a", "b")])[0].type_ids):
        _name_token_types(out, encoder.tokenizer.model_input_names)
    out.write_json("config.json", _config_of(config, Path(model_path)))
    weights = _weights(reader, job, task, config, model_path, empty)
    files = _write_weights(published_weights(empty, weights), out)
    _reopen(out, task.head_class(config), weights, job.model.trust_remote_code)
    files |= {name: _record(out, name) for name in out.list() if name not in files}
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


def _write_settings(serving: Serving, config: Any, source: Path, out: Folder) -> None:
    """The template and the end tokens that the model was trained with, in place of the pretrained folder's."""
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
    """Settings of generation with the end tokens of the training; None where the pretrained folder's stay."""
    from transformers import GenerationConfig

    if not serving.stop_ids:
        return None
    has_own = (source / "generation_config.json").is_file()
    generation = GenerationConfig.from_pretrained(source) if has_own else GenerationConfig.from_model_config(config)
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
    reader: CheckpointReader, job: Job, task: Task, config: Any, model_path: str, empty: Any
) -> dict[str, Weight]:
    """The weights as the model in memory has them, adapters merged, and its persistent buffers; by name.

    Args:
        empty: the model on the meta device.
    """
    import torch

    dtype, shapes, lora = getattr(torch, job.model.dtype), reader.state.shapes, job.model.lora
    base = _frozen_weights(job, task, config, model_path, empty) if lora else {}
    if lora:
        _check_frozen([plain_name(name) for name in shapes if not reader.holds("weight", name)], base, model_path)

    def read(name: str) -> Any:
        if lora and not reader.holds("weight", name):
            return base[plain_name(name)].float()
        return reader.read("weight", name, 0, prod(shapes[name])).view(shapes[name])

    merged = merged_reader(shapes, read, lora, transposed_weights(empty)) if lora else read
    weights: dict[str, Weight] = {}
    for name, shape in (merged_shapes(shapes) if lora else shapes).items():
        spec = TensorSpec(name, job.model.dtype, tuple(shape))

        def load(name: str = name) -> Any:
            return merged(name).to(dtype)

        def parts(name: str = name, size: int = prod(shape)) -> Iterator[Any]:
            if lora:
                return iter((merged(name).to(dtype),))
            return in_parts(lambda start, end: reader.read("weight", name, start, end).to(dtype), size)

        weights[name] = Weight(spec, load, parts)
    for name, buffer in reader.buffers():
        name = name.removeprefix(PREFIX)
        weights[name] = Weight(spec_of(name, buffer), partial(torch.Tensor.detach, buffer), partial(iter, (buffer,)))
    return weights


def _frozen_weights(job: Job, task: Task, config: Any, model_path: str, empty: Any) -> dict[str, Any]:
    """Weights of the pretrained model, which checkpoints with adapters do not hold; whole in memory, in its type.
    Without those that the folder lacks, which were drawn at random; of these, zeros for what the task does not read."""
    import torch
    import transformers

    auto: Any = getattr(transformers, task.head_class(config))
    model, missing = load_pretrained(
        auto,
        model_path,
        config=config,
        dtype=getattr(torch, job.model.dtype),
        use_safetensors=True,
        trust_remote_code=job.model.trust_remote_code,
    )
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    unread = missing & unread_weights(empty, task) if missing else frozenset()
    zeros = {name: torch.zeros_like(weights[name]) for name in unread}
    return {name: weight for name, weight in weights.items() if name not in missing} | zeros


def _check_frozen(needed: Sequence[str], base: Mapping[str, Any], model_path: str) -> None:
    """Raises EvaluationError where frozen weights are neither in the checkpoint nor in the pretrained folder."""
    lost = sorted(set(needed) - base.keys())
    if lost:
        raise EvaluationError(
            f"a checkpoint with adapters holds what is trained alone, and {len(lost)} frozen weights are not in "
            f"{model_path} either: {', '.join(lost[:5])}. They were drawn at random when the training began, and "
            "cannot be had again: take a model folder that has them, or train without model.lora"
        )


def _write_weights(weights: dict[str, Weight], out: Folder) -> dict[str, FileRecord]:
    """One safetensors file, or several with an index where there is more than SHARD_BYTES."""
    specs = [weight.spec for weight in weights.values()]
    groups = _group(specs)
    files: dict[str, FileRecord] = {}
    for number, group in enumerate(groups, 1):
        name = "model.safetensors" if len(groups) == 1 else f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        with out.open_output(name) as stream:
            digest = write_parts(stream, group, lambda name: weights[name].parts(), {"format": "pt"})
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
