"""Names of classes that `datasets` keeps beside integers: in the schema's metadata of a parquet or Arrow file.

{"info": {"features": {"label": {"names": ["neg", "pos"], "_type": "ClassLabel"}}}}, also within lists and structures.
Rows get the names, so that logits and reports have them; -1, which stands for "not labelled", becomes null.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyarrow as pa

METADATA = b"huggingface"
Decode = Callable[[Any], Any]


def read_features(schema: pa.Schema) -> Mapping[str, Any]:
    """`datasets`' features of a file's columns; empty if there are none."""
    try:
        features = json.loads((schema.metadata or {})[METADATA])["info"]["features"]
    except (KeyError, TypeError, ValueError):
        return {}
    return features if isinstance(features, dict) else {}


def feature_of(features: Mapping[str, Any], column: str) -> Any:
    """What a column holds; with dots, what stands in a structure. None if it is not there."""
    feature: Any = features
    for name in [column] if column in features else column.split("."):
        feature = feature.get(name) if isinstance(feature, Mapping) else None
    return feature


def class_names(feature: Any) -> tuple[str, ...]:
    """The names of a column's classes, in order, at whatever depth; empty for other columns."""
    if isinstance(feature, Mapping):
        if feature.get("_type") == "ClassLabel" and isinstance(feature.get("names"), list):
            return tuple(map(str, feature["names"]))
        feature = list(feature.values())
    if isinstance(feature, list):
        return next((names for inner in feature if (names := class_names(inner))), ())
    return ()


def decoders(features: Mapping[str, Any], columns: Sequence[str]) -> dict[str, Decode]:
    """For each of the columns that holds classes, what puts names for their numbers."""
    return {name: decode for name in columns if name in features and (decode := _decoder(features[name]))}


def _decoder(feature: Any) -> Decode | None:
    """What decodes a value of this feature; None if it holds no classes."""
    if isinstance(feature, list) and len(feature) == 1:  # how lists were written once
        return _of_list(_decoder(feature[0]))
    if not isinstance(feature, Mapping):
        return None
    if feature.get("_type") == "ClassLabel":
        names = class_names(feature)
        return (lambda value: _name(value, names)) if names else None
    if "feature" in feature and "_type" in feature:
        inner = feature["feature"]
        if feature["_type"] == "Sequence" and isinstance(inner, Mapping) and "_type" not in inner:
            return _of_fields({name: _of_list(_decoder(kind)) for name, kind in inner.items()})  # a structure of lists
        return _of_list(_decoder(inner))
    return _of_fields({name: _decoder(kind) for name, kind in feature.items() if name != "_type"})


def _name(value: Any, names: Sequence[str]) -> Any:
    if not isinstance(value, int):
        return value
    return names[value] if 0 <= value < len(names) else None if value == -1 else value


def _of_list(decode: Decode | None) -> Decode | None:
    if decode is None:
        return None
    return lambda values: [decode(value) for value in values] if isinstance(values, list) else values


def _of_fields(decode_of: Mapping[str, Decode | None]) -> Decode | None:
    decoders = {name: decode for name, decode in decode_of.items() if decode}
    if not decoders:
        return None

    def decode(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {name: decoders[name](inner) if name in decoders else inner for name, inner in value.items()}

    return decode
