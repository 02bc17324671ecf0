"""Tools: offered to a model that was trained for them, called as the request says, read back."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from model.chat import encode_chat
from model.tokenizer_files import tokenizer_files
from serve.app import create_app
from serve.grammar import LIMITS, Compiled, vocabulary
from serve.host import ModelHost
from serve.tools import Tool, grammar_of, whole_message
from tasks.training.conversations import Conversation
from tests.serve.calls import CHAT, bomb, error, post, stream
from tests.serve.conftest import Endpoint, eventually, listening, spec
from tests.tiny_models import model_directory, tokenizer

NAMES = tokenizer()
ASKED = CHAT["messages"]
PLACE = {"place": {"enum": ["Rome", "Oslo"]}, "days": {"type": "integer", "maximum": 9}}
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a place",
        "parameters": {"properties": PLACE, "required": ["place"], "additionalProperties": False},
    },
}
CLOCK = {"type": "function", "function": {"name": "clock", "strict": True}}
TOOLS = [WEATHER, CLOCK]
SHORT = {"model": "tiny", "messages": [{"role": "user", "content": "?"}]}


@pytest.fixture(scope="module")
def caller(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    """A model that is said to call tools; its weights are random."""
    directory = model_directory(tmp_path_factory.mktemp("caller"), context=512)
    for name, body in tokenizer_files(NAMES, 512, tools=True).items():
        (directory / name).write_bytes(body)
    models: dict[str, Path] = {"one": directory}
    host = ModelHost(lambda wanted: models[wanted.artifact])
    host.want(spec())
    assert eventually(lambda: host.current is not None), host.state()
    with listening(create_app(host)) as url:
        yield Endpoint(url, host, models)
    host.close()


def assert_follows(call: dict) -> None:
    """A call as OpenAI's clients read it, of one of the tools, with arguments of its schema."""
    assert call["id"].startswith("call_") and call["type"] == "function"
    arguments = json.loads(call["function"]["arguments"])
    if call["function"]["name"] == "clock":
        assert arguments == {}
    else:
        assert call["function"]["name"] == "weather"
        assert arguments["place"] in ("Rome", "Oslo") and arguments.keys() <= PLACE.keys()


@pytest.mark.parametrize("seed", range(3))
def test_a_call_that_is_required_is_made(caller: Endpoint, seed: int) -> None:
    body = SHORT | {"tools": TOOLS, "tool_choice": "required", "seed": seed, "max_tokens": 400}
    (choice,) = post(caller, "/v1/chat/completions", body)["choices"]
    assert choice["message"]["content"] is None and choice["message"]["role"] == "assistant"
    for call in choice["message"]["tool_calls"][:-1]:
        assert_follows(call)
    if choice["finish_reason"] == "tool_calls":
        assert_follows(choice["message"]["tool_calls"][-1])
    else:
        assert choice["finish_reason"] == "length"


@pytest.mark.parametrize("name", ["weather", "clock"])
def test_a_named_function_is_called_once(caller: Endpoint, name: str) -> None:
    named = {"type": "function", "function": {"name": name}}
    body = SHORT | {"tools": TOOLS, "tool_choice": named, "max_tokens": 400, "n": 2, "seed": 3}
    for choice in post(caller, "/v1/chat/completions", body)["choices"]:
        (call,) = choice["message"]["tool_calls"]
        assert call["function"]["name"] == name and choice["finish_reason"] == "tool_calls"
        assert_follows(call)


