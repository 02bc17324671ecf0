"""What a page says to a crawler: links, robots directives, canonical address."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lxml import etree
from lxml import html as lxml_html

from tasks.corpus.charset import decode
from tasks.corpus.opt_out import meta_reserves
from tasks.corpus.urls import canonical_or_empty, link_target

MAX_LINKS = 10_000  # of one page
_REFRESH = re.compile(r"""\s*[\d.]*\s*[;,]\s*(?:url\s*=\s*)?["']?([^"']+)""", re.IGNORECASE)
_LINK = re.compile(r"<([^<>]*)>([^<]*)")
_REL = re.compile(r"""(?:^|;)\s*rel\s*=\s*(?:"([^"]*)"|'([^']*)'|([^\s;,]+))""", re.IGNORECASE)
_VALUED_DIRECTIVES = frozenset(
    {"unavailable_after", "max-snippet", "max-image-preview", "max-video-preview"}
)


@dataclass(frozen=True)
class PageLinks:
    """`links` are canonical, without duplicates, in document order; nofollow ones are left out.

    `invalid` were no address, `left_out` stood behind the first MAX_LINKS. `clipped` says that
    there may have been more, as elements are nested deeper than the parser follows.
    """

    links: tuple[str, ...] = ()
    canonical: str = ""
    noindex: bool = False
    nofollow: bool = False
    invalid: int = 0
    left_out: int = 0
    clipped: bool = False
    reserved: str = ""  # how the page reserves itself from text mining, or empty


def page_links(
    body: bytes, url: str, charset: str | None, directives: Iterable[str], agent: str
) -> PageLinks:
    """Read an HTML page. `directives` are its X-Robots-Tag headers; `agent` our product token."""
    noindex, nofollow = robots_directives(directives, agent)
    # Read as the text is: libxml2 knows fewer encodings, and ends a page without a word at the
    # first byte that has no character in the one it was told.
    text, _ = decode(body, f"charset={charset}" if charset else "")
    # Of the limits that `huge_tree` lifts, that of depth remains, at 2,048 elements.
    parser = lxml_html.HTMLParser(encoding="utf-8", no_network=True, huge_tree=True)
    try:
        data = text.replace("\x00", "").encode("utf-8", "replace")
        tree = lxml_html.document_fromstring(data, parser=parser)
    except (etree.ParserError, etree.XMLSyntaxError, ValueError, AssertionError):
        return PageLinks(noindex=noindex, nofollow=nofollow)
    base, canonical, reserved = url, "", ""
    hrefs: list[str] = []
    for element in tree.iter("base", "meta", "link", "a", "area"):
        tag = element.tag
        if tag == "base" and base == url and element.get("href"):
            base = canonical_or_empty(element.get("href"), url) or url
        elif tag == "meta":
            name, content = (element.get("name") or "").lower(), element.get("content") or ""
            reserved = reserved or meta_reserves(name, content)
            if (element.get("http-equiv") or "").strip().lower() == "refresh":
                # A redirect by other means; the page itself is judged as any other.
                hrefs += _REFRESH.findall(content)[:1]
            if name in ("robots", agent.lower()):
                found = robots_directives([content], agent)
                noindex, nofollow = noindex or found[0], nofollow or found[1]
        elif tag == "link" and "canonical" in (element.get("rel") or "").lower().split():
            canonical = canonical_or_empty(element.get("href") or "", base)
        elif (
            tag in ("a", "area")
            and element.get("href")
            and "nofollow" not in (element.get("rel") or "").lower().split()
        ):
            hrefs.append(element.get("href"))
    links, invalid, left_out = _resolve(() if nofollow else hrefs, base, MAX_LINKS)
    clipped = met_limit(parser)
    return PageLinks(links, canonical, noindex, nofollow, invalid, left_out, clipped, reserved)


def met_limit(parser: etree.HTMLParser) -> bool:
    """Whether the parser gave its last page up in the middle, as it is nested too deep."""
    return any(entry.type == etree.ErrorTypes.ERR_RESOURCE_LIMIT for entry in parser.error_log)


def header_canonical(lines: Iterable[str], url: str) -> str:
    """The address that a Link header calls canonical (RFC 8288, RFC 6596), or empty."""
    for line in lines:
        for target, parameters in _LINK.findall(line):
            rel = _REL.search(parameters)
            if rel and "canonical" in "".join(rel.groups("")).lower().split():
                return canonical_or_empty(target, url)
    return ""


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


def _resolve(hrefs: Sequence[str], base: str, most: int) -> tuple[tuple[str, ...], int, int]:
    """The first `most` addresses, how many were none, and how many were not looked at any more."""
    found: dict[str, None] = {}
    invalid = 0
    for number, href in enumerate(hrefs, 1):
        address = link_target(href, base)
        if address is None:
            invalid += 1
        elif address:
            found.setdefault(address)
            if len(found) >= most:
                return tuple(found), invalid, len(hrefs) - number
    return tuple(found), invalid, 0
