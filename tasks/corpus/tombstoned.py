"""Which documents are tombstoned, and the stage that leaves them out.

The stage stands in the chain only where there are tombstones, before deduplication: a copy that a
forgotten page had displaced comes back in its place. Its fingerprint holds a digest of all standing
tombstones, so a new one re-runs this stage and, when a document is affected, what follows; never
the crawl.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.compute as pc

from tasks.corpus.digests import canonical_digest
from tasks.corpus.documents import (
    REMOVED,
    Removal,
    Tally,
    counts,
    document_shards,
    require_some,
    selection_reports,
)
from tasks.corpus.sharding import run_shards
from tasks.corpus.urls import DEFAULT_PORTS, address_key, canonical_url
from tasks.runtime.errors import UserError
from tasks.runtime.manifest import Manifest
from tasks.runtime.settings import Settings
from tasks.runtime.stage import Outcome, Workspace, stage
from tasks.runtime.stage_config import StageConfig
from tasks.runtime.store import Directory
from tasks.state.tombstones import Tombstone, Tombstones, digest_of

RULE = "tombstoned"
REMEDIES = {"": "withdraw a tombstone (gristmill forget --list) or crawl more pages"}
_HEX = re.compile(r"[0-9a-f]{16}(?:[0-9a-f]{48})?")
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_BEYOND = re.compile(r"[/?#\\]|:(?:80|443)$")  # what a domain has not: a path, a scheme's own port
_ODD = r"[^\x21-\x7e]|^[^/]*//[^/]*[%\\]"
_NAME = re.compile(
    r"[a-z0-9.:/_-]*[a-z][a-z0-9.:/_-]*"
)  # no address of IP, which has many spellings
ID_DIGITS = 16


def parse(what: str) -> tuple[str, str]:
    """(kind, value) of what a person wants forgotten. Raises UserError when it is none of them.

    An address is one with a scheme. A digest is a document's id, the SHA-256 of its text that the
    id is the start of, or the payload digest of a WARC record (`canonical_digest`). Else it is a
    domain, and nothing but one: a purge of a whole domain cannot be taken back.
    """
    text = what.strip()
    if _HEX.fullmatch(text.lower()):
        return "digest", text.lower()[:ID_DIGITS]
    if payload := canonical_digest(text):
        return "digest", payload
    if scheme := _SCHEME.match(text):
        return "url", _page(text) if scheme[1].lower() in DEFAULT_PORTS else text
    try:
        host = urlsplit(canonical_url(f"http://{text}")).netloc
    except ValueError:
        host = ""
    if "." not in host and not host.startswith("[") and not host.startswith("localhost"):
        raise UserError(
            f"{what!r} is no address (https://example.org/page), no domain (example.org) and no "
            "digest (16 or 64 hex digits, sha256:… or sha1:…); write it as one of them"
        )
    if _BEYOND.search(text.rstrip("/")):
        raise UserError(
            f"{what!r} is more than a domain; write https://{text} for that one address, or "
            f"{host} for every page of {host} and of what is below it"
        )
    return "domain", host


def _page(text: str) -> str:
    """What an address of the web is known by. Raises UserError where no page can have it."""
    try:
        return address_key(canonical_url(text))
    except ValueError as error:
        raise UserError(
            f"{text!r} is no page's address: {error}; mend it. A document of a source that states "
            "such an address is forgotten by its id"
        ) from error


@dataclass(frozen=True)
class Forgotten:
    """A set of tombstones, ready to be asked about documents. Picklable."""

    stones: tuple[Tombstone, ...]

    @classmethod
    def standing(cls, settings: Settings) -> Forgotten:
        return cls(tuple(Tombstones(settings.database_url).standing()))

    @cached_property
    def _by_value(self) -> dict[str, dict[str, Tombstone]]:
        kinds: dict[str, dict[str, Tombstone]] = {"url": {}, "domain": {}, "digest": {}}
        for stone in self.stones:
            kinds[stone.kind].setdefault(stone.value, stone)
        return kinds

    def address(self, url: str) -> Tombstone | None:
        """The tombstone of this address or of its domain."""
        known = self._by_value
        if known["url"] and (found := known["url"].get(address_key(url))):
            return found
        return self.host(urlsplit(url).netloc) if known["domain"] else None

    def host(self, netloc: str) -> Tombstone | None:
        """The tombstone of this host (with or without port) or of a domain above it."""
        domains = self._by_value["domain"]
        name = netloc.rpartition("@")[2].lower()
        bare = re.sub(r":\d+$", "", name)
        labels = bare.split(".")
        above = (".".join(labels[start:]) for start in range(len(labels)))
        return next((domains[key] for key in (name, *above) if key in domains), None)

    @cached_property
    def _hints(self) -> list[str]:
        """Regular expressions; an ordinary address that is tombstoned matches one of them."""
        hints = set()
        for stone in self.stones:
            value = stone.value.lower()
            if stone.kind == "domain" or stone.value.startswith("//"):
                value = value.removeprefix("//").partition("/")[0]
                if not _NAME.fullmatch(value):
                    return [""]
            if stone.kind != "digest":
                hints.add(re.escape(value))
        ordered = sorted(hints)
        return ["|".join(ordered[start : start + 100]) for start in range(0, len(ordered), 100)]

    def possibly(self, addresses: pa.ChunkedArray) -> pa.ChunkedArray:
        """Which of these addresses or hosts `address` must be asked about: found in whole columns,
        for an address at a time takes fifty times as long.

        Odd spellings of a host (signs beyond ASCII, percent signs, blanks) are all asked about.
        """
        lowered = pc.fill_null(pc.utf8_lower(addresses), "")
        found = pc.match_substring_regex(lowered, _ODD)
        for hints in self._hints:
            found = pc.or_(found, pc.match_substring_regex(lowered, hints))
        return found

    @property
    def digests(self) -> list[str]:
        return list(self._by_value["digest"])

    def digest(self, *digests: str | None) -> Tombstone | None:
        """The tombstone of a document's id or of a page's payload digest."""
        known = self._by_value["digest"]
        return next((known[d.rstrip("=")] for d in digests if d and d.rstrip("=") in known), None)

    def document(self, url: str, id: str, digest: str | None) -> Tombstone | None:
        return self.address(url) or self.digest(id, digest)


class ForgetConfig(StageConfig):
    """Which tombstones stand: how many, and a digest over them."""

    tombstones: int
    digest: str

    @classmethod
    def of(cls, standing: Iterable[Tombstone]) -> ForgetConfig:
        stones = list(standing)
        return cls(tombstones=len(stones), digest=digest_of(stones))


def standing_tombstones() -> ForgetConfig | None:
    """The stage's configuration, or None where nothing is to be forgotten."""
    stones = Tombstones(Settings.load().database_url).standing()
    return ForgetConfig.of(stones) if stones else None


