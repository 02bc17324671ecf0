"""Markdown as the corpus holds it: fences apart from their surroundings, no runs of blank lines."""

from __future__ import annotations

import re
from collections.abc import Callable

_FENCE = re.compile(r"^(`{3,})", re.MULTILINE)
_BLANKS = re.compile(r"\n{3,}")
_BACKTICKS = re.compile(r"`{3,}")


def tidy(text: str, prose_line: Callable[[str], str]) -> str:
    """Every line outside fenced code through `prose_line`; code is left as it is."""
    lines: list[str] = []
    fence = ""
    for line in text.split("\n"):
        mark = _FENCE.match(line) if line.startswith("```") else None
        if fence:
            lines.append(line.rstrip())
            if mark and line.strip() == fence:
                fence = ""
                lines.append("")
        elif mark and "`" not in line[mark.end() :]:
            fence = mark.group(1)
            lines += ["", line.rstrip()]
        else:
            lines.append(prose_line(line.rstrip()))
    return _BLANKS.sub("\n\n", "\n".join(lines)).strip()


def fenced(code: str) -> str:
    """A fenced block; its fence is longer than any inside."""
    longest = max(map(len, _BACKTICKS.findall(code)), default=2)
    fence = "`" * (longest + 1)
    return f"{fence}\n{code}\n{fence}"


def table(rows: list[list[str]]) -> str:
    """Rows of cells as a table whose first row is its head."""
    width = max(map(len, rows))
    padded = [[cell.replace("|", "\\|") for cell in row] + [""] * width for row in rows]
    lines = [f"| {' | '.join(row[:width])} |" for row in padded]
    return "\n".join([lines[0], "|" + "---|" * width, *lines[1:]])
