"""The language reference as the interpreter carries it for `help("with")`: plain text to HTML.

`pydoc_data.topics` is reStructuredText already rendered as text: headings are underlined, what
belongs to a line is indented below it, code stands in double quotes.
"""

from __future__ import annotations

import html
import importlib
import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass

from tasks.corpus.docstring_html import inline_html

_HEADINGS = {"*": "h1", "=": "h2", "-": "h3", "~": "h4", "^": "h4"}
_RULER = re.compile(r"([*=\-~^])\1{2,}$")
_ITEM = re.compile(r"(?:[*+-]|\d{1,2}\.)\s+")
_ADMONITION = re.compile(r"(?:Note|Warning|See also|Changed in|New in|Deprecated)\b[^.]*:$")
_QUOTED = re.compile(r'"([^"\n]+)"')
_BOLD = re.compile(r"\*\*([^*\n]+)\*\*")


@dataclass(frozen=True)
class Topic:
    """`name` is what one gives to `help`; `body` is HTML with a heading of level 1 on top."""

    name: str
    title: str
    body: str


def read_topics() -> list[Topic]:
    """Every topic of this interpreter, sorted by name; none where it was built without them."""
    try:
        texts: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ImportError:
        return []
    return [Topic(name, _title(texts[name]), topic_html(texts[name])) for name in sorted(texts)]


def topic_html(text: str) -> str:
    """A topic's text as block elements."""
    return "\n".join(_blocks(text.strip("\n").split("\n")))


def _title(text: str) -> str:
    return _QUOTED.sub(r"\1", text.strip().split("\n", 1)[0])


def _blocks(lines: list[str]) -> Iterator[str]:
    position, before = 0, ""
    while position < len(lines):
        line = lines[position]
        if not line.strip():
            position += 1
        elif line.startswith(" "):
            block, position = _indented(lines, position)
            if _is_code(block, before):
                yield f"<pre><code>{html.escape(block, quote=False)}</code></pre>"
            else:
                yield from _blocks(block.split("\n"))
        elif _ITEM.match(line):
            items, position = _items(lines, position)
            inner = "\n".join(f"<li>{item}</li>" for item in items)
            yield f"<ul>\n{inner}\n</ul>"
        else:
            end = position
            while end < len(lines) and lines[end].strip() and not lines[end].startswith(" "):
                end += 1
            below = next((line for line in lines[end:] if line.strip()), "")
            before = lines[end - 1]
            described = below.startswith(" ") and not before.endswith(":")
            yield from _paragraph(lines[position:end], described)
            position = end


def _indented(lines: list[str], start: int) -> tuple[str, int]:
    end = start
    while end < len(lines) and (not lines[end].strip() or lines[end].startswith(" ")):
        end += 1
    return textwrap.dedent("\n".join(lines[start:end])).strip("\n"), end


def _items(lines: list[str], start: int) -> tuple[list[str], int]:
    """A list: what is indented below an item's first line belongs to it."""
    items = []
    position = start
    while position < len(lines) and (match := _ITEM.match(lines[position])):
        rest, end = _indented(lines, position + 1)
        first = lines[position][match.end() :]
        joined = f"{first}\n{rest}" if lines[position + 1 : position + 2] != [""] else first
        if joined == first and rest:
            joined = f"{first}\n\n{rest}"
        blocks = list(_blocks(joined.split("\n")))
        if blocks and blocks[0].startswith("<p>"):
            blocks[0] = blocks[0].removeprefix("<p>").removesuffix("</p>")
        items.append("\n".join(blocks))
        position = end
    return items, position


def _is_code(block: str, before: str) -> bool:
    if "::=" in block or block.startswith((">>>", "+-")):
        return True
    return before.endswith(":") and not _ADMONITION.match(before) and not _ITEM.match(block)


def _paragraph(lines: list[str], described: bool) -> Iterator[str]:
    """described: what is indented below tells of these lines, so they are a signature."""
    if len(lines) >= 2 and (ruler := _RULER.match(lines[1])):
        tag = _HEADINGS[ruler[1]]
        yield f"<{tag}>{_inline(lines[0])}</{tag}>"
        lines = lines[2:]
    if lines and (lines[0].startswith("+-") or any("::=" in line for line in lines)):
        text = "\n".join(lines)
        yield f"<pre><code>{html.escape(text, quote=False)}</code></pre>"
    elif lines:
        line = " ".join(" ".join(lines).split())
        if described:
            yield f"<p><code>{html.escape(line, quote=False)}</code></p>"
        else:
            yield f"<p>{_inline(line)}</p>"


def _inline(text: str) -> str:
    return _BOLD.sub(r"<strong>\1</strong>", inline_html(_QUOTED.sub(r"``\1``", text)))
