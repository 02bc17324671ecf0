"""Facts are what the documents state, and questions about them keep their groups apart."""

import hashlib
import json
import random
from collections import Counter

import pytest

from tasks.corpus.facts import (
    Fact,
    clean_sentence,
    is_answer,
    mine_entries,
    mine_page,
    parameter_names,
)
from tasks.corpus.pairs import PairsConfig, items_of, make_tables, select_facts
from tasks.corpus.phrasings import _MODULE, _PAGE, _PARAMETERS, _WHAT, _WHERE, trained_questions

PAGE = """# textwrap

Text wrapping and filling.

See also: `re`.

Functions: `textwrap.dedent`, `textwrap.fill`.

## textwrap.dedent(text)

Remove any common leading whitespace from every line in `text`.

This can be used to make triple-quoted strings line up.

```
# not.a.heading(x)
```

## textwrap.fill(text, width: int = 70, /, *rest, flag=(1, 2), **kwargs) -> str

Also available as `wrapping.fill`.

Fill a *single* paragraph of text, returning a new string. More follows.

## class textwrap.TextWrapper(width=70)

Bases: `object`.

Object for wrapping/filling text.

### TextWrapper.wrap(text)

Reformat the single paragraph in text.

### property TextWrapper.width

## textwrap.undocumented()

## Something to read in prose

It is not about a name at all.
"""


def by_name(facts: list[Fact]) -> dict[str, Fact]:
    return {fact.name: fact for fact in facts}


def test_a_documentation_page_states_facts_by_its_layout() -> None:
    facts = by_name(mine_entries("d1", PAGE))
    assert list(facts) == [
        "textwrap",
        "textwrap.dedent",
        "textwrap.fill",
        "textwrap.TextWrapper",
        "textwrap.TextWrapper.wrap",
        "textwrap.TextWrapper.width",
        "textwrap.undocumented",
    ]
    assert facts["textwrap"].sentence == "Text wrapping and filling."
    dedent = facts["textwrap.dedent"]
    assert dedent.sentence == "Remove any common leading whitespace from every line in `text`."
    assert (dedent.kind, dedent.home, dedent.parameters) == ("function", "textwrap", ("text",))
    fill = facts["textwrap.fill"]
    assert fill.sentence == "Fill a single paragraph of text, returning a new string."
    assert fill.parameters == ("text", "width", "*rest", "flag", "**kwargs")
    assert fill.names == ("wrapping.fill", "textwrap.fill", "fill")
    assert facts["textwrap.TextWrapper"].sentence == "Object for wrapping/filling text."
    wrap = facts["textwrap.TextWrapper.wrap"]
    assert (wrap.kind, wrap.names) == (
        "method",
        ("textwrap.TextWrapper.wrap", "TextWrapper.wrap", "wrap"),
    )
    assert facts["textwrap.undocumented"].sentence == ""


def test_headings_as_code_are_read_alike() -> None:
    page = PAGE.replace("# textwrap\n", "# `textwrap`\n").replace(
        "## textwrap.dedent(text)", "## `textwrap.dedent(text)`"
    )
    assert mine_entries("d1", page) == mine_entries("d1", PAGE)


def test_an_ordinary_page_states_what_it_says_first_of_its_title() -> None:
    text = "# Granite\n\n- a list\n\nGranite is a coarse-grained igneous rock. It is hard.\n"
    assert mine_entries("d", text) == []
    fact = mine_page("d", "Granite - The Stone Wiki", text)
    assert fact is not None
    assert (fact.name, fact.sentence) == ("Granite", "Granite is a coarse-grained igneous rock.")
    assert mine_page("d", "", text) is None
    assert mine_page("d", "Granite", "Granite\n\n| a | b |") is None


@pytest.mark.parametrize(
    ("sentence", "rule"),
    [
        ("Return the sum of all numbers.", None),
        ("", "no sentence"),
        ("Deprecated.", "too short"),
        ("word " * 40, "too long"),
        ("keys() -> a set of the keys", "not a sentence"),
        ("These are the options:", "not a sentence"),
        ("An opening (bracket only.", "not a sentence"),
    ],
)
def test_what_cannot_be_an_answer_has_a_rule(sentence: str, rule: str | None) -> None:
    assert is_answer(sentence) == rule


def test_sentences_lose_emphasis_and_links_but_not_names() -> None:
    text = "Copy **all** files to [dst](http://x/y) with `copy_function`, e.g. *args. Then stop."
    assert clean_sentence(text) == "Copy all files to dst with `copy_function`, e.g. *args."
    text = "Replace every match of the pattern in string by repl. repl can be a callable. Then."
    assert clean_sentence(text) == "Replace every match of the pattern in string by repl."


def test_unreadable_signatures_have_no_parameters() -> None:
    assert parameter_names("(object[, default])") is None
    assert parameter_names("()") == ()
    assert parameter_names("(a, b=f(1, 2), *, c: int = 3)") == ("a", "b", "c")


def fact(name: str, sentence: str = "", kind: str = "function") -> Fact:
    home, _, short = name.rpartition(".")
    sentence = sentence or f"Do what {short} says it does."
    return Fact(name, (name, short), kind, home, sentence, ("a", "b"), "d")


