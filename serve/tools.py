"""Tools in requests and answers, as OpenAI's chat completions have them.

How a model reads and writes them is said in `model.tool_calls`. Calls are held to the offered
functions' names and the schemas of their arguments by a grammar, also beside free text.
"""

import json
import uuid
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import pydantic_core
from pydantic import BaseModel, ConfigDict, Field, field_validator

from model.tool_calls import BEGINS, ENDS, Arguments, Call, CallReader, Text

MOST_TOOLS = 128
MOST_CALLS = 16  # of one answer that must call
NOTHING = {"properties": {}, "additionalProperties": False}
SPACING = {"x-guidance": {"whitespace_pattern": " ?"}}  # llguidance's; else blanks without end

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]


class Function(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None  # the schema is always kept to

    @field_validator("parameters")
    @classmethod
    def _of_an_object(cls, schema: dict[str, Any] | None) -> dict[str, Any] | None:
        if schema is not None and schema.get("type", "object") != "object":
            raise pydantic_core.PydanticCustomError(
                "parameters", "must be the schema of an object, whose type is 'object'"
            )
        return schema


class Tool(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    type: Literal["function"]
    function: Function

    def offered(self) -> dict[str, Any]:
        """As the model reads it."""
        return self.model_dump(exclude_none=True, exclude={"function": {"strict"}})

    def arguments(self) -> dict[str, Any]:
        """Their schema, for llguidance."""
        given = self.function.parameters
        return {"type": "object"} | (given or NOTHING) | SPACING


class FunctionName(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    name: str


class NamedTool(BaseModel):
    """A choice of tool: this one must be called."""

    model_config = ConfigDict(strict=True, extra="forbid")

    type: Literal["function"]
    function: FunctionName


class CalledFunction(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    name: str
    arguments: str

    @field_validator("arguments")
    @classmethod
    def _are_an_object(cls, text: str) -> str:
        try:
            value = pydantic_core.from_json(text)
        except ValueError:
            value = None
        if not isinstance(value, dict):
            raise pydantic_core.PydanticCustomError("arguments", "must be a JSON object in a text")
        return text


class CalledTool(BaseModel):
    """A call of an earlier answer."""

    model_config = ConfigDict(strict=True, extra="forbid")

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


def grammar_of(
    tools: Sequence[Tool], *, must: bool, several: bool, answer: str | None = None
) -> str:
    """llguidance's grammar of an answer. must: it is a call; several: it may be more than one;
    answer: the JSON schema of what is no call, None: any text."""
    rules = ["%llguidance {}"]
    if must or answer is not None:
        calls = f'one ("\\n" one){{0,{MOST_CALLS - 1}}}' if several else "one"
        rules.append(f"start: {calls}" + ("" if must else " | answer"))
        if not must:
            rules.append(f"answer: %json {answer}")
        rules.append(f"one: {_quoted(BEGINS)} call")
    else:
        rules.append("start: (free call)* TEXT" if several else "start: free call | TEXT")
        rules.append(f"free[lazy]: TEXT {_quoted(BEGINS)}")
        rules.append(r"TEXT: /(.|\n)*/")
    rules.append("call: " + " | ".join(f"call_{number}" for number in range(len(tools))))
    for number, tool in enumerate(tools):
        head = f'{{"name": {_quoted(tool.function.name)}, "arguments": '
        body = f"%json {json.dumps(tool.arguments())}"
        rules.append(f"call_{number}: {_quoted(head)} {body} {_quoted('}' + ENDS)}")
    return "\n".join(rules) + "\n"


def _quoted(text: str) -> str:
    return json.dumps(text)


class AnswerReader:
    """Turns the text of one answer into what a client is told: parts of the message, as deltas."""

    def __init__(self) -> None:
        self._reader = CallReader()
        self._called = False

    def ended(self, reason: str | None) -> str | None:
        """Why the answer ended: one whose calls are whole, as a stop text may cut them, says so."""
        whole = self._called and not self._reader.inside
        return "tool_calls" if whole and reason == "stop" else reason

    def push(self, text: str, *, last: bool) -> list[dict[str, Any]]:
        """Deltas that are certain with this text. last: nothing follows."""
        pieces = self._reader.push(text)
        return [*map(self._delta, pieces + self._reader.finish() if last else pieces)]

    def _delta(self, piece: Text | Call | Arguments) -> dict[str, Any]:
        if isinstance(piece, Text):
            return {"content": piece.text}
        called: dict[str, Any] = {"index": piece.number}
        if isinstance(piece, Call):
            self._called = True
            named = {"name": piece.name, "arguments": ""}
            called |= {"id": f"call_{uuid.uuid4().hex}", "type": "function", "function": named}
        else:
            called["function"] = {"arguments": piece.text}
        return {"tool_calls": [called]}


def whole_message(text: str, reason: str | None) -> tuple[dict[str, Any], str | None]:
    """(`content`, and `tool_calls` where there are any, of a finished answer; why it ended)."""
    content, reader = "", AnswerReader()
    calls: list[dict[str, Any]] = []
    for delta in reader.push(text, last=True):
        content += delta.get("content", "")
        for part in delta.get("tool_calls", ()):
            place = part.pop("index")
            if place == len(calls):
                calls.append(part)
            else:
                calls[place]["function"]["arguments"] += part["function"]["arguments"]
    if not calls:
        return {"content": content}, reason
    return {"content": content or None, "tool_calls": calls}, reader.ended(reason)
