"""Erasing what is tombstoned from every artifact of the store.

 - Tables lose the rows that name it by address, id or record; WARC files have its records
   overwritten with padding, so that all other offsets stay; reports lose the lines that name it.
 - What was made of those documents and holds their text in another form (DERIVED) is deleted.
 - Everything else made of them (tokenizers, models) is marked as not replayable.

Each artifact is noted in the state database before it is touched. An erasure that was killed is
ended by the next one, which finds the rest by looking again.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tasks.corpus import warc
from tasks.corpus.tombstoned import Forgotten
from tasks.corpus.tracked_report import untrack
from tasks.runtime.errors import UserError
from tasks.runtime.manifest import Erased, Manifest
from tasks.runtime.settings import Settings
from tasks.runtime.store import REPORT, Directory, Store
from tasks.state.leases import lease
from tasks.state.tombstones import PURGE, Tombstones

DERIVED = frozenset({"signatures", "token-shards", "pairs", "evaluate"})
# Unfinished, a crawl has the table of its addresses; a training has weights and no text.
TOLD_BY_TABLES = frozenset({"crawl", "pretrain", "finetune"})
PAGE = "report.html"  # of a corpus report, which quotes what any stage removed
# What later stages read.
KEPT = ("documents-", "train-", "heldout-", "conversations-", "pages.parquet")
KEYS = ("url", "fetch_url", "id", "before", "record_id", "digest", "host")
TEXTS = ("reason", "source", "location", "canonical")  # may name the address in another's row
READERS = 8  # tables at a time: each waits for its place of storage
ERASED = "(erased)"
NOTE = "erased on request"


@dataclass(frozen=True)
class Done:
    """What became of one artifact."""

    stage: str
    fingerprint: str
    action: str  # rewritten, deleted, marked, or removed (one that was never finished)
    documents: int


@dataclass
class _Found:
    """What one artifact holds of what is to be erased."""

    rows: dict[str, list[bool]] = field(default_factory=dict)  # table → which rows go
    addresses: set[str] = field(default_factory=set)
    records: set[str] = field(default_factory=set)

    @property
    def documents(self) -> int:
        return sum(sum(gone) for name, gone in self.rows.items() if name.startswith(KEPT))


@dataclass(frozen=True)
class _Payloads:
    """What is known of payloads whose digest is tombstoned, for tables that do not have digests."""

    records: set[str] = field(default_factory=set)  # ids of their records
    texts: set[tuple[str, str]] = field(default_factory=set)  # address and id of what they say


def erase(
    settings: Settings,
    forgotten: Forgotten,
    say: Callable[[Done], None] = lambda done: None,
    named: set[str] | None = None,
) -> list[Done]:
    """Erase what `forgotten` names from the store; returns what was done, artifact by artifact.

    The addresses of what was erased are added to `named`.

    Raises UserError while a run is making something, for it might be reading what goes, and while
    another purge runs. Stages that are started meanwhile wait until it is over.
    """
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(lease(settings.database_url, PURGE, patience=0))
        except TimeoutError as error:
            raise UserError("another purge is under way; wait for its end, then purge") from error
        state = Tombstones(settings.database_url)
        if busy := state.at_work():
            raise UserError(
                f"{busy[0][:40]} is being made now; wait for that run or cancel it, then purge"
            )
        return _erase(settings, state, forgotten, say, named if named is not None else set())


def _erase(
    settings: Settings,
    state: Tombstones,
    forgotten: Forgotten,
    say: Callable[[Done], None],
    addresses: set[str],
) -> list[Done]:
    store = Store.open(settings)
    artifacts = [manifest for stage in store.stages() for manifest in store.all(stage)]
    artifacts.sort(key=lambda manifest: (manifest.created, manifest.fingerprint))
    interrupted = {e.fingerprint for e in state.erased() if e.finished is None}
    stones = tuple(stone.id for stone in forgotten.stones)
    payloads = _payloads(store, forgotten, artifacts)
    lost = _lost_before(state, artifacts)
    tainted: set[str] = set()
    results: list[Done] = []
    swept = False

    def sweep(unfinished: Iterable[tuple[str, str]]) -> None:
        for stage, fingerprint in unfinished:
            store.directory(stage, fingerprint).remove()
            shutil.rmtree(_scratch(settings, stage, fingerprint), ignore_errors=True)
            results.append(Done(stage, fingerprint, "removed", 0))
            say(results[-1])

    def note(manifest: Manifest, action: str, documents: int, act: Callable[[], object]) -> None:
        nonlocal swept
        if action != "marked" and not swept:  # first: a purge that is killed does it again
            sweep([*_unsearchable(store)])
            _clear_scratch(settings)
            swept = True
        noted = state.begin(manifest.stage, manifest.fingerprint, action, stones, documents)
        act()
        state.finish(noted)
        results.append(Done(manifest.stage, manifest.fingerprint, action, documents))
        say(results[-1])

    for manifest in artifacts:
        inputs = set(manifest.inputs.values())
        stale = any(lost.get(mark, "") > manifest.created for mark in inputs)
        found = _search(
            store.of(manifest), list(manifest.names(suffix=".parquet")), forgotten, payloads
        )
        addresses.update(found.addresses)
        if found.rows or manifest.fingerprint in interrupted:
            if found.documents or manifest.fingerprint in interrupted:
                lost[manifest.fingerprint] = _now()
            act = partial(_rewrite, store, manifest, forgotten, found, stones)
            note(manifest, "rewritten", found.documents, act)
        elif manifest.stage in DERIVED and stale:
            lost[manifest.fingerprint] = _now()
            note(manifest, "deleted", 0, store.of(manifest).remove)
            store.forget_copies(manifest)
        elif PAGE in manifest.names() and (stale or _quotes(store, manifest, addresses)):
            note(manifest, "deleted", 0, partial(_drop_report, store, manifest))
        elif not _is_tabular(manifest) and (stale or inputs & tainted):
            tainted.add(manifest.fingerprint)
            if not manifest.not_replayable:
                why = f"not replayable: {NOTE} from what it was made of"
                note(manifest, "marked", 0, partial(store.amend, manifest, not_replayable=why))
    sweep([*_unfinished(store, forgotten, payloads)])
    for erasure in state.erased():
        if erasure.finished is None:
            state.finish(erasure.id)
    return results


def _lost_before(state: Tombstones, artifacts: list[Manifest]) -> dict[str, str]:
    """Artifacts that lost documents in earlier erasures, with the moment: what was made of them
    before it still holds those. An erasure that was killed left such descendants."""
    lost = {m.fingerprint: e.at for m in artifacts for e in m.erased if e.documents}
    for erasure in state.erased():
        if erasure.action == "deleted":
            moment = datetime.fromtimestamp(erasure.begun, UTC)
            lost[erasure.fingerprint] = moment.isoformat(timespec="milliseconds")
    return lost


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _is_tabular(manifest: Manifest) -> bool:
    """Whether an artifact's own rows say all that is to be known of it."""
    return any(name.startswith(KEPT) for name in manifest.names(suffix=".parquet"))


