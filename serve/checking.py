"""Request bodies checked: each parameter implemented, or rejected by name.

`parse` is strict: no text becomes a number, and nothing unknown passes. A parameter of the
specification that this server does not implement is accepted only where it asks for nothing: null,
or a value of `NEUTRAL`, because clients send such defaults. What changes nothing by its nature
(`Bookkeeping`) must still be what the specification says.
"""

from itertools import pairwise
from typing import Any, Literal, TypeVar

import pydantic_core
from pydantic import BaseModel, ConfigDict, ValidationError

from serve.errors import ApiError
from serve.protocol import Metadata

Body = TypeVar("Body", bound=BaseModel)

# Parameters we do not implement, and what each may be besides null when it asks for nothing. One
# that is a field of a request's model is checked there instead.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "background": (False,),
    "best_of": (1,),
    "context_management": ([],),
    "conversation": (),
    "dimensions": (),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none",),
    "functions": ([],),
    "include": ([],),
    "instructions": (),
    "logit_bias": ({},),
    "logprobs": (False,),
    "max_completion_tokens": (),
    "max_output_tokens": (),
    "max_tokens": (),
    "max_tool_calls": (),
    "modalities": (["text"],),
    "moderation": (),
    "n": (1,),
    "parallel_tool_calls": (True, False),  # says nothing while there are no tools
    "prediction": (),
    "presence_penalty": (0,),
    "previous_response_id": (),
    "prompt": (),
    "prompt_cache_key": (),
    "prompt_cache_options": (),
    "prompt_cache_retention": (),
    "reasoning": (),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "seed": (),
    "stop": ([],),
    "stream": (False,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),  # "auto" says nothing while there are no tools
    "tools": ([],),
    "top_logprobs": (0,),
    "truncation": ("disabled",),
    "verbosity": (),
    "web_search_options": (),
}


class Bookkeeping(BaseModel):
    """For the caller's side of OpenAI's service; by its nature nothing here depends on it."""

    model_config = ConfigDict(strict=True, extra="forbid")

    user: str | None = None
    safety_identifier: str | None = None
    store: bool | None = None
    metadata: Metadata | None = None
    service_tier: Literal["auto", "default", "flex", "scale", "priority", "fast"] | None = None


WITHOUT_EFFECT = tuple(Bookkeeping.model_fields)

# In words, what may stand where several types may.
UNIONS = {
    "content": "a text or a list of text parts, the only kind this server reads",
    "input": "a text, a list of texts, a list of token ids or a list of such lists, none empty",
    "json": "a JSON schema, as an object or as text",
    "schema": "a JSON schema",
    "prompt": "a text, a list of texts, a list of token ids or a list of such lists, none empty",
    "stop": "a text or a list of at most 16 texts",
    "tool_choice": "'none', 'auto', 'required' or an object that names a function of tools",
}


def decode_json(raw: bytes) -> dict[str, Any]:
    """The JSON object of a body. Raises ApiError 400 for anything else."""
    try:
        value = pydantic_core.from_json(raw, allow_inf_nan=False)
    except ValueError as error:
        raise ApiError(400, f"the body is not valid JSON: {error}", code="invalid_json") from error
    if not isinstance(value, dict):
        raise ApiError(400, "the body must be a JSON object", code="invalid_json")
    return value


def parse(kind: type[Body], values: dict[str, Any]) -> Body:
    """A checked request. Raises ApiError 400 naming the first parameter that is wrong."""
    known = kind.model_fields
    noted = {k: v for k, v in values.items() if k in WITHOUT_EFFECT and k not in known}
    validate(Bookkeeping, noted)
    values = {k: v for k, v in values.items() if k not in noted}
    for name in [name for name in values if name not in known]:
        if name not in NEUTRAL:
            raise ApiError(
                400,
                f"Unrecognized request argument supplied: {name}",
                param=name,
                code="unknown_parameter",
            )
        if not any(_same(values[name], neutral) for neutral in (None, *NEUTRAL[name])):
            raise ApiError(
                400,
                f"Unsupported parameter: {name!r} is not implemented by this server; leave it out",
                param=name,
                code="unsupported_parameter",
            )
        del values[name]
    return validate(kind, values)


def validate(kind: type[Body], values: dict[str, Any]) -> Body:
    """Pydantic's check, its first complaint as an ApiError 400."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        path, code = _path(first["loc"]), "invalid_value"
        if not path and first["type"] in kind.model_fields:
            path = first["type"]  # our own checks of what goes together are named by the field
        if first["type"] == "missing":
            message, code = f"Missing required parameter: {path!r}", "missing_required_parameter"
        elif union := next((n for n, s in pairwise(first["loc"]) if _is_union_member(s)), None):
            path = path.partition(str(union))[0] + str(union)
            message = f"{path!r} should be {UNIONS.get(str(union), first['msg'])}"
        else:
            message = f"{path!r}: {first['msg']}" if first["loc"] else first["msg"]
        raise ApiError(400, message, param=path or None, code=code) from error


def _same(value: Any, neutral: Any) -> bool:
    """Equal, without taking False for 0."""
    return value == neutral and isinstance(value, bool) == isinstance(neutral, bool)


def _is_union_member(step: int | str) -> bool:
    """Whether a step of an error's location is pydantic's name for a member of a union."""
    return step == "str" or ("[" in str(step) and step != "[key]")


def _path(location: tuple[int | str, ...]) -> str:
    """("messages", 0, "role") → messages[0].role; names of union members are left out."""
    path = ""
    for step in location:
        if step == "body":  # a field's own name, as pydantic keeps `schema` to itself
            step = "schema"
        if isinstance(step, int):
            path += f"[{step}]"
        elif step != "[key]" and not _is_union_member(step):
            path += f".{step}" if path else step
    return path
