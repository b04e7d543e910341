"""Reads a pretrained folder into a model, and knows which weights it did not find there.

transformers draws those at random and goes on. For a new head that is right. Where the head's class calls the body by
another name than the folder does (question answering on Llama and Qwen), it would draw the whole body; here the
folder's name is given to it.
"""

import logging
import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trainers.errors import JobError


def load_pretrained(auto: Any, path: str, **options: Any) -> tuple[Any, frozenset[str]]:
    """What transformers' from_pretrained gives, and the parameters that the folder lacks.

    Raises:
        JobError: where the folder has no weight of the model's body.
    """
    model, info = auto.from_pretrained(path, output_loading_info=True, **options)
    body = f"{model.base_model_prefix}."
    if names := _other_names(path, info["missing_keys"], body):
        renamed = {f"^{re.escape(name)}": body for name in names}
        model, info = auto.from_pretrained(path, output_loading_info=True, key_mapping=renamed, **options)
    fresh = frozenset(info["missing_keys"])
    own = {name for name, _ in model.named_parameters() if name.startswith(body)}
    if own and own <= fresh:
        raise JobError(
            f"model.path: none of the {len(own)} weights of {type(model).__name__}'s body is in {path} (it looked for "
            f"{min(own)}), so all would be drawn at random; choose a folder with its weights, or another task"
        )
    return model, fresh


def load_to_disk(auto: Any, path: str, scratch: str, **options: Any) -> tuple[Any, frozenset[str]]:
    """As `load_pretrained`, a model whose weights `read_offloaded` reads from disk one at a time.

    Args:
        scratch: a folder for those that lie otherwise in the pretrained folder, as experts do; the others stay there.
    """
    with without_notice():
        return load_pretrained(auto, path, device_map={"": "disk"}, offload_folder=scratch, **options)


@contextmanager
def without_notice() -> Iterator[None]:
    """Nobody need know that weights wait on disk for an export."""
    log = logging.getLogger("accelerate.big_modeling")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(action="ignore", category=UserWarning):
            yield
    finally:
        log.setLevel(before)


def read_offloaded(model: Any, name: str) -> Any:
    """A parameter of a model that was loaded to disk, in the model's type."""
    from transformers.integrations.accelerate import load_offloaded_parameter

    return load_offloaded_parameter(model, name)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors of a folder, without hidden ones, of a writer that was killed, and without a second copy under
    the names of its maker's own code (`consolidated`)."""
    return sorted(file for file in folder.glob("*.safetensors") if not file.name.startswith((".", "consolidated")))


def class_for(auto: str, config: Any) -> type:
    """transformers' class that one of its automatic ones gives for a configuration; object where it has none."""
    import transformers

    known: Any = getattr(transformers, auto)._model_mapping.get(type(config), object)
    first: type = known[0] if isinstance(known, tuple | list) else known
    return first


def _other_names(path: str, missing: Iterable[str], body: str) -> set[str]:
    """What a folder calls the body, where the parts of both are named alike. Its files are asked: under ZeRO-3
    transformers does not tell which of their weights it left out."""
    from safetensors import safe_open

    tails = {name.removeprefix(body) for name in missing if name.startswith(body)}
    names: set[str] = set()
    for file in weight_files(Path(path)) if tails else ():
        with safe_open(file, "pt") as weights:
            parts = [key.partition(".") for key in weights.keys()]  # noqa: SIM118  # it is no dict
            names |= {f"{first}." for first, _, tail in parts if tail in tails}
    return names - {body}