def _drop_report(store: Store, manifest: Manifest) -> None:
    if manifest.metrics.get("mlflow"):
        untrack(manifest.fingerprint)
    store.of(manifest).remove()


def _quotes(store: Store, manifest: Manifest, addresses: set[str]) -> bool:
    page = unescape(store.of(manifest).read_bytes(PAGE).decode())
    return _names(page, [*addresses])


def _payloads(store: Store, forgotten: Forgotten, artifacts: list[Manifest]) -> _Payloads:
    found = _Payloads()
    if not any(stone.kind == "digest" for stone in forgotten.stones):
        return found
    digests = pa.array(sorted(forgotten.digests), pa.string())
    for manifest in artifacts:
        directory = store.of(manifest)
        for name in manifest.names(suffix=".parquet"):
            if not name.startswith(KEPT):
                continue
            table = directory.read_present(name, ("url", "id", "record_id", "digest"))
            if not {"url", "record_id", "digest"} <= set(table.column_names):
                continue
            named = pc.is_in(pc.utf8_rtrim(table["digest"], "="), value_set=digests)
            for row in table.filter(named).to_pylist():
                found.records.update(filter(None, [row["record_id"]]))
                found.texts.update([(row["url"], row["id"])] if "id" in row else ())
    return found


def _search(
    directory: Directory, names: list[str], forgotten: Forgotten, payloads: _Payloads
) -> _Found:
    """The rows of an artifact's tables that name what is to be erased; reads key columns only."""
    found = _Found()
    with ThreadPoolExecutor(READERS) as readers:
        looked = readers.map(partial(_rows, directory, forgotten, payloads), names)
        for name, (gone, rows) in zip(names, looked, strict=True):
            if not rows:
                continue
            found.rows[name] = gone
            for row in rows:
                found.addresses |= {row[key] for key in ("url", "fetch_url") if row.get(key)}
                found.records |= {row["record_id"]} if row.get("record_id") else set()
    return found


