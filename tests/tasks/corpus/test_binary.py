"""Bytes that are no text are told from text, whatever a server calls them."""

import bz2
import gzip
import io
import lzma
import sys
import wave
import zipfile
from pathlib import Path

import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st
from loopback_site import Crawler, LoopbackSite, page

from tasks.corpus.binary import binary_kind

PNG = b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR" + bytes(range(256))
WORDS = b"Many words that a program has packed into few bytes, and few of those are any text. "
TEXT = "".join(f"Line {n}: words, words and 3.14 words.\n" for n in range(200))


def zipped() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as file:
        file.writestr("a", "b")
    return out.getvalue()


def sound() -> bytes:
    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setparams((1, 2, 8000, 4, "NONE", ""))
        file.writeframes(b"\x00\x01" * 4)
    return out.getvalue()


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (PNG, "PNG image"),
        (b"\xff\xd8\xff\xe0\x00\x10JFIF", "JPEG image"),
        (b"GIF89a\x01\x00\x01\x00\x80\x00\x00", "GIF image"),
        (b"%PDF-1.7\n%words", "PDF"),
        (zipped(), "zip archive"),
        (sound(), "audio or video"),
        (gzip.compress(WORDS), "compressed data"),
        (bz2.compress(WORDS), "compressed data"),
        (lzma.compress(WORDS), "compressed data"),
        (Path(sys.executable).resolve().read_bytes()[:4096], "program"),
        (gzip.compress(bytes(range(256)) * 40)[10:] * 3, "unknown"),
        (bytes(range(256)) * 4, "unknown"),
    ],
)
def test_what_is_binary(body: bytes, kind: str) -> None:
    assert binary_kind(body) == kind
    assert binary_kind(body, "text/plain; charset=utf-8") == kind


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1", "utf-16", "utf-16-le", "utf-32"])
@pytest.mark.parametrize("text", [TEXT, "Ein schöner Tag für Bücher.", "", "x"])
def test_what_is_text(text: str, encoding: str) -> None:
    assert binary_kind(text.encode(encoding)) == ""


def test_text_with_stray_bytes_and_about_formats_is_text() -> None:
    assert binary_kind(TEXT.replace("words", "w\x00\x01rds", 4).encode()) == ""
    assert binary_kind(b"GIF89a is a format of images, as PK is of archives.") == ""
    assert binary_kind(b"ID3 tags and wOFF fonts; MZ begins a program; RIFF, too.") == ""
    assert binary_kind(b"N\bNA\bAM\bME\bE\n" * 50) == ""  # a manual page in bold type
    assert binary_kind(b"\x1b[1mbold\x1b[0m\f\n" * 50) == ""
    japanese = "日本語の文章です。" * 50
    assert binary_kind(japanese.encode("iso2022_jp")) == ""
    assert binary_kind(japanese.encode("utf-16-be"), "text/html; charset=UTF-16BE") == ""


@given(st.text(st.characters(blacklist_categories=("Cs", "Cc")), max_size=2000))
def test_no_text_is_binary(text: str) -> None:
    assert binary_kind(text.encode()) == ""


@given(st.binary(max_size=3000))
def test_any_bytes_are_the_one_or_the_other(data: bytes) -> None:
    binary_kind(data)


@pytest.mark.parametrize("content_type", ["text/plain", "text/html"])
def test_a_crawl_refuses_them_and_says_why(tmp_path: Path, content_type: str) -> None:
    def picture() -> web.Response:
        return web.Response(body=PNG, content_type=content_type)

    noise = gzip.compress(bytes(range(256)) * 40)[10:] * 3
    pages = {
        "/": page("/picture", "/noise"),
        "/picture": picture,
        "/noise": lambda: web.Response(body=noise, content_type="text/plain"),
    }
    with LoopbackSite(pages) as site:
        result = Crawler(tmp_path / "home").crawl(site.url)
    assert result.reason(f"{site.url}/picture") == ("skipped", "binary: PNG image")
    assert result.reason(f"{site.url}/noise") == ("skipped", "binary: unknown")
    assert set(result.pages) == {f"{site.url}/"}
    rules = next(r.body for r in result.outcome.reports if r.key == "crawl-rules")
    assert "binary: PNG image" in {row["reason"] for row in rules}
