"""Sitemaps as sitemaps.org describes them: XML or text, indexes, gzip, and when pages changed."""

from __future__ import annotations

import codecs
import re
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from lxml import etree

from tasks.corpus.content_coding import CodingError, Decoder
from tasks.corpus.urls import canonical_url
from tasks.corpus.warc import warc_date

MAX_LINKS = 50_000  # sitemaps.org's own limit
MAX_BYTES = 50 * 1024 * 1024
_DECLARATION = re.compile(r"\s*<\?xml[^>]*\?>")
_MOMENT = re.compile(
    r"(\d{4})(?:-(\d\d)(?:-(\d\d)(?:T(\d\d):(\d\d)(?::(\d\d)(?:\.\d+)?)?(Z|[+-]\d\d:\d\d))?)?)?"
)


@dataclass(frozen=True)
class SitemapLinks:
    """The pages and further sitemaps that a sitemap names.

    `lastmods` has, for each page, when it changed last (`last_moment`), or empty. `damage` says
    that the file is not what XML has to be, so that there may have been more; `left_out` stood
    behind the first MAX_LINKS.
    """

    pages: tuple[str, ...] = ()
    maps: tuple[str, ...] = ()
    invalid: int = 0
    left_out: int = 0
    damage: str = ""
    lastmods: tuple[str, ...] = ()


def sitemap_links(body: bytes, url: str) -> SitemapLinks:
    """Read a sitemap: XML or one address per line, gzip (of any number of members) or not.

    Raises ValueError when it is neither or unpacks to more than MAX_BYTES.
    """
    if body.startswith(b"\x1f\x8b"):
        body = _unpacked(body)
    text = _utf8(body).lstrip(b"\xef\xbb\xbf \t\r\n")
    found: dict[str, dict[str, str]] = {"url": {}, "sitemap": {}}
    invalid = left_out = 0

    def take(kind: str, location: str, base: str | None, lastmod: str) -> None:
        nonlocal invalid, left_out
        if len(found["url"]) + len(found["sitemap"]) >= MAX_LINKS:
            left_out += 1
            return
        try:
            found[kind].setdefault(canonical_url(location, base), last_moment(lastmod))
        except ValueError:
            invalid += 1

    damage = ""
    if text.startswith(b"<"):
        parser = etree.XMLParser(
            recover=True,
            resolve_entities=False,
            no_network=True,
            load_dtd=False,
            huge_tree=False,
            remove_comments=True,  # one within an address would end it
            remove_pis=True,
        )
        root = etree.fromstring(text, parser)
        if root is None:
            raise ValueError("it is not XML")
        for element in root.iter("{*}loc"):
            parent = element.getparent()
            kind = etree.QName(parent).localname if parent is not None else ""
            if kind in found:
                take(kind, element.text or "", url, parent.findtext("{*}lastmod") or "")
        damage = "its XML is damaged" if parser.error_log else ""
    else:
        for line in text.splitlines():
            if line.strip():  # whole addresses only: an error page is no list of them
                take("url", line.decode("utf-8", "replace"), None, "")
    lastmods = tuple(found["url"].values())
    return SitemapLinks(
        tuple(found["url"]),
        tuple(found["sitemap"]),
        invalid,
        left_out,
        damage,
        lastmods if any(lastmods) else (),
    )


def last_moment(lastmod: str) -> str:
    """The last moment that a W3C date (YYYY, YYYY-MM, YYYY-MM-DD, or with a time and its zone)
    can mean, as WARC dates are written; empty where it is none, or before there were pages.
    """
    match = _MOMENT.fullmatch(lastmod.strip())
    if match is None or int(match[1]) < 1970:
        return ""
    year, month, day, hour, _, second, zone = match.groups()
    try:
        if hour:
            zoned = datetime.fromisoformat(lastmod.strip()[:16] + zone)
            return warc_date((zoned + timedelta(seconds=int(second or 59))).astimezone(UTC))
        begin = datetime(int(year), int(month or 1), int(day or 1), tzinfo=UTC)
        days = 1 if day else 31 if month else 366
        return warc_date(begin + timedelta(days=days, seconds=-1))
    except (ValueError, OverflowError):
        return ""


def _utf8(body: bytes) -> bytes:
    """UTF-16 that says so by its first two bytes, as XML demands, as UTF-8; else as it is."""
    if not body.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return body
    # What the file says of its encoding is no longer true.
    return _DECLARATION.sub("", body.decode("utf-16", "replace")).encode()


def _unpacked(body: bytes) -> bytes:
    decoder = Decoder("gzip", MAX_BYTES)
    try:
        data = decoder.feed(body)
        if decoder.overflown:
            raise ValueError(f"it unpacks to more than {MAX_BYTES} bytes")
        decoder.finish()
    except CodingError as error:
        early = "too early" in str(error)
        raise ValueError(f"its gzip data {'end too early' if early else 'are damaged'}") from error
    return data
