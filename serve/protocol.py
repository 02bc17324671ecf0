"""OpenAI's request bodies: each parameter implemented, or rejected by name.

`parse` is strict: no text becomes a number, and nothing unknown passes. A parameter of the
specification that this server does not implement is accepted only with the value that asks for
nothing (`NEUTRAL`), because clients send such defaults.
"""

from itertools import pairwise
from typing import Annotated, Any, Literal, TypeVar

import pydantic_core
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from model.engine import Sampling
from serve.errors import ApiError

MAX_CHOICES = 128  # prompts × n of one request
DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's, for /v1/completions

# What each parameter we do not implement may be, when it asks for nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "audio": (None,),
    "best_of": (None, 1),
    "echo": (None, False),
    "frequency_penalty": (None, 0),
    "function_call": (None, "none"),
    "functions": (None, []),
    "logit_bias": (None, {}),
    "logprobs": (None, False),
    "modalities": (None, ["text"]),
    "moderation": (None,),
    "parallel_tool_calls": (None, True, False),  # says nothing while there are no tools
    "prediction": (None,),
    "presence_penalty": (None, 0),
    "prompt_cache_key": (None,),
    "prompt_cache_retention": (None,),
    "reasoning_effort": (None, "none"),
    "response_format": (None, {"type": "text"}),
    "suffix": (None, ""),
    "tool_choice": (None, "none"),
    "tools": (None, []),
    "top_logprobs": (None, 0),
    "verbosity": (None,),
    "web_search_options": (None,),
}
# Bookkeeping for the caller's side of OpenAI's service; by its nature nothing here depends on it.
WITHOUT_EFFECT = ("user", "store", "metadata", "service_tier", "safety_identifier")

# In words, what may stand where several types may.
UNIONS = {
    "content": "a text or a list of text parts, the only kind this server reads",
    "prompt": "a text, a list of texts, a list of token ids or a list of such lists, none empty",
    "stop": "a text or a list of at most 16 texts",
}

TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
Body = TypeVar("Body", bound="Request")


class Part(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    type: Literal["text"]
    text: str


class Message(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]
    # What clients echo of an earlier answer; there is nothing to do with any other value.
    name: None = None
    refusal: None = None
    audio: None = None
    annotations: list[Part] | None = Field(None, max_length=0)
    tool_calls: list[Part] | None = Field(None, max_length=0)
    function_call: None = None

    def layout(self) -> dict[str, str]:
        """As `model.chat.encode_chat` takes it; "developer" is OpenAI's newer word for system."""
        content = self.content
        text = content if isinstance(content, str) else "".join(part.text for part in content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    include_usage: bool = False


class Request(BaseModel):
    """What both kinds of completion have in common."""

    model_config = ConfigDict(strict=True, extra="forbid")

    model: str
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1)  # not OpenAI's; vLLM's: -1 and 0 keep every token
    min_p: float | None = Field(None, ge=0, le=1)  # not OpenAI's; vLLM's
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: str | Annotated[list[str], Field(max_length=16)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @model_validator(mode="after")
    def _stream_options_need_a_stream(self) -> "Request":
        if self.stream_options is not None and not self.stream:
            raise pydantic_core.PydanticCustomError(
                "stream_options", "stream_options is only allowed when stream is true"
            )
        return self

    @property
    def choices(self) -> int:
        return self.n or 1

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def sampling(self, max_tokens: int | None) -> Sampling:
        """The temperature is 1 unless given, as OpenAI's."""
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        given = {
            "top_p": self.top_p,
            "top_k": max(self.top_k, 0) if self.top_k is not None else None,
            "min_p": self.min_p,
            "seed": self.seed,
        }
        return Sampling(
            temperature=1.0 if self.temperature is None else self.temperature,
            max_tokens=max_tokens,
            stop=tuple(text for text in stop if text),
            **{name: value for name, value in given.items() if value is not None},  # type: ignore[arg-type]
        )


class ChatRequest(Request):
    """POST /v1/chat/completions"""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)

    @property
    def limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class CompletionRequest(Request):
    """POST /v1/completions"""

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1)]
        | TokenIds
        | Annotated[list[TokenIds], Field(min_length=1)]
    )
    max_tokens: int | None = Field(None, ge=1)

    @property
    def limit(self) -> int:
        return DEFAULT_COMPLETION_TOKENS if self.max_tokens is None else self.max_tokens

    def prompts(self) -> list[str | list[int]]:
        """One entry for each prompt: a text, or token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt  # type: ignore[return-value]


class TokenizeRequest(BaseModel):
    """POST /tokenize, as vLLM has it: a text, or a conversation laid out for an answer."""

    model_config = ConfigDict(strict=True, extra="forbid")

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> "TokenizeRequest":
        if (self.prompt is None) == (self.messages is None):
            raise pydantic_core.PydanticCustomError("one_of", "give either prompt or messages")
        return self


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
    values = {k: v for k, v in values.items() if k in known or k not in WITHOUT_EFFECT}
    for name in [name for name in values if name not in known]:
        if name not in NEUTRAL:
            raise ApiError(
                400,
                f"Unrecognized request argument supplied: {name}",
                param=name,
                code="unknown_parameter",
            )
        if not any(_same(values[name], neutral) for neutral in NEUTRAL[name]):
            raise ApiError(
                400,
                f"Unsupported parameter: {name!r} is not implemented by this server; leave it out",
                param=name,
                code="unsupported_parameter",
            )
        del values[name]
    return validate(kind, values)


Validated = TypeVar("Validated", bound=BaseModel)


def validate(kind: type[Validated], values: dict[str, Any]) -> Validated:
    """Pydantic's check, its first complaint as an ApiError 400."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        path, code = _path(first["loc"]), "invalid_value"
        if first["type"] == "missing":
            message, code = f"Missing required parameter: {path!r}", "missing_required_parameter"
        elif union := next((n for n, s in pairwise(first["loc"]) if _is_union_member(s)), None):
            path = path.partition(str(union))[0] + str(union)
            message = f"{path!r} should be {UNIONS[str(union)]}"
        else:
            message = f"{path!r}: {first['msg']}" if path else first["msg"]
        raise ApiError(400, message, param=path or None, code=code) from error


def _same(value: Any, neutral: Any) -> bool:
    """Equal, without taking False for 0."""
    return value == neutral and isinstance(value, bool) == isinstance(neutral, bool)


def _is_union_member(step: int | str) -> bool:
    """Whether a step of an error's location is pydantic's name for a member of a union."""
    return step == "str" or "[" in str(step)


def _path(location: tuple[int | str, ...]) -> str:
    """("messages", 0, "role") → messages[0].role; names of union members are left out."""
    path = ""
    for step in location:
        if isinstance(step, int):
            path += f"[{step}]"
        elif not _is_union_member(step):
            path += f".{step}" if path else step
    return path
