"""What an answer comes to: its outcome and the records that stand for it, or another attempt."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from tasks.corpus import warc
from tasks.corpus.binary import binary_kind
from tasks.corpus.client import Answer
from tasks.corpus.fetch_plan import Limits, Outcome, Request
from tasks.corpus.links import header_canonical, page_links, robots_directives
from tasks.corpus.opt_out import OPT_OUT, headers_reserve
from tasks.corpus.sitemaps import sitemap_links
from tasks.corpus.urls import Aliases, canonical_url

HTML_TYPES = frozenset({"text/html", "application/xhtml+xml"})
REDIRECT = frozenset({301, 302, 303, 307, 308})
RETRIED = frozenset({429, 500, 502, 503, 504})
NESTED_TOO_DEEP = "nested too deep for all its links"

Judged = tuple[Outcome, tuple[bytes, ...]]
"""The outcome of a request and its WARC records, none where nothing is kept."""


@dataclass(frozen=True)
class Retry:
    """A request worth repeating, with the outcome it has if it is not repeated."""

    outcome: Outcome
    after: float | None  # seconds the server asked for


def judged(
    request: Request, answer: Answer, place: str, limits: Limits, aliases: Aliases
) -> Judged | Retry:
    """place: where the request went, of which its address may be a name (`aliases`)."""
    exchange = answer.exchange
    identifier = warc.record_id()
    outcome = Outcome(
        request.url,
        request.kind,
        "fetched",
        status=exchange.status,
        content_type=answer.content_type,
        etag=answer.etag,
        modified=answer.modified,
        digest=warc.payload_digest(exchange.body),
        bytes=len(exchange.body),
        fetched_at=exchange.date,
        record_id=identifier,
    )
    if limits.honour_opt_outs and request.kind == "page":
        headers = {name.lower(): value for name, value in exchange.headers}
        if reserved := headers_reserve(headers, answer.directives):
            return _skipped(outcome, f"{OPT_OUT}: {reserved}"), ()
    if exchange.status == 304 and request.digest:
        return _revisit(request, outcome, exchange)
    records = warc.response_records(exchange, outcome.digest, identifier)
    if exchange.status in REDIRECT:
        return _redirected(outcome, answer, place, aliases), records
    if exchange.status != 200:
        failed = dataclasses.replace(outcome, state="error", reason=f"HTTP {exchange.status}")
        if exchange.status in RETRIED:
            return Retry(failed, answer.retry_after)
        return failed, records
    if answer.refused:
        return _skipped(outcome, answer.refused), ()
    if not exchange.body:
        return dataclasses.replace(outcome, state="skipped", reason="empty"), records
    if request.kind == "sitemap":
        outcome = _sitemap(outcome, answer, place, aliases)
    elif _is_textual(answer) and (kind := binary_kind(exchange.body, answer.content_type)):
        return _skipped(outcome, f"binary: {kind}"), ()
    else:
        outcome = _page(outcome, answer, place, limits, aliases)
    # The same bytes under another Content-Type may be another text.
    alike = (request.digest, request.content_type) == (outcome.digest, outcome.content_type)
    if outcome.state == "fetched" and request.digest and alike:
        return _revisit(request, outcome, exchange)
    return outcome, records if outcome.record_id else ()


def _is_textual(answer: Answer) -> bool:
    return answer.media_type.startswith("text/") or answer.media_type in HTML_TYPES


def _redirected(outcome: Outcome, answer: Answer, place: str, aliases: Aliases) -> Outcome:
    try:
        location = aliases.name(canonical_url(answer.location, place))
    except ValueError:
        return dataclasses.replace(outcome, state="error", reason="redirect to no address")
    return dataclasses.replace(outcome, state="redirect", location=location)


def _sitemap(outcome: Outcome, answer: Answer, place: str, aliases: Aliases) -> Outcome:
    try:
        named = sitemap_links(answer.exchange.body, place)
    except ValueError as error:
        return dataclasses.replace(outcome, state="error", reason=f"sitemap: {error}")
    return dataclasses.replace(
        outcome,
        reason=f"sitemap: {named.damage}" if named.damage else "",
        links=tuple(map(aliases.name, named.pages)),
        sitemaps=tuple(map(aliases.name, named.maps)),
        lastmods=named.lastmods,
        links_invalid=named.invalid,
        links_left_out=named.left_out,
    )


def _page(
    outcome: Outcome, answer: Answer, place: str, limits: Limits, aliases: Aliases
) -> Outcome:
    canonical = header_canonical(answer.links, place)
    noindex, _ = robots_directives(answer.directives, limits.token)
    outcome = dataclasses.replace(outcome, canonical=aliases.name(canonical), noindex=noindex)
    if answer.media_type not in HTML_TYPES:
        return _unkept(outcome) if noindex else outcome
    body = answer.exchange.body
    found = page_links(body, place, answer.charset, answer.directives, limits.token)
    outcome = dataclasses.replace(
        outcome,
        reason=NESTED_TOO_DEEP if found.clipped else "",
        links=tuple(map(aliases.name, found.links)),
        canonical=aliases.name(found.canonical or canonical),
        noindex=found.noindex,
        links_invalid=found.invalid,
        links_left_out=found.left_out,
    )
    if found.reserved and limits.honour_opt_outs:
        return _skipped(outcome, f"{OPT_OUT}: {found.reserved}")
    return _unkept(outcome) if found.noindex else outcome


def _unkept(outcome: Outcome) -> Outcome:
    """A page with noindex is read for its links only."""
    return dataclasses.replace(outcome, record_id="", digest="")


def _revisit(request: Request, outcome: Outcome, exchange: warc.Exchange) -> Judged:
    """Nothing new: the body, and the links in it, are those of the earlier record."""
    outcome = dataclasses.replace(
        outcome,
        state="not_modified",
        digest=request.digest,
        content_type="",
        links=(),
        canonical="",
        links_invalid=0,
        links_left_out=0,
    )
    earlier = warc.Earlier(
        request.record_id, request.record_url, request.fetched_at, request.digest
    )
    return outcome, warc.revisit_records(exchange, earlier, outcome.record_id)


def _skipped(outcome: Outcome, reason: str) -> Outcome:
    """Answered and not kept: no record stands for it."""
    return dataclasses.replace(
        outcome, state="skipped", reason=reason, digest="", bytes=0, record_id=""
    )
