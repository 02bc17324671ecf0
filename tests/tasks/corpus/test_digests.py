"""Payload digests: one form to compare, and documents of any WARC file are forgotten by them."""

import base64
import gzip
import hashlib
from pathlib import Path

import pytest
from documents_of import rows
from hypothesis import given
from hypothesis import strategies as st
from inline_shards import stages_inline
from test_gather import PARAGRAPH
from test_records import plain

from tasks.corpus.digests import canonical_digest
from tasks.corpus.gather import GatherConfig, gather
from tasks.corpus.source_config import SourceConfig
from tasks.corpus.tombstoned import forget, parse, standing_tombstones
from tasks.runtime.manifest import Manifest
from tasks.runtime.settings import Settings
from tasks.state.tombstones import Tombstones

NAMES = ("sha1-known", "sha256-known", "nothing-known", "stays")


@given(st.binary(max_size=100), st.sampled_from(["sha1", "sha256"]))
def test_every_spelling_of_a_digest_is_one(payload: bytes, algorithm: str) -> None:
    digest = hashlib.new(algorithm, payload)
    base32 = base64.b32encode(digest.digest()).decode()
    wanted = f"{algorithm}:{base32.rstrip('=')}"
    for spelling in (base32, base32.rstrip("="), base32.lower(), digest.hexdigest()):
        assert canonical_digest(f"{algorithm}:{spelling}") == wanted
        assert canonical_digest(f"{algorithm.upper()}:{spelling}") == wanted
    assert canonical_digest(wanted) == wanted


@given(st.text(max_size=80))
def test_other_text_is_no_digest(text: str) -> None:
    assert canonical_digest(text) == "" or ":" in text
    assert canonical_digest(f"md5:{text}") == ""


def body(name: str) -> bytes:
    return f"<html><body><article><p>{name}. {PARAGRAPH}</p></article></body></html>".encode()


def record(name: str, digest: str) -> bytes:
    http = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n" + body(name)
    head, block = plain(http, url=f"http://example.org/{name}").split(b"\r\n\r\n", 1)
    if digest:
        head += b"\r\nWARC-Payload-Digest: " + digest.encode()
    return gzip.compress(head + b"\r\n\r\n" + block)


def sha1(name: str) -> str:
    return "sha1:" + base64.b32encode(hashlib.sha1(body(name)).digest()).decode()


@pytest.fixture
def gathered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with stages_inline(monkeypatch, tmp_path / "home"):
        inbox = tmp_path / "home" / "sources"
        inbox.mkdir(parents=True)
        known = {
            "sha1-known": sha1("sha1-known"),
            "sha256-known": "sha-256:" + hashlib.sha256(body("sha256-known")).hexdigest(),
        }
        data = b"".join(record(name, known.get(name, "")) for name in NAMES)
        (inbox / "a.warc.gz").write_bytes(data)
        source = SourceConfig(name="w", path=str(inbox / "a.warc.gz"), format="warc")
        yield gather(GatherConfig(sources=(source,)))


def test_a_document_of_a_warc_file_is_forgotten_by_its_payload(gathered: Manifest) -> None:
    found = {row["url"].rpartition("/")[2]: row["digest"] for row in rows(gathered)}
    assert found["sha1-known"] == sha1("sha1-known")
    assert found["nothing-known"].startswith("sha256:")  # of the body, where the record has none
    state = Tombstones(Settings.load().database_url)
    asked = (
        sha1("sha1-known"),
        "sha256:" + hashlib.sha256(body("nothing-known")).hexdigest(),
        found["sha256-known"] + "====",
    )
    for what in asked:
        state.add(*parse(what), "the author asked")
    standing = standing_tombstones()
    assert standing is not None
    left = forget(standing, documents=gathered)
    assert [row["url"] for row in rows(left)] == ["http://example.org/stays"]
    assert left.rules == {"tombstoned": 3}
