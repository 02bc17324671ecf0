"""OpenAI's request bodies: each parameter implemented, or rejected by name.

`parse` is strict: no text becomes a number, and nothing unknown passes. A parameter of the
specification that this server does not implement is accepted only with the value that asks for
nothing (`NEUTRAL`), because clients send such defaults.
"""

import json
import re
from itertools import pairwise
from typing import Annotated, Any, Literal, TypeVar

import pydantic_core
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from model.engine import ConstraintFactory, Sampling
from model.engine.sampling import MAX_LOGPROBS
from serve.errors import ApiError

MAX_CHOICES = 128  # prompts × n of one request
DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's, for /v1/completions

# What each parameter we do not implement may be, when it asks for nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "audio": (None,),
    "background": (None, False),
    "best_of": (None, 1),
    "conversation": (None,),
    "echo": (None, False),
    "function_call": (None, "none"),
    "functions": (None, []),
    "include": (None, []),
    "logprobs": (None, False),
    "max_tool_calls": (None,),
    "modalities": (None, ["text"]),
    "moderation": (None,),
    "parallel_tool_calls": (None, True, False),  # says nothing while there are no tools
    "prediction": (None,),
    "previous_response_id": (None,),
    "prompt": (None,),
    "prompt_cache_key": (None,),
    "prompt_cache_retention": (None,),
    "reasoning": (None,),
    "reasoning_effort": (None, "none"),
    "suffix": (None, ""),
    "tool_choice": (None, "none", "auto"),  # "auto" says nothing while there are no tools
    "tools": (None, []),
    "top_logprobs": (None, 0),
    "truncation": (None, "disabled"),
    "verbosity": (None,),
    "web_search_options": (None,),
}
# Bookkeeping for the caller's side of OpenAI's service; by its nature nothing here depends on it.
WITHOUT_EFFECT = ("user", "store", "metadata", "service_tier", "safety_identifier")

# In words, what may stand where several types may.
UNIONS = {
    "content": "a text or a list of text parts, the only kind this server reads",
    "input": "a text, a list of texts, a list of token ids or a list of such lists, none empty",
    "json": "a JSON schema, as an object or as text",
    "schema": "a JSON schema",
    "prompt": "a text, a list of texts, a list of token ids or a list of such lists, none empty",
    "stop": "a text or a list of at most 16 texts",
}

TokenId = Annotated[int, Field(ge=0)]
TokenIds = Annotated[list[TokenId], Field(min_length=1)]
TokenKey = Annotated[str, Field(pattern=r"^\d{1,9}$")]  # JSON's keys are texts
Body = TypeVar("Body", bound=BaseModel)


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


