"""Addresses nobody wants text from: by pattern, by domain, by word.

As RefinedWeb filters before it reads (Penedo et al. 2023, arXiv:2306.01116, appendix G.1): lists of
domains, and words that stand in an address as a whole, so that `sex` does not match Essex. The
lists are the configuration's; none is built in.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from urllib.parse import unquote, urlsplit

from tasks.corpus.documents import Removal
from tasks.corpus.urls import domain_name

_BETWEEN = re.compile(r"[\W_]+")


def by_address(
    patterns: Iterable[str], hosts: Iterable[str], words: Iterable[str]
) -> Callable[[str], Removal | None]:
    """A judge of addresses; `hosts` are spelt as by `domain_name`, words compared in lower case."""
    expressions = [re.compile(pattern) for pattern in patterns]
    domains = frozenset(hosts)
    unwanted = frozenset(word.lower() for word in words)

    def judge(url: str) -> Removal | None:
        for expression in expressions:
            if expression.search(url):
                return Removal("url", f"the address matches {expression.pattern!r}")
        if domains and (domain := _listed(url, domains)):
            return Removal("host", f"the address lies below {domain}")
        if unwanted and (found := unwanted.intersection(words_of_address(url))):
            return Removal("url-words", f"the address has the word {min(found)!r}")
        return None

    return judge


def words_of_address(url: str) -> list[str]:
    """What stands between its signs, in lower case; percent-encoded letters as such."""
    return _BETWEEN.split(unquote(url).lower())


def _listed(url: str, domains: frozenset[str]) -> str:
    """The entry that covers the address's host, or empty."""
    try:
        host = (urlsplit(url).hostname or "").rstrip(".")
        if not host.isascii():  # as sources may state it
            host = domain_name(host)
    except ValueError:
        return ""
    labels = host.split(".")
    above = (".".join(labels[start:]) for start in range(len(labels)))
    return next((domain for domain in above if domain in domains), "")
