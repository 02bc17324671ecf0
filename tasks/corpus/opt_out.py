"""What a site or a page says against being mined for text: honoured unless a person says otherwise.

Four ways in use:
 - robots.txt rules for the crawlers of AI companies. A site that shuts out several of them by name
   does not want its text in a model, whatever our own crawler is called;
 - the TDM Reservation Protocol (W3C community group report, 2024): the header `tdm-reservation: 1`,
   the meta element of that name, and `/.well-known/tdmrep.json`, whose longest matching location
   decides, patterns being those of robots.txt;
 - `noai` in X-Robots-Tag or a robots meta element;
 - `Content-Signal: ai-train=no` and `Content-Usage: train-ai=n`, lines of robots.txt (IETF AIPREF,
   drafts) and headers of the latter name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

# Product tokens whose only stated purpose is to gather text for language models.
AI_AGENTS = (
    "GPTBot",
    "ClaudeBot",
    "anthropic-ai",
    "Google-Extended",
    "Applebot-Extended",
    "CCBot",
    "Bytespider",
    "meta-externalagent",
    "cohere-training-data-crawler",
    "AI2Bot",
    "Omgilibot",
)
OPT_OUT = "opts out of text mining"
MAX_LOCATIONS = 10_000  # of a tdmrep.json; each page is asked of all
SEVERAL = 2  # shut out by name; one alone may be about that company
NO_AI = frozenset({"noai"})
_SIGNAL = re.compile(
    r"^\s*(?:content-signal\s*:.*\bai-train\s*=\s*no\b|content-usage\s*:.*\btrain-ai\s*=\s*n\b)",
    re.IGNORECASE | re.MULTILINE,
)
_ADDRESSEE = re.compile(
    r"\s*(?!(?:unavailable_after|max-snippet|max-image-preview|max-video-preview)\b)[\w-]+\s*:",
    re.I,
)
_AGENT_LINE = re.compile(r"^\s*user-agent\s*:\s*([^#\r\n]+?)\s*(?:#.*)?$", re.I | re.M)


def named_agents(robots: str) -> list[str]:
    """Which of AI_AGENTS a robots.txt speaks of by name, in the order of that list."""
    known = {match.group(1).lower() for match in _AGENT_LINE.finditer(robots)}
    return [agent for agent in AI_AGENTS if agent.lower() in known]


def reserves(robots: str) -> str:
    """The line by which a robots.txt reserves training for all of the site, or empty."""
    found = _SIGNAL.search(robots)
    return " ".join(found.group().split())[:100] if found else ""


def headers_reserve(headers: Mapping[str, str], directives: Iterable[str]) -> str:
    """The header of one answer (lower-case names) that reserves text mining, or empty."""
    if headers.get("tdm-reservation", "").strip() == "1":
        return "tdm-reservation: 1"
    if re.search(r"\btrain-ai\s*=\s*n\b", headers.get("content-usage", ""), re.IGNORECASE):
        return "content-usage: train-ai=n"
    for line in directives:
        # `otherbot: noai` counts as well: whom it is said to is not what the text is taken for. A
        # value such as `max-snippet:50` keeps its colon, and a date its commas: neither is noai.
        words = {word.strip().lower() for word in _ADDRESSEE.sub("", line).split(",")}
        if words & NO_AI:
            return "x-robots-tag: noai"
    return ""


def meta_reserves(name: str, content: str) -> str:
    """What a meta element of a page reserves, or empty. `name` in lower case."""
    if name == "tdm-reservation" and content.strip() == "1":
        return "meta tdm-reservation"
    if name == "robots" and {word.strip().lower() for word in content.split(",")} & NO_AI:
        return "meta noai"
    return ""


@dataclass(frozen=True)
class Location:
    """A location of a tdmrep.json. No regular expression: there may be thousands, and the stars of
    somebody else's pattern could make one take for ever.
    """

    pattern: str
    reserved: bool

    @cached_property
    def _parts(self) -> list[str]:
        return re.split(r"\*+", self.pattern.removesuffix("$"))

    def matches(self, path: str) -> bool:
        """As rules of robots.txt do (RFC 9309, section 2.2.3): the parts between stars stand in
        `path` in this order, the first at its beginning, with `$` the last at its end.
        """
        first, *others = self._parts
        if not path.startswith(first):
            return False
        at = len(first)
        last = others.pop() if others and self.pattern.endswith("$") else None
        for part in others:
            at = path.find(part, at)
            if at < 0:
                return False
            at += len(part)
        if last is not None:
            return path.endswith(last, at)
        return at == len(path) or not self.pattern.endswith("$")


def tdm_locations(text: str) -> list[Location]:
    """The locations of a tdmrep.json in the order in which they decide: the longest first, of
    equally long ones the last. Nothing where it is none.
    """
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return []
    rules = found if isinstance(found, list) else [found]
    locations: dict[str, Location] = {}
    for rule in reversed(rules):
        if isinstance(rule, dict):
            pattern = str(rule.get("location", "/"))
            reserved = str(rule.get("tdm-reservation", 0)) == "1"
            locations.setdefault(pattern, Location(pattern, reserved))
    return sorted(locations.values(), key=lambda location: -len(location.pattern))


def tdm_reserves(locations: Iterable[Location], path: str) -> str:
    """The location of a tdmrep.json that reserves `path` (query included), or empty."""
    for location in locations:
        if location.matches(path):
            return f"tdmrep.json reserves {location.pattern}" if location.reserved else ""
    return ""
