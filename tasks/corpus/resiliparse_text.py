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
from tasks.corpus.page_about import META_NAMES, About

_ITEM = re.compile(r"^ {2}( *)(?:•|(\d+\.)) ")
_AFTER_TABLE = re.compile(r"^(\|.*\|)\n(?=[^|\n])", re.MULTILINE)
_LARGEST_TABLE = 200_000  # characters of text; larger ones lay out a page
# Every element handed to Python costs 4 µs; the parser finds those that matter in C.
_NAMES = [f'[{named}="{name}" i]' for named in ("name", "property") for name in META_NAMES]
_METAS = f"meta:is({', '.join(_NAMES)}, [http-equiv=content-language i])"
_LINKS = 'link[rel~="canonical" i], [rel*=icense], [href*="creativecommons.org/"]'
_MENUS = "nav, header, footer, aside, li"  # a list in one of these is no content by itself
_BLOCKS = "pre, h1, h2, h3, h4, h5, h6"  # code in one of these needs no marks of its own
_CODE = ", ".join(f"{name}:not(:is({_BLOCKS}) {name})" for name in ("code", "tt"))
_MARKED = f"{_BLOCKS}, table, ul:not(:is({_MENUS}) ul), {_CODE}"


def read_html(html: str, url: str = "") -> tuple[About, str]:
    """What the page says of itself, and its main text as Markdown; empty when there is none.

    A page that asks not to be indexed gives no text. `url` does not matter here.
    """
    tree = HTMLTree.parse(html)
    about = _look_over(tree)
    if about.noindex or tree.body is None:
        return about, ""
    _write_marks(tree)
    text = extract_plain_text(
        tree, main_content=True, preserve_formatting=True, alt_texts=False, comments=False
    )
    return about, tidy(_AFTER_TABLE.sub(r"\1\n\n", text), _prose_line)


def _look_over(tree: HTMLTree) -> About:
    about = About()
    document: Any = tree.document
    root: Any = document.document_element
    about.add_language(root.getattr("lang", "") or root.getattr("xml:lang", ""))
    for element in _all(document, _METAS):
        name = element.getattr("name", "") or element.getattr("property", "")
        about.add_meta(name, element.getattr("http-equiv", ""), element.getattr("content", ""))
    about.add_heading(tree.title or "")
    if not about.title and (heading := document.query_selector("h1")):
        about.add_heading(heading.text)
    if not about.date and (moment := document.query_selector("time")):
        about.add_time(moment.getattr("datetime", ""))
    if base := document.query_selector("base[href]"):
        about.add_base(base.getattr("href", ""))
    for element in _all(document, _LINKS):
        about.add_link(element.getattr("rel", ""), element.getattr("href", ""))
    return about


def _all(node: Any, selector: str) -> list[Any]:
    """As a list: indexing or iterating such a collection makes the whole list for every element."""
    found: list[Any] = node.query_selector_all(selector).values()
    return found


def _write_marks(tree: HTMLTree) -> None:
    found: dict[str, list[Any]] = {}
    for element in _all(tree.body, _MARKED):
        found.setdefault(element.tag, []).append(element)
    for code in found.get("pre", ()):
        code.text = fenced(code.text.strip("\n"))
    for code in (*found.get("code", ()), *found.get("tt", ())):
        text = code.text or ""
        if text.strip() and "`" not in text:
            code.text = f"`{' '.join(text.split())}`"
    for level in range(1, 7):
        if headings := found.get(f"h{level}"):
            mark: Any = tree.create_text_node("#" * level + " ")
            for heading in headings:
                heading.prepend(mark.clone_node())
    for listed in found.get("ul", ()):
        if _is_content(listed):
            box: Any = tree.create_element("div")
            listed.replace_with(box)
            box.append(listed)
    for grid in found.get("table", ()):
        rows = _cells(grid)
        if rows:
            lines: Any = tree.create_element("pre")
            lines.text = table(rows)
            grid.replace_with(lines)


def _is_content(listed: Any) -> bool:
    """Whether a list outside menus is mostly no links. resiliparse drops every list that stands
    bare beside paragraphs, as menus do; one in a box of its own it keeps.
    """
    linked = sum(len(link.text) for link in _all(listed, "a"))
    return linked < 0.5 * len(" ".join(listed.text.split()))


def _cells(grid: Any) -> list[list[str]]:
    """The cells of a table of data, row by row; none where a table only lays out a page."""
    if grid.query_selector("table, pre, h1, h2, h3, h4, ul, ol, form, p + p"):
        return []
    rows = [
        [cell for cell in row.children.values() if cell.tag in ("td", "th")]
        for row in _all(grid, "tr")
    ]
    rows = [[" ".join(cell.inner_text.split()) for cell in row] for row in rows]
    rows = [row for row in rows if any(row)]
    if len(rows) < 2 or max(map(len, rows)) < 2 or len(grid.text) > _LARGEST_TABLE:
        return []
    return rows


def _prose_line(line: str) -> str:
    item = _ITEM.match(line) if line.startswith("  ") else None
    return f"{item[1]}{item[2] or '-'} {line[item.end() :]}" if item else line
