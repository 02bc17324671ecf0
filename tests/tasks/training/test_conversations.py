"""A person's own conversations: read, checked line by line, known by their content."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flows.deployments import plan
from model.chat import encode_example
from model.loader import DataError
from tasks.runtime.errors import UserError
from tasks.runtime.settings import Settings
from tasks.runtime.store import Store
from tasks.training.conversations import (
    ConversationsConfig,
    ConversationsStageConfig,
    gather_conversations,
    read_conversations,
    standing_conversations,
)
from tasks.training.data import own_examples
from tests.tiny_models import tokenizer

CLOCK = {"type": "function", "function": {"name": "clock", "description": "now", "strict": None}}
ASKED = {"role": "user", "content": "Time?"}
CALLS = {"role": "assistant", "content": None, "tool_calls": [{"id": "c", "type": "function"}]}
CALLS["tool_calls"][0]["function"] = {"name": "clock", "arguments": "{}"}
GAVE = {"role": "tool", "tool_call_id": "c", "content": "noon"}
SAYS = {"role": "assistant", "content": "Noon."}


@pytest.fixture
def sources(home: Path) -> Path:
    (home / "sources").mkdir()
    return home / "sources"


def write(path: Path, *rows: object) -> ConversationsStageConfig:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ConversationsStageConfig(path=str(path))


def test_conversations_become_examples(sources: Path) -> None:
    plain = {"messages": [ASKED, SAYS]}
    calling = {"messages": [ASKED, CALLS, GAVE, SAYS], "tools": [CLOCK]}
    config = write(sources / "talk.jsonl", plain, calling)
    manifest = gather_conversations(config.model_copy(update={"repeat": 3}))
    assert manifest.counts == {"conversations": 2, "answers": 3, "with_calls": 1}
    rows = list(read_conversations(Store.open(), manifest))
    assert [row[:2] for row in rows] == [("conversations-00000.parquet", n) for n in (0, 1)]
    names = tokenizer()
    examples, too_long = own_examples(Store.open(), manifest, names, 500)
    assert too_long == 0 and len(examples) == 6
    offered = [{"type": "function", "function": {"name": "clock", "description": "now"}}]
    ids, learned = encode_example(calling["messages"], names, offered)
    assert (examples[3].ids, examples[3].learned) == (ids, learned)
    (short,) = {len(example.ids) for example in examples[:3]}
    assert own_examples(Store.open(), manifest, names, short)[1] == 1
    with pytest.raises(DataError, match=r"all 2 conversations are longer than finetune.sequence 4"):
        own_examples(Store.open(), manifest, names, 4)


def test_they_are_known_by_their_content(sources: Path) -> None:
    first = gather_conversations(write(sources / "a.jsonl", {"messages": [ASKED, SAYS]}))
    (sources / "elsewhere").mkdir()
    moved = (sources / "a.jsonl").rename(sources / "elsewhere" / "a.jsonl")
    again = ConversationsStageConfig(path=str(moved))
    assert gather_conversations.find(again, {}) == first
    assert gather_conversations.find(again.model_copy(update={"repeat": 2}), {}) is None
    changed = write(sources / "a.jsonl", {"messages": [ASKED, SAYS | {"content": "One."}]})
    assert gather_conversations.find(changed, {}) is None
    assert standing_conversations(ConversationsConfig()) == {}


def test_fine_tuning_without_any_stays_the_artifact_it_was(sources: Path) -> None:
    write(sources / "talk.jsonl", {"messages": [ASKED, SAYS]})
    named = {"conversations": {"path": str(sources / "talk.jsonl")}}
    stages = [one.stage for one in plan("finetune", named)]
    assert stages[-2:] == ["conversations", "finetune"]
    assert "conversations" not in [one.stage for one in plan("finetune", {})]


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ([1], "Input should be"),
        ({"messages": [ASKED]}, "no message is the assistant's, so there is nothing to learn"),
        ({"messages": []}, "no message is the assistant's"),
        ({"messages": [ASKED, CALLS]}, "it calls 'clock', which is not among its tools"),
        ({"messages": [{"role": "robot", "content": "x"}, SAYS]}, "messages.0.role: Input should"),
        ({"messages": [{"role": "user"}, SAYS]}, "messages.0: the message has neither content nor"),
        (
            {"messages": [ASKED | {"tool_calls": CALLS["tool_calls"]}, SAYS]},
            "messages.0: only an assistant",
        ),
        ({"messages": [ASKED, SAYS | {"weight": 0}]}, "messages.1.weight: Extra inputs are not"),
        ({"messages": [ASKED, SAYS], "tools": [{"type": "x"}]}, "tools.0.type: Input should be"),
        ({"question": "a", "answer": "b"}, "messages: Field required"),
    ],
)
def test_a_row_that_is_none_is_named_with_its_line(sources: Path, row: object, why: str) -> None:
    config = write(sources / "talk.jsonl", {"messages": [ASKED, SAYS]}, row)
    with pytest.raises(UserError) as found:
        gather_conversations(config)
    assert str(found.value).startswith(
        f"conversations: line 2 of talk.jsonl is no conversation: {why}"
    )
    assert str(found.value).endswith("mend it or take it out")
    assert Store.open(Settings.load()).all("conversations") == []


def test_files_without_conversations_are_refused(sources: Path) -> None:
    (sources / "talk.jsonl").write_text("\n")
    with pytest.raises(UserError, match="has no rows; give a file with some"):
        gather_conversations(ConversationsStageConfig(path=str(sources / "talk.jsonl")))
    (sources / "talk.jsonl").write_text('{"messages": [')
    with pytest.raises(UserError, match=r"line 1 of talk.jsonl is no conversation: it is no JSON"):
        gather_conversations(ConversationsStageConfig(path=str(sources / "talk.jsonl")))
    with pytest.raises(UserError, match="lies outside the directories that sources may be read"):
        gather_conversations(ConversationsStageConfig(path="/etc/passwd"))
