"""Text that is already there: folders, JSON Lines, Parquet and WARC files as documents."""

import errno
import gzip
import json
import os
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from documents_of import documents, rows
from inline_shards import stages_inline
from shared_data import shared

from flows.corpus import CorpusParams
from tasks.corpus import extract as extract_module
from tasks.corpus.documents import DOCUMENTS, Removal, document_id
from tasks.corpus.gather import GatherConfig, gather
from tasks.corpus.records import Fetched
from tasks.corpus.source_config import SourceConfig
from tasks.corpus.source_rows import rows_of
from tasks.runtime.errors import UserError
from tasks.runtime.manifest import Manifest
from tasks.runtime.store import REPORT, Store

PARAGRAPH = "A paragraph with enough words in it to be taken for the text of the page. " * 5


@pytest.fixture(autouse=True)
def inbox(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with stages_inline(monkeypatch, tmp_path / "home"):
        folder = tmp_path / "home" / "sources"
        folder.mkdir(parents=True)
        yield folder


def gathered(*sources: SourceConfig, **inputs: Manifest) -> Manifest:
    return gather(GatherConfig(sources=sources), **inputs)


def pdf(text: str) -> bytes:
    """A file of one page with this line on it, cross-reference table and all."""
    stream = f"BT /F1 12 Tf 72 720 Td ({text}) Tj ET".encode()
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents 4 0 R "
        b"/Resources << /Font << /F1 5 0 R >> >> >>",
        b"<< /Length %d >>\nstream\n%s\nendstream" % (len(stream), stream),
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    data, offsets = b"%PDF-1.4\n", []
    for number, body in enumerate(objects, 1):
        offsets.append(len(data))
        data += b"%d 0 obj\n%s\nendobj\n" % (number, body)
    table = b"".join(b"%010d 00000 n \n" % offset for offset in offsets)
    trailer = b"trailer\n<< /Size 6 /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF" % len(data)
    return data + b"xref\n0 6\n0000000000 65535 f \n" + table + trailer


def test_a_folder_of_text_markdown_html_and_pdf(inbox: Path) -> None:
    (inbox / "deep").mkdir()
    (inbox / "a.txt").write_text(f"Plain.\r\n\x00{PARAGRAPH}")
    (inbox / "deep" / "b.md").write_text(f"# Heading\n\n{PARAGRAPH}\n\n```\ncode()\n```\n")
    html = f"<html><head><title>T</title></head><body><article><p>{PARAGRAPH}</p></article></body>"
    (inbox / "c.html").write_text(html)
    (inbox / "d.pdf").write_bytes(pdf("Words in a PDF file"))
    (inbox / "e.pdf").write_bytes(b"%PDF-1.4 and nothing more")
    (inbox / "f.txt").write_text("  \n")
    for other in ("picture.png", "deep/other.PNG", "deep/words.docx", "README"):
        (inbox / other).write_bytes(b"\x89PNG")
    manifest = gathered(SourceConfig(name="inbox", path=str(inbox)))
    found = {row["url"].removeprefix("file://inbox/"): row for row in rows(manifest)}
    assert list(found) == ["a.txt", "c.html", "d.pdf", "deep/b.md"]
    assert found["a.txt"]["text"] == f"Plain.\n{PARAGRAPH}".strip()
    assert "```\ncode()" in found["deep/b.md"]["text"]
    assert found["c.html"]["title"] == "T"
    assert found["d.pdf"]["text"] == "Words in a PDF file"
    assert found["d.pdf"]["warc"] == "inbox:d.pdf"
    assert set(found["a.txt"]) == set(DOCUMENTS.names)
    assert found["a.txt"]["id"] == document_id(found["a.txt"]["text"])
    assert manifest.rules == {"not-parsed": 1, "no-text": 1}
    assert manifest.counts["files_not_read"] == 4
    reports = json.loads(Store.open().of(manifest).read_bytes(REPORT))
    [row] = next(report["body"] for report in reports if report["key"] == "sources")
    assert row["files not read"] == "2 .png, 1 (none), 1 .docx"


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".jsonl.zst", ".jsonl.bz2"])
def test_json_lines(inbox: Path, ending: str) -> None:
    lines = [
        json.dumps({"body": "first text", "link": "http://e.org/1", "title": "one"}),
        "{broken",
        "",
        json.dumps(["no", "object"]),
        json.dumps({"other": 1}),
        json.dumps({"body": "second \ud800 text", "date": "2020-01-01"}),
        json.dumps({"body": "x" * 100_000}),
        json.dumps({"body": "last"}),
    ]
    with pa.output_stream(
        str(inbox / f"rows{ending}"),
        compression={".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}.get(Path(ending).suffix),
    ) as out:
        out.write("\n".join(lines).encode())
    source = SourceConfig(
        name="rows", path=str(inbox), format="jsonl", text_field="body", url_field="link"
    )
    config = GatherConfig(
        sources=(source,), extract=extract_module.ExtractConfig(largest_page_megabytes=0.05)
    )
    manifest = gather(config)
    found = rows(manifest)
    assert [row["text"] for row in found] == ["first text", "second ? text", "last"]
    assert found[0]["url"] == "http://e.org/1" and found[0]["title"] == "one"
    assert found[1]["url"] == f"file://rows/rows{ending}#5" and found[1]["date"] == "2020-01-01"
    assert manifest.rules == {"not-json": 2, "no-text": 1, "too-large": 1}


def test_rows_that_no_parser_likes_are_counted_and_the_rest_is_kept(inbox: Path) -> None:
    odd = {"text": "row with an odd address", "url": "http://[odd", "title": "a \ud800 title"}
    lines = ["[" * 100_000, json.dumps(odd), json.dumps({"text": "last row"})]
    (inbox / "a.jsonl").write_text("\n".join(lines))
    bad = pa.py_buffer(b"\xff no UTF-8")
    bounds = pa.array([0, len(bad)], pa.int32()).buffers()[1]
    text = pa.Array.from_buffers(pa.string(), 1, [None, bounds, bad])
    pq.write_table(pa.table({"text": text}), inbox / "b.parquet")
    manifest = gathered(
        SourceConfig(name="rows", path=str(inbox / "a.jsonl"), format="jsonl"),
        SourceConfig(name="table", path=str(inbox / "b.parquet"), format="parquet"),
    )
    assert [(row["url"], row["title"], row["text"]) for row in rows(manifest)] == [
        ("file://rows/a.jsonl#1", "a ? title", "row with an odd address"),
        ("file://rows/a.jsonl#3", "", "last row"),
        ("file://table/b.parquet#1", "", "\ufffd no UTF-8"),
    ]
    assert manifest.rules == {"not-json": 1}


def test_what_stands_before_damage_is_kept(inbox: Path) -> None:
    whole = gzip.compress(b"".join(b'{"text": "row %d of it"}\n' % n for n in range(12_000)))
    (inbox / "a.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    (inbox / "b.jsonl").write_text('{"text": "whole"}\n')
    manifest = gathered(SourceConfig(name="clipped", path=str(inbox), format="jsonl"))
    assert manifest.rules == {"damaged-file": 1}
    assert 1000 < manifest.counts["documents"] < 12_000
    assert rows(manifest)[-1]["text"] == "whole"
    (inbox / "c.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(UserError, match=r"'damaged-file' removed 1 .* check that the files are"):
        gathered(SourceConfig(name="clipped", path=str(inbox), format="parquet"))


def test_parquet_reads_only_the_columns_it_needs(inbox: Path) -> None:
    table = pa.table(
        {"content": ["one", None, "three"], "url": ["http://e/1", "", None], "vector": [[1.0]] * 3}
    )
    pq.write_table(table, inbox / "a.parquet")
    source = SourceConfig(
        name="pq", path=str(inbox / "a.parquet"), format="parquet", text_field="content"
    )
    manifest = gathered(source)
    found = [(row["text"], row["url"]) for row in rows(manifest)]
    assert found == [("one", "http://e/1"), ("three", "file://pq/a.parquet#3")]
    assert manifest.rules == {"no-text": 1}


def test_warc_files_and_lists_of_them(inbox: Path) -> None:
    for name in ("sample-0000.warc.gz", "sample-0001.warc.gz"):
        (inbox / name).write_bytes(shared(f"warc/{name}").read_bytes())
    (inbox / "plain.warc").write_bytes(
        gzip.decompress((inbox / "sample-0000.warc.gz").read_bytes())
    )
    (inbox / "warc.paths.gz").write_bytes(gzip.compress(b"sample-0000.warc.gz\n# no\n\n"))
    one = gathered(SourceConfig(name="w", path=str(inbox / "warc.paths.gz"), format="warc-list"))
    assert one.counts["seen"] == 22 and one.counts["documents"] >= 20
    first = rows(one)[0]
    assert first["url"].startswith("http") and first["record_id"].startswith("<urn:uuid:")
    with open(inbox / first["warc"].removeprefix("w:"), "rb") as file:
        file.seek(first["offset"])
        assert file.read(2) == b"\x1f\x8b"
    stated = {row["url"]: row["canonical"] for row in rows(one)}
    assert sum(bool(canonical) for canonical in stated.values()) > 3
    plain = gathered(SourceConfig(name="w", path=str(inbox / "plain.warc"), format="warc"))
    assert [row["text"] for row in rows(plain)] == [row["text"] for row in rows(one)]
    every = gathered(SourceConfig(name="w", path=str(inbox), format="warc"))
    assert every.counts["seen"] > 2 * 22


def test_sources_stand_beside_the_pages_of_the_seeds(inbox: Path) -> None:
    (inbox / "a.txt").write_text("From the folder.")
    crawled = documents({f"http://e.org/{n}": f"Page {n}." for n in range(6)})
    source = SourceConfig(name="inbox", path=str(inbox), licence="CC0-1.0")
    manifest = gathered(source, crawled=crawled)
    assert [row["url"] for row in rows(manifest)][-2:] == ["http://e.org/5", "file://inbox/a.txt"]
    assert manifest.counts["documents_seeds"] == 6
    assert manifest.counts["documents_inbox"] == 1


def test_a_source_is_known_by_its_content_not_by_its_place(inbox: Path) -> None:
    (inbox / "one").mkdir()
    (inbox / "one" / "a.txt").write_text("The same text.")
    first = gathered(SourceConfig(name="s", path=str(inbox / "one")))
    (inbox / "one").rename(inbox / "two")
    moved = SourceConfig(name="s", path=str(inbox / "two"))
    assert gathered(moved).fingerprint == first.fingerprint
    os.utime(inbox / "two" / "a.txt", (0, 0))
    assert gathered(moved).fingerprint == first.fingerprint
    (inbox / "two" / "a.txt").write_text("Another text.")
    assert gathered(moved).fingerprint != first.fingerprint


def test_only_what_lies_below_a_root_is_read(
    inbox: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret.txt").write_text("secret")
    for path in (str(outside), str(inbox / ".." / ".." / "outside"), "/etc"):
        with pytest.raises(UserError, match=r"lies outside .* set GRISTMILL_SOURCE_ROOTS"):
            gathered(SourceConfig(name="s", path=path))
    (inbox / "link.txt").symlink_to(outside / "secret.txt")
    with pytest.raises(UserError, match="lies outside"):
        gathered(SourceConfig(name="s", path=str(inbox)))
    (inbox / "list").write_text(str(outside / "secret.txt"))
    with pytest.raises(UserError, match="lies outside"):
        gathered(SourceConfig(name="s", path=str(inbox / "list"), format="warc-list"))
    monkeypatch.setenv("GRISTMILL_SOURCE_ROOTS", f"{inbox}{os.pathsep}{outside}")
    assert gathered(SourceConfig(name="s", path=str(outside))).counts["documents"] == 1


def test_mistakes_are_one_sentence(inbox: Path) -> None:
    with pytest.raises(UserError, match="does not exist; check the path"):
        gathered(SourceConfig(name="s", path=str(inbox / "no")))
    with pytest.raises(UserError, match=r"no file of format 'parquet' \(\.parquet\)"):
        gathered(SourceConfig(name="s", path=str(inbox), format="parquet"))
    (inbox / "list").write_text("not-there.warc.gz\n")
    with pytest.raises(UserError, match=r"lists 'not-there.warc.gz', which is not in"):
        gathered(SourceConfig(name="s", path=str(inbox / "list"), format="warc-list"))
    with pytest.raises(ValueError, match="neither seeds nor sources"):
        CorpusParams(seeds=())
    twice = (SourceConfig(name="s", path="a"), SourceConfig(name="s", path="b"))
    with pytest.raises(ValueError, match="each needs its own name"):
        CorpusParams(sources=twice)


@pytest.mark.parametrize(
    ("listing", "told"),
    [
        (
            gzip.compress(b"a.warc.gz\n" * 1000, mtime=0)[:40],
            r"list .*list' cannot be read \(Compressed",
        ),
        (b"\x1f\x8b no gzip at all", r"the list .*list' cannot be read \(Unknown compression"),
        (b"a\x00b.warc\n", r"lists .*x00b.warc' cannot be looked at \(embedded null byte\)"),
        (b"a" * 5000, r"lists .{,220} cannot be looked at \(File name too long\); check the path"),
        (None, r"the list .*list' cannot be read \(Is a directory\); check that"),
    ],
)
def test_an_odd_list_is_told_in_a_sentence(inbox: Path, listing: bytes | None, told: str) -> None:
    if listing is None:
        (inbox / "list").mkdir()
    else:
        (inbox / "list").write_bytes(listing)
    with pytest.raises(UserError, match=f"source 's'.* {told}"):
        gathered(SourceConfig(name="s", path=str(inbox / "list"), format="warc-list"))


def test_a_path_that_is_none_is_told_in_a_sentence(inbox: Path) -> None:
    for name in ("a\x00b", "a" * 300):
        with pytest.raises(UserError, match=r"'s': .* cannot be looked at \(.*check the path"):
            gathered(SourceConfig(name="s", path=str(inbox / name)))


def test_a_file_that_may_not_be_read_is_named(inbox: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refusing(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    (inbox / "a.txt").write_text("Private.")
    # Not by chmod: root may read every file.
    monkeypatch.setattr("tasks.corpus.source_config.open", refusing, raising=False)
    with pytest.raises(UserError, match=r"'a.txt' cannot be read \(Permission denied\); make it"):
        gathered(SourceConfig(name="s", path=str(inbox)))


def test_dates_that_nobody_can_read_cost_no_row(inbox: Path) -> None:
    texts = ["first text", "second text", "third text"]
    seconds = pa.array([0, 2**62, None], pa.int64())
    for name, date in (
        ("far", seconds.cast(pa.timestamp("us"))),
        ("zone", seconds.cast(pa.timestamp("us", tz="Foo/Bar"))),
        ("good", pa.array([0, 1, None], pa.int64()).cast(pa.timestamp("us"))),
    ):
        pq.write_table(pa.table({"text": texts, "date": date}), inbox / f"{name}.parquet")
    made = gathered(SourceConfig(name="s", path=str(inbox), format="parquet"))
    assert [row["text"] for row in rows(made)] == texts * 3
    first = "1970-01-01 00:00:00"
    stated = [row["date"] for row in rows(made)]
    assert stated == [first, "", "", first, f"{first}.000001", "", "", "", ""]
    assert made.rules == {}


def test_a_record_far_too_large_is_counted_without_being_read(inbox: Path) -> None:
    head = "WARC/1.1\r\nWARC-Type: response\r\nWARC-Target-URI: http://e.org/{}\r\n"
    head += "Content-Type: application/http; msgtype=response\r\nContent-Length: {}\r\n\r\n"
    video = b"HTTP/1.1 200 OK\r\nContent-Type: video/mp4\r\n\r\n"
    text = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n\r\n" + PARAGRAPH.encode()
    size = 300 << 20
    with open(inbox / "a.warc", "wb") as out:
        out.write(head.format("video", len(video) + size).encode() + video)
        out.seek(size, os.SEEK_CUR)  # a hole: it takes no room on the disk
        out.write(b"\r\n\r\n" + head.format("text", len(text)).encode() + text + b"\r\n\r\n")
    source = SourceConfig(name="s", path=str(inbox), format="warc")
    tracemalloc.start()
    found = list(rows_of(source, inbox / "a.warc", "a.warc", 10 << 20))
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [about["url"] for about, _ in found] == ["http://e.org/video", "http://e.org/text"]
    assert isinstance(found[0][1], Removal) and found[0][1].rule == "too-large"
    assert isinstance(found[1][1], Fetched)
    assert most < 100 << 20


def test_large_rows_of_parquet_are_read_a_few_at_a_time(inbox: Path) -> None:
    texts = ["x" * (8 << 20), "é" * 600_000, None, "short"] * 40
    table = pa.table({"text": texts})
    pq.write_table(table, inbox / "a.parquet", use_dictionary=False, write_batch_size=4)
    source = SourceConfig(name="s", path=str(inbox), format="parquet")
    before = pa.total_allocated_bytes()
    most = 0
    rules: list[str] = []
    for _, content in rows_of(source, inbox / "a.parquet", "a.parquet", 1 << 20):
        most = max(most, pa.total_allocated_bytes() - before)
        rules.append(content.rule if isinstance(content, Removal) else str(content))
    assert rules == ["too-large", "too-large", "no-text", "short"] * 40
    assert most < 250 << 20  # of 370 in the file


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_large_file_is_the_work_of_many(
    inbox: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [f"Text {n}. " + "words " * (n % 40) for n in range(400)]
    path = inbox / f"large.{kind}"
    if kind == "parquet":
        pq.write_table(pa.table({"text": texts}), path, row_group_size=30, compression="none")
    else:
        rows_of_it = [json.dumps({"text": text}) for text in texts]
        rows_of_it[7] = ""  # is no row
        rows_of_it[50] = "{broken"
        rows_of_it[200] = json.dumps({"text": "x" * 60_000})  # too large, and over several pieces
        path.write_text("\n".join(rows_of_it))
    (inbox / f"small.{kind}").write_bytes(path.read_bytes()[:10])
    source = SourceConfig(name="large", path=str(inbox), format=kind)
    config = GatherConfig(
        sources=(source,), extract=extract_module.ExtractConfig(largest_page_megabytes=0.05)
    )

    def known(made: Manifest) -> list[tuple[Any, ...]]:
        return [
            (row["url"], row["offset"], row["id"])
            for prefix in ("documents-", "rejected-")
            for row in sorted(rows(made, prefix), key=lambda row: (row["warc"], row["offset"]))
        ]

    whole = gather(config)
    expected = known(whole)
    Store.open().of(whole).remove()
    monkeypatch.setattr("tasks.corpus.source_pieces.PIECE_BYTES", 5_000)
    divided = gather(config)
    assert known(divided) == expected
    assert divided.rules == whole.rules
    assert len(divided.names("rejected-")) > 5 > len(whole.names("rejected-"))
