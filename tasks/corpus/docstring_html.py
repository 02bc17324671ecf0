"""Docstrings as HTML: paragraphs, lists, literal blocks and inline code, in their own order.

Docstrings are loosely reStructuredText. Paragraphs lose their hard line breaks, doctests and
indented blocks keep theirs, names with underscores become `<code>` (extractors that write Markdown
would otherwise escape them).
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterator

_BULLET = re.compile(r"(?:[-*+o•]|\(?\d{1,2}[.)])\s+(?=\S)")
_RULER = re.compile(r"[=~\-_^*#]{3,}$")
_TABLE_ROW = re.compile(r"\S(?: --?> |\s+--\s|\s{3,})\S")
_INLINE = re.compile(
    r"(?::[\w:]+:)?``(?P<literal>[^`]+(?:`[^`]+)*?)``"
    r"|(?::[\w:]+:)?`(?P<name>[^`'\n]{1,80})[`']"
    r"|(?<![\w*\"'(=/])\*(?P<emphasis>[A-Za-z_][\w ]{0,40})\*(?![\w*])"
    r"|(?P<code>(?<![\w/<:])(?:\*{1,2}(?=[A-Za-z_]))?[\w.]*_[\w.]*\w(?:\(\))?)"
)


def inline_html(text: str) -> str:
    """One line of docstring text, escaped, with code and emphasis marked up."""
    parts, end = [], 0
    for match in _INLINE.finditer(text):
        parts.append(html.escape(text[end : match.start()], quote=False))
        kind = str(match.lastgroup)
        tag = "em" if kind == "emphasis" else "code"
        parts.append(f"<{tag}>{html.escape(match.group(kind), quote=False)}</{tag}>")
        end = match.end()
    parts.append(html.escape(text[end:], quote=False))
    return "".join(parts)


def block_html(doc: str) -> str:
    """A cleaned docstring as block elements; empty for an empty docstring."""
    return "\n".join(_blocks(doc.expandtabs(8).split("\n")))


def _blocks(lines: list[str]) -> Iterator[str]:
    position = 0
    while position < len(lines):
        line = lines[position]
        if not line.strip():
            position += 1
        elif line.startswith((" ", ">>>")):
            block, position = _literal(lines, position)
            yield _pre(block)
        elif _BULLET.match(line):
            block, position = _paragraph(lines, position)
            yield _list(block)
        else:
            block, position = _paragraph(lines, position)
            yield from _prose(block)


def _literal(lines: list[str], start: int) -> tuple[list[str], int]:
    """An indented block up to the next unindented line, or a doctest up to the next blank line."""
    doctest = lines[start].startswith(">>>")
    end = start
    while end < len(lines):
        blank = not lines[end].strip()
        if doctest and blank:
            following = next((line for line in lines[end:] if line.strip()), "")
            if not following.startswith(">>>"):
                break
        elif not doctest and not blank and not lines[end].startswith(" "):
            break
        end += 1
    return lines[start:end], end


def _paragraph(lines: list[str], start: int) -> tuple[list[str], int]:
    end = start
    while end < len(lines) and lines[end].strip() and not lines[end].startswith(">>>"):
        end += 1
    return lines[start:end], end


def _prose(block: list[str]) -> Iterator[str]:
    if len(block) >= 2 and _RULER.match(block[1].strip()):
        yield f"<h4>{inline_html(block[0].strip())}</h4>"
        block = block[2:]
    block = [line for line in block if not _RULER.match(line.strip())]
    if not block:
        return
    indented = [line.startswith(" ") for line in block]
    if len(block) > 1 and sum(bool(_TABLE_ROW.search(line)) for line in block) > len(block) / 2:
        # "count(start=0, step=1) --> start, start+step, …": a table drawn with arrows.
        yield _pre(block)
        return
    if not any(indented):
        bullets = next((i for i, line in enumerate(block) if _BULLET.match(line)), None)
        if bullets is not None and block[bullets][0] in "-*":
            yield _joined(block[:bullets])
            yield _list(block[bullets:])
        else:
            yield _joined(block)
    elif " -- " in block[0] and all(indented[1:]):
        yield _joined(block)
    elif block[0].rstrip().endswith(":") and all(indented[1:]):
        yield _joined(block[:1])
        yield _pre(block[1:])
    else:
        yield _pre(block)


def _joined(lines: list[str]) -> str:
    text = re.sub(r"::$", ":", " ".join(" ".join(lines).split()))
    return f"<p>{inline_html(text)}</p>"


def _list(block: list[str]) -> str:
    items: list[str] = []
    for line in block:
        match = _BULLET.match(line)
        if match or not items:
            items.append(line[match.end() :] if match else line)
        else:
            items[-1] += " " + line.strip()
    body = "\n".join(f"<li>{inline_html(item.strip())}</li>" for item in items)
    return f"<ul>\n{body}\n</ul>"


def _pre(block: list[str]) -> str:
    while block and not block[-1].strip():
        block = block[:-1]
    shift = min(len(line) - len(line.lstrip()) for line in block if line.strip())
    text = "\n".join(line[shift:].rstrip() for line in block)
    return f"<pre><code>{html.escape(text, quote=False)}</code></pre>"
