"""What a crawl says of itself: counts, removals by rule, a table of hosts, the content digest."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable
from typing import Any

from tasks.corpus.addresses import Address, Host
from tasks.corpus.frontier import Frontier
from tasks.corpus.robots import MAX_BYTES
from tasks.corpus.urls import host_of
from tasks.runtime.stage import Outcome, Report


def content_digest(documents: Iterable[Address]) -> str:
    """What stages downstream depend on: which documents there are and what they say."""
    lines = sorted(f"{address.url}\t{address.digest}\n" for address in documents)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def crawl_outcome(
    frontier: Frontier, documents: list[Address], rounds: int, note: str = ""
) -> Outcome:
    """`note` says what a later epoch goes on from."""
    addresses = list(frontier.addresses.values())
    states = Counter(a.state for a in addresses if a.kind == "page")
    rules = Counter(
        "noindex" if a.noindex else a.reason
        for a in addresses
        if not a.is_document and a.kind == "page" and a.state != "redirect"
    )
    counts = {
        "pages": len(documents),
        "fetched": sum(a.state == "fetched" for a in documents),
        "not_modified": sum(a.state == "not_modified" for a in documents),
        "stale": sum(a.state == "stale" for a in documents),
        "redirects": states["redirect"],
        "errors": states["error"],
        "robots_denied": states["denied"],
        "skipped": states["skipped"],
        "addresses": len(addresses),
        "same_body": len(documents) - len({a.digest for a in documents}),
        "links_to_known": frontier.counts["links to a known address"],
        "links_out_of_scope": frontier.counts["links to another host"],
        "links_invalid": frontier.counts["links that are no address"],
        "links_left_out": frontier.counts["links left out"],
        "hosts": sum(host.in_scope for host in frontier.hosts.values()),
        "requests": sum(host.requests for host in frontier.hosts.values()),
        "bytes": sum(a.bytes for a in documents),
        "rounds": rounds,
    }
    if frontier.earlier:
        before = {url: earlier.address.digest for url, earlier in frontier.earlier.items()}
        now = {a.url: a.digest for a in documents}
        counts |= {
            "new": len(now.keys() - before.keys()),
            "gone": len(before.keys() - now.keys()),
            "not_asked": frontier.counts["pages not asked for again"],
            "changed": sum(now[url] != before[url] for url in now.keys() & before.keys()),
        }
    return Outcome(
        counts=counts,
        rules=dict(rules.most_common()),
        content=content_digest(documents),
        reports=(
            *([Report("crawl-epoch", "markdown", note)] if note else []),
            Report("crawl-hosts", "table", _host_rows(frontier), "Hosts of the crawl"),
            Report("crawl-rules", "table", _rule_rows(addresses), "What became of addresses"),
        ),
    )


def _host_rows(frontier: Frontier, limit: int = 200) -> list[dict[str, Any]]:
    """A row a host: half of them those that gave most, then those that most failed of, then all
    others in one row.
    """
    by_host: dict[str, list[Address]] = {}
    for address in frontier.addresses.values():
        by_host.setdefault(host_of(address.url), []).append(address)
    rows: list[dict[str, Any]] = []
    unhad: dict[str, int] = {}  # addresses that failed or were denied, by host
    for host in frontier.hosts.values():
        if not host.in_scope:
            continue
        own = by_host.get(host.host, [])
        taken = [a.seconds for a in own if a.seconds]
        unhad[host.host] = sum(a.state in ("error", "denied") for a in own)
        rows.append(
            {
                "host": host.host,
                "fetched": sum(a.is_document for a in own),
                "stale": _by_reason(own, "stale"),
                "failed": _by_reason(own, "error"),
                "denied": _by_reason(own, "denied"),
                "skipped": _by_reason(own, "skipped"),
                "requests": host.requests,
                "bytes": host.bytes,
                "delay, s": host.delay,
                "mean pause, s": round(host.paused / max(host.requests, 1), 4),
                "mean answer, s": round(sum(taken) / max(len(taken), 1), 4),
                "note": _note(host),
            }
        )
    rows.sort(key=lambda row: -row["fetched"])
    shown, rest = rows[: limit // 2], rows[limit // 2 :]
    rest.sort(key=lambda row: -unhad[row["host"]])
    half = limit - len(shown)
    return shown + rest[:half] + ([_others(rest[half:])] if rest[half:] else [])


def _note(host: Host) -> str:
    clipped = sorted(origin for origin, robots in host.robots.items() if robots.clipped)
    files = ", ".join(f"{origin}/robots.txt" for origin in clipped)
    return f"longer than {MAX_BYTES:,} bytes, the rest not read: {files}" if files else ""


def _others(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Many hosts in one row: only what adds up."""
    summed = {name: sum(row[name] for row in rows) for name in ("fetched", "requests", "bytes")}
    return dict.fromkeys(rows[0]) | {"host": f"({len(rows):,} others)"} | summed


def _by_reason(addresses: Iterable[Address], state: str) -> str:
    """`12 timeout, 3 HTTP 404`: so many addresses in this state for each reason."""
    reasons = Counter(a.reason or state for a in addresses if a.state == state)
    return ", ".join(f"{count:,} {reason}" for reason, count in reasons.most_common())


def _rule_rows(addresses: list[Address], examples: int = 2) -> list[dict[str, Any]]:
    groups: dict[tuple[str, str], list[str]] = {}
    for address in addresses:
        reason = "noindex" if address.noindex else address.reason
        groups.setdefault((address.state, reason), []).append(address.url)
    return [
        {"state": state, "reason": reason, "addresses": len(urls), "such as": urls[:examples]}
        for (state, reason), urls in sorted(groups.items(), key=lambda item: -len(item[1]))
    ]