class JsonSchema(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    name: str = ""
    description: str | None = None
    strict: bool | None = None  # the schema is always kept to
    body: dict[str, Any] | bool = Field(alias="schema")


class ResponseFormat(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _schema_where_it_belongs(self) -> "ResponseFormat":
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise pydantic_core.PydanticCustomError(
                "json_schema", "json_schema is required by type 'json_schema', and by no other"
            )
        return self


class StructuredOutputs(BaseModel):
    """vLLM's: one of three ways to say what form the answer must have."""

    model_config = ConfigDict(strict=True, extra="forbid")

    json_schema: dict[str, Any] | bool | str | None = Field(None, alias="json")
    regex: str | None = None
    choice: Annotated[list[str], Field(min_length=1, max_length=256)] | None = None

    @model_validator(mode="after")
    def _one(self) -> "StructuredOutputs":
        if sum(way is not None for way in (self.json_schema, self.regex, self.choice)) != 1:
            raise pydantic_core.PydanticCustomError(
                "structured_outputs", "give exactly one of json, regex and choice"
            )
        return self


class Request(BaseModel):
    """What both kinds of completion have in common."""

    model_config = ConfigDict(strict=True, extra="forbid")

    model: str
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1)  # not OpenAI's; vLLM's: -1 and 0 keep every token
    min_p: float | None = Field(None, ge=0, le=1)  # not OpenAI's; vLLM's
    repetition_penalty: float | None = Field(None, gt=0, le=10)  # vLLM's
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: (
        Annotated[dict[TokenKey, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=1024)]
        | None
    ) = None
    min_tokens: int | None = Field(None, ge=0)  # vLLM's
    ignore_eos: bool | None = None  # vLLM's
    stop_token_ids: Annotated[list[TokenId], Field(max_length=64)] | None = None  # vLLM's
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None  # vLLM's
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: str | Annotated[list[str], Field(max_length=16)] | None = None
    user: str | None = None
    safety_identifier: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @model_validator(mode="after")
    def _stream_options_need_a_stream(self) -> "Request":
        if self.stream_options is not None and not self.stream:
            raise pydantic_core.PydanticCustomError(
                "stream_options", "stream_options is only allowed when stream is true"
            )
        return self

    @model_validator(mode="after")
    def _one_form(self) -> "Request":
        if self.structured_outputs and self.response_format:
            raise pydantic_core.PydanticCustomError(
                "structured_outputs", "give either response_format or structured_outputs"
            )
        return self

    def grammar(self) -> tuple[str, str, str] | None:
        """(kind, text, parameter) of the form the answer must have; None for any text."""
        asked, form = self.structured_outputs, self.response_format
        if asked is not None:
            if asked.regex is not None:
                return "regex", asked.regex, "structured_outputs.regex"
            if asked.choice is not None:
                alternatives = "|".join(re.escape(text) for text in asked.choice)
                return "regex", alternatives, "structured_outputs.choice"
            schema = asked.json_schema
            text = schema if isinstance(schema, str) else json.dumps(schema)
            return "json_schema", text, "structured_outputs.json"
        if form is not None and form.type == "json_object":
            return "json_schema", '{"type": "object"}', "response_format"
        if form is not None and form.json_schema is not None:
            text = json.dumps(form.json_schema.body)
            return "json_schema", text, "response_format.json_schema.schema"
        return None

    @property
    def top_count(self) -> int | None:
        """How many likeliest tokens to report beside each chosen one; None: no logprobs."""
        raise NotImplementedError

    @property
    def client(self) -> str | None:
        """Who asks, as far as the request says: keeps a person on one version of a canary."""
        return self.safety_identifier or self.user

    @property
    def candidates(self) -> int:
        """Answers to generate for each prompt, the best `choices` of which are sent."""
        return self.choices

    @property
    def choices(self) -> int:
        return self.n or 1

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def limit(self) -> int | None:
        """Tokens to generate at most; None: as many as the context holds."""
        raise NotImplementedError

    def sampling(self, constraint: ConstraintFactory | None = None) -> Sampling:
        """The temperature is 1 unless given, as OpenAI's. Raises ApiError 400 for values that do
        not go together.
        """
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        given = {
            "top_p": self.top_p,
            "top_k": max(self.top_k, 0) if self.top_k is not None else None,
            "min_p": self.min_p,
            "seed": self.seed,
            "repetition_penalty": self.repetition_penalty,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "min_tokens": self.min_tokens,
            "ignore_eos": self.ignore_eos,
        }
        try:
            return Sampling(
                temperature=1.0 if self.temperature is None else self.temperature,
                max_tokens=self.limit,
                stop=tuple(text for text in stop if text),
                stop_ids=tuple(self.stop_token_ids or ()),
                logit_bias=tuple((int(token), v) for token, v in (self.logit_bias or {}).items()),
                logprobs=self.top_count,
                constraint=constraint,
                **{name: value for name, value in given.items() if value is not None},  # type: ignore[arg-type]
            )
        except ValueError as error:
            param = str(error).split()[0]
            raise ApiError(400, str(error), param=param, code="invalid_value") from error


class ChatRequest(Request):
    """POST /v1/chat/completions"""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)

    @model_validator(mode="after")
    def _top_logprobs_need_logprobs(self) -> "ChatRequest":
        if self.top_logprobs and not self.logprobs:
            raise pydantic_core.PydanticCustomError(
                "top_logprobs", "top_logprobs is only allowed when logprobs is true"
            )
        return self

    @property
    def limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def top_count(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(Request):
    """POST /v1/completions"""

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1)]
        | TokenIds
        | Annotated[list[TokenIds], Field(min_length=1)]
    )
    max_tokens: int | None = Field(None, ge=0)  # 0: only with echo
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    echo: bool | None = None
    best_of: int | None = Field(None, ge=1, le=MAX_CHOICES)

    @model_validator(mode="after")
    def _what_goes_together(self) -> "CompletionRequest":
        if self.best_of is not None and self.best_of < self.choices:
            raise pydantic_core.PydanticCustomError("best_of", "best_of must be at least n")
        if self.stream and self.candidates > self.choices:
            raise pydantic_core.PydanticCustomError(
                "best_of", "best_of above n is not possible when stream is true"
            )
        if self.max_tokens == 0 and not self.echo:
            raise pydantic_core.PydanticCustomError(
                "max_tokens", "max_tokens 0 is only allowed when echo is true"
            )
        return self

    @property
    def limit(self) -> int:
        return DEFAULT_COMPLETION_TOKENS if self.max_tokens is None else self.max_tokens

    @property
    def top_count(self) -> int | None:
        return self.logprobs

    @property
    def candidates(self) -> int:
        return max(self.best_of or 0, self.choices)

    def prompts(self) -> list[str | list[int]]:
        """One entry for each prompt: a text, or token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt  # type: ignore[return-value]


class EmbeddingRequest(BaseModel):
    """POST /v1/embeddings"""

    model_config = ConfigDict(strict=True, extra="forbid")

    model: str
    input: (
        str
        | Annotated[list[str], Field(min_length=1)]
        | TokenIds
        | Annotated[list[TokenIds], Field(min_length=1)]
    )
    encoding_format: Literal["float", "base64"] | None = None

    def prompts(self) -> list[str | list[int]]:
        """One entry for each input."""
        if isinstance(self.input, str):
            return [self.input]
        if isinstance(self.input[0], int):
            return [self.input]
        return self.input  # type: ignore[return-value]


class DetokenizeRequest(BaseModel):
    """POST /detokenize, as vLLM has it."""

    model_config = ConfigDict(strict=True, extra="forbid")

    model: str | None = None
    tokens: Annotated[list[TokenId], Field(max_length=1_000_000)]


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
        if isinstance(step, int):
            path += f"[{step}]"
        elif step != "[key]" and not _is_union_member(step):
            path += f".{step}" if path else step
    return path
