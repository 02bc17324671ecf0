"""The conversations stage: a person's own conversations to fine-tune on, from JSON Lines files.

A row is as OpenAI's fine-tuning files have it: `messages`, and `tools` where answers may call some.
Written is conversations-NNNNN.parquet with columns id (as documents have one), url (file and line),
messages and tools, the two in JSON. A purge finds rows by id or url.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, Literal, Self

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from model.tool_calls import in_order
from tasks.corpus.documents import document_id
from tasks.corpus.source_config import SourceConfig, content_digest, files_of
from tasks.corpus.source_rows import text_lines
from tasks.runtime.errors import UserError
from tasks.runtime.fingerprint import place
from tasks.runtime.manifest import Manifest
from tasks.runtime.settings import Settings
from tasks.runtime.stage import Outcome, Workspace, stage
from tasks.runtime.stage_config import StageConfig
from tasks.runtime.store import Store

TABLE, TOO_LONG = "conversations", "conversations_too_long"
CONVERSATIONS = pa.schema([(name, pa.string()) for name in ("id", "url", "messages", "tools")])
LARGEST = 32 << 20  # characters of one file


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
    arguments: dict[str, Any]

    @field_validator("arguments", mode="before")
    @classmethod
    def _from_text(cls, given: Any) -> Any:
        """OpenAI's files have them as text, empty for none."""
        if not isinstance(given, str):
            return given
        try:
            value = json.loads(given or "{}")
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, dict):
            raise ValueError(f"{given[:80]!r} is no JSON object")
        return value


class Call(_Row):
    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


class TextPart(_Row):
    type: Literal["text"]
    text: str


class Turn(_Row):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    tool_calls: list[Call] | None = None
    tool_call_id: str | None = None
    name: str | None = None  # of the function, where a tool speaks
    weight: Literal[0, 1] | None = None  # 0: an answer that is not learned
    refusal: None = None

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if self.tool_calls and self.role != "assistant":
            raise ValueError(f"only an assistant calls tools, not a {self.role}")
        if self.weight is not None and self.role != "assistant":
            raise ValueError(f"only an assistant's message has a weight, not a {self.role}'s")
        if self.name is not None and self.role != "tool":
            raise ValueError(f"only a tool's message has a name, not a {self.role}'s")
        if self.content is None and not self.tool_calls:
            raise ValueError("the message has neither content nor tool_calls")
        return self

    def laid_out(self, schemas: Mapping[str, Any]) -> dict[str, Any]:
        """As `model.chat` takes it. schemas: of the arguments, by function."""
        content = self.content or ""
        text = content if isinstance(content, str) else "".join(part.text for part in content)
        said: dict[str, Any] = {
            "role": "system" if self.role == "developer" else self.role,
            "content": text,
        }
        if self.tool_calls:
            said["tool_calls"] = [_call(call, schemas) for call in self.tool_calls]
        said |= {"weight": 0} if self.weight == 0 else {}
        return said | ({"tool_call_id": self.tool_call_id} if self.tool_call_id else {})


class Conversation(_Row):
    """One row of a file."""

    messages: list[Turn]
    tools: list[Tool] | None = None
    parallel_tool_calls: bool | None = None  # of the request; the messages say what was called

    @model_validator(mode="after")
    def _can_be_learned(self) -> Self:
        if not any(turn.role == "assistant" and turn.weight != 0 for turn in self.messages):
            raise ValueError("no message is the assistant's to learn")
        offered = {tool.function.name for tool in self.tools or ()}
        for name in self.called:
            if name not in offered:
                raise ValueError(f"it calls {name!r}, which is not among its tools")
        in_order(self._messages())
        return self

    @property
    def called(self) -> Iterator[str]:
        """Names of the functions that it calls."""
        for turn in self.messages:
            for call in turn.tool_calls or ():
                yield call.function.name

    def _messages(self) -> list[dict[str, Any]]:
        functions = [tool.function for tool in self.tools or ()]
        schemas = {function.name: function.parameters for function in functions}
        return [turn.laid_out(schemas) for turn in self.messages]

    def row(self, url: str) -> dict[str, str]:
        """As the table has it: what `model.chat.encode_example` takes, in JSON."""
        # As the endpoint offers tools (`serve.tools.Tool.offered`).
        offered: dict[str, Any] = {"exclude_none": True, "exclude": {"function": {"strict"}}}
        tools = [tool.model_dump(**offered) for tool in self.tools or ()]
        said = {"messages": json.dumps(self._messages()), "tools": json.dumps(tools)}
        return {"id": document_id("\n".join(said.values())), "url": url, **said}


def _call(call: Call, schemas: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments as the endpoint's grammar has them: one spacing, keys in the schema's order."""
    arguments = _in_order_of(schemas.get(call.function.name), call.function.arguments)
    function = {"name": call.function.name, "arguments": arguments}
    return ({"id": call.id} if call.id else {}) | {"function": function}


def _in_order_of(schema: Any, value: Any) -> Any:
    if isinstance(value, list):
        items = schema.get("items") if isinstance(schema, dict) else None
        return [_in_order_of(items, one) for one in value]
    if not isinstance(value, dict):
        return value
    properties = schema.get("properties") if isinstance(schema, dict) else None
    known = properties if isinstance(properties, dict) else {}
    keys = [key for key in known if key in value]
    keys += [key for key in value if key not in known]
    return {key: _in_order_of(known.get(key), value[key]) for key in keys}


@stage("conversations", version=1)
def gather_conversations(config: ConversationsStageConfig, work: Workspace) -> Outcome:
    """Read and check a person's own conversations."""
    counts = Counter(conversations=0, answers=0, with_calls=0)
    rows: list[dict[str, str]] = []
    size = files = 0

    def write() -> None:
        nonlocal size, files
        table = pa.Table.from_pylist(rows, schema=CONVERSATIONS)
        work.write_table(f"{TABLE}-{files:05d}.parquet", table)
        rows.clear()
        size, files = 0, files + 1

    for url, conversation in conversations_of(config, Settings.load()):
        counts["conversations"] += 1
        counts["answers"] += sum(turn.role == "assistant" for turn in conversation.messages)
        counts["with_calls"] += any(True for _ in conversation.called)
        rows.append(conversation.row(url))
        size += len(rows[-1]["messages"]) + len(rows[-1]["tools"])
        if size >= LARGEST:
            write()
    if rows:
        write()
    return Outcome(counts=counts)


def conversations_of(
    config: ConversationsStageConfig, settings: Settings
) -> Iterator[tuple[str, Conversation]]:
    """All conversations, each with its place. Raises UserError naming file and line of what is
    none, and for none."""
    some = False
    for path in files_of(config.source(), settings):
        for number, line in text_lines(path, TABLE):
            line = line.removeprefix("\ufeff")
            if "\ufffd" in line:
                raise _wrong(path.name, number, "it is not all UTF-8")
            try:
                found = Conversation.model_validate(json.loads(line))
            except ValidationError as error:
                first = error.errors(include_url=False, include_input=False)[0]
                where = ".".join(map(str, first["loc"]))
                said = str(first["msg"]).removeprefix("Value error, ")
                raise _wrong(path.name, number, f"{where}: {said}" if where else said) from error
            except (ValueError, RecursionError) as error:
                raise _wrong(path.name, number, f"it is no JSON ({error})") from error
            some = True
            yield f"{TABLE}://{path.name}#{number}", found
    if not some:
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
