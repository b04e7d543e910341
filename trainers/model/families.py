"""The families that the tests compare with plain transformers: families.json here, written by tests/architectures."""

import json
from importlib.resources import files


def tested_families() -> dict[str, list[str]]:
    """Tasks that a family passed, by its `model_type`."""
    families: dict[str, list[str]] = json.loads((files("trainers.model") / "families.json").read_text(encoding="utf-8"))
    return families
