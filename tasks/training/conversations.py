"""The conversations stage: a person's own conversations to fine-tune on, from JSON Lines files.

A row is as OpenAI's fine-tuning files have it: `messages`, and `tools` where answers may call some.
Written is conversations-NNNNN.parquet with columns id (SHA-256 of the two), messages and tools, in
JSON.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, Literal, Self

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from tasks.corpus.source_config import SourceConfig, content_digest, files_of
from tasks.corpus.source_rows import text_lines
from tasks.runtime.errors import UserError
from tasks.runtime.fingerprint import place
from tasks.runtime.manifest import Manifest
from tasks.runtime.settings import Settings
from tasks.runtime.stage import Outcome, Workspace, stage
from tasks.runtime.stage_config import StageConfig
from tasks.runtime.store import Store

TABLE = "conversations"
CONVERSATIONS = pa.schema([("id", pa.string()), ("messages", pa.string()), ("tools", pa.string())])
ROWS = 10_000  # of one file


class ConversationsConfig(StageConfig):
    """Own conversations to fine-tune on beside the questions about the corpus."""

    path: str = place("")
    """JSON Lines file, or a directory of them, below a root that sources may be read from; a row
    has messages, as OpenAI's fine-tuning files do, and tools if it calls some. Empty: none."""
    repeat: int = Field(1, ge=1, le=1000)
    """Times each of them stands in one pass over the questions."""
    licence: str = ""
    """Under which terms they may be used; told in the model's card."""


class ConversationsStageConfig(ConversationsConfig):
    """The files are known by their content."""

    digest: str = ""

    def source(self) -> SourceConfig:
        return SourceConfig(name=TABLE, path=self.path, format="jsonl")

    def resolve(self) -> Self:
        return self.model_copy(update={"digest": content_digest(self.source(), Settings.load())})


class _Row(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class Function(_Row):
    name: str = Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(_Row):
    type: Literal["function"]
    function: Function


class CalledFunction(_Row):
    name: str
    arguments: str | dict[str, Any]

    @model_validator(mode="after")
    def _are_an_object(self) -> Self:
        if isinstance(self.arguments, str):
            try:
                value = json.loads(self.arguments)
            except ValueError:
                value = None
            if not isinstance(value, dict):
                raise ValueError(f"the arguments {self.arguments[:80]!r} are no JSON object")
        return self


class Call(_Row):
    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


class Turn(_Row):
    role: Literal["system", "user", "assistant", "tool"]
    content: str | None = None
    tool_calls: list[Call] | None = None
    tool_call_id: str | None = None

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if self.tool_calls and self.role != "assistant":
            raise ValueError(f"only an assistant calls tools, not a {self.role}")
        if self.content is None and not self.tool_calls:
            raise ValueError("the message has neither content nor tool_calls")
        return self


class Conversation(_Row):
    """One row of a file."""

    messages: list[Turn]
    tools: list[Tool] = []

    @model_validator(mode="after")
    def _can_be_learned(self) -> Self:
        if not any(turn.role == "assistant" for turn in self.messages):
            raise ValueError("no message is the assistant's, so there is nothing to learn")
        offered = {tool.function.name for tool in self.tools}
        for name in self.called:
            if name not in offered:
                raise ValueError(f"it calls {name!r}, which is not among its tools")
        return self

    @property
    def called(self) -> Iterator[str]:
        """Names of the functions that it calls."""
        for turn in self.messages:
            for call in turn.tool_calls or ():
                yield call.function.name

    def row(self) -> dict[str, str]:
        """As the table has it: what `model.chat.encode_example` takes, in JSON."""
        messages = [
            {"role": turn.role, "content": turn.content or ""}
            | ({"tool_calls": [_call(call) for call in turn.tool_calls]} if turn.tool_calls else {})
            for turn in self.messages
        ]
        # As the endpoint offers tools (`serve.tools.Tool.offered`).
        offered = {"exclude_none": True, "exclude": {"function": {"strict"}}}
        tools = [tool.model_dump(**offered) for tool in self.tools]  # type: ignore[arg-type]
        said = {"messages": _json(messages), "tools": _json(tools)}
        told = "\n".join(said.values()).encode("utf-8", "surrogatepass")
        return {"id": hashlib.sha256(told).hexdigest(), **said}


def _call(call: Call) -> dict[str, Any]:
    return {"type": "function", "function": call.function.model_dump()}


def _json(value: Any) -> str:
    return json.dumps(value)


@stage("conversations", version=1)
def gather_conversations(config: ConversationsStageConfig, work: Workspace) -> Outcome:
    """Read and check a person's own conversations."""
    counts = Counter(conversations=0, answers=0, with_calls=0)
    rows = _rows(conversations_of(config, Settings.load()), counts)
    for number, some in enumerate(iter(lambda: list(islice(rows, ROWS)), [])):
        table = pa.Table.from_pylist(some, schema=CONVERSATIONS)
        work.write_table(f"{TABLE}-{number:05d}.parquet", table)
    return Outcome(counts=counts)


def _rows(found: Iterable[Conversation], counts: Counter[str]) -> Iterator[dict[str, str]]:
    for conversation in found:
        counts["conversations"] += 1
        counts["answers"] += sum(turn.role == "assistant" for turn in conversation.messages)
        counts["with_calls"] += any(True for _ in conversation.called)
        yield conversation.row()


def conversations_of(
    config: ConversationsStageConfig, settings: Settings
) -> Iterator[Conversation]:
    """All conversations. Raises UserError naming file and line of what is none, and for none."""
    found = False
    for path in files_of(config.source(), settings):
        for number, line in text_lines(path, TABLE):
            try:
                yield Conversation.model_validate(json.loads(line))
            except ValidationError as error:
                first = error.errors(include_url=False, include_input=False)[0]
                where = ".".join(map(str, first["loc"]))
                said = str(first["msg"]).removeprefix("Value error, ")
                raise _wrong(path.name, number, f"{where}: {said}" if where else said) from error
            except (ValueError, RecursionError) as error:
                raise _wrong(path.name, number, f"it is no JSON ({error})") from error
            found = True
    if not found:
        raise UserError(f"conversations: {config.path!r} has no rows; give a file with some")


def _wrong(file: str, number: int, why: str) -> UserError:
    return UserError(
        f"conversations: line {number} of {file} is no conversation: {why}; mend it or take it out"
    )


def standing_conversations(config: ConversationsConfig) -> dict[str, Manifest]:
    """The input of fine-tuning, if there are any."""
    if not config.path:
        return {}
    return {TABLE: gather_conversations(ConversationsStageConfig(**config.model_dump()))}


def read_conversations(
    store: Store, conversations: Manifest
) -> Iterator[tuple[str, int, list[dict[str, Any]], list[dict[str, Any]]]]:
    """(file, row, messages, tools) of each."""
    for file in conversations.names(f"{TABLE}-", ".parquet"):
        table = store.of(conversations).read_table(file, ["messages", "tools"])
        for number, row in enumerate(table.to_pylist()):
            yield file, number, json.loads(row["messages"]), json.loads(row["tools"])