def test_a_stream_says_the_same_calls(caller: Endpoint) -> None:
    body = SHORT | {"tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False}
    body |= {"max_tokens": 400, "seed": 1, "temperature": 1.0}
    (whole,) = post(caller, "/v1/chat/completions", body)["choices"]
    streamed = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = stream(caller, "/v1/chat/completions", body | streamed)
    deltas = [choice for chunk in chunks for choice in chunk["choices"]]
    assert deltas[0]["delta"] == {"role": "assistant", "content": ""}
    assert deltas[-1]["delta"] == {} and deltas[-1]["finish_reason"] == "tool_calls"
    parts = [part for one in deltas[1:-1] for part in one["delta"]["tool_calls"]]
    assert {part["index"] for part in parts} == {0} and len(parts) > 2
    opening = parts[0]
    assert opening["type"] == "function" and opening["function"]["arguments"] == ""
    assert all(set(part) == {"index", "function"} for part in parts[1:])
    text = "".join(part["function"]["arguments"] for part in parts)
    (call,) = whole["message"]["tool_calls"]
    assert call["function"] == {"name": opening["function"]["name"], "arguments": text}
    assert chunks[-1]["usage"]["completion_tokens"] > len(parts) / 2


def test_without_need_the_model_chooses_and_calls_are_still_of_the_tools(caller: Endpoint) -> None:
    """A bias towards the text that opens a call makes random weights begin one."""
    (opens,) = {token for token in NAMES.encode("<") if NAMES.decode([token]) == "<"}
    plain = post(caller, "/v1/chat/completions", SHORT | {"tools": TOOLS, "max_tokens": 8})
    assert set(plain["choices"][0]["message"]) == {"role", "content", "refusal"}
    body = SHORT | {"tools": TOOLS, "max_tokens": 60, "logit_bias": {str(opens): 20}, "seed": 5}
    (choice,) = post(caller, "/v1/chat/completions", body)["choices"]
    assert choice["message"]["content"].startswith("<<<")


def test_tools_are_read_and_with_none_they_are_not(caller: Endpoint) -> None:
    offered = [Tool.model_validate(tool).offered() for tool in TOOLS]
    body = {"model": "tiny", "messages": ASKED, "max_tokens": 2}
    for more, tools in (
        ({"tools": TOOLS}, offered),
        ({"tools": TOOLS, "tool_choice": "none"}, []),
        ({"tools": [], "tool_choice": "auto"}, []),
    ):
        usage = post(caller, "/v1/chat/completions", body | more)["usage"]
        assert usage["prompt_tokens"] == len(encode_chat(ASKED, NAMES, tools=tools))
    counted = post(caller, "/tokenize", {"messages": ASKED, "tools": TOOLS})
    assert counted["tokens"] == encode_chat(ASKED, NAMES, tools=offered)
    with caller.client() as client:
        assert client.get("/v1/models/tiny").json()["calls_tools"] is True


def test_tools_are_offered_as_they_were_when_they_were_learned() -> None:
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    learned = Conversation.model_validate({"messages": messages, "tools": TOOLS}).row("")["tools"]
    assert json.loads(learned) == [Tool.model_validate(tool).offered() for tool in TOOLS]


def test_calls_and_results_travel_back(caller: Endpoint) -> None:
    """As clients send them: what openai-python made of a stream or parsed, what was cut, in any
    order, with fields that say nothing.
    """
    cut = {"name": "weather", "arguments": '{"place": "Os', "parsed_arguments": None}
    void = {"name": "clock", "arguments": ""}
    called = {
        "role": "assistant",
        "content": None,
        "refusal": None,
        "annotations": [],
        "parsed": None,
        "reasoning_content": None,
        "tool_calls": [
            {"id": "c1", "type": "function", "function": cut, "index": 0},
            {"id": "c2", "type": "function", "function": void, "index": 1},
        ],
    }
    gave = [
        {"role": "tool", "tool_call_id": "c2", "name": "clock", "content": "noon"},
        {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "snow"}]},
    ]
    body = {"model": "tiny", "messages": [*ASKED, called, *gave], "max_tokens": 2}
    usage = post(caller, "/v1/chat/completions", body)["usage"]
    calls = [{"function": cut}, {"function": void | {"arguments": "{}"}}]
    read = [
        *ASKED,
        {"role": "assistant", "tool_calls": calls},
        {"role": "tool", "content": "snow"},
        {"role": "tool", "content": "noon"},
    ]
    assert usage["prompt_tokens"] == len(encode_chat(read, NAMES))
    counted = post(caller, "/tokenize", {"messages": body["messages"]})
    assert counted["tokens"] == encode_chat(read, NAMES)


@pytest.mark.parametrize("length", [4, 12])
def test_a_call_that_is_cut_before_its_arguments_is_not_shown(
    caller: Endpoint, length: int
) -> None:
    body = SHORT | {"tools": TOOLS, "tool_choice": "required", "max_tokens": length}
    (choice,) = post(caller, "/v1/chat/completions", body)["choices"]
    assert choice["message"]["content"] == "" and choice["finish_reason"] == "length"
    chunks = stream(caller, "/v1/chat/completions", body | {"stream": True})
    assert [c["choices"][0]["delta"].get("content") for c in chunks] == ["", None]


