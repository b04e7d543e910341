"""What a model's folder tells before anything of it is loaded: config.json and the shapes of its tensors. No torch."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

POSITIONS = re.compile(r"(?:^|\.)(?:position_embeddings?|embed_positions|wpe)(?:\.weight)?$")
"""Names of tables of learned (or stored) positions: a sequence longer than the table is an error in the model."""
EMBEDDINGS = re.compile(r"(?:^|\.)(?:embed_tokens|word_embeddings|tok_embeddings|wte|embed_in|shared)\.weight$")
OTHER_SENSES = re.compile("vision|visual|image|audio")


def text_json(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """`text_config` of a config.json that is only read."""
    nested: Mapping[str, Any] = config.get("text_config") or config
    return nested


def token_rows(config: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]) -> int:
    """Token ids that a folder has embeddings for, by its config.json and its tensors' shapes; 0: unknown."""
    rows = [shape[0] for name, shape in shapes.items() if EMBEDDINGS.search(name) and len(shape) == 2]
    return max(rows, default=int(text_json(config).get("vocab_size") or 0))


def learned_positions(config: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]) -> int | None:
    """`table_positions` of a folder, by its config.json and the shapes of its tensors."""
    text = text_json(config)
    tables = [shape[0] for name, shape in shapes.items() if POSITIONS.search(name) and not OTHER_SENSES.search(name)]
    if not tables or text.get("position_embedding_type") == "rotary":
        return None
    limit = min(min(tables), int(text.get("max_position_embeddings") or min(tables)))  # some tables begin later
    from_padding = counts_from_padding(str(text.get("model_type", "")))
    return limit - int(text.get("pad_token_id") or 0) - 1 if from_padding else limit


def counts_from_padding(family: str) -> bool:
    """Whether a family numbers positions from the padding id + 1 on, as its code in transformers says, which is read
    and not imported: that would bring torch along."""
    spec = find_spec("transformers")
    assert spec is not None and spec.origin is not None, "transformers is a requirement"
    models, names = Path(spec.origin).parent / "models", (family.replace("-", "_"), family.partition("-")[0])
    files = (file for name in dict.fromkeys(filter(None, names)) for file in (models / name).glob("modeling_*.py"))
    return any("create_position_ids_from_input_ids" in file.read_text(encoding="utf-8") for file in files)


@dataclass(frozen=True)
class Rotary:
    """Rotary embeddings of positions."""

    trained: int
    """Positions that they were trained for, scaling included."""
    kind: str
    """Of scaling; `default` is none."""
    factor: float | None
    before: int | None
    """Positions without scaling."""


def rotary(config: Mapping[str, Any]) -> Rotary | None:
    """How positions are rotated, by a config.json; None where it says nothing of that or of their number."""
    text = text_json(config)
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    trained = text.get("max_position_embeddings")
    if not isinstance(trained, int) or not (rope or any("rope" in name or "rotary" in name for name in text)):
        return None
    kind = str(rope.get("rope_type") or rope.get("type") or "default")
    before = rope.get("original_max_position_embeddings") or text.get("original_max_position_embeddings")
    factor = rope.get("factor")
    return Rotary(
        trained,
        kind,
        float(factor) if isinstance(factor, int | float) else None,
        before if isinstance(before, int) else None,
    )
