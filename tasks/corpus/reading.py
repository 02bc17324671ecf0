"""One document read once for all rules: its lines, its prose apart from its code."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property

_FENCE = re.compile(r"^\s*(`{3,}|~{3,})")
_HEADING = re.compile(r"^#{1,6} ")
_BULLET = re.compile(r"^\s*(?:[-*+•‣▶●]|\d{1,3}[.)])\s+")
_CODE_SPAN = re.compile(r"(`+)(?!`).+?(?<!`)\1(?!`)")
_WORD = re.compile(r"\S+")
_NAME = re.compile(r"[^\W_]+")
_LEFT_OVER = re.compile(r"[,.;:()\[\]'\"!?]+")


@dataclass(frozen=True)
class Reading:
    """A document as rules see it. `prose` and `code` are lines; headings are in neither."""

    text: str
    lines: tuple[str, ...]  # that are not blank, fences left out
    prose: tuple[str, ...]
    code: tuple[str, ...]

    @classmethod
    def of(cls, text: str) -> Reading:
        lines, prose, code = [], [], []
        fence = ""
        for line in text.split("\n"):
            if not line.strip():
                continue
            mark = _FENCE.match(line)
            if mark and (not fence or line.strip() == fence):
                fence = "" if fence else mark.group(1)
                continue
            lines.append(line)
            if fence:
                code.append(line)
            elif not _HEADING.match(line):
                prose.append(line)
        return cls(text, tuple(lines), tuple(prose), tuple(code))

    @cached_property
    def names(self) -> list[str]:
        """Runs of letters and digits, code and all: a signature counts by the names in it."""
        return _NAME.findall(self.text)

    @cached_property
    def prose_words(self) -> list[str]:
        """Words of the prose without code spans, the commas between those, and bullets."""
        plain = (_BULLET.sub("", _CODE_SPAN.sub(" ", line)) for line in self.prose)
        words = (word for line in plain for word in _WORD.findall(line))
        return [word for word in words if not _LEFT_OVER.fullmatch(word)]

    @cached_property
    def paragraphs(self) -> list[str]:
        return [part.strip() for part in re.split(r"\n\s*\n", self.text) if part.strip()]

    @cached_property
    def code_share(self) -> float:
        """Share of the characters that are fenced code, code spans or headings made of code."""
        total = sum(map(len, self.lines))
        spans = sum(len(m.group()) for line in self.prose for m in _CODE_SPAN.finditer(line))
        signatures = sum(
            len(line)
            for line in self.lines
            if _HEADING.match(line) and re.search(r"\w\(|\w\.\w", line)
        )
        return (sum(map(len, self.code)) + spans + signatures) / max(total, 1)

    @property
    def is_technical(self) -> bool:
        """A tenth of it is code: rules made for articles would throw documentation away."""
        return self.code_share >= 0.1

    @cached_property
    def bullet_lines(self) -> int:
        return sum(bool(_BULLET.match(line)) for line in self.lines)
