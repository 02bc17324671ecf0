"""What a site or a page says against being mined for text: honoured unless a person says otherwise.

Four ways in use:
 - robots.txt rules for the crawlers of AI companies. A site that shuts out several of them by name
   does not want its text in a model, whatever our own crawler is called;
 - the TDM Reservation Protocol (W3C community group report, 2024): the header `tdm-reservation: 1`
   and the meta element of that name;
 - `noai` in X-Robots-Tag or a robots meta element;
 - `Content-Signal: ai-train=no` and `Content-Usage: train-ai=n`, lines of robots.txt (IETF AIPREF,
   drafts) and headers of the latter name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

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
SEVERAL = 2  # shut out by name; one alone may be about that company
NO_AI = frozenset({"noai"})
_SIGNAL = re.compile(
    r"^\s*(?:content-signal\s*:.*\bai-train\s*=\s*no\b|content-usage\s*:.*\btrain-ai\s*=\s*n\b)",
    re.IGNORECASE | re.MULTILINE,
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
        words = {word.strip().lower() for word in line.rpartition(":")[2].split(",")}
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
