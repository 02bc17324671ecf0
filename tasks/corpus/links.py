"""What a page says to a crawler: links, robots directives, canonical address; sitemaps."""

from __future__ import annotations

import codecs
import re
import zlib
from collections.abc import Iterable
from dataclasses import dataclass

from lxml import etree
from lxml import html as lxml_html

from tasks.corpus.opt_out import meta_reserves
from tasks.corpus.urls import canonical_url, link_target

MAX_LINKS = 10_000  # of one page
MAX_SITEMAP_LINKS = 50_000  # sitemaps.org's own limit
MAX_SITEMAP_BYTES = 50 * 1024 * 1024
_VALUED_DIRECTIVES = frozenset(
    {"unavailable_after", "max-snippet", "max-image-preview", "max-video-preview"}
)


@dataclass(frozen=True)
class PageLinks:
    """`links` are canonical, without duplicates, in document order; nofollow ones are left out."""

    links: tuple[str, ...] = ()
    canonical: str = ""
    noindex: bool = False
    nofollow: bool = False
    invalid: int = 0
    reserved: str = ""  # how the page reserves itself from text mining, or empty


def page_links(
    body: bytes, url: str, charset: str | None, directives: Iterable[str], agent: str
) -> PageLinks:
    """Read an HTML page. `directives` are its X-Robots-Tag headers; `agent` our product token."""
    noindex, nofollow = robots_directives(directives, agent)
    try:
        known = codecs.lookup(charset).name if charset else None
    except LookupError:
        known = None
    parser = lxml_html.HTMLParser(encoding=known, no_network=True)
    try:
        tree = lxml_html.document_fromstring(body.replace(b"\x00", b""), parser=parser)
    except (etree.ParserError, etree.XMLSyntaxError, ValueError, AssertionError):
        return PageLinks(noindex=noindex, nofollow=nofollow)
    base, canonical, reserved = url, "", ""
    hrefs: list[str] = []
    for element in tree.iter("base", "meta", "link", "a", "area"):
        tag = element.tag
        if tag == "base" and base == url and element.get("href"):
            base = _canonical(element.get("href"), url) or url
        elif tag == "meta":
            name, content = (element.get("name") or "").lower(), element.get("content") or ""
            reserved = reserved or meta_reserves(name, content)
            if name in ("robots", agent.lower()):
                found = robots_directives([content], agent)
                noindex, nofollow = noindex or found[0], nofollow or found[1]
        elif tag == "link" and "canonical" in (element.get("rel") or "").lower().split():
            canonical = _canonical(element.get("href") or "", base)
        elif (
            tag in ("a", "area")
            and element.get("href")
            and "nofollow" not in (element.get("rel") or "").lower().split()
        ):
            hrefs.append(element.get("href"))
    links, invalid = _resolve(hrefs, base) if not nofollow else ((), 0)
    return PageLinks(links, canonical, noindex, nofollow, invalid, reserved)


def robots_directives(lines: Iterable[str], agent: str) -> tuple[bool, bool]:
    """(noindex, nofollow) of robots directives; `otherbot: noindex, nofollow` is for another."""
    words: set[str] = set()
    for line in lines:
        text = line.strip().lower()
        addressee = re.match(r"([\w-]+)\s*:", text)
        if addressee and addressee.group(1) not in _VALUED_DIRECTIVES:
            if addressee.group(1) != agent.lower():
                continue
            text = text[addressee.end() :]
        words |= {word.strip() for word in text.split(",")}
    return bool(words & {"noindex", "none"}), bool(words & {"nofollow", "none"})


def _canonical(href: str, base: str) -> str:
    try:
        return canonical_url(href, base)
    except ValueError:
        return ""


def _resolve(hrefs: Iterable[str], base: str) -> tuple[tuple[str, ...], int]:
    found: dict[str, None] = {}
    invalid = 0
    for href in hrefs:
        address = link_target(href, base)
        if address is None:
            invalid += 1
        elif address:
            found.setdefault(address)
            if len(found) >= MAX_LINKS:
                break
    return tuple(found), invalid


def sitemap_links(body: bytes, url: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(pages, further sitemaps) of a sitemap: XML or one address per line, gzip or not.

    Raises ValueError when it is neither or unpacks to more than MAX_SITEMAP_BYTES.
    """
    if body.startswith(b"\x1f\x8b"):
        unpacker = zlib.decompressobj(31)
        try:
            body = unpacker.decompress(body, MAX_SITEMAP_BYTES)
        except zlib.error as error:
            raise ValueError(f"its gzip data are damaged ({error})") from error
        if not unpacker.eof and not unpacker.unconsumed_tail:
            raise ValueError("its gzip data end too early")
        if unpacker.unconsumed_tail:
            raise ValueError(f"it unpacks to more than {MAX_SITEMAP_BYTES} bytes")
    text = body.lstrip(b"\xef\xbb\xbf \t\r\n")
    if not text.startswith(b"<"):
        lines = [line.decode("utf-8", "replace") for line in text.splitlines()]
        return _resolve(lines[:MAX_SITEMAP_LINKS], url)[0], ()
    parser = etree.XMLParser(
        recover=True, resolve_entities=False, no_network=True, load_dtd=False, huge_tree=False
    )
    root = etree.fromstring(text, parser)
    if root is None:
        raise ValueError("it is not XML")
    pages: list[str] = []
    maps: list[str] = []
    for element in root.iter("{*}loc"):
        parent = element.getparent()
        name = etree.QName(parent).localname if parent is not None else ""
        address = _canonical(element.text or "", url)
        if address and name in ("url", "sitemap"):
            (pages if name == "url" else maps).append(address)
        if len(pages) + len(maps) >= MAX_SITEMAP_LINKS:
            break
    return tuple(dict.fromkeys(pages)), tuple(dict.fromkeys(maps))