NO_FORM = {"type": "json_schema", "json_schema": {"schema": {"type": 3}}}
LOOSE = {
    "type": "object",
    "title": "Loose",
    "properties": {
        "tags": {"type": "array", "items": {"type": "string"}, "uniqueItems": True},
        "count": {"type": "integer", "format": "int32", "description": "x" * 600},
        "either": {"oneOf": [{"type": "string"}, {"type": "string", "minLength": 1}]},
        "title": {"type": "string"},
    },
    "minProperties": 1,
}


def test_schemas_as_programs_make_them_are_taken(caller: Endpoint) -> None:
    names = [f"f{number}" for number in range(128)]
    functions = [{"name": name, "parameters": LOOSE} for name in names]
    tools = [{"type": "function", "function": function} for function in functions]
    asked = [Tool.model_validate(tool) for tool in tools]
    assert len(grammar_of(asked, must=True, several=True)) < 65_536
    assert asked[0].arguments()["properties"].keys() == LOOSE["properties"].keys()
    short = {"name": "f", "parameters": json.loads(json.dumps(LOOSE).replace("x" * 600, ""))}
    tools = [{"type": "function", "function": short}]
    body = SHORT | {"tools": tools, "tool_choice": "required", "max_tokens": 3}
    post(caller, "/v1/chat/completions", body)
    strict = {"name": "f", "parameters": LOOSE, "strict": True}
    wrong = body | {"tools": [{"type": "function", "function": strict}]}
    status, said = error(caller, "/v1/chat/completions", json=wrong)
    assert (status, said["param"]) == (400, "tools[0].function.parameters")


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tools": [CLOCK, CLOCK]}, "tools"),
        ({"tools": [CLOCK] * 129}, "tools"),
        (
            {
                "tools": [
                    {"type": "function", "function": {"name": "f", "parameters": {"type": "array"}}}
                ]
            },
            "tools[0].function.parameters",
        ),
        (
            {
                "tools": [
                    {
                        "type": "function",
                        "function": {"name": "f", "parameters": {"properties": {"a": {"type": 3}}}},
                    }
                ]
            },
            "tools[0].function.parameters",
        ),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [CLOCK], "tool_choice": "sometimes"}, "tool_choice"),
        (
            {"tools": [CLOCK], "tool_choice": {"type": "function", "function": {"name": "x"}}},
            "tool_choice",
        ),
        ({"tools": [CLOCK], "structured_outputs": {"regex": "a"}}, "structured_outputs"),
        ({"tools": [CLOCK], "response_format": NO_FORM}, "response_format.json_schema.schema"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id"),
        ({"messages": [{"role": "assistant"}]}, "messages[0].content"),
        (
            {"messages": [{"role": "user", "content": "x", "tool_call_id": "c"}]},
            "messages[0].tool_call_id",
        ),
        ({"messages": [{"role": "user", "content": "x", "name": "Ann"}]}, "messages[0].name"),
        ({"messages": [*ASKED, {"role": "tool", "tool_call_id": "z", "content": "x"}]}, "messages"),
    ],
)
def test_wrong_tools_are_named(caller: Endpoint, more: dict, param: str) -> None:
    status, said = error(caller, "/v1/chat/completions", json=CHAT | more)
    assert (status, said["param"]) == (400, param), said


def test_a_model_that_was_not_trained_for_tools_says_so(endpoint: Endpoint) -> None:
    for more, param in (
        ({"tools": TOOLS}, "tools"),
        (
            {"messages": [*ASKED, {"role": "tool", "tool_call_id": "c", "content": "x"}]},
            "messages[1]",
        ),
    ):
        status, said = error(endpoint, "/v1/chat/completions", json=CHAT | more)
        assert (status, said["param"]) == (400, param)
        assert said["code"] == "unsupported_parameter"
        assert "tiny@1 was not trained to call tools" in said["message"]
    for more in ({"tools": TOOLS, "tool_choice": "none"}, {"tools": []}, {"tool_choice": "auto"}):
        post(endpoint, "/v1/chat/completions", CHAT | more | {"max_tokens": 1})
    status, said = error(endpoint, "/tokenize", json={"messages": ASKED, "tools": TOOLS})
    assert (status, said["param"]) == (400, "tools")


