"""Sources behind http and on other filesystems, and the weights of sources."""

import gzip
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from aiohttp import web
from documents_of import rows
from inline_shards import stages_inline
from loopback_site import LoopbackSite
from shared_data import shared

from tasks.corpus.gather import GatherConfig, gather
from tasks.corpus.source_config import SourceConfig, content_digest
from tasks.corpus.weights import copies, rounds
from tasks.runtime.errors import Unavailable, UserError
from tasks.runtime.manifest import Manifest
from tasks.runtime.settings import Settings

NAME = "warc/sample-0000.warc.gz"


@pytest.fixture(autouse=True)
def inbox(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    with stages_inline(monkeypatch, tmp_path / "home"):
        folder = tmp_path / "home" / "sources"
        folder.mkdir(parents=True)
        yield folder


def gathered(*sources: SourceConfig) -> Manifest:
    return gather(GatherConfig(sources=sources))


def file_of(data: bytes, etag: str = "1") -> Callable[[], web.Response]:
    return lambda: web.Response(body=data, headers={"ETag": etag})


def listed(*paths: str) -> bytes:
    return gzip.compress("\n".join(paths).encode())


def test_a_common_crawl_path_list_over_http(
    inbox: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    data = shared(NAME).read_bytes()
    (inbox / "sample.warc.gz").write_bytes(data)
    local = gathered(SourceConfig(name="cc", path=str(inbox), format="warc"))
    site = LoopbackSite({})
    site.pages = {
        "/crawl/warc.paths.gz": file_of(listed(*(f"crawl/data/{n}.warc.gz" for n in "abc"))),
        "/crawl/data/a.warc.gz": file_of(data),
        "/crawl/data/b.warc.gz": file_of(data[:20_000]),
    }
    with site:
        roots = f"{inbox}:{site.url}/crawl"
        monkeypatch.setenv("GRISTMILL_SOURCE_ROOTS", roots)
        source = SourceConfig(
            name="cc", path=f"{site.url}/crawl/warc.paths.gz", base=site.url, format="warc-list"
        )
        made = gathered(source)
        one = SourceConfig(name="a", path=f"{site.url}/crawl/data/a.warc.gz", format="warc")
        before = content_digest(one, Settings.load())
        site.pages["/crawl/data/a.warc.gz"] = file_of(data, etag="2")
        assert content_digest(one, Settings.load()) != before
    whole = Counter(row["text"] for row in rows(local))
    assert whole <= Counter(row["text"] for row in rows(made))
    places = {row["warc"] for row in rows(made)}
    assert places == {"cc:crawl/data/a.warc.gz", "cc:crawl/data/b.warc.gz"}
    assert (made.rules["damaged-record"], made.rules["missing-file"]) == (1, 1)
    assert not list((tmp_path / "home" / "work").rglob("*.gz"))  # copies are gone


def test_only_what_lies_below_a_remote_root_is_asked_for(
    inbox: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = LoopbackSite({"/secret.warc.gz": file_of(b"")})
    pages: dict[str, Any] = {}
    with secret, LoopbackSite(pages) as site:
        away = f"{secret.url}/secret.warc.gz"
        site.pages["/cc/away.warc.gz"] = lambda: web.Response(
            status=302, headers={"Location": away}
        )
        site.pages["/cc/list"] = file_of(listed("../../secret.warc.gz"))

        def refused(path: str, form: Any = "warc") -> str:
            with pytest.raises(UserError) as raised:
                gathered(SourceConfig(name="cc", path=path, format=form))
            return str(raised.value)

        assert "none of the remote roots (none)" in refused(away)
        monkeypatch.setenv("GRISTMILL_SOURCE_ROOTS", f"{site.url}/cc/")
        assert "none of the remote roots" in refused(away)
        assert "none of the remote roots" in refused(f"{site.url}/cc-other/x.warc.gz")
        assert "redirects to" in refused(f"{site.url}/cc/away.warc.gz")
        assert "none of the remote roots" in refused(f"{site.url}/cc/list", "warc-list")
        assert "answered 404" in refused(f"{site.url}/cc/missing.warc.gz")
        assert "lies outside the directories" in refused("/etc/passwd")
    assert not secret.requests


def test_a_server_that_does_not_answer_is_unavailable_and_told_in_a_sentence(
    inbox: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def hangs_up(request: web.Request) -> web.Response:
        assert request.transport is not None
        request.transport.abort()
        return web.Response()

    def told(path: str) -> str:
        with pytest.raises(UserError) as raised:
            gathered(SourceConfig(name="cc", path=path, format="warc"))
        assert isinstance(raised.value, Unavailable) == ("one two" not in path)
        return str(raised.value)

    with LoopbackSite({"/x.warc.gz": hangs_up, "/busy": lambda: web.Response(status=503)}) as site:
        dead = "http://127.0.0.1:9"
        monkeypatch.setenv("GRISTMILL_SOURCE_ROOTS", f"{dead}:{site.url}")
        assert told(f"{dead}/x.warc.gz") == (
            f"source 'cc': '{dead}/x.warc.gz' does not answer ([Errno 111] Connection refused); "
            "check the address and the network"
        )
        assert "x.warc.gz' does not answer (" in told(f"{site.url}/x.warc.gz")
        assert "busy' answered 503; try again later" in told(f"{site.url}/busy")
        assert "is no address that can be asked for" in told(f"{site.url}/one two")


def test_a_server_that_breaks_off_for_good_fails_the_stage_and_loses_no_file(
    inbox: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tasks.corpus.remote_source.ATTEMPTS", 2)

    async def clipped(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Length": "1000", "ETag": "1"})
        await response.prepare(request)
        if request.method == "GET":
            await response.write(b"half")
            assert request.transport is not None
            request.transport.abort()
        return response

    with LoopbackSite({"/x.jsonl": clipped}) as site:
        monkeypatch.setenv("GRISTMILL_SOURCE_ROOTS", f"{inbox}:{site.url}")
        (inbox / "a.jsonl").write_text('{"text": "whole"}\n')
        with pytest.raises(Unavailable, match="broke off"):
            gathered(
                SourceConfig(name="x", path=f"{site.url}/x.jsonl", format="jsonl"),
                SourceConfig(name="a", path=str(inbox / "a.jsonl"), format="jsonl"),
            )


def test_a_download_that_breaks_off_is_tried_again(
    inbox: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = b'{"text": "%s"}\n' % (b"words " * 5000)
    attempts = iter(range(9))

    async def clipped(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Length": str(len(line)), "ETag": "1"})
        await response.prepare(request)
        if request.method == "GET":
            await response.write(line if next(attempts) > 0 else line[:100])
            if next(attempts) < 2:
                assert request.transport is not None
                request.transport.abort()
        return response

    with LoopbackSite({"/x.jsonl": clipped}) as site:
        monkeypatch.setenv("GRISTMILL_SOURCE_ROOTS", site.url)
        made = gathered(SourceConfig(name="x", path=f"{site.url}/x.jsonl", format="jsonl"))
    assert made.counts["documents"] == 1


def test_weights_come_with_the_documents_and_decide_how_often_they_are_seen(inbox: Path) -> None:
    for name in ("twice", "half"):
        (inbox / name).mkdir()
        for number in range(20):
            (inbox / name / f"{number}.txt").write_text(f"{name} and number {number}")
    made = gathered(
        SourceConfig(name="twice", path=str(inbox / "twice"), weight=2),
        SourceConfig(name="half", path=str(inbox / "half"), weight=0.5),
    )
    documents = rows(made)
    weights = [row["weight"] for row in documents]
    assert Counter(weights) == {2.0: 20, 0.5: 20}
    counts = copies([row["id"] for row in documents], weights)
    assert counts[:20] == [2] * 20 and 3 < sum(counts[20:]) < 17
    assert copies(["a", "b"], None) == [1, 1]
    assert rounds([2, 0, 1]) == [0, 2, 0]
    plain = gathered(SourceConfig(name="twice", path=str(inbox / "twice")))
    assert "weight" not in pa.Table.from_pylist(rows(plain)).column_names
