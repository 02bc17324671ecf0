"""The extract stage on real and on hostile records."""

import pytest
from crawled import Page, SegmentsConfig, crawl, html, segments_of
from inline_shards import stages_inline
from shared_data import shared

from tasks.corpus import extract as extract_module
from tasks.corpus.documents import DOCUMENTS, document_id
from tasks.corpus.extract import ExtractConfig, extract
from tasks.runtime.errors import UserError
from tasks.runtime.manifest import Manifest
from tasks.runtime.store import Store

PARAGRAPH = "<p>A paragraph with enough words in it to be taken for the text of the page.</p>" * 5


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    with stages_inline(monkeypatch, tmp_path / "home"):
        yield tmp_path


def rows(manifest: Manifest, prefix: str = "documents-") -> list[dict]:
    return [row for table in Store.open().tables(manifest, prefix) for row in table.to_pylist()]


def page(name: str, body: str = "", **options) -> Page:
    return Page(url=f"http://example.org/{name}", body=body or html(name, PARAGRAPH), **options)


def test_documents_point_at_their_record() -> None:
    crawled = crawl(page("a"), page("b", status=404), page("c"))
    manifest = extract(ExtractConfig(), crawl=crawled)
    documents = rows(manifest)
    assert [d["url"] for d in documents] == ["http://example.org/a", "http://example.org/c"]
    first = documents[0]
    assert set(first) == set(DOCUMENTS.names)
    assert first["id"] == document_id(first["text"])
    assert first["title"] == "a"
    assert first["bytes"] == len(first["text"].encode())
    directory = Store.open().of(crawled)
    with directory.filesystem.open_input_file(directory.location(first["warc"])) as segment:
        segment.seek(first["offset"])
        assert segment.read(2) == b"\x1f\x8b"
    assert first["record_id"] == "<urn:uuid:0>"


LINKED = (("Link", '<https://h/plain>; rel="canonical"'),)


def test_documents_know_their_canonical_address() -> None:
    head = '<link rel="canonical" href="/better">'
    pages = (
        Page(url="http://h/a", body=html("A", PARAGRAPH, head=head)),
        Page(url="http://h/b", body="Plain text.", content_type="text/plain", headers=LINKED),
        Page(url="http://h/c", body=html("C", PARAGRAPH)),
    )
    made = crawl(*pages)
    segment = Store.open().of(made).location("warc/00000.warc.gz")
    scanned = extract(ExtractConfig(), crawl=segments_of(SegmentsConfig(segments=(segment,))))
    assert [row["canonical"] for row in rows(scanned)] == ["http://h/better", "https://h/plain", ""]
    # A crawl has looked already, and may know the site by another name.
    known = Page(
        url="embedded://x/a", canonical="embedded://x/b", body=html("A", PARAGRAPH, head=head)
    )
    assert rows(extract(ExtractConfig(), crawl=crawl(known)))[0]["canonical"] == "embedded://x/b"


def test_every_removed_page_is_counted_by_rule_and_kept_for_inspection() -> None:
    noindex = html("n", PARAGRAPH, head='<meta name="robots" content="noindex">')
    manifest = extract(
        ExtractConfig(largest_page_megabytes=0.05),
        crawl=crawl(
            page("good"),
            page("gone", status=410),
            page("picture", content_type="image/png"),
            page("meta", noindex),
            page("header", headers=(("X-Robots-Tag", "noindex, nofollow"),)),
            page("empty", "<html><body><script>render()</script></body></html>"),
            page("large", html("large", PARAGRAPH * 500)),
        ),
    )
    expected = {"status": 1, "content-type": 1, "noindex": 2, "no-text": 1, "too-large": 1}
    assert manifest.rules == expected
    assert manifest.counts["documents"] == 1
    rejected = {row["url"].rsplit("/", 1)[-1]: row for row in rows(manifest, "rejected-")}
    assert rejected["gone"]["reason"] == "answered with status 410"
    assert rejected["empty"]["text"].startswith("<html>")


def test_directives_in_headers_are_for_those_they_name() -> None:
    ours = (("X-Robots-Tag", "otherbot: nofollow"), ("X-Robots-Tag", "gristmill: noindex"))
    everybodys = (("X-Robots-Tag", "otherbot: nofollow"), ("X-Robots-Tag", "noindex"))
    manifest = extract(
        ExtractConfig(),
        crawl=crawl(
            page("theirs", headers=(("X-Robots-Tag", "googlebot: nofollow, noindex"),)),
            page("ours", headers=ours),
            page("everybodys", headers=everybodys),
            page("reserved", headers=(("X-Robots-Tag", "noimageindex, noai"),)),
        ),
    )
    assert [row["title"] for row in rows(manifest)] == ["theirs"]
    assert manifest.rules == {"noindex": 2, "opt-out": 1}


