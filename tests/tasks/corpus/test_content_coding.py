"""Content codings: the same bytes however they are cut, bombs stopped, clipped bodies noticed."""

import gzip
import tracemalloc
import zlib
from collections.abc import Callable

import brotli
import pytest
from backports import zstd
from hypothesis import given
from hypothesis import strategies as st

from tasks.corpus.content_coding import CodingError, Decoder, UnknownCoding

ENCODERS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "deflate": zlib.compress,
    "br": lambda body: brotli.compress(body, quality=4),
    "zstd": zstd.compress,
}
TEXT = b"<html>" + b"".join(b"%d words of a page " % n for n in range(9000)) + b"</html>"


def decode(header: str, data: bytes, step: int = 1 << 14, limit: int = 10**7) -> bytes:
    decoder = Decoder(header, limit)
    parts = [decoder.feed(data[start : start + step]) for start in range(0, len(data), step)]
    decoder.finish()
    return b"".join(parts)


@pytest.mark.parametrize("name", ENCODERS)
@given(body=st.binary(min_size=0, max_size=400), step=st.integers(1, 500))
def test_any_body_comes_back_however_it_is_cut(name: str, body: bytes, step: int) -> None:
    assert decode(name, ENCODERS[name](body), step) == body


@pytest.mark.parametrize("name", ENCODERS)
def test_a_long_body_comes_back_whole_and_a_clipped_one_is_noticed(name: str) -> None:
    coded = ENCODERS[name](TEXT)
    assert decode(name.upper(), coded) == TEXT
    with pytest.raises(CodingError, match="ends too early"):
        decode(name, coded[:-9])
    with pytest.raises(CodingError, match=r"damaged|too early"):
        decode(name, coded[:60] + bytes(len(coded) - 60))


@pytest.mark.parametrize("name", ENCODERS)
def test_a_bomb_is_stopped_long_before_it_is_unpacked(name: str) -> None:
    bomb = ENCODERS[name](bytes(50_000_000))
    tracemalloc.start()
    decoder = Decoder(name, 1_000_000)
    size = len(decoder.feed(bomb))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert size == 1_000_001 and decoder.overflown
    decoder.finish()
    assert peak < 20_000_000


def test_members_chains_and_lies() -> None:
    two = gzip.compress(TEXT[:5000]) + gzip.compress(TEXT[5000:]) + bytes(100)
    assert decode("x-gzip", two, 1000) == TEXT
    assert decode("zstd", zstd.compress(TEXT[:7]) + zstd.compress(TEXT[7:])) == TEXT
    assert decode("gzip, br", brotli.compress(gzip.compress(TEXT))) == TEXT
    assert decode("gzip;q=1, Brotli ; q=1", brotli.compress(gzip.compress(TEXT))) == TEXT
    assert decode("gzip gzip", gzip.compress(TEXT)) == TEXT
    assert decode("x-deflate", zlib.compress(TEXT)) == TEXT
    raw = zlib.compressobj(wbits=-15)
    assert decode("deflate", raw.compress(TEXT) + raw.flush()) == TEXT
    assert decode("gzip", b"<html>plain</html>", 1) == b"<html>plain</html>"
    assert decode("identity", TEXT) == decode("", TEXT) == TEXT
    assert decode("gzip", b"") == b""
    for header in ("compress", "gzip, X-Compress"):
        with pytest.raises(UnknownCoding, match=r"content coding (x-)?compress is not known"):
            Decoder(header, 10)


@pytest.mark.parametrize("header", ["none", "UTF-8", "identity", "binary", ", ,"])
def test_a_name_that_is_no_coding_says_nothing(header: str) -> None:
    assert decode(header, TEXT) == TEXT
    assert decode(f"gzip, {header}", gzip.compress(TEXT)) == TEXT
