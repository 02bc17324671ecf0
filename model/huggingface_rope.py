"""Rotary positions in Hugging Face's config.json: `rope_parameters` of transformers 5, `rope_theta`
and `rope_scaling` of 4; both are read, both are written.
"""

from collections.abc import Mapping
from typing import Any

from model.config import ModelConfig
from model.families import FormatError
from model.rope_scaling import SETTINGS, RopeScaling

RENAMED = {"original_context": "original_max_position_embeddings"}  # all other names are the same


def export_rope(config: ModelConfig) -> dict[str, Any]:
    """The settings of `config.json` about rotary positions."""
    scaling = _export_scaling(config.rope_scaling)
    rope = {"rope_type": "default"} | scaling | {"rope_theta": config.rope_theta}
    theirs: dict[str, Any] = {"rope_theta": config.rope_theta, "rope_parameters": rope}
    if scaling:
        theirs["rope_scaling"] = scaling
    if config.window_rope_theta is not None:
        local = {"rope_type": "default", "rope_theta": config.window_rope_theta}
        theirs["rope_local_base_freq"] = config.window_rope_theta
        theirs["rope_parameters"] = {"full_attention": rope, "sliding_attention": local}
    return theirs


def import_rope(theirs: Mapping[str, Any], *, local: bool) -> dict[str, Any]:
    """Our settings of a `config.json`. local: layers with a window have a base of their own."""
    ropes = theirs.get("rope_parameters") or theirs.get("rope_scaling") or {}
    parts = ropes if isinstance(ropes, Mapping) else {"full_attention": ropes}
    rope, window = parts.get("full_attention", parts), parts.get("sliding_attention", {})
    for part in (rope, window):
        if not isinstance(part, Mapping):
            raise FormatError(f"RoPE scaling {part!r} is no object of settings")
    if _kind(window) != "default":
        raise FormatError(f"RoPE scaling {_kind(window)!r} of layers with a window is not known")
    for told in (rope, theirs):
        if told.get("partial_rotary_factor") not in (None, 1):
            raise FormatError(
                f"partial_rotary_factor {told['partial_rotary_factor']} is not supported: all of a "
                f"head's channels are turned"
            )
    usual = 1e6 if local else 10_000.0
    ours = {
        "rope_theta": _number(
            "rope_theta", rope.get("rope_theta") or theirs.get("rope_theta") or usual
        ),
        "rope_scaling": _import_scaling(rope, theirs["max_position_embeddings"]),
    }
    if local:
        base = window.get("rope_theta") or theirs.get("rope_local_base_freq") or 10_000.0
        ours["window_rope_theta"] = _number("rope_theta", base)
    return ours


def _number(name: str, value: Any) -> float:
    if not isinstance(value, int | float):
        raise FormatError(f"{name} {value!r} is not a number")
    return float(value)


def _kind(rope: Mapping[str, Any]) -> str:
    return str(rope.get("rope_type") or rope.get("type") or "default")


def _export_scaling(scaling: RopeScaling | None) -> dict[str, Any]:
    if scaling is None:
        return {}
    values = {their: getattr(scaling, our) for their, our in _names_of(scaling.kind).items()}
    return {"rope_type": scaling.kind} | {k: v for k, v in values.items() if v is not None}


def _import_scaling(rope: Mapping[str, Any], context: int) -> RopeScaling | None:
    """The inverse of `_export_scaling`; what would stay unread is refused."""
    kind = _kind(rope)
    if kind == "default":
        return None
    if kind not in SETTINGS:
        raise FormatError(
            f"RoPE scaling {kind!r} is not supported; known are default, {', '.join(SETTINGS)}"
        )
    names = _names_of(kind)
    values: dict[str, Any] = {"kind": kind}
    for name, value in rope.items():
        if value is None or name in ("rope_type", "type", "rope_theta", "partial_rotary_factor"):
            continue
        if name not in names:
            raise FormatError(f"RoPE scaling {kind} with {name} is not supported")
        # 8 and 8.0 are one factor, and would be two configurations.
        whole = isinstance(value, bool) or name == "original_max_position_embeddings"
        values[names[name]] = value if whole else _number(name, value)
    if "factor" not in values:
        raise FormatError(f"RoPE scaling {kind} lacks factor")
    if "original_context" in SETTINGS[kind]:
        values.setdefault("original_context", context)
    return RopeScaling(**values)


def _names_of(kind: str) -> dict[str, str]:
    """Their names of a kind's settings, with ours."""
    return {RENAMED.get(name, name): name for name in ("factor", *SETTINGS[kind])}
