"""Addresses nobody wants text from: by pattern, by domain, by word.

As RefinedWeb filters before it reads (Penedo et al. 2023, arXiv:2306.01116, appendix G.1): lists of
domains, and words that stand in an address as a whole, so that `sex` does not match Essex. The
lists are the configuration's; none is built in.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from urllib.parse import urlsplit

from tasks.corpus.documents import Removal

_BETWEEN = re.compile(r"[^a-z0-9]+")


def by_address(
    patterns: Iterable[str], hosts: Iterable[str], words: Iterable[str]
) -> Callable[[str], Removal | None]:
    """A judge of addresses; hosts and words are compared in lower case."""
    expressions = [re.compile(pattern) for pattern in patterns]
    domains = frozenset(host.lower().strip(".") for host in hosts)
    unwanted = frozenset(word.lower() for word in words)

    def judge(url: str) -> Removal | None:
        for expression in expressions:
            if expression.search(url):
                return Removal("url", f"the address matches {expression.pattern!r}")
        if domains and (domain := _listed(url, domains)):
            return Removal("host", f"the address lies below {domain}")
        if unwanted and (found := unwanted.intersection(_BETWEEN.split(url.lower()))):
            return Removal("url-words", f"the address has the word {min(found)!r}")
        return None

    return judge


def _listed(url: str, domains: frozenset[str]) -> str:
    """The entry that covers the address's host, or empty."""
    try:
        labels = (urlsplit(url).hostname or "").rstrip(".").split(".")
    except ValueError:
        return ""
    above = (".".join(labels[start:]) for start in range(len(labels)))
    return next((domain for domain in above if domain in domains), "")