@stage("forget", version=2, content_addressed=True)
def forget(
    config: ForgetConfig, work: Workspace, *, documents: Manifest, crawl: Manifest | None = None
) -> Outcome:
    """Leave out the documents that are tombstoned; `crawl` knows pages by their payload."""
    forgotten = Forgotten.standing(Settings.load())
    if digest_of(forgotten.stones) != config.digest:
        raise UserError(
            f"the tombstones are no longer the {config.tombstones} this run was started with; "
            "run it again"
        )
    records = payload_records(forgotten, work, crawl) if crawl is not None else {}
    where = work.store.of(documents)
    items = [(forgotten, records, where, name) for name in document_shards(documents)]
    reports = run_shards(work, "forgotten", forget_shard, items, label="Forget")
    tally = Tally.total(report["tally"] for report in reports)
    require_some("forget", tally, REMEDIES, "documents")
    gone = [key for report in reports for key in report["gone"]]
    told = hashlib.sha256("\n".join([documents.content, *sorted(gone)]).encode())
    return Outcome(
        counts=counts(tally),
        rules=tally.rules,
        # Where nothing was left out, what follows has nothing to do again.
        content=told.hexdigest() if gone else documents.content,
        reports=selection_reports("forget", tally),
    )


def payload_records(forgotten: Forgotten, work: Workspace, crawl: Manifest) -> dict[str, Tombstone]:
    """Record id → tombstone, for pages whose payload digest has one."""
    if not any(stone.kind == "digest" for stone in forgotten.stones):
        return {}
    pages = work.store.of(crawl).read_table("pages.parquet", ["record_id", "digest"])
    columns = zip(pages["record_id"].to_pylist(), pages["digest"].to_pylist(), strict=True)
    return {id: stone for id, digest in columns if (stone := forgotten.digest(digest))}


def forget_shard(
    work: Workspace,
    number: int,
    forgotten: Forgotten,
    records: dict[str, Tombstone],
    where: Directory,
    name: str,
) -> dict[str, Any]:
    """One shard without what is tombstoned; of that no text is kept, not even as rejected."""
    table = where.read_table(name)
    tally, keep = Tally(), []
    gone: list[dict[str, Any]] = []
    for row in table.select(["id", "url", "record_id", "digest", "bytes"]).to_pylist():
        stone = forgotten.document(row["url"], row["id"], row["digest"])
        stone = stone or records.get(row["record_id"])
        keep.append(stone is None)
        if stone is None:
            tally.keep(row["bytes"])
            continue
        removal = Removal(RULE, f"tombstone {stone.id}, a {stone.kind}: {stone.reason}")
        tally.remove(removal, row["url"], "")
        blank = dict.fromkeys(table.column_names) | {"text": "", "title": ""}
        gone.append(blank | row | {"rule": removal.rule, "reason": removal.reason})
    schema = pa.schema([*table.schema.remove_metadata(), *REMOVED])
    work.write_table(f"rejected-{number:05d}.parquet", pa.Table.from_pylist(gone, schema))
    work.write_table(f"documents-{number:05d}.parquet", table.filter(pa.array(keep, pa.bool_())))
    return {"tally": asdict(tally), "gone": [f"{row['id']} {row['url']}" for row in gone]}
