"""What many documents share stays in the first of them; code and tables go whole or not at all."""

import random
import re
from collections import Counter

import pytest
from documents_of import documents, rows, urls
from hypothesis import given
from hypothesis import strategies as st
from inline_shards import run_inline
from pydantic import ValidationError

from tasks.corpus.boilerplate import BoilerplateConfig, boilerplate
from tasks.corpus.documents import document_id
from tasks.corpus.text_units import units_of, without
from tasks.runtime.manifest import Manifest
from tasks.runtime.store import Store


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("GRISTMILL_HOME", str(tmp_path / "home"))
    run_inline(monkeypatch)


def texts_of(manifest: Manifest) -> dict[str, str]:
    return {row["url"]: row["text"] for row in rows(manifest)}


def own(number: int, words: int = 60) -> str:
    rng = random.Random(number)
    return " ".join(f"{rng.choice('abcdefgh')}{rng.randrange(10**6)}" for _ in range(words))


NOTICE = "Copyright of the library society, all rights reserved everywhere."
CODE = "```python\nimport library\nlibrary.start(now=True)\nprint(library.state of the thing)\n```"
TABLE = "| name of it | what it does |\n|---|---|\n| start | starts the whole library |"


def site(host: str, count: int, *common: str) -> dict[str, str]:
    seed = 1000 * ord(host)
    return {
        f"http://{host}/{n}": "\n\n".join(["# Page", own(n + seed), *common, own(n + seed + 500)])
        for n in range(count)
    }


def test_what_more_documents_share_stays_in_the_first() -> None:
    pages = site("a", 6, NOTICE, CODE, TABLE)
    pages["http://a/5"] = pages["http://a/5"].replace(NOTICE, f"* {NOTICE.upper()} ")
    manifest = boilerplate(BoilerplateConfig(scope="host", documents=3), documents=documents(pages))
    texts = texts_of(manifest)
    assert texts["http://a/0"] == pages["http://a/0"]
    for url in list(pages)[1:]:
        whole = pages[url].split("\n\n")
        assert texts[url] == "\n\n".join([*whole[:2], whole[-1]])
    assert manifest.metrics["common_texts"] == 3 and manifest.metrics["documents_cut"] == 5
    cuts = rows(manifest, "cut-")
    assert Counter(cut["rule"] for cut in cuts) == dict.fromkeys(
        ("boilerplate-line", "boilerplate-code", "boilerplate-table"), 5
    )
    for cut in cuts:
        whole = pages[cut["url"]].split("\n")[cut["line"] - 1 :]
        assert "\n".join(whole).startswith(cut["text"])
        assert cut["before"] == document_id(pages[cut["url"]])
        assert cut["id"] == document_id(texts[cut["url"]])
    row = rows(manifest)[1]
    assert row["bytes"] == len(row["text"].encode()) and row["id"] != rows(manifest)[0]["id"]
    shown = Store.open().of(manifest).read_table("boilerplate.parquet").to_pylist()
    assert {(r["documents"], r["kind"], r["url"]) for r in shown} == {
        (6, kind, "http://a/0") for kind in ("line", "code", "table")
    }
    assert {r["text"] for r in shown} == {NOTICE, CODE, TABLE}


def test_few_documents_and_other_hosts_keep_what_they_share() -> None:
    pages = site("a", 3, NOTICE) | site("b", 3, NOTICE)
    given = documents(pages)
    by_host = boilerplate(BoilerplateConfig(scope="host", documents=3), documents=given)
    assert texts_of(by_host) == pages
    everywhere = boilerplate(BoilerplateConfig(scope="corpus", documents=3), documents=given)
    left = [url for url, text in texts_of(everywhere).items() if NOTICE in text]
    assert left == ["http://a/0"]


def test_short_lines_and_parts_of_code_stay() -> None:
    code = "```\nimport library as a name of it\n" + "{}\n```"
    pages = {
        f"http://a/{n}": f"# Page\n\n## Example\n\n{own(n)}\n\n{code.format(n)}\n\n> See also"
        for n in range(9)
    }
    manifest = boilerplate(BoilerplateConfig(scope="host", documents=2), documents=documents(pages))
    assert texts_of(manifest) == pages