def follows(grammar: str, text: str) -> bool:
    """Whether a whole answer is one of the grammar's."""
    matcher = Compiled(vocabulary(NAMES), "grammar", grammar, LIMITS).matcher.deep_copy()
    taken = all(matcher.consume_token(token) for token in NAMES.encode(text))
    return taken and (matcher.is_accepting() or matcher.is_stopped())


ROME = '<tool_call>{"name": "weather", "arguments": {"place": "Rome"}}</tool_call>'
TIME = '<tool_call>{"name": "clock", "arguments": {}}</tool_call>'
WRONG = '<tool_call>{"name": "weather", "arguments": {"place": "Bonn"}}</tool_call>'


@pytest.mark.parametrize(
    ("options", "yes", "no"),
    [
        (
            {"must": False, "several": True},
            ["", "hello <tool", ROME, f"I see.\n{ROME}\n{TIME}", f"{TIME} and"],
            [WRONG, f"I see. {WRONG}", f"{ROME}\n{WRONG}", "<tool_call>", ROME[:-3]],
        ),
        ({"must": False, "several": False}, ["hello", f"so {ROME}"], [f"{ROME}\n{TIME}", WRONG]),
        (
            {"must": True, "several": True},
            [ROME, f"{ROME}\n{TIME}"],
            ["", "hello", WRONG, f"a{ROME}"],
        ),
        ({"must": True, "several": False}, [ROME, TIME], [f"{ROME}\n{TIME}", "hello"]),
        (
            {"must": False, "several": True, "answer": '{"type": "integer"}'},
            ["12", TIME, f"{TIME}\n{ROME}"],
            ["hello", WRONG, f"1{TIME}"],
        ),
    ],
)
def test_the_grammar_holds_calls_to_their_tools(options: dict, yes: list, no: list) -> None:
    grammar = grammar_of([Tool.model_validate(tool) for tool in TOOLS], **options)
    assert [text for text in yes if not follows(grammar, text)] == []
    assert [text for text in no if follows(grammar, text)] == []


def test_a_whole_answer_is_text_and_calls() -> None:
    assert whole_message("just text", "stop", must=False) == ({"content": "just text"}, "stop")
    message, reason = whole_message(f"I see.\n{ROME}\n{TIME}", "stop", must=False)
    assert reason == "tool_calls" and whole_message(ROME, "length", must=True)[1] == "length"
    assert message["content"] == "I see."
    assert [call["function"] for call in message["tool_calls"]] == [
        {"name": "weather", "arguments": '{"place": "Rome"}'},
        {"name": "clock", "arguments": "{}"},
    ]
    assert all("index" not in call for call in message["tool_calls"])


def test_a_call_that_a_stop_text_cuts_is_not_said_to_be_whole(caller: Endpoint) -> None:
    named = {"type": "function", "function": {"name": "weather"}}
    body = SHORT | {"tools": TOOLS, "tool_choice": named, "stop": "place", "max_tokens": 99}
    (choice,) = post(caller, "/v1/chat/completions", body)["choices"]
    (call,) = choice["message"]["tool_calls"]
    assert choice["finish_reason"] == "stop" and "place" not in call["function"]["arguments"]
    deltas = stream(caller, "/v1/chat/completions", body | {"stream": True})
    assert deltas[-1]["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize("choice", ["auto", "required"])
@pytest.mark.parametrize(
    "schema",
    [
        {"properties": {"a": {"pattern": "(?=x)"}}},
        {"properties": {"a": {"$ref": "#/nowhere"}}, "required": ["a"]},
        {"properties": {"a": json.loads(bomb())}, "required": ["a"]},
    ],
)
def test_a_schema_that_cannot_be_followed_is_refused(
    caller: Endpoint, schema: dict, choice: str
) -> None:
    """Also where an answer might never come to the call."""
    tools = [CLOCK, {"type": "function", "function": {"name": "f", "parameters": schema}}]
    body = SHORT | {"tools": tools, "tool_choice": choice}
    status, said = error(caller, "/v1/chat/completions", json=body)
    assert (status, said["param"]) == (400, "tools[1].function.parameters"), said
    assert said["message"].startswith("not a usable json_schema: ")
