"""Real pages beside the checkout (`../shared/data`), replicated and perturbed to any amount."""

from __future__ import annotations

import gzip
import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

EXTRACTION = Path(__file__).resolve().parents[2] / "shared" / "data" / "extraction"
_WORD = re.compile(r"\b[a-z]{4,}\b")
_MARKUP = re.compile(r"(<(script|style)\b.*?</\2>|<[^>]*>)", re.DOTALL | re.IGNORECASE)


@dataclass(frozen=True)
class Sample:
    """A real page: its bytes as HTML, the text of its article, its address."""

    html: bytes
    article: str
    url: str


def samples() -> list[Sample]:
    """The pages of the article extraction benchmark, in the order of their names."""
    truth = EXTRACTION / "ground-truth.json"
    if not truth.exists():
        raise SystemExit(f"{EXTRACTION} is missing: this benchmark needs its pages")
    return [
        Sample(
            gzip.decompress((EXTRACTION / "html" / f"{name}.html.gz").read_bytes()),
            item["articleBody"],
            item.get("url") or f"http://sample.example/{name}",
        )
        for name, item in sorted(json.loads(truth.read_text()).items())
    ]


def vocabulary(pages: list[Sample]) -> list[str]:
    """Lower-case words of four letters or more of the articles, as often as they stand there."""
    return [word for page in pages for word in _WORD.findall(page.article)]


def perturbed(text: str, rng: random.Random, share: float, words: list[str]) -> str:
    """Every word replaced with probability `share` by one of `words`; the rest stays."""
    return _WORD.sub(lambda m: rng.choice(words) if rng.random() < share else m.group(), text)


def articles(pages: list[Sample], seed: int = 0) -> Iterator[str]:
    """Article texts without end; no two are near duplicates of each other.

    Beyond the first round each is a real one with every second of its replaceable words another:
    two such texts share few runs of five words. Articles that have too few such words (other
    scripts, tables) stand here once.
    """
    rng, words = random.Random(seed), vocabulary(pages)
    texts = [page.article for page in pages]
    yield from texts
    plain = [t for t in texts if len(_WORD.findall(t)) >= 0.4 * len(re.findall(r"[^\W_]+", t))]
    while True:
        for text in plain:
            yield perturbed(text, rng, 0.5, words)


def pages_without_end(pages: list[Sample], seed: int = 0) -> Iterator[tuple[str, bytes]]:
    """(address, HTML) without end: real pages, then the same with other words between tags."""
    rng, words = random.Random(seed), vocabulary(pages)
    parts = [
        _MARKUP.split(page.html.decode("utf-8", "replace")) if page.html else [] for page in pages
    ]
    number = 0
    while True:
        for page, split in zip(pages, parts, strict=True):
            address = f"http://site{number % 7}.example/{number}"
            if number < len(pages):
                yield address, page.html
            else:
                # re.split with two groups: text, markup, name of the element, text, …
                kept = [
                    perturbed(part, rng, 0.3, words) if place % 3 == 0 else part
                    for place, part in enumerate(split)
                    if place % 3 != 2 and part
                ]
                yield address, "".join(kept).encode()
            number += 1
