"""What a page says about itself, whichever parser reads it: title, date, language, licence, wishes,
canonical address.

The parsers hand over elements in document order; here is decided what they mean.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from tasks.corpus.opt_out import meta_reserves
from tasks.corpus.urls import canonical_or_empty

AGENT = "gristmill"  # our product token, by which a page may address us
_DATE = re.compile(r"(\d{4})-(\d\d)-(\d\d)")
_DATE_NAMES = (
    "article:published_time",
    "datepublished",
    "date",
    "dc.date",
    "dc.date.issued",
    "dcterms.date",
    "citation_publication_date",
    "article:modified_time",
)
# Dublin Core (ISO 15836) in the ways it stands in HTML, and what Creative Commons' chooser writes.
_LICENCE_NAMES = (
    "dcterms.license",
    "dc.rights.license",
    "dc.license",
    "license",
    "dcterms.rights",
    "dc.rights",
    "rights",
    "dcterms.accessrights",
)
# What meta elements are called that say anything here; http-equiv=content-language does, too.
META_NAMES = ("robots", AGENT, "tdm-reservation", *_DATE_NAMES, *_LICENCE_NAMES)
_COMMONS = re.compile(r"^(?:https?:)?//(?:www\.)?creativecommons\.org/(?:licenses|publicdomain)/")
_LONGEST_TITLE = 500
_LONGEST_LICENCE = 200


@dataclass
class About:
    """`language` as the page claims it (primary subtag, or empty)."""

    title: str = ""
    noindex: bool = False
    clipped: bool = False  # nested deeper than the parser follows: there is more that was not read
    reserved: str = ""  # how it reserves itself from text mining, or empty
    _canonical: str = ""
    _base: str = ""
    _language: str = ""
    _dates: dict[str, str] = field(default_factory=dict)
    _licences: dict[str, str] = field(default_factory=dict)

    def add_heading(self, text: str) -> None:
        """A title element or a first heading: the first of either is the page's title.

        An SVG picture may hold further titles.
        """
        if not self.title:
            self.title = " ".join(text.split())[:_LONGEST_TITLE]

    def add_language(self, code: str) -> None:
        self._language = self._language or code

    def add_time(self, moment: str) -> None:
        self._dates.setdefault("time", moment)

    def add_meta(self, name: str, equivalent: str, content: str) -> None:
        """A meta element: its name or property, its http-equiv, its content."""
        name = name.lower()
        self.reserved = self.reserved or meta_reserves(name, content)
        if name in ("robots", AGENT):
            words = {word.strip() for word in content.lower().split(",")}
            self.noindex = self.noindex or bool(words & {"noindex", "none"})
        elif name in _DATE_NAMES:
            self._dates.setdefault(name, content)
        elif name in _LICENCE_NAMES:
            self._licences.setdefault(name, " ".join(content.split()))
        elif equivalent.lower() == "content-language":
            self.add_language(content)

    def add_base(self, address: str) -> None:
        """A base element, by which the page's relative addresses are meant."""
        self._base = self._base or address

    def add_link(self, relation: str, address: str) -> None:
        """A link or anchor: rel=license (RFC 4946) names a licence, so does an address of CC's;
        rel=canonical (RFC 6596) names the address that the page is better known by.
        """
        relations = relation.lower().split()
        if "canonical" in relations:
            self._canonical = self._canonical or address.strip()
        if "license" in relations:
            self._licences.setdefault("rel", address.strip())
        elif _COMMONS.match(address.strip()):
            self._licences.setdefault("commons", address.strip())

    def canonical(self, url: str) -> str:
        """The canonical address that the page at `url` names, or empty."""
        base = canonical_or_empty(self._base, url) if self._base else ""
        return canonical_or_empty(self._canonical, base or url) if self._canonical else ""

    @property
    def language(self) -> str:
        return re.split(r"[-_,; ]", self._language.strip().lower())[0][:8]

    @property
    def date(self) -> str:
        """ISO 8601, or empty."""
        stated = (self._dates.get(name, "") for name in (*_DATE_NAMES, "time"))
        return next((match.group() for match in map(_DATE.match, stated) if match), "")

    @property
    def licence(self) -> str:
        """What is said of the page's licence: an address or a sentence; a hint, no legal fact."""
        stated = (self._licences.get(name, "") for name in ("rel", *_LICENCE_NAMES, "commons"))
        return next((licence for licence in stated if licence), "")[:_LONGEST_LICENCE]