@pytest.mark.parametrize("extractor", ["trafilatura", "resiliparse"])
def test_a_pathological_page_stalls_nothing(extractor) -> None:
    deep = "<div>" * 200_000 + "x"
    slow = html("slow", "<table><tr><td>" * 40_000 + "word " * 1000)
    config = ExtractConfig(seconds_per_document=1.0, extractor=extractor)
    manifest = extract(config, crawl=crawl(page("a"), page("d", deep), page("s", slow), page("z")))
    urls = [row["url"] for row in rows(manifest)]
    assert urls[0].endswith("/a")
    assert urls[-1].endswith("/z")
    named = {"time-limit", "crashed", "memory-limit", "too-deep", "not-parsed", "no-text"}
    assert set(manifest.rules) <= named
    assert sum(manifest.rules.values()) + manifest.counts["documents"] == 4


def test_what_a_too_deep_page_lost_is_counted_by_name() -> None:
    deep = html("deep", PARAGRAPH, "<div>" * 5000, PARAGRAPH)
    manifest = extract(ExtractConfig(), crawl=crawl(page("a"), page("deep", deep)))
    assert manifest.counts["documents"] == 2
    assert manifest.metrics["mended_nested-too-deep"] == 1


def test_a_page_beyond_the_time_limit_is_counted() -> None:
    slow = html("slow", "".join(f"<p>{'word ' * 30}{number}</p>" for number in range(20_000)))
    config = ExtractConfig(seconds_per_document=0.3)
    manifest = extract(config, crawl=crawl(page("a"), page("slow", slow), page("z")))
    assert manifest.rules == {"time-limit": 1}
    assert manifest.counts["documents"] == 2


def test_segments_of_others_are_scanned_and_their_damage_counted(tmp_path) -> None:
    whole = shared("warc/sample-0000.warc.gz")
    data = bytearray(shared("warc/sample-0001.warc.gz").read_bytes())
    intact = extract(ExtractConfig(), crawl=segments_of(SegmentsConfig(segments=(str(whole),))))
    assert intact.counts["seen"] == 22
    assert intact.counts["documents"] >= 20
    data[30_000:30_020] = bytes(20)
    damaged = tmp_path / "damaged.warc.gz"
    damaged.write_bytes(data[:150_000])
    both = SegmentsConfig(segments=(str(whole), str(damaged)))
    manifest = extract(ExtractConfig(shard_megabytes=0.2), crawl=segments_of(both))
    assert manifest.rules["damaged-record"] == 2
    assert manifest.counts["documents"] > intact.counts["documents"]
    assert len(manifest.names("documents-")) > 2
    texts = " ".join(row["text"] for row in rows(manifest))
    assert "\x00" not in texts


def test_nothing_left_names_the_rule_and_the_remedy() -> None:
    with pytest.raises(UserError, match=r"none of 2 pages: rule 'status' removed 2 .* 503"):
        extract(ExtractConfig(), crawl=crawl(page("a", status=503), page("b", status=503)))
    with pytest.raises(UserError, match="no pages at all; check the seeds"):
        extract(ExtractConfig(), crawl=crawl())


def test_an_interrupted_stage_repeats_no_finished_shard(monkeypatch) -> None:
    pages = [page(str(number), html(str(number), PARAGRAPH * 40)) for number in range(6)]
    config = ExtractConfig(shard_megabytes=0.01)
    calls: list[int] = []
    real = extract_module.extract_shard

    def counted(work, number, *rest):
        calls.append(number)
        if number == 3 and calls.count(3) == 1:
            raise ConnectionError("the machine went away")
        return real(work, number, *rest)

    monkeypatch.setattr(extract_module, "extract_shard", counted)
    with pytest.raises(ConnectionError):
        extract(config, crawl=crawl(*pages))
    manifest = extract(config, crawl=crawl(*pages))
    assert calls == [0, 1, 2, 3, 3, 4, 5]
    assert manifest.counts["documents"] == 6
    assert not [name for name in manifest.names() if name.startswith("_")]
