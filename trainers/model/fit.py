"""Whether a model can take what a job gives it: so many positions, every id of its tokenizer. Read from headers.

Torch-free, so that `plan` asks before anything is launched. Begin at `check_fit`.
"""

import json
import re
import struct
from collections.abc import Mapping, Sequence
from importlib.resources import files
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import Any

from trainers.architecture import POSITIONS
from trainers.errors import JobError
from trainers.job.schema import Job
from trainers.pretrained import weight_files
from trainers.tasks.options import task_options
from trainers.tokenizer.encoder import Encoder, load_encoder

EMBEDDINGS = re.compile(r"(?:^|\.)(?:embed_tokens|word_embeddings|tok_embeddings|wte|embed_in|shared)\.weight$")
OTHER_SENSES = re.compile("vision|visual|image|audio")


def check_fit(job: Job, folder: str) -> list[str]:
    """Compare a prepared model with its tokenizer and with the lengths of the job.

    Returns:
        What the user should know although it is no error.

    Raises:
        JobError: with every way in which training would fail.
    """
    config, shapes = json.loads((Path(folder) / "config.json").read_text()), tensor_shapes(Path(folder))
    text = config.get("text_config") or config
    problems, notes = _positions(job, config, text, shapes)
    rows = [shape[0] for name, shape in shapes.items() if EMBEDDINGS.search(name) and len(shape) == 2]
    if rows or text.get("vocab_size"):
        encoder = load_encoder(folder, job.model.trust_remote_code)
        more_problems, more_notes = _vocabulary(
            encoder, max(rows, default=int(text.get("vocab_size", 0))), _written(job, encoder)
        )
        problems, notes = problems + more_problems, notes + more_notes
    if problems:
        raise JobError(problems)
    return notes


def check_teacher(job: Job, student: str, teacher: str) -> None:
    """See that a teacher reads the student's token ids and lengths, where it has a tokenizer to compare.

    Raises:
        JobError: where the same id is another token to it, or it has fewer positions.
    """
    config, shapes = json.loads((Path(teacher) / "config.json").read_text()), tensor_shapes(Path(teacher))
    problems, _ = _positions(job, config, config.get("text_config") or config, shapes)
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


def counts_from_padding(family: str) -> bool:
    """Whether a family numbers positions from the padding id + 1 on, as its code in transformers says, which is read
    and not imported: that would bring torch along."""
    spec = find_spec("transformers")
    assert spec is not None and spec.origin is not None, "transformers is a requirement"
    models, names = Path(spec.origin).parent / "models", (family.replace("-", "_"), family.partition("-")[0])
    files = (file for name in dict.fromkeys(filter(None, names)) for file in (models / name).glob("modeling_*.py"))
    return any("create_position_ids_from_input_ids" in file.read_text(encoding="utf-8") for file in files)


def _positions(
    job: Job, config: dict[str, Any], text: dict[str, Any], shapes: dict[str, list[int]]
) -> tuple[list[str], list[str]]:
    """Problems and notes about the longest sequence."""
    tables = [shape[0] for name, shape in shapes.items() if POSITIONS.search(name) and not OTHER_SENSES.search(name)]
    longest = job.data.max_length
    if job.task == "seq2seq" and config.get("is_encoder_decoder"):
        longest = max(longest, job.data.max_target_length)
    if tables and text.get("position_embedding_type") != "rotary":
        limit = min(min(tables), int(text.get("max_position_embeddings") or min(tables)))  # some tables begin later
        if counts_from_padding(str(text.get("model_type", ""))):
            limit -= int(text.get("pad_token_id") or 0) + 1
        if longest > limit:
            key = "data.max_length" if job.data.max_length > limit else "data.max_target_length"
            return [
                f"{key}: {longest} tokens are more than the {limit} positions that {job.model.path} has learned; "
                f"set it to {limit} or less, or take a model for longer texts"
            ], []
        return [], []
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    rotary = bool(rope) or any("rope" in name or "rotary" in name for name in text)
    trained = text.get("max_position_embeddings")
    if not rotary or not isinstance(trained, int):
        return [], []
    kind = str(rope.get("rope_type") or rope.get("type") or "default")
    before = rope.get("original_max_position_embeddings") or text.get("original_max_position_embeddings")
    if longest > trained:
        return [], [
            f"data.max_length {longest} is past the {trained} positions of the model: rotary positions go on, but it "
            "was never trained there; set rope scaling (e.g. yarn) in its config.json, or expect to teach it"
        ]
    if kind != "default" and isinstance(before, int) and longest > before:
        factor = f" by {rope['factor']:g}" if isinstance(rope.get("factor"), int | float) else ""
        return [], [f"positions past {before} come from the model's rope scaling ({kind}{factor})"]
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
