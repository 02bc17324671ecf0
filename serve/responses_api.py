"""/v1/responses, for texts: the same answers as chat completions in OpenAI's newer shape.

Nothing is stored: `previous_response_id` is refused, the conversation travels in `input`.
"""

import json
import time
import uuid
from collections.abc import AsyncGenerator
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from model.engine import Update
from serve.completions import Completion, failure_of
from serve.host import ServedModel
from serve.mailbox import Mailbox
from serve.protocol import MAX_NUMBER, ChatRequest, JsonSchema, Message, Part, ResponseFormat
from serve.responses import Clock, Usage


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
    name: str = ""
    description: str | None = None
    strict: bool | None = None
    body: dict[str, Any] | bool | None = Field(None, alias="schema")


class TextOptions(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    format: TextFormat | None = None
    verbosity: None = None


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

    @property
    def client(self) -> str | None:
        return self.safety_identifier or self.user

    def chat(self) -> ChatRequest:
        """The same question as a chat completion."""
        messages = []
        if self.instructions is not None:
            messages.append(Message(role="system", content=self.instructions))
        if isinstance(self.input, str):
            messages.append(Message(role="user", content=self.input))
        else:
            messages += [item.message() for item in self.input]
        return ChatRequest(
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
            body = True if asked.body is None else asked.body
            schema = JsonSchema(name=asked.name, schema=body)
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
    def clock(self) -> Clock:
        return self.completion.clock

    async def whole(self, mailbox: Mailbox) -> dict[str, Any]:
        with self.completion.open(mailbox, streamed=False) as mail:
            async for index, update in mail.updates():
                self.completion.count(index, update)
                if failure := failure_of(update):
                    raise failure
        return self._body(update.text, update)

    async def events(self, mailbox: Mailbox) -> AsyncGenerator[bytes, None]:
        """Typed events; the first is made before any token."""
        text = ""
        where = {"item_id": self.item, "output_index": 0, "content_index": 0}
        with self.completion.open(mailbox, streamed=True) as mail:
            empty = {"type": "output_text", "text": "", "annotations": []}
            opening = self._event("response.created", response=self._body("", None))
            opening += self._event("response.in_progress", response=self._body("", None))
            opening += self._event(
                "response.output_item.added", output_index=0, item=self._item(None, None)
            )
            opening += self._event("response.content_part.added", **where, part=empty)
            yield opening
            async for index, update in mail.updates():
                self.completion.count(index, update)
                if failure := failure_of(update):
                    problem = failure.body()["error"]
                    body = self._body(text, None) | {"status": "failed", "error": problem}
                    yield self._event("response.failed", response=body)
                    return
                text += update.text
                if update.text:
                    yield self._event("response.output_text.delta", **where, delta=update.text)
        part = empty | {"text": text}
        yield self._event("response.output_text.done", **where, text=text)
        yield self._event("response.content_part.done", **where, part=part)
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
        content = [] if text is None else [{"type": "output_text", "text": text, "annotations": []}]
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
            "text": {"format": {"type": asked.text.format.type}}
            if asked.text and asked.text.format
            else {"format": {"type": "text"}},
            "tool_choice": "none",
            "tools": [],
            "top_p": 1.0 if asked.top_p is None else asked.top_p,
            "truncation": "disabled",
            "metadata": {},
            "usage": None
            if last is None
            else {
                "input_tokens": usage.prompt_tokens,
                "input_tokens_details": {"cached_tokens": sum(usage.cached.values())},
                "output_tokens": usage.completion_tokens,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": usage.prompt_tokens + usage.completion_tokens,
            },
        }


def _status(last: Update | None) -> str:
    if last is None:
        return "in_progress"
    return "incomplete" if last.finish_reason == "length" else "completed"
