"""HTML to Markdown with resiliparse: eight times trafilatura's speed, for crawls of millions.

resiliparse finds the main content and lays out its text, but knows no Markdown. What it would lose
is written into the tree before: marks of headings and code, fences, tables as lines of cells.
"""

from __future__ import annotations

import re
from typing import Any

from resiliparse.extract.html2text import extract_plain_text
from resiliparse.parse.html import HTMLTree

from tasks.corpus.markdown import fenced, table, tidy
from tasks.corpus.page_about import LICENCE_HINTS, About

_BULLET = re.compile(r"^( *)• ")
_MARKS = {f"h{level}": "#" * level + " " for level in range(1, 7)}
_LARGEST_TABLE = 200_000  # characters of text; larger ones lay out a page


def read_html(html: str, url: str = "") -> tuple[About, str]:
    """What the page says of itself, and its main text as Markdown; empty when there is none.

    A page that asks not to be indexed gives no text. `url` does not matter here.
    """
    tree = HTMLTree.parse(html)
    about = _look_over(tree, any(hint in html for hint in LICENCE_HINTS))
    if about.noindex or tree.body is None:
        return about, ""
    _write_marks(tree)
    text = extract_plain_text(
        tree, main_content=True, preserve_formatting=True, alt_texts=False, comments=False
    )
    return about, tidy(text, _prose_line)


def _look_over(tree: HTMLTree, with_links: bool) -> About:
    about, document = About(), tree.document
    for element in document.get_elements_by_tag_name("html"):
        about.add_language(element.getattr("lang", "") or element.getattr("xml:lang", ""))
    for element in document.get_elements_by_tag_name("meta"):
        name = element.getattr("name", "") or element.getattr("property", "")
        about.add_meta(name, element.getattr("http-equiv", ""), element.getattr("content", ""))
    for tag in ("title", "h1"):
        for element in document.get_elements_by_tag_name(tag):
            about.add_heading(element.text)
    for element in document.get_elements_by_tag_name("time"):
        about.add_time(element.getattr("datetime", ""))
    for tag in ("a", "link", "area") if with_links else ():
        for element in document.get_elements_by_tag_name(tag):
            about.add_link(element.getattr("rel", ""), element.getattr("href", ""))
    return about


def _write_marks(tree: HTMLTree) -> None:
    body: Any = tree.body
    for code in body.get_elements_by_tag_name("pre"):
        code.text = fenced(code.text.strip("\n"))
    for code in body.get_elements_by_tag_name("code"):
        text = code.text
        if text.strip() and "`" not in text and not code.closest("pre, h1, h2, h3, h4, h5, h6"):
            code.text = f"`{' '.join(text.split())}`"
    for tag, mark in _MARKS.items():
        for heading in body.get_elements_by_tag_name(tag):
            heading.prepend(tree.create_text_node(mark))
    for grid in body.get_elements_by_tag_name("table"):
        rows = _cells(grid)
        if rows:
            lines = tree.create_element("pre")
            lines.text = table(rows)
            grid.replace_with(lines)


def _cells(grid: Any) -> list[list[str]]:
    """The cells of a table of data, row by row; none where a table only lays out a page."""
    if grid.query_selector("table, pre, h1, h2, h3, h4, ul, ol, form, p + p"):
        return []
    rows = [
        [" ".join(cell.text.split()) for cell in row.children if cell.tag in ("td", "th")]
        for row in grid.get_elements_by_tag_name("tr")
    ]
    rows = [row for row in rows if any(row)]
    if len(rows) < 2 or max(map(len, rows)) < 2 or len(grid.text) > _LARGEST_TABLE:
        return []
    return rows


def _prose_line(line: str) -> str:
    return _BULLET.sub(r"\1- ", line)
