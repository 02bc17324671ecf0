"""What a page says of itself, told from elements in document order."""

import pytest
from crawled import html

from tasks.corpus.page_about import About
from tasks.corpus.page_text import read_page

BY = "https://creativecommons.org/licenses/by/4.0/"
PARAGRAPH = "<p>A paragraph with enough words in it to be taken for the text of the page.</p>" * 5


@pytest.mark.parametrize("extractor", ["trafilatura", "resiliparse"])
@pytest.mark.parametrize(
    ("head", "block", "licence"),
    [
        (f'<link rel="license" href="{BY}">', "", BY),
        ("", f'<p>Text under <a rel="nofollow license" href="{BY}">this</a>.</p>', BY),
        ("", f'<p>Text under <a href="{BY}">this</a>.</p>', BY),
        ('<meta name="DC.rights" content="All  rights reserved">', "", "All rights reserved"),
        (
            '<meta name="dcterms.license" content="MIT">',
            f'<a href="{BY}">a picture</a>',
            "MIT",
        ),
        ("", '<p>A <a href="/license">driving license</a> is needed.</p>', ""),
        ("", '<p><a href="https://creativecommons.org/about">About</a> them.</p>', ""),
    ],
)
def test_licence_hints(extractor, head: str, block: str, licence: str) -> None:
    page = html("T", PARAGRAPH, block, PARAGRAPH, head=head)
    assert read_page(page.encode(), "text/html", "", extractor).licence == licence


@pytest.mark.parametrize("extractor", ["trafilatura", "resiliparse"])
@pytest.mark.parametrize(
    ("head", "canonical"),
    [
        ('<link rel="canonical" href="HTTP://Example.org:80/a#top">', "http://example.org/a"),
        ('<LINK REL="alternate Canonical" href="b.html?utm_source=x">', "http://h/d/b.html"),
        ('<base href="/other/"><link rel="canonical" href="b">', "http://h/other/b"),
        ('<link rel="canonical" href="mailto:a@b.org">', ""),
        ('<link rel="stylesheet" href="/canonical">', ""),
        ("", ""),
    ],
)
def test_canonical_addresses(extractor, head: str, canonical: str) -> None:
    page = html("T", PARAGRAPH, head=head).encode()
    assert read_page(page, "text/html", "http://h/d/c.html", extractor).canonical == canonical


def test_the_first_of_several_statements_counts() -> None:
    about = About()
    about.add_heading("  The\n title ")
    about.add_heading("An icon")
    about.add_language("de-AT")
    about.add_meta("", "Content-Language", "en")
    about.add_time("2021-01-01")
    about.add_meta("article:modified_time", "", "2023-03-03T00:00")
    about.add_meta("date", "", "yesterday")
    assert (about.title, about.language, about.date) == ("The title", "de", "2023-03-03")
    assert (about.licence, about.noindex, about.reserved) == ("", False, "")