def test_spans_are_cut_out_of_lines() -> None:
    passage = own(1000, 40)
    pages = {
        f"http://a/{n}": f"{own(n, 20)} {passage.title()}. {own(n + 50, 20)}\n\n```\n{passage}\n```"
        for n in range(5)
    }
    pages["http://a/9"] = f"{own(9, 20)} {' '.join(passage.split()[:30])} {own(59, 20)}"
    config = BoilerplateConfig(scope="corpus", documents=3, span_words=30)
    made = boilerplate(config, documents=documents(pages))
    texts = texts_of(made)
    spans = [cut for cut in rows(made, "cut-") if cut["rule"] == "boilerplate-span"]
    assert [cut["text"].rstrip(". ") for cut in spans[:-1]] == [passage.title()] * 4
    assert spans[-1]["url"] == "http://a/9" and spans[-1]["line"] == 1
    assert texts["http://a/0"] == pages["http://a/0"]
    for n in range(1, 5):
        # The code block is another document's first to have it whole, in the first page.
        assert texts[f"http://a/{n}"] == f"{own(n, 20)} {own(n + 50, 20)}"
    assert texts["http://a/9"] == f"{own(9, 20)} {own(59, 20)}"


def test_a_page_of_nothing_else_is_rejected_with_its_text() -> None:
    pages = site("a", 4, NOTICE) | {"http://a/none": f"# Notice\n\n{NOTICE}"}
    manifest = boilerplate(BoilerplateConfig(scope="host", documents=2), documents=documents(pages))
    assert manifest.rules == {"only-boilerplate": 1}
    (row,) = rows(manifest, "rejected-")
    assert row["text"] == pages["http://a/none"] and "http://a/none" not in urls(manifest)


def test_partitions_count_as_one_table_would(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasks.corpus.boilerplate.ENTRIES", 7)
    rng = random.Random(3)
    lines = [own(n, 6) for n in range(12)]
    pages = {f"http://a/{n}": "\n".join(rng.choices(lines, k=8)) for n in range(30)}
    manifest = boilerplate(BoilerplateConfig(scope="host", documents=9), documents=documents(pages))
    having = Counter(line for text in pages.values() for line in set(text.split("\n")))
    first = {line: next(u for u, t in pages.items() if line in t) for line in lines}
    expected = {
        url: "\n".join(line for line in text.split("\n") if having[line] <= 9 or first[line] == url)
        for url, text in pages.items()
    }
    assert texts_of(manifest) == {url: text for url, text in expected.items() if text}
    assert {row["url"] for row in rows(manifest, "rejected-")} == {
        url for url, text in expected.items() if not text
    }


markdown = st.lists(
    st.sampled_from(["```", "~~~", "a b", "", "| a |", "  ```py", "# h", "x"]), max_size=12
)


@given(markdown)
def test_units_cover_every_line_with_text_once_and_in_order(lines: list[str]) -> None:
    covered = [n for unit in units_of(lines) for n in range(unit.first, unit.last)]
    assert covered == sorted(set(covered))
    assert {n for n, line in enumerate(lines) if line.strip()} <= set(covered)
    assert without(lines, set(), ()) == re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def test_short_spans_are_refused() -> None:
    with pytest.raises(ValidationError, match=r"span_words 5 < 20"):
        BoilerplateConfig(span_words=5)


def test_what_the_stage_makes_changes_only_with_its_version() -> None:
    pages = site("a", 6, NOTICE, CODE, TABLE) | {"http://a/s": f"{own(1)} {own(500 + 97000)} end"}
    config = BoilerplateConfig(scope="host", documents=1, span_words=25)
    manifest = boilerplate(config, documents=documents(pages))
    said = "\n".join(f"{url}\n{text}" for url, text in texts_of(manifest).items())
    assert (manifest.version, document_id(said)) == (2, "08bfe0ff22a7b3f7")
