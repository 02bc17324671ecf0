"""The fast extractor: Markdown of documentation, and articles nearly as good as trafilatura's."""

import gzip
import json

import pytest
from crawled import html
from shared_data import shared
from test_page_text import f1, overlap

from tasks.corpus.charset import decode
from tasks.corpus.page_text import PageText, read_page
from tasks.corpus.resiliparse_text import read_html

PARAGRAPH = "<p>A paragraph with enough words in it to be taken for the text of the page.</p>" * 3


def read(*blocks: str, head: str = "") -> PageText:
    page = html("Title", PARAGRAPH, *blocks, PARAGRAPH, head=head)
    return read_page(page.encode(), "text/html", "http://h/", "resiliparse")


@pytest.mark.parametrize(
    ("block", "expected"),
    [
        ("<h2><code>foo(x)</code></h2>", "\n\n## foo(x)\n\n"),
        ("<p>Call <code>f(*a)</code> &lt;now&gt;.</p>", "\n\nCall `f(*a)` <now>.\n\n"),
        (
            "<div><pre><span>&gt;&gt;&gt; </span>f('''```''')\n  1</pre></div>",
            "\n\n````\n>>> f('''```''')\n  1\n````\n\n",
        ),
        ("<ul><li>one</li><li>two<ul><li>three</li></ul></li></ul>", "\n- one\n- two\n  - three\n"),
        ("<ol><li>one</li><li>two</li></ol>", "\n1. one\n2. two\n"),
        (
            "<table><tr><th>a</th><th>b|c</th></tr><tr><td>1<br>2</td><td></td></tr></table>",
            "\n\n| a | b\\|c |\n|---|---|\n| 1 2 |  |\n\n",
        ),
    ],
)
def test_structure_becomes_markdown(block: str, expected: str) -> None:
    assert expected in read(block).text


def test_a_table_that_lays_out_a_page_is_none() -> None:
    inner = f"<table><tr><td><h2>A</h2>{PARAGRAPH}</td><td><h2>B</h2>{PARAGRAPH}</td></tr></table>"
    text = read(inner).text
    assert "## A" in text and "|" not in text


def test_what_the_page_says_of_itself() -> None:
    head = (
        '<meta property="article:published_time" content="2024-05-01T10:00:00Z">'
        '<link rel="license" href="https://creativecommons.org/licenses/by/4.0/">'
    )
    page = read(head=head)
    assert (page.title, page.date, page.language) == ("Title", "2024-05-01", "en")
    assert page.licence == "https://creativecommons.org/licenses/by/4.0/"
    assert read(head='<meta name="robots" content="noindex">') == PageText(
        title="Title", language="en", noindex=True
    )


@pytest.mark.parametrize("body", [b"", b"   ", b"<html></html>", b"\x00\x00", b"<!DOCTYPE html>"])
def test_a_page_without_anything_is_empty(body: bytes) -> None:
    assert read_page(body, extractor="resiliparse").text == ""


def test_articles_are_nearly_as_good_as_trafilaturas() -> None:
    truth = json.loads(shared("extraction/ground-truth.json").read_text())
    scores = []
    for path in sorted(shared("extraction/html").glob("*.html.gz")):
        body = gzip.decompress(path.read_bytes()).replace(b"noindex", b"index")
        expected = truth[path.name.removesuffix(".html.gz")]["articleBody"]
        scores.append(overlap(read_html(decode(body)[0])[1], expected))
    assert f1(scores) > 0.91
