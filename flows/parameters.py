"""Parameters of a run from a file and from `--set`, checked before anything starts."""

from __future__ import annotations

import copy
import difflib
import json
import tomllib
import types
import typing
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from tasks.runtime.errors import UserError

PRESETS = Path(__file__).resolve().parents[1] / "configs"


def merged(
    config: str | None, settings: Sequence[str], names: Collection[str] | None = None
) -> dict[str, Any]:
    """The values of a config file with those of `KEY=VALUE` settings laid over them.

    `config` is a path to YAML, TOML or JSON, or the name of a preset in `configs/`. Keys are dotted
    paths, values JSON; what is not JSON is a string. Raises UserError naming file, key and value.

    names: the flow's parameters. Presets are for all flows: of one only these are taken. What
    stands in a person's own file is meant, and is refused later if the flow lacks it.
    """
    values = read_config(config, names) if config else {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals or not all(key.split(".")):
            raise UserError(
                f"--set {setting!r} has no key and value; write it as --set pretrain.tokens=100000"
            )
        put(values, key, parse(text))
    return values


def read_config(config: str, names: Collection[str] | None = None) -> dict[str, Any]:
    path = Path(config)
    is_preset = not path.is_file()
    if is_preset:
        presets = sorted(preset.stem for preset in PRESETS.glob("*.*"))
        if config not in presets:
            known = ", ".join(presets) or "none"
            raise UserError(f"no file {config!r}, and no such preset; presets are: {known}")
        path = next(PRESETS.glob(f"{config}.*"))
    text = path.read_text()
    try:
        match path.suffix.lower():
            case ".toml":
                values = tomllib.loads(text)
            case ".json":
                values = json.loads(text)
            case ".yaml" | ".yml":
                values = yaml.safe_load(text) or {}
            case other:
                raise UserError(f"{path} ends in {other!r}; use .yaml, .toml or .json")
    except (ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} cannot be read: {reason}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} holds {type(values).__name__}, not keys and values")
    if not is_preset or names is None:
        return values
    own = {name: value for name, value in values.items() if name in names}
    if not own:
        raise UserError(f"preset {config!r} holds {', '.join(values)}, none of which this flow has")
    return own


def parse(text: str) -> Any:
    """A value of `--set`: JSON where it is JSON, else the text itself."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def put(values: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key, making the levels on the way."""
    *levels, last = key.split(".")
    place = values
    for level in levels:
        below = place.setdefault(level, {})
        if not isinstance(below, dict):
            raise UserError(
                f"--set {key} goes below {level!r}, which is {below!r} and holds no keys"
            )
        place = below
    if isinstance(value, dict) and isinstance(place.get(last), dict):
        for name, part in value.items():
            put(place[last], name, part)
    else:
        place[last] = value


def check(flow: str, model: type[BaseModel], values: dict[str, Any]) -> dict[str, Any]:
    """The values as a run of `flow` takes them: a whole number where only text is wanted, such as
    `version=3`, is that text. Raises UserError with one sentence for each wrong key or value.
    """
    try:
        model.model_validate(values)
    except ValidationError as error:
        problems = error.errors()
        numbers = [p for p in problems if p["type"] == "string_type" and type(p["input"]) is int]
        if not numbers:
            raise UserError(explain(flow, model, error)) from error
        values = copy.deepcopy(values)
        for problem in numbers:
            *above, last = _place(model, problem["loc"])
            place: Any = values
            for part in above:
                place = place[int(part) if isinstance(place, list) else part]
            place[int(last) if isinstance(place, list) else last] = str(problem["input"])
        return check(flow, model, values)
    return values


def explain(flow: str, model: type[BaseModel], error: ValidationError) -> str:
    """What pydantic found, one sentence each, with the names that were probably meant."""
    return "\n".join(_sentence(flow, model, problem) for problem in error.errors())


def _sentence(flow: str, model: type[BaseModel], problem: Mapping[str, Any]) -> str:
    place = _place(model, problem["loc"])
    key = ".".join(place)
    if problem["type"] == "extra_forbidden":
        names = _names_at(model, place[:-1])
        near = difflib.get_close_matches(place[-1], names, n=3, cutoff=0.5)
        meant = f"did you mean {' or '.join(near)}?" if near else f"valid names: {', '.join(names)}"
        return f"{flow} has no parameter {key!r}; {meant}"
    if problem["type"] == "missing":
        return f"{flow} needs a value for {key!r}; give it with --set {key}=…"
    message = str(problem["msg"]).removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    given = json.dumps(problem["input"], default=str)
    shown = given if len(given) <= 80 else given[:77] + "…"
    return f"{key or flow} = {shown} is impossible: {message}" if key else f"{flow}: {message}"


def _place(model: type[BaseModel], location: Sequence[str | int]) -> list[str]:
    """A location as a person writes it: without the tags pydantic adds for members of a union."""
    *above, last = location
    place: list[str] = []
    for part in above:
        if isinstance(part, int) or part in _names_at(model, place):
            place.append(str(part))
    return [*place, str(last)]


def _names_at(model: type[BaseModel], place: Sequence[str]) -> list[str]:
    """The field names of the model that stands at a place below `model`."""
    candidates = [model]
    for part in place:
        below: list[type[BaseModel]] = []
        for candidate in candidates:
            if part in candidate.model_fields:
                below += _models_in(candidate.model_fields[part].annotation)
        candidates = below or candidates
    return sorted({name for candidate in candidates for name in candidate.model_fields})


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    """The models an annotation may hold: itself, or the members of a union or a container."""
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        return [annotation] if issubclass(annotation, BaseModel) else []
    return [model for inner in typing.get_args(annotation) for model in _models_in(inner)]
