"""Whether a model can take what a job gives it: so many positions, every id of its tokenizer. Read from headers.

Torch-free, so that `plan` asks before anything is launched. Begin at `check_fit`.
"""

import json
import struct
from collections.abc import Mapping, Sequence
from importlib.resources import files
from math import prod
from pathlib import Path
from typing import Any

from trainers.architecture import DOCUMENTS, learned_positions, rotary, token_rows
from trainers.errors import JobError
from trainers.job.schema import Job
from trainers.pretrained import weight_files
from trainers.tasks.options import task_options
from trainers.tokenizer.encoder import Encoder, load_encoder


def check_fit(job: Job, folder: str) -> list[str]:
    """Compare a prepared model with its tokenizer and with the lengths of the job.

    Returns:
        What the user should know although it is no error.

    Raises:
        JobError: with every way in which training would fail.
    """
    config, shapes = json.loads((Path(folder) / "config.json").read_text()), tensor_shapes(Path(folder))
    problems, notes = _positions(job, config, shapes)
    if rows := token_rows(config, shapes):
        encoder = load_encoder(folder, job.model.trust_remote_code)
        more_problems, more_notes = _vocabulary(encoder, rows, _written(job, encoder))
        problems, notes = problems + more_problems, notes + more_notes
        if job.task == "seq2seq" and encoder.is_encoder_decoder and isinstance(encoder.spec.target, str):
            problems = [*problems, f"model.path: {encoder.spec.target}"]
    if problems:
        raise JobError(problems)
    return notes


def check_teacher(job: Job, student: str, teacher: str) -> None:
    """See that a teacher reads the student's token ids and lengths, where it has a tokenizer to compare.

    Raises:
        JobError: where the same id is another token to it, or it has fewer positions.
    """
    config, shapes = json.loads((Path(teacher) / "config.json").read_text()), tensor_shapes(Path(teacher))
    problems, _ = _positions(job, config, shapes)
    if (Path(teacher) / "tokenizer.json").is_file():
        ours, theirs = (
            load_encoder(folder, job.model.trust_remote_code).tokenizer.get_vocab() for folder in (student, teacher)
        )
        others = [token for token, index in sorted(ours.items()) if theirs.get(token) != index]
        if others:
            problems.append(
                f"train.distill.teacher: {teacher} has another vocabulary than the model, or other ids for "
                f"{', '.join(map(repr, others[:5]))}; teacher and student must read the same token ids"
            )
    if problems:
        raise JobError([problem.replace(job.model.path, teacher) for problem in problems])


def check_long_sequences(job: Job, model_path: str) -> None:
    """Whether workers can share the job's sequences, and feed-forward layers come in tiles, where the job asks for it:
    asked of the model without weights.

    Args:
        job: with the attention backend that packing came to.

    Raises:
        JobError: where it cannot be, and why.
    """
    ranks, tiled = job.train.sequence_parallel, job.train.feed_forward_tiles is True
    if ranks > 1 and (not job.packing or job.model.attention != DOCUMENTS):
        raise JobError(
            f"train.sequence_parallel: needs data.packing and model.attention {DOCUMENTS}, which tells documents by "
            f"their bounds; {job.model.path} has {job.model.attention} here. Leave out model.attention, or "
            "train.sequence_parallel where the model packs with no other"
        )
    if ranks == 1 and not tiled:
        return
    from trainers.architecture.sequence_parallel import sharing_obstacle
    from trainers.model.model_size import build, stand_in_task
    from trainers.model.tiles import tile_feed_forward

    model = build(job, stand_in_task(job), model_path)
    if tiled:
        tile_feed_forward(model)
    if ranks > 1 and (problem := sharing_obstacle(model.config, model, ranks)):
        raise JobError(
            f"train.sequence_parallel: {ranks} workers cannot share sequences of {job.model.path}: {problem}"
        )


def tensor_shapes(folder: Path) -> dict[str, list[int]]:
    """Shape by name of every tensor in a folder's safetensors, from their headers alone."""
    shapes: dict[str, list[int]] = {}
    for file in weight_files(folder):
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(length))
        shapes |= {name: entry["shape"] for name, entry in header.items() if name != "__metadata__"}
    return shapes


def tested_families() -> dict[str, list[str]]:
    """Tasks that a family passed in the tests that compare with plain transformers, by its `model_type`: families.json
    here, written by tests/architectures."""
    families: dict[str, list[str]] = json.loads((files("trainers.model") / "families.json").read_text(encoding="utf-8"))
    return families


def count_parameters(shapes: Mapping[str, Sequence[int]]) -> int:
    """Values of all tensors."""
    return sum(prod(shape) for shape in shapes.values())


def _positions(job: Job, config: dict[str, Any], shapes: dict[str, list[int]]) -> tuple[list[str], list[str]]:
    """Problems and notes about the longest sequence."""
    longest = job.data.max_length
    if job.task == "seq2seq" and config.get("is_encoder_decoder"):
        longest = max(longest, job.data.max_target_length)
    limit = learned_positions(config, shapes)
    if limit is not None and longest > limit:
        key = "data.max_length" if job.data.max_length > limit else "data.max_target_length"
        return [
            f"{key}: {longest} tokens are more than the {limit} positions that {job.model.path} has learned; "
            f"set it to {limit} or less, or take a model for longer texts"
        ], []
    known = None if limit is not None else rotary(config)
    if known is None:
        return [], []
    if longest > known.trained:
        return [], [
            f"data.max_length {longest} is past the {known.trained} positions of the model: rotary positions go on, "
            "but it was never trained there; set rope scaling (e.g. yarn) in its config.json, or expect to teach it"
        ]
    if known.kind != "default" and known.before is not None and longest > known.before:
        factor = f" by {known.factor:g}" if known.factor is not None else ""
        return [], [f"positions past {known.before} come from the model's rope scaling ({known.kind}{factor})"]
    return [], []


def _written(job: Job, encoder: Encoder) -> str:
    """What stands in every row of sft: the chat template's own text."""
    return str(task_options(job).chat_template or encoder.tokenizer.chat_template or "") if job.task == "sft" else ""


def _vocabulary(encoder: Encoder, rows: int, written: str) -> tuple[list[str], list[str]]:
    """Problems and notes about ids that have no embedding.

    Args:
        written: text that is in every row.
    """
    tokenizer = encoder.tokenizer
    beyond = {token: index for token, index in tokenizer.get_vocab().items() if index >= rows}
    added = set(tokenizer.get_added_vocab()) - set(tokenizer.all_special_tokens)
    used = {token: index for token, index in beyond.items() if token not in added or token in written}
    if used or encoder.pad_id >= rows:
        first = ", ".join(f"{token!r} ({used[token]})" for token in sorted(used, key=lambda token: used[token])[:5])
        highest = max([*used.values(), encoder.pad_id])
        return [
            f"model.path: the tokenizer gives ids up to {highest}, but the model has only {rows} embeddings; without "
            f"one: {first or f'the padding id {encoder.pad_id}'}. Take the tokenizer that belongs to the model, or "
            "resize its embeddings (resize_token_embeddings) and save it"
        ], []
    if beyond:
        listed = ", ".join(map(repr, sorted(beyond)[:5]))
        return [], [f"rows that hold {listed} would fail: the model has no embedding for it"]
    return [], []
