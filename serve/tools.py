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

from model.tool_calls import BEGINS, ENDS, Call, CallReader, Piece, Text

MOST_TOOLS = 128
MOST_CALLS = 16  # of one answer that must call
NOTHING: dict[str, Any] = {"properties": {}, "additionalProperties": False}
SPACING = {"whitespace_pattern": " ?"}  # llguidance's option; else there are blanks without end
# What it does not know, of schemas that are not strict, guides and does not bind.
LENIENT = {"lenient": True, "coerce_one_of": True}
NOTES = ("title", "description", "examples", "default")  # of a schema: they bind nothing
NAMED = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")

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
        given = _binding(self.function.parameters or NOTHING)
        options = SPACING | ({} if self.function.strict else LENIENT)
        return {"type": "object"} | given | {"x-guidance": options}


def _binding(schema: Any) -> Any:
    """A schema without notes for people, which would count as its size."""
    if isinstance(schema, list):
        return [_binding(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    found = {}
    for key, value in schema.items():
        if key in NAMED and isinstance(value, dict):
            found[key] = {name: _binding(part) for name, part in value.items()}
        elif key not in NOTES:
            found[key] = value if key in ("enum", "const", "required") else _binding(value)
    return found


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
    arguments: str  # as they were, also where the answer was cut
    parsed_arguments: Any = None  # the same once more, as openai-python has read them


class CalledTool(BaseModel):
    """A call of an earlier answer."""

    model_config = ConfigDict(strict=True, extra="forbid")

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None  # that of a stream's delta

    def layout(self) -> dict[str, Any]:
        """As `model.chat.encode_chat` takes it."""
        function = {"name": self.function.name, "arguments": self.function.arguments or "{}"}
        return {"id": self.id, "function": function}


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
    """Turns the text of one answer into what a client is told: parts of the message, as deltas.
    must: the answer has nothing but calls.
    """

    def __init__(self, must: bool) -> None:
        self._must = must
        self._reader = CallReader()
        self._called = False

    def ended(self, reason: str | None) -> str | None:
        """Why the answer ended: one whose calls are whole, as a stop text may cut them, says so."""
        whole = self._called and not self._reader.inside
        return "tool_calls" if whole and reason == "stop" else reason

    def push(self, text: str, *, last: bool) -> list[dict[str, Any]]:
        """Deltas that are certain with this text. last: nothing follows."""
        pieces = self._reader.push(text)
        if last:
            pieces += filter(self._is_told, self._reader.finish())
        return [*map(self._delta, pieces)]

    def _is_told(self, held: Piece) -> bool:
        """A call that is cut before its arguments says nothing to anybody."""
        return not (isinstance(held, Text) and (self._must or BEGINS in held.text))

    def _delta(self, piece: Piece) -> dict[str, Any]:
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


def whole_message(
    text: str, reason: str | None, *, must: bool
) -> tuple[dict[str, Any], str | None]:
    """(`content`, and `tool_calls` where there are any, of a finished answer; why it ended)."""
    content, reader = "", AnswerReader(must)
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
