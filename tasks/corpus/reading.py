"""One document read once for all rules: its lines, its prose apart from its code.

What is wanted of every word is done by the regular expressions of C over the whole text, line ends
and all; a Python step for every word made these rules as slow as extraction itself.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import compress, repeat

from tasks.corpus.phrases import Phrases, phrases
from tasks.corpus.shingles import count_names, normal_words

_FENCE = re.compile(r"^\s*(`{3,}|~{3,})")
_HEADING = re.compile(r"^#{1,6} ")
_BULLET = re.compile(r"^[^\S\n]*(?:[-*+•‣▶●]|\d{1,3}[.)])[^\S\n]+", re.MULTILINE)
_CODE_SPAN = re.compile(r"(`+)(?!`).+?(?<!`)\1(?!`)")
_CALL_OR_PATH = re.compile(r"\w\(|\w\.\w")
_LEFT_OVER = ",.;:()[]'\"!?"
TECHNICAL = 0.1
LEAST_WORDS = 50  # of prose, for its phrases to say something


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
            begin = line.lstrip()[:1]
            if not begin:
                continue
            mark = _FENCE.match(line) if begin in "`~" else None
            if mark and (not fence or line.strip() == fence):
                fence = "" if fence else mark.group(1)
                continue
            lines.append(line)
            if fence:
                code.append(line)
            elif begin != "#" or not _HEADING.match(line):
                prose.append(line)
        return cls(text, tuple(lines), tuple(prose), tuple(code))

    @cached_property
    def word_count(self) -> int:
        """Runs of letters and digits, code and all: a signature counts by the names in it."""
        return count_names(self.text)

    @cached_property
    def lowered(self) -> str:
        return self.text.lower()

    @cached_property
    def prose_text(self) -> str:
        return "\n".join(self.prose)

    @cached_property
    def prose_words(self) -> list[str]:
        """Words of the prose without code spans, the commas between those, and bullets."""
        plain = self.prose_text
        if "`" in plain:
            plain = _CODE_SPAN.sub(" ", plain)
        words = _BULLET.sub("", plain).split()
        return list(compress(words, map(str.strip, words, repeat(_LEFT_OVER))))

    @cached_property
    def plain_text(self) -> str:
        """`prose_words` with a blank between each and the next."""
        return " ".join(self.prose_words)

    @cached_property
    def normal_words(self) -> list[str]:
        """The words of `plain_text` in lower case, letters and digits only."""
        return normal_words(self.plain_text)

    @cached_property
    def distinct_words(self) -> frozenset[str]:
        return frozenset(self.normal_words)

    @cached_property
    def paragraphs(self) -> list[str]:
        return [part.strip() for part in re.split(r"\n\s*\n", self.text) if part.strip()]

    @cached_property
    def code_share(self) -> float:
        """Share of the characters that are fenced code, code spans or headings made of code."""
        total = sum(map(len, self.lines))
        spans = 0
        if "`" in self.prose_text:
            spans = sum(len(m.group()) for m in _CODE_SPAN.finditer(self.prose_text))
        signatures = sum(
            len(line)
            for line in self.lines
            if line[0] == "#" and _HEADING.match(line) and _CALL_OR_PATH.search(line)
        )
        return (sum(map(len, self.code)) + spans + signatures) / max(total, 1)

    @cached_property
    def is_technical(self) -> bool:
        """A tenth of it is code: rules made for articles would throw documentation away."""
        return self.code_share >= TECHNICAL

    @cached_property
    def bullet_lines(self) -> int:
        return sum(bool(_BULLET.match(line)) for line in self.lines)


@dataclass(frozen=True)
class Readings:
    """Several documents, and what is cheaper to find out of all of them together."""

    each: tuple[Reading, ...]

    @classmethod
    def of(cls, texts: Iterable[str]) -> Readings:
        return cls(tuple(map(Reading.of, texts)))

    @cached_property
    def phrases(self) -> list[Phrases | None]:
        """Of the prose; None where there is little of it beside the code, or little at all."""
        judged = [
            not reading.is_technical and len(reading.prose_words) >= LEAST_WORDS
            for reading in self.each
        ]
        found = iter(phrases([" ".join(one.normal_words) for one in compress(self.each, judged)]))
        return [next(found) if is_judged else None for is_judged in judged]
