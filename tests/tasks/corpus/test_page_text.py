"""HTML to Markdown: code, signatures, headings and lists survive, renderer's marks do not."""

import gzip
import json
import re
from collections import Counter
from typing import Literal

import pytest
from crawled import html
from hypothesis import given
from hypothesis import strategies as st
from shared_data import shared
from trafilatura import extract
from trafilatura.utils import load_html

from tasks.corpus.charset import decode
from tasks.corpus.page_text import read_page
from tasks.corpus.trafilatura_text import main_text, tidy_markdown

PAGE = html(
    "textwrap",
    "<p>Text wrapping and filling, for <code>*args</code> and \\*args alike [see below], "
    "<b>bold <i>words</i></b> of 10<sup>3</sup>.</p>",
    '<section id="share_dialog"><h2><code>textwrap.share_dialog(text, *, tabs_to=8)</code></h2>',
    "<p>Remove any common leading whitespace from every line in <code>text</code>.</p>",
    "<pre><code>&gt;&gt;&gt; dedent('  a\\n  b')\n'a\\nb'\n\n&gt;&gt;&gt; x = [1 * 2]</code></pre>",
    "</section>",
    "<h2><code>textwrap.fill(text, width=70)</code></h2>",
    "<p>Reformat the single paragraph in 'text' to fit in lines of no more than 'width' columns, "
    "and return a new string containing the entire wrapped paragraph.</p>",
    "<ul><li>first point of some length</li><li>second point of some length</li></ul>",
    "<table><tr><th>name</th><th>use</th></tr><tr><td>wrap</td><td>lines</td></tr></table>",
    head='<meta property="article:published_time" content="2023-04-05T06:07:08Z">',
)


def test_documentation_keeps_its_structure() -> None:
    page = read_page(PAGE.encode())
    assert page.title == "textwrap"
    assert page.date == "2023-04-05"
    assert page.language == "en"
    lines = page.text.split("\n")
    assert lines[0] == "# textwrap"
    assert "## textwrap.share_dialog(text, *, tabs_to=8)" in lines
    assert "## textwrap.fill(text, width=70)" in lines
    assert ">>> dedent('  a\\n  b')\n'a\\nb'\n>>> x = [1 * 2]" in page.text
    assert "for `*args` and" in page.text
    assert "[see below], bold words of 103." in page.text
    assert "- first point of some length" in lines
    assert re.search(r"\| *wrap *\| *lines *\|", page.text)


def test_noindex_pages_give_no_text() -> None:
    for content in ("noindex", "NOINDEX, follow", "none"):
        head = f'<meta name="Robots" content="{content}">'
        page = read_page(html("x", "<p>" + "secret words " * 50 + "</p>", head=head).encode())
        assert page.noindex
        assert page.text == ""
    assert not read_page(html("x", head='<meta name="robots" content="all">').encode()).noindex


def test_tables_become_markdown_and_a_bar_stays_in_its_cell() -> None:
    rows = "<tr><th>Name</th><th>Use</th></tr><tr><td>a | b</td><td>either</td></tr>"
    words = "<p>A paragraph with enough words in it to be taken for the text of the page.</p>"
    body = html("T", words * 5, f"<table>{rows}</table>", words * 5)
    text = read_page(body.encode()).text
    assert "| Name | Use |\n|---|---|\n| a \\| b | either |" in text


def nested(depth: int) -> bytes:
    before, deep, after = (
        f"<p>The {n} words of this page are told here for everybody to read.</p>"
        for n in ("first", "deepest", "last")
    )
    return html("T", before, "<div>" * depth, deep, "</div>" * depth, after).encode()


@pytest.mark.parametrize("extractor", ["trafilatura", "resiliparse"])
@pytest.mark.parametrize("depth", [200, 300, 2000])
def test_text_within_and_behind_deep_nesting_is_read(
    depth: int, extractor: Literal["trafilatura", "resiliparse"]
) -> None:
    page = read_page(nested(depth), extractor=extractor)
    for word in ("first", "deepest", "last"):
        assert f"The {word} words of this page" in page.text
    assert page.mended == ()


def test_a_page_nested_deeper_than_the_parser_follows_is_counted() -> None:
    page = read_page(nested(5000))
    assert "The first words" in page.text and "The last words" not in page.text
    assert page.mended == ("nested-too-deep",)
    assert read_page(nested(5)).mended == ()  # of the page before nothing is left


def test_plain_text_passes_through() -> None:
    assert read_page(b"# a\r\n\r\n<b>\\*", "text/plain; charset=utf-8").text == "# a\n\n<b>\\*"


def test_a_page_without_anything_is_empty_and_no_error() -> None:
    for body in (b"", b"   ", b"<html></html>", b"\x00\x00", b"<!DOCTYPE html>"):
        assert read_page(body).text == ""


def test_fences_stand_apart_and_their_inside_is_left_alone() -> None:
    text = "a \\* b\n```\n\\*kept\\*\n\n\n\n## no `heading`\n```\n## `f(x)`\n### `a` and `b`"
    assert tidy_markdown(text) == (
        "a * b\n\n```\n\\*kept\\*\n\n## no `heading`\n```\n\n## f(x)\n### `a` and `b`"
    )


def test_emphasis_goes_and_operators_stay() -> None:
    text = "**bold**, *it* and ***both***: 2 * 3 * 4, \\*args, \\*\\*kwargs, `**not** *this*`"
    assert tidy_markdown(text) == "bold, it and both: 2 * 3 * 4, *args, **kwargs, `**not** *this*`"


@given(st.text(alphabet="ab \n`\\*#-_.", max_size=200))
def test_tidying_loses_no_letters(text: str) -> None:
    tidy = tidy_markdown(text)
    assert re.findall("[ab]", tidy) == re.findall("[ab]", text)
    assert "\n\n\n" not in tidy


@pytest.mark.slow
def test_article_text_is_as_good_as_bare_trafilatura() -> None:
    truth = json.loads(shared("extraction/ground-truth.json").read_text())
    ours, theirs, pages = [], [], 0
    for path in sorted(shared("extraction/html").glob("*.html.gz")):
        body = gzip.decompress(path.read_bytes())
        expected = truth[path.name.removesuffix(".html.gz")]["articleBody"]
        ours.append(overlap(main_text(load_html(decode(body)[0])), expected))
        theirs.append(overlap(extract(body, fast=True, include_comments=False) or "", expected))
        pages += 1
    assert pages == 91
    assert f1(ours) >= f1(theirs) - 0.002, (f1(ours), f1(theirs))


def overlap(predicted: str, expected: str) -> tuple[float, float, float]:
    """The benchmark's own measure: 4-word shingles as a multiset; (tp, fp, fn), normalised."""
    found, wanted = shingles(predicted), shingles(expected)
    tp = sum((found & wanted).values())
    fp, fn = sum((found - wanted).values()), sum((wanted - found).values())
    total = max(tp + fp + fn, 1)
    return tp / total, fp / total, fn / total


def shingles(text: str) -> Counter[tuple[str, ...]]:
    words = re.findall(r"\w+", text)
    return Counter(tuple(words[i : i + 4]) for i in range(max(len(words) - 3, 1)))


def f1(scores: list[tuple[float, float, float]]) -> float:
    precision = [tp / (tp + fp) if tp + fp else 0.0 for tp, fp, _ in scores]
    recall = [tp / (tp + fn) if tp + fn else 0.0 for tp, _, fn in scores]
    p, r = sum(precision) / len(scores), sum(recall) / len(scores)
    return 2 * p * r / (p + r)
