"""The identity of a stage's output.

`fingerprint = sha256(stage, stage version, identity config, contents of inputs)`. Invariant: two
runs with the same fingerprint may be exchanged for each other. Literals bear identity, places do
not: a config field declared with `place()` (a host, a worker count, a directory) is left out. A
value whose JSON form is not deterministic is refused, never `str()`-ed.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from enum import Enum
from typing import Any

from pydantic import BaseModel, Field
from pydantic.fields import FieldInfo


def place(default: Any, **options: Any) -> Any:
    """A pydantic field that says where or with what a stage runs, not what it makes."""
    return Field(default, json_schema_extra={"identity": False}, **options)


def bears_identity(field: FieldInfo) -> bool:
    extra = field.json_schema_extra
    return not (isinstance(extra, dict) and extra.get("identity") is False)


def identity(value: Any, where: str = "value") -> Any:
    """`value` as plain JSON types, without places.

    Raises TypeError or ValueError for anything that cannot be hashed deterministically.
    """
    if value is None or isinstance(value, bool | int | str):
        return value.value if isinstance(value, Enum) else value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{where} = {value} has no stable identity; use a finite number")
        return value
    if isinstance(value, Enum):
        return identity(value.value, where)
    if isinstance(value, BaseModel):
        fields = type(value).model_fields
        return {
            name: identity(getattr(value, name), f"{where}.{name}")
            for name, field in fields.items()
            if bears_identity(field)
        }
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"{where} has the key {key!r}; only text keys have an identity")
        return {key: identity(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [identity(item, f"{where}[{index}]") for index, item in enumerate(value)]
    raise TypeError(
        f"{where} is a {type(value).__name__}, which has no deterministic identity; "
        "use text, numbers, booleans, lists, mappings or a config model"
    )


def fingerprint(stage: str, version: int, config: Any, inputs: Mapping[str, str]) -> str:
    """Hex SHA-256 of the identity; `inputs` maps an input's name to the content it had."""
    body = {
        "stage": stage,
        "version": version,
        "config": identity(config, stage),
        "inputs": dict(inputs),
    }
    text = json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()