def _rows(
    directory: Directory, forgotten: Forgotten, payloads: _Payloads, name: str
) -> tuple[list[bool], list[dict[str, Any]]]:
    """Which rows of a table are to be erased, and the keys of those."""
    table = directory.read_present(name, KEYS)
    keys = table.column_names
    if not {"url", "host"} & set(keys):
        return [], []
    possible = forgotten.possibly(table["url" if "url" in keys else "host"])
    ids = sorted({*forgotten.digests, *(id for _, id in payloads.texts)})
    looked_for = {"id": ids, "before": ids, "digest": ids, "record_id": sorted(payloads.records)}
    for key, values in looked_for.items():
        if key in keys:
            column = pc.utf8_rtrim(table[key], "=") if key == "digest" else table[key]
            known = pa.array(values, pa.string())
            possible = pc.or_(possible, pc.is_in(column, value_set=known))
    gone = [False] * table.num_rows
    rows = []
    for place in np.flatnonzero(possible.to_numpy()).tolist():
        row = {key: table[key][place].as_py() for key in keys}
        if _is_forgotten(row, forgotten, payloads):
            gone[place] = True
            rows.append(row)
    return gone, rows


def _is_forgotten(row: dict[str, Any], forgotten: Forgotten, payloads: _Payloads) -> bool:
    if "host" in row and "url" not in row:
        return forgotten.host(row["host"]) is not None
    # Attributes stay: they say nothing, and are looked up by documents of other payloads too.
    if "record_id" in row and "digest" not in row:
        texts = {(row["url"], row.get("id")), (row["url"], row.get("before"))}
        if texts & payloads.texts:
            return True
    return (
        forgotten.address(row["url"] or "") is not None
        or forgotten.digest(row.get("id"), row.get("before"), row.get("digest")) is not None
        or row.get("record_id") in payloads.records
    )


def _rewrite(
    store: Store, manifest: Manifest, forgotten: Forgotten, found: _Found, stones: tuple[int, ...]
) -> None:
    """Take the rows, records and lines out; WARC files first: the tables say what is in them."""
    directory = store.of(manifest)
    for name in manifest.names(suffix=".warc.gz"):
        _blank(directory, name, forgotten, found)
    for name in manifest.names(suffix=".parquet"):
        if name not in found.rows:
            _unname(directory, name, found.addresses)
    for name, gone in found.rows.items():
        table = directory.read_table(name)
        kept = table.filter(pa.array([not goes for goes in gone], pa.bool_()))
        directory.write_table(name, _unnamed(kept, found.addresses))
    needles = [*found.addresses, *(s.value for s in forgotten.stones if s.kind == "domain")]
    if directory.has(REPORT):
        reports = json.loads(directory.read_bytes(REPORT))
        for report in reports:
            report["body"] = _without(report["body"], needles)
        directory.write_bytes(REPORT, json.dumps(reports, indent=1).encode())
    erased = Erased(at=_now(), tombstones=stones, documents=found.documents)
    store.amend(
        manifest,
        erased=(*manifest.erased, erased),
        not_replayable=f"not replayable: {NOTE} from it",
    )


def _unnamed(table: pa.Table, addresses: set[str]) -> pa.Table:
    """The table with erased addresses gone from what other rows say of them."""
    for column in TEXTS:
        if column not in table.column_names:
            continue
        values = table[column].to_pylist()
        mended = [_mask(value, addresses) if value else value for value in values]
        if mended != values:
            place = table.schema.get_field_index(column)
            table = table.set_column(
                place, table.schema.field(place), pa.array(mended, pa.string())
            )
    return table


