"""/v1/responses, for texts: the same answers as chat completions in OpenAI's newer shape.

Nothing is stored: `previous_response_id` is refused, the conversation travels in `input`.
"""

import json
import time
import uuid
from collections.abc import AsyncGenerator
from typing import Annotated, Any, Literal

import pydantic_core
from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from model.engine import Update
from serve.completions import Completion
from serve.host import ServedModel
from serve.mailbox import Mailbox
from serve.protocol import (
    MAX_NUMBER,
    ChatRequest,
    JsonSchema,
    Metadata,
    ResponseFormat,
)
from serve.responses import Clock, Usage
from serve.turns import Message, Part


class InputText(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    type: Literal["input_text", "output_text"]
    text: str
    annotations: list[Part] | None = Field(None, max_length=0)
    logprobs: list[Part] | None = Field(None, max_length=0)


class InputMessage(BaseModel):
    """A turn of the conversation, also as an earlier response gave it."""

    model_config = ConfigDict(strict=True, extra="forbid")

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[InputText]
    id: str | None = None
    status: str | None = None

    def message(self) -> Message:
        content = self.content
        text = content if isinstance(content, str) else "".join(part.text for part in content)
        return Message(role=self.role, content=text)


class TextFormat(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = Field(None, validate_default=True)
    description: str | None = None
    strict: bool | None = None  # the schema is always kept to
    body: dict[str, Any] | bool | None = Field(None, alias="schema", validate_default=True)

    @field_validator("name", "description", "strict", "body")
    @classmethod
    def _with_a_schema(cls, value: Any, info: ValidationInfo) -> Any:
        kind = info.data.get("type")
        if kind == "json_schema" and value is None and info.field_name in ("name", "body"):
            raise pydantic_core.PydanticCustomError("missing", "required by type 'json_schema'")
        if kind in ("text", "json_object") and value is not None:
            raise pydantic_core.PydanticCustomError(
                "schema_only", "only allowed with type 'json_schema'"
            )
        return value

    def echo(self) -> dict[str, Any]:
        """As the response shows it."""
        if self.type != "json_schema":
            return {"type": self.type}
        named = {"type": self.type, "name": self.name, "schema": self.body, "strict": True}
        return named | ({"description": self.description} if self.description else {})


class TextOptions(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    format: TextFormat | None = None
    verbosity: None = None


class ResponseStreamOptions(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    include_obfuscation: Literal[False] | None = None  # padding against those who count bytes


class ResponseChat(ChatRequest):
    """A response's question as a chat completion, whose errors name what /v1/responses has."""

    @property
    def source(self) -> str:
        return "input"

    def grammar(self) -> tuple[str, str, str] | None:
        if (found := super().grammar()) is None:
            return None
        kind, text, param = found
        return kind, text, "text.format.schema" if param.endswith("schema") else "text.format"


class ResponsesRequest(BaseModel):
    """POST /v1/responses"""

    model_config = ConfigDict(strict=True, extra="forbid")

    model: str
    input: str | Annotated[list[InputMessage], Field(min_length=1)]
    instructions: str | None = None
    max_output_tokens: int | None = Field(None, ge=1, le=MAX_NUMBER)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    text: TextOptions | None = None
    stream: bool | None = None
    user: str | None = None
    safety_identifier: str | None = None
    metadata: Metadata | None = None  # only given back
    stream_options: ResponseStreamOptions | None = None

    @model_validator(mode="after")
    def _stream_options_need_a_stream(self) -> "ResponsesRequest":
        if self.stream_options is not None and not self.stream:
            raise pydantic_core.PydanticCustomError(
                "stream_options", "stream_options is only allowed when stream is true"
            )
        return self

    @property
    def client(self) -> str | None:
        return self.safety_identifier or self.user

    def chat(self) -> ResponseChat:
        """The same question as a chat completion."""
        messages = []
        if self.instructions is not None:
            messages.append(Message(role="system", content=self.instructions))
        if isinstance(self.input, str):
            messages.append(Message(role="user", content=self.input))
        else:
            messages += [item.message() for item in self.input]
        return ResponseChat(
            model=self.model,
            messages=messages,
            max_completion_tokens=self.max_output_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            stream=self.stream,
            response_format=self._format(),
        )

    def _format(self) -> ResponseFormat | None:
        asked = self.text.format if self.text else None
        if asked is None or asked.type == "text":
            return None
        schema = None
        if asked.type == "json_schema":
            assert asked.name is not None and asked.body is not None
            schema = JsonSchema(name=asked.name, schema=asked.body)
        return ResponseFormat(type=asked.type, json_schema=schema)


class ResponseRun:
    """One response in the making."""

    def __init__(self, request: ResponsesRequest, completion: Completion) -> None:
        self.request = request
        self.completion = completion
        self.id = f"resp_{uuid.uuid4().hex}"
        self.item = f"msg_{uuid.uuid4().hex}"
        self.created = int(time.time())
        self._number = 0

    @classmethod
    async def begin(cls, request: ResponsesRequest, served: ServedModel) -> "ResponseRun":
        return cls(request, await Completion.prepare(request.chat(), served))

    @property
    def served(self) -> ServedModel:
        return self.completion.served

    @property
    def usage(self) -> Usage:
        return self.completion.usage

    @property
    def accepted(self) -> bool:
        return self.completion.accepted

    @property
    def tokens(self) -> tuple[int, int]:
        return self.completion.tokens

    @property
    def choices(self) -> int:
        return 1

    @property
    def limit(self) -> int | None:
        return self.completion.limit

    @property
    def clock(self) -> Clock:
        return self.completion.clock

    async def whole(self, mailbox: Mailbox) -> dict[str, Any]:
        async with self.completion.open(mailbox, streamed=False) as mail:
            async for index, update in mail.updates():
                self.completion.count(index, update)
                if failure := self.completion.failure(update):
                    raise failure
        return self._body(update.text, update)

    async def events(self, mailbox: Mailbox) -> AsyncGenerator[bytes, None]:
        """Typed events; the first is made before any token."""
        text = ""
        where = {"item_id": self.item, "output_index": 0, "content_index": 0}
        async with self.completion.open(mailbox, streamed=True) as mail:
            empty = _part("")
            opening = self._event("response.created", response=self._body("", None))
            opening += self._event("response.in_progress", response=self._body("", None))
            opening += self._event(
                "response.output_item.added", output_index=0, item=self._item(None, None)
            )
            opening += self._event("response.content_part.added", **where, part=empty)
            yield opening
            async for index, update in mail.updates():
                self.completion.count(index, update)
                if failure := self.completion.failure(update):
                    # OpenAI's codes are an enumeration; of these two say what happened here.
                    code = "server_error" if failure.status >= 500 else "invalid_prompt"
                    problem = {"code": code, "message": str(failure)}
                    body = self._body(text, None) | {"status": "failed", "error": problem}
                    yield self._event("response.failed", response=body)
                    return
                text += update.text
                if update.text:
                    yield self._event(
                        "response.output_text.delta", **where, delta=update.text, logprobs=[]
                    )
        yield self._event("response.output_text.done", **where, text=text, logprobs=[])
        yield self._event("response.content_part.done", **where, part=_part(text))
        item = self._item(text, update)
        yield self._event("response.output_item.done", output_index=0, item=item)
        body = self._body(text, update)
        yield self._event(f"response.{body['status']}", response=body)

    def _event(self, name: str, **values: Any) -> bytes:
        body = {"type": name, "sequence_number": self._number, **values}
        self._number += 1
        text = json.dumps(body, ensure_ascii=False, separators=(",", ":"))
        return f"event: {name}\ndata: {text}\n\n".encode()

    def _item(self, text: str | None, last: Update | None) -> dict[str, Any]:
        """The message; None: not begun."""
        content = [] if text is None else [_part(text)]
        return {
            "type": "message",
            "id": self.item,
            "role": "assistant",
            "status": _status(last),
            "content": content,
        }

    def _body(self, text: str, last: Update | None) -> dict[str, Any]:
        """The response; `last` is None until it is over."""
        asked, status = self.request, _status(last)
        cut = {"reason": "max_output_tokens"} if status == "incomplete" else None
        usage = self.usage
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "status": status,
            "error": None,
            "incomplete_details": cut,
            "instructions": asked.instructions,
            "max_output_tokens": asked.max_output_tokens,
            "model": self.served.spec.name,
            "system_fingerprint": self.served.spec.system_fingerprint,
            "output": [] if last is None else [self._item(text, last)],
            "parallel_tool_calls": False,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "store": False,
            "temperature": 1.0 if asked.temperature is None else asked.temperature,
            "text": {
                "format": asked.text.format.echo()
                if asked.text and asked.text.format
                else {"type": "text"}
            },
            "tool_choice": "none",
            "tools": [],
            "top_p": 1.0 if asked.top_p is None else asked.top_p,
            "truncation": "disabled",
            "metadata": asked.metadata or {},
            "usage": None
            if last is None
            else {
                "input_tokens": usage.prompt_tokens,
                "input_tokens_details": {
                    "cached_tokens": sum(usage.cached.values()),
                    "cache_write_tokens": 0,  # nobody pays for them here
                },
                "output_tokens": usage.completion_tokens,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": usage.prompt_tokens + usage.completion_tokens,
            },
        }


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _status(last: Update | None) -> str:
    if last is None:
        return "in_progress"
    return "incomplete" if last.finish_reason == "length" else "completed"
