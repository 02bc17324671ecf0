"""OpenAI's request bodies: what is asked, and what it means to the engine."""

import json
import re
from abc import abstractmethod
from typing import Annotated, Any, Literal

import pydantic_core
from pydantic import BaseModel, ConfigDict, Field, model_validator

from model.engine import ConstraintFactory, Sampling
from model.engine.sampling import MAX_LOGPROBS
from serve.errors import ApiError
from serve.specification import MAX_CHOICES
from serve.tools import MOST_TOOLS, NamedTool, Tool, grammar_of
from serve.turns import Message

MAX_NUMBER = 2**31 - 1  # of tokens; what is more is a mistake, and no tensor holds it
DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's, for /v1/completions

TokenId = Annotated[int, Field(ge=0, le=MAX_NUMBER)]
TokenIds = Annotated[list[TokenId], Field(min_length=1)]
TokenKey = Annotated[str, Field(pattern=r"^(0|[1-9][0-9]{0,8})$")]  # one text for each id


Metadata = Annotated[
    dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]],
    Field(max_length=16),
]


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None  # padding against those who count bytes


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
    # Not OpenAI's; vLLM's: -1 and 0 keep every token.
    top_k: int | None = Field(None, ge=-1, le=MAX_NUMBER)
    min_p: float | None = Field(None, ge=0, le=1)  # not OpenAI's; vLLM's
    repetition_penalty: float | None = Field(None, ge=0.01, le=10)  # vLLM's
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: (
        Annotated[dict[TokenKey, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=1024)]
        | None
    ) = None
    min_tokens: int | None = Field(None, ge=0, le=MAX_NUMBER)  # vLLM's
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
    @abstractmethod
    def source(self) -> str:
        """The parameter that holds what is to be continued."""

    @property
    def form(self) -> str | None:
        """The parameter that says which form the answer must have."""
        grammar = self.grammar()
        return grammar and grammar[2]

    @property
    @abstractmethod
    def top_count(self) -> int | None:
        """How many likeliest tokens to report beside each chosen one; None: no logprobs."""

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
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    @abstractmethod
    def limit(self) -> int | None:
        """Tokens to generate at most; None: as many as the context holds."""

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
    max_tokens: int | None = Field(None, ge=1, le=MAX_NUMBER)
    max_completion_tokens: int | None = Field(None, ge=1, le=MAX_NUMBER)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    tools: Annotated[list[Tool], Field(max_length=MOST_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None

    @property
    def source(self) -> str:
        return "messages"

    @model_validator(mode="after")
    def _tools_that_can_be_chosen(self) -> "ChatRequest":
        names = [tool.function.name for tool in self.tools or ()]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise pydantic_core.PydanticCustomError("tools", f"two tools are called {twice!r}")
        choice = self.tool_choice
        if isinstance(choice, NamedTool) and choice.function.name not in names:
            raise pydantic_core.PydanticCustomError(
                "tool_choice", f"{choice.function.name!r} is not among the tools"
            )
        if choice == "required" and not names:
            raise pydantic_core.PydanticCustomError(
                "tool_choice", "'required' is only allowed with tools"
            )
        if self.offered and self.structured_outputs:
            raise pydantic_core.PydanticCustomError(
                "structured_outputs", "structured_outputs is not possible with tools"
            )
        return self

    @property
    def offered(self) -> list[Tool]:
        """Tools that the answer may call."""
        return [] if self.tool_choice == "none" else self.tools or []

    @property
    def must_call(self) -> bool:
        """Whether the answer is calls and nothing else."""
        return self.tool_choice == "required" or isinstance(self.tool_choice, NamedTool)

    def grammar(self) -> tuple[str, str, str] | None:
        form, tools, choice = super().grammar(), self.offered, self.tool_choice
        if not tools:
            return form
        if named := isinstance(choice, NamedTool):
            tools = [tool for tool in tools if tool.function.name == choice.function.name]
        text = grammar_of(
            tools,
            must=self.must_call,
            several=not named and self.parallel_tool_calls is not False,
            answer=form and form[1],
        )
        return "grammar", text, "tools"

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
    max_tokens: int | None = Field(None, ge=0, le=MAX_NUMBER)  # 0: only with echo
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    echo: bool | None = None
    best_of: int | None = Field(None, ge=1, le=MAX_CHOICES)

    @property
    def source(self) -> str:
        return "prompt"

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
        return _each(self.prompt)


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
        return _each(self.input)


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
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    tools: Annotated[list[Tool], Field(max_length=MOST_TOOLS)] | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> "TokenizeRequest":
        if (self.prompt is None) == (self.messages is None):
            raise pydantic_core.PydanticCustomError("one_of", "give either prompt or messages")
        if self.tools and self.messages is None:
            raise pydantic_core.PydanticCustomError("tools", "tools are only allowed with messages")
        return self


def _each(given: str | list[str] | list[int] | list[list[int]]) -> list[str | list[int]]:
    """Texts, or lists of token ids, of what may also be a single one of them."""
    if isinstance(given, str):
        return [given]
    ids = [entry for entry in given if isinstance(entry, int)]
    return [ids] if ids else [entry for entry in given if not isinstance(entry, int)]
