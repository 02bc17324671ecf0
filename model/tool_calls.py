"""Tools in a conversation: how functions are offered to a model, how it calls them, how results
come back.

    <|system|> (what the system says) <tools> (one JSON object a line) </tools>
    <|assistant|> (text) <tool_call>{"name": …, "arguments": {…}}</tool_call>
    <|reserved_0|> (what the function gave)          the role "tool"

Calls are written in the manner of Hermes (NousResearch, Hermes-Function-Calling), which vLLM and
llama.cpp read as well. The result of a tool has a mark of its own, so that nobody can write one.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

BEGINS, ENDS = "<tool_call>", "</tool_call>"
_OFFERED, _OFFERED_END = "<tools>", "</tools>"
_HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*"([^"\\]+)"\s*,\s*"arguments"\s*:\s*(?=\{)')
_LONGEST_HEAD = 256  # characters; names have 64 at most

Tool = Mapping[str, Any]  # {"type": "function", "function": {"name", "description", "parameters"}}


def offer(system: str, tools: Sequence[Tool]) -> str:
    """A system message that offers tools."""
    lines = [_OFFERED, *map(_json, tools), _OFFERED_END]
    return "\n".join([system, *lines] if system else lines)


def said(content: str, calls: Sequence[Mapping[str, Any]]) -> str:
    """What an assistant says that calls functions. calls: as OpenAI has them, each with a `name`
    and `arguments` (JSON, as text or as an object) in its `function`."""
    texts = []
    for call in calls:
        function = call["function"]
        arguments = function["arguments"]
        text = arguments if isinstance(arguments, str) else _json(arguments)
        texts.append(f'{BEGINS}{{"name": {_json(function["name"])}, "arguments": {text}}}{ENDS}')
    return "\n".join([content, *texts] if content else texts)


def in_order(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Messages with the results of each answer's calls in the order of the calls, as the layout has
    no room for ids. Results and calls without ids stay where they are.

    Raises ValueError naming a result whose `tool_call_id` no call before it has.
    """
    ordered: list[Mapping[str, Any]] = []
    ids: list[str] = []
    first = 0  # of the results after the latest answer
    for number, message in enumerate(messages):
        ordered.append(message)
        if message.get("role") != "tool":
            ids = [call.get("id") or "" for call in message.get("tool_calls") or ()]
            first = len(ordered)
            continue
        if (id := message.get("tool_call_id")) and id not in ids:
            raise ValueError(f"messages[{number}].tool_call_id {id!r} is of no call before it")
        if all(result.get("tool_call_id") in ids for result in ordered[first:]):
            ordered[first:] = sorted(ordered[first:], key=lambda r: ids.index(r["tool_call_id"]))
    return ordered


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


@dataclass(frozen=True)
class Text:
    """What the assistant says beside its calls."""

    text: str


@dataclass(frozen=True)
class Call:
    """A call begins. number: of the call in its answer, from 0."""

    number: int
    name: str


@dataclass(frozen=True)
class Arguments:
    """More of the arguments of a call, as JSON text."""

    number: int
    text: str


Piece = Text | Call | Arguments


class CallReader:
    """Tells calls from text in an answer that grows. What begins like a call and is none (other
    keys, another order, cut before its arguments) is text; blanks around calls say nothing.
    """

    def __init__(self) -> None:
        self._held = ""  # what could still become something else
        self._calls = 0
        self._inside: _Object | None = None  # the arguments being read
        self._ending = False  # between the arguments of a call and its end
        self._fresh = False  # behind a call, before any text

    @property
    def inside(self) -> bool:
        """Whether the arguments of a call are not whole yet."""
        return self._inside is not None

    def push(self, text: str) -> list[Piece]:
        """What is certain with this text."""
        self._held += text
        pieces: list[Piece] = []
        while (more := self._next()) is not None:
            pieces += more
        return pieces

    def finish(self) -> list[Piece]:
        """What was held back at the end, as the text that it is."""
        held, self._held = self._held, ""
        if self._ending or (self._fresh and not held.strip()):
            return []
        return [Text(held)] if held else []

    def _next(self) -> list[Piece] | None:
        """Pieces that can be told now, none for what says nothing; None: more must come first."""
        if self._inside is not None:
            return self._more_arguments(self._inside)
        if self._ending:
            return self._end()
        if self._fresh:
            self._held = self._held.lstrip()
        begins = self._held.find(BEGINS)
        if begins < 0:
            return self._text_up_to(len(self._held) - _open_end(self._held))
        if before := self._held[:begins].removesuffix("\n"):
            return self._text_up_to(len(before))
        body = self._held[begins + len(BEGINS) :]
        if head := _HEAD.match(body):
            self._held = body[head.end() :]
            self._inside = _Object()
            self._calls += 1
            return [Call(self._calls - 1, head[1])]
        if len(body) < _LONGEST_HEAD and ENDS not in body:
            return None
        return self._text_up_to(begins + len(BEGINS))

    def _more_arguments(self, inside: "_Object") -> list[Piece] | None:
        text = self._held[: inside.take(self._held)]
        self._held = self._held[len(text) :]
        if inside.whole:
            self._inside, self._ending = None, True
        return [Arguments(self._calls - 1, text)] if text else None

    def _end(self) -> list[Piece] | None:
        rest = self._held.lstrip("} \t\r\n")  # the brace that closes the call, too
        if rest != ENDS and ENDS.startswith(rest):
            return None
        self._held = rest.removeprefix(ENDS)
        self._ending, self._fresh = False, True
        return []

    def _text_up_to(self, end: int) -> list[Piece] | None:
        text, self._held = self._held[:end], self._held[end:]
        if not text:
            return None
        self._fresh = False
        return [Text(text)]


class _Object:
    """Finds the end of a JSON object."""

    def __init__(self) -> None:
        self._depth = 0
        self._quoted = self._escaped = False
        self.whole = False

    def take(self, text: str) -> int:
        """How many characters of a text belong to it."""
        for place, letter in enumerate(text):
            if self._escaped:
                self._escaped = False
            elif self._quoted:
                self._escaped, self._quoted = letter == "\\", letter != '"'
            elif letter == '"':
                self._quoted = True
            elif letter in "{[":
                self._depth += 1
            elif letter in "}]":
                self._depth -= 1
                if self._depth == 0:
                    self.whole = True
                    return place + 1
        return len(text)


def _open_end(text: str) -> int:
    """Length of the longest end of a text with which a call could begin."""
    for opening in ("\n" + BEGINS, BEGINS):
        for size in range(min(len(opening) - 1, len(text)), 0, -1):
            if text.endswith(opening[:size]):
                return size
    return 0