TRAIN = [fact(f"alpha.f{n}") for n in range(150)] + [fact("alpha.same"), fact("beta.same")]
HELDOUT = [fact(f"gamma.g{n}") for n in range(50)]
CONFIG = PairsConfig(questions_per_group=40, phrasings_per_fact=3)


def test_held_out_facts_are_examined_and_never_trained() -> None:
    chosen = select_facts(CONFIG, [*TRAIN, fact("gamma.g1")], HELDOUT, {"gamma.g2"}, Counter())
    assert {f.name for f in chosen.unseen} == {f.name for f in HELDOUT} - {"gamma.g2"}
    assert {f.name for f in chosen.trained} == {f.name for f in TRAIN}
    assert chosen.rules == {"also in a held-out document": 1, "also in a training document": 1}
    tables = make_tables(CONFIG, chosen)
    trained = {row["fact"] for row in tables["pairs-train"].to_pylist()}
    assert not trained & {f.name for f in HELDOUT}
    assert {row["fact"] for row in tables["questions-unseen"].to_pylist()} <= {
        f.name for f in chosen.unseen
    }


def test_an_ambiguous_name_is_never_used_alone() -> None:
    chosen = select_facts(CONFIG, TRAIN, HELDOUT, set(), Counter())
    names = {f.name: f.names for f in chosen.trained}
    assert names["alpha.same"] == ("alpha.same",)
    assert names["alpha.f1"] == ("alpha.f1", "f1")
    same = next(f for f in chosen.trained if f.name == "alpha.same")
    assert "where" not in {item.question for item in items_of(same, CONFIG)}


def test_the_facts_kept_under_a_limit_are_those_of_modules_much_mentioned() -> None:
    config = CONFIG.model_copy(update={"facts": 5})
    chosen = select_facts(config, TRAIN, HELDOUT, set(), Counter({"beta": 9, "alpha": 2}))
    assert chosen.trained[0].name == "beta.same" and len(chosen.trained) == 5
    assert chosen.rules["beyond the number asked for"] == len(TRAIN) - 5


def test_pages_are_asked_for_only_where_names_are_few() -> None:
    stone = Fact("Granite", ("Granite",), "page", "", "Granite is a rock.", None, "d")
    beside = select_facts(CONFIG, [*TRAIN, stone], [], set(), Counter())
    assert beside.rules == {"page beside documented names": 1}
    alone = select_facts(CONFIG, [stone], [], set(), Counter())
    (item,) = items_of(alone.trained[0], CONFIG)
    assert item.answer == "Granite is a rock."


def test_groups_share_no_phrasing_that_they_must_not() -> None:
    for ways in (_WHAT, _MODULE, _PAGE, _WHERE, _PARAMETERS):
        trained = {text.lower().rstrip("?.") for text in ways.trained}
        assert not trained & {text.lower().rstrip("?.") for text in ways.never_trained}
    tables = make_tables(CONFIG, select_facts(CONFIG, TRAIN, HELDOUT, set(), Counter()))
    rows = {name: table.to_pylist() for name, table in tables.items()}
    asked = {row["question"] for row in rows["pairs-train"]}
    assert all(row["question"] in asked for row in rows["questions-seen"])
    assert not any(row["question"] in asked for row in rows["questions-recall"])
    assert all(len(rows[f"questions-{g}"]) == 40 for g in ("seen", "recall", "unseen"))


def test_a_new_fact_changes_no_other_facts_questions() -> None:
    before = make_tables(CONFIG, select_facts(CONFIG, TRAIN, HELDOUT, set(), Counter()))
    more = [*TRAIN, fact("delta.new")]
    after = make_tables(CONFIG, select_facts(CONFIG, more, HELDOUT, set(), Counter()))
    asked = {row["id"] for row in after["pairs-train"].to_pylist()}
    assert {row["id"] for row in before["pairs-train"].to_pylist()} <= asked


def test_every_trained_phrasing_is_used_before_one_comes_again() -> None:
    for count in (5, len(_WHERE.trained), 2 * len(_WHERE.trained)):
        wordings = trained_questions("where", TRAIN[0], count, random.Random(0), alter=0.4)
        used = Counter(wording.phrasing for wording in wordings)
        assert sum(used.values()) == count
        assert max(used.values()) <= -(-count // len(_WHERE.trained))


def test_words_come_and_go_around_the_name_in_the_share_asked_for() -> None:
    for share, least, most in ((0.0, 0, 0), (0.5, 30, 250), (1.0, 250, 500)):
        wordings = list(trained_questions("what", TRAIN[0], 500, random.Random(0), alter=share))
        assert least <= sum(wording.altered for wording in wordings) <= most
        assert all("f0" in wording.text for wording in wordings)


def test_pairs_change_only_with_the_version_of_the_stage() -> None:
    # Raise the stage's version when this changes.
    config = CONFIG.model_copy(update={"phrasings_per_detail": 8})
    tables = make_tables(config, select_facts(config, TRAIN, HELDOUT, set(), Counter()))
    rows = [row for table in tables.values() for row in table.to_pylist()]
    digest = hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()
    assert digest[:16] == "eba7c5b58161b95f"
