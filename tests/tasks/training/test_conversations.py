"""A person's own conversations: read, checked line by line, known by their content."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path

import pytest

from flows.deployments import plan
from model.chat import encode_example
from model.loader import DataError
from tasks.corpus.erase import erase
from tasks.corpus.tombstoned import Forgotten, parse
from tasks.runtime.errors import UserError
from tasks.runtime.settings import Settings
from tasks.runtime.store import Store
from tasks.state.tombstones import Tombstones
from tasks.training.conversations import (
    ConversationsConfig,
    ConversationsStageConfig,
    gather_conversations,
    read_conversations,
    standing_conversations,
)
from tasks.training.data import own_examples
from tests.tasks.made_artifacts import commit
from tests.tiny_models import tokenizer

CLOCK = {"type": "function", "function": {"name": "clock", "description": "now", "strict": None}}
ASKED = {"role": "user", "content": "Time?"}
CALLS = {"role": "assistant", "content": None, "tool_calls": [{"id": "c", "type": "function"}]}
CALLS["tool_calls"][0]["function"] = {"name": "clock", "arguments": "{}"}
GAVE = {"role": "tool", "tool_call_id": "c", "content": "noon"}
SAYS = {"role": "assistant", "content": "Noon."}
CALLED_WITH_A_LIST = {"function": {"name": "clock", "arguments": "[1]"}}
NO_OBJECT = {"role": "assistant", "tool_calls": [CALLED_WITH_A_LIST]}
STRAY = [ASKED, CALLS, GAVE | {"tool_call_id": "d"}, SAYS]


@pytest.fixture
def sources(home: Path) -> Path:
    (home / "sources").mkdir()
    return home / "sources"


def write(path: Path, *rows: object) -> ConversationsStageConfig:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return ConversationsStageConfig(path=str(path))


def said(kept: int, calling: int, too_long: int) -> dict[str, int]:
    names = ("conversations", "conversations_with_calls", "conversations_too_long")
    return dict(zip(names, (kept, calling, too_long), strict=True))


def test_conversations_become_examples(sources: Path) -> None:
    plain = {"messages": [ASKED, SAYS]}
    calling = {"messages": [ASKED, CALLS, GAVE, SAYS], "tools": [CLOCK]}
    config = write(sources / "talk.jsonl", plain, calling)
    manifest = gather_conversations(config.model_copy(update={"repeat": 3}))
    assert manifest.counts == {"conversations": 2, "answers": 3, "with_calls": 1}
    rows = list(read_conversations(Store.open(), manifest))
    assert [row[:2] for row in rows] == [("conversations-00000.parquet", n) for n in (0, 1)]
    names = tokenizer()
    examples, counts = own_examples(Store.open(), manifest, names, 500)
    assert counts == said(2, 1, 0) and len(examples) == 6
    offered = [{"type": "function", "function": {"name": "clock", "description": "now"}}]
    ids, learned = encode_example(calling["messages"], names, offered)
    assert (examples[3].ids, examples[3].learned) == (ids, learned)
    (short,) = {len(example.ids) for example in examples[:3]}
    # None that is left calls a tool, so the model will not be said to.
    assert own_examples(Store.open(), manifest, names, short)[1] == said(1, 0, 1)
    with pytest.raises(DataError, match=r"all 2 conversations are longer than finetune.sequence 4"):
        own_examples(Store.open(), manifest, names, 4)


def test_rows_of_openais_files_are_read(sources: Path) -> None:
    """As their guide to fine-tuning has them, and as tables of others write what is not there."""
    schema = {
        "type": "object",
        "properties": {"zone": {}, "at": {"properties": {"a": {}, "b": {}}}},
    }
    tool = {"type": "function", "function": {"name": "clock", "parameters": schema}}
    pretty = '{\n "at": [1], "more": 1,\n "zone": "\\u0141"\n}'
    calls = [
        {"id": "c1", "type": "function", "function": {"name": "clock", "arguments": pretty}},
        {"id": "c2", "type": "function", "function": {"name": "clock", "arguments": ""}},
    ]
    row = {
        "messages": [
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "Time?"}]},
            {"role": "assistant", "content": "Hm.", "weight": 0},
            {"role": "assistant", "content": None, "tool_calls": calls, "refusal": None},
            {"role": "tool", "tool_call_id": "c2", "name": "clock", "content": "two"},
            {"role": "tool", "tool_call_id": "c1", "content": "one"},
            {"role": "assistant", "content": "Noon.", "tool_calls": None, "weight": 1},
        ],
        "parallel_tool_calls": False,
        "tools": [tool],
    }
    path = sources / "talk.jsonl"
    other = {"messages": [ASKED, SAYS], "tools": None}
    path.write_text("\ufeff" + json.dumps(row) + "\r\n" + json.dumps(other))
    manifest = gather_conversations(ConversationsStageConfig(path=str(path)))
    names = tokenizer()
    ((example, _), _) = own_examples(Store.open(), manifest, names, 2000)
    told = zip(example.ids, example.learned, strict=True)
    learned = names.decode([token for token, learns in told if learns])
    assert learned == (
        '<tool_call>{"name": "clock", "arguments": {"zone": "Ł", "at": [1], "more": 1}}</tool_call>'
        '\n<tool_call>{"name": "clock", "arguments": {}}</tool_call>Noon.'
    )
    text = names.decode(example.ids)
    assert text.index("one") < text.rindex("two")  # in the order of the calls
    assert text.startswith("Be brief.\n<tools>")


def test_a_purge_finds_a_row_and_marks_what_learned_it(sources: Path) -> None:
    rows = [{"messages": [ASKED, SAYS | {"content": f"{n}."}]} for n in range(4)]
    manifest = gather_conversations(write(sources / "talk.jsonl", *rows))
    (table,) = Store.open().tables(manifest)
    assert table["url"].to_pylist() == [f"conversations://talk.jsonl#{n}" for n in (1, 2, 3, 4)]
    made = commit("finetune", {"model.safetensors": b"x"}, {"conversations": manifest.fingerprint})
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    Store.open().amend(made, created=now)  # after what it was made of
    settings = Settings.load()
    for what in (table["id"][1].as_py(), "conversations://talk.jsonl#4"):
        Tombstones(settings.database_url).add(*parse(what), "asked")
    done = {one.stage: one.action for one in erase(settings, Forgotten.standing(settings))}
    assert done == {"conversations": "rewritten", "finetune": "marked"}
    left = Store.open().get("conversations", manifest.fingerprint)
    assert [row[1:3] for row in read_conversations(Store.open(), left)] == [
        (n, [ASKED, SAYS | {"content": f"{2 * n}."}]) for n in range(2)
    ]
    assert Store.open().get("finetune", made.fingerprint).not_replayable


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
    assert stages[0] == "conversations" and stages[-1] == "finetune"  # checked before the work
    assert "conversations" not in [one.stage for one in plan("finetune", {})]


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ([1], "Input should be"),
        ({"messages": [ASKED]}, "no message is the assistant's to learn"),
        ({"messages": []}, "no message is the assistant's"),
        ({"messages": [ASKED, CALLS]}, "it calls 'clock', which is not among its tools"),
        ({"messages": [{"role": "robot", "content": "x"}, SAYS]}, "messages.0.role: Input should"),
        ({"messages": [{"role": "user"}, SAYS]}, "messages.0: the message has neither content nor"),
        (
            {"messages": [ASKED | {"tool_calls": CALLS["tool_calls"]}, SAYS]},
            "messages.0: only an assistant",
        ),
        ({"messages": [ASKED, SAYS | {"weight": 0}]}, "no message is the assistant's to learn"),
        (
            {"messages": [ASKED | {"weight": 1}, SAYS]},
            "messages.0: only an assistant's",
        ),
        ({"messages": [ASKED | {"name": "Ann"}, SAYS]}, "messages.0: only a tool's message has"),
        ({"messages": [ASKED, SAYS], "prompt": 1}, "prompt: Extra inputs are not"),
        (
            {"messages": [ASKED, NO_OBJECT], "tools": [CLOCK]},
            "messages.1.tool_calls.0.function.arg",
        ),
        ({"messages": STRAY, "tools": [CLOCK]}, "messages[2].tool_call_id 'd' is of no call"),
        ({"messages": [ASKED, SAYS | {"content": "Z\ufffdrich"}]}, "it is not all UTF-8"),
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
