"""C4's line rules cut prose, by the rule that is told, and leave code, tables and documentation."""

import pytest
from documents_of import documents, rows, urls
from inline_shards import run_inline
from test_quality import CONSTANTS, DOCUMENTATION, PROSE

from tasks.corpus.documents import document_id
from tasks.corpus.line_edits import HEADING, NOTHING, LinesConfig, edit_lines, edited
from tasks.runtime.store import REPORT, Store

ALL = LinesConfig(rules=("punctuation", "words", "javascript", "policy"))
PAGE = f"""# The bridge

Home | News | Contact

{PROSE}

## Share this

- by letter
- Read more ...

## Notes

It was quiet.
This page needs JavaScript to show the map of the river.
By staying you agree that this site uses cookies for statistics.
“The bridge will be open again before the end of the year.”

### Figures

| year | lorries |
|---|---|
| 1931 | 12 |"""
LEFT = f"""# The bridge

{PROSE}

## Notes

“The bridge will be open again before the end of the year.”

### Figures

| year | lorries |
|---|---|
| 1931 | 12 |"""


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("GRISTMILL_HOME", str(tmp_path / "home"))
    run_inline(monkeypatch)


def test_every_line_goes_by_the_first_rule_that_drops_it() -> None:
    left, dropped = edited(PAGE, ALL)
    assert left == LEFT
    assert [(cut.rule, cut.text.split()[0]) for cut in dropped] == [
        ("punctuation", "Home"),
        ("heading", "##"),
        ("punctuation", "-"),
        ("words", "-"),
        ("words", "It"),
        ("javascript", "This"),
        ("policy", "By"),
    ]


@pytest.mark.parametrize("rule", ALL.rules)
def test_a_rule_alone_drops_its_own_lines(rule) -> None:
    config = LinesConfig(rules=(rule,))
    left, dropped = edited(PAGE, config)
    assert {cut.rule for cut in dropped} - {HEADING} == {rule}
    assert edited(left, config) == (left, [])
    assert not any(cut.text in left.split("\n") for cut in dropped)


def test_code_is_never_torn_and_documentation_stays() -> None:
    code = "```\nfor (;;) { step() }\n// JavaScript, cookie policy\n```"
    assert edited(f"{PROSE}\n\nOff\n\n{code}", ALL)[0] == f"{PROSE}\n\n{code}"
    for text in (DOCUMENTATION, CONSTANTS):
        assert edited(text, ALL) == (text, [])


def test_what_went_is_counted_by_rule_and_what_is_left_is_a_document() -> None:
    menu = "# Menu\n\nHome\nAbout us"
    texts = {"http://h/a": PAGE, "http://h/b": PROSE, "http://h/c": menu, "http://h/d": "Home"}
    made = edit_lines(ALL, documents=documents(texts))
    assert urls(made) == ["http://h/a", "http://h/b"]
    first, second = rows(made)
    assert (first["text"], first["id"]) == (LEFT, document_id(LEFT))
    assert first["bytes"] == len(LEFT.encode())
    assert second["text"] == PROSE
    assert made.rules == {NOTHING: 2}
    assert made.metrics == {
        "mended_lines-punctuation": 5,
        "mended_lines-words": 2,
        "mended_lines-javascript": 1,
        "mended_lines-policy": 1,
    }
    gone = rows(made, "rejected-")
    assert [row["text"] for row in gone] == [menu, "Home"]  # whole, to be looked at
    assert gone[0]["reason"] == "every line broke a rule"
    cuts = rows(made, "cut-")  # of what stayed; what went is whole among the rejected
    lines = PAGE.split("\n")
    assert [cut["text"] for cut in cuts] == [lines[cut["line"] - 1] for cut in cuts]
    assert {cut["text"] for cut in cuts} == {line for line in lines if line} - {*LEFT.split("\n")}
    assert {cut["rule"] for cut in cuts} == {*ALL.rules, HEADING}
    assert {(cut["url"], cut["before"], cut["id"]) for cut in cuts} == {
        ("http://h/a", document_id(PAGE), document_id(LEFT))
    }
    told = Store.open().of(made).read_bytes(REPORT).decode()
    assert "Home | News | Contact" in told