def _unname(directory: Directory, name: str, addresses: set[str]) -> None:
    """The same of a table none of whose rows goes; written only where that changes it."""
    texts = directory.read_present(name, TEXTS)
    if _unnamed(texts, addresses) is not texts:
        directory.write_table(name, _unnamed(directory.read_table(name), addresses))


def _mask(value: str, addresses: set[str]) -> str:
    words = value.split(" ")
    return " ".join(ERASED if word in addresses else word for word in words)


def _without(body: Any, needles: list[str]) -> Any:
    """A report's body without the rows or sections that name what was erased."""
    if isinstance(body, list):
        return [row for row in body if not _names(json.dumps(row, ensure_ascii=False), needles)]
    text = str(body)
    sections = text.split("\n### ")
    return "\n### ".join(part for part in sections if not _names(part, needles)) or ERASED


def _names(text: str, needles: list[str]) -> bool:
    """Whether a text names one of these addresses or hosts (or a host below one) as a whole."""
    return any(needle in text and _whole(needle).search(text) for needle in needles)


def _whole(needle: str) -> re.Pattern[str]:
    further = r"[\w/%?&=~+-]|[.:;,@]\w" if "//" in needle else r"[\w-]|\.\w"
    return re.compile(rf"(?<![\w-]){re.escape(needle)}(?!{further})")


def _blank(directory: Directory, name: str, forgotten: Forgotten, found: _Found) -> None:
    """Overwrite the records of what is erased with padding of the same length."""
    data = directory.read_bytes(name)
    pieces, clean = [], 0
    for start, stop in _runs(data, forgotten, found):
        pieces += [data[clean:start], warc.padding(stop - start, NOTE)]
        clean = stop
    if pieces:
        directory.write_bytes(name, b"".join([*pieces, data[clean:]]))


def _runs(data: bytes, forgotten: Forgotten, found: _Found) -> Iterator[tuple[int, int]]:
    """Ranges of neighbouring records that go."""
    open_at = end = 0
    for member in warc.members(data):
        if not _is_about(member, forgotten, found):
            continue
        if end != member.offset:
            if end > open_at:
                yield open_at, end
            open_at = member.offset
        end = member.offset + member.length
    if end > open_at:
        yield open_at, end


def _is_about(member: warc.Member, forgotten: Forgotten, found: _Found) -> bool:
    if member.kind == b"warcinfo":
        return False
    ids = {member.field(name).decode() for name in (b"warc-record-id", b"warc-concurrent-to")}
    if ids & found.records:
        return True
    target = member.field(b"warc-target-uri").decode("utf-8", "replace")
    return target in found.addresses or forgotten.address(target) is not None


def _unfinished(
    store: Store, forgotten: Forgotten, payloads: _Payloads
) -> Iterator[tuple[str, str]]:
    """Half-made artifacts that hold some of it: a later run would take up their shards."""
    for stage in store.stages():
        for fingerprint in store.unfinished(stage):
            directory = store.directory(stage, fingerprint)
            tables = [name for name in directory.names() if name.endswith(".parquet")]
            if _search(directory, tables, forgotten, payloads).rows:
                yield stage, fingerprint


def _unsearchable(store: Store) -> Iterator[tuple[str, str]]:
    """Half-made artifacts of which no table tells whose text they hold: arrays of tokens, hashed
    lines and names. Without a manifest nothing says what they are made of, so all of them go.
    """
    for stage in store.stages():
        if stage not in TOLD_BY_TABLES:
            yield from ((stage, fingerprint) for fingerprint in store.unfinished(stage))


def _scratch(settings: Settings, stage: str, fingerprint: str) -> Path:
    return settings.home / "work" / f"{stage}-{fingerprint[:16]}"


def _clear_scratch(settings: Settings) -> None:
    """Remove what unfinished stages keep on this machine alone, such as copies of source files."""
    for path in (settings.home / "work").glob("*"):
        if path.name.rpartition("-")[0] not in TOLD_BY_TABLES:
            shutil.rmtree(path, ignore_errors=True)
