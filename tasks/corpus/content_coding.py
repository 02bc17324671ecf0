"""Content codings of HTTP bodies (RFC 9110, section 8.4.1), undone piece by piece within a limit.

aiohttp would undo them as well, but takes a gzip body that ends too early for a whole one, and
gives a page up whose server says gzip and sends plain HTML.
"""

from __future__ import annotations

import zlib
from typing import Any

import brotli
from backports import zstd

ACCEPTED = "gzip, deflate, br, zstd"
_NAMES = {name: name for name in ("gzip", "deflate", "br", "zstd")}
_NAMES |= {"x-gzip": "gzip", "x-deflate": "deflate", "brotli": "br"}
# Registered (IANA, HTTP Content Coding Registry) and offered by nobody.
_OTHERS = frozenset({"aes128gcm", "compress", "dcb", "dcz", "exi", "pack200-gzip", "x-compress"})
_MAGIC = {"gzip": b"\x1f\x8b", "zstd": b"\x28\xb5\x2f\xfd"}
_STEP = 1 << 16  # bytes a decoder may give at once: a bomb is noticed before it is unpacked
MAX_WINDOW = 27  # binary logarithm of the window a zstd frame may ask for: 128 MB


class CodingError(ValueError):
    """The body is not what its Content-Encoding says, or ends before its end."""


class UnknownCoding(CodingError):
    """A coding that was not offered."""

    def __init__(self, coding: str) -> None:
        super().__init__(f"content coding {coding} is not known")
        self.coding = coding


class Decoder:
    """Undoes the codings of one body; `feed` returns what became of the bytes so far.

    A body without the first bytes of its coding is taken as it is: servers lie.
    """

    def __init__(self, header: str, limit: int) -> None:
        """`header` is Content-Encoding; what follows a `;` says nothing, nor do names of no coding
        (`none`, `utf-8`), which `unknown` has. Raises UnknownCoding for a coding nobody offered."""
        parts = [part.partition(";")[0].lower() for part in header.split(",")]
        names = [name for part in parts for name in part.split()]
        if others := _OTHERS.intersection(names):
            raise UnknownCoding(min(others))
        self.unknown = [name for name in names if name not in _NAMES]
        self._layers = [_Layer(_NAMES[name]) for name in reversed(names) if name in _NAMES]
        self._left = limit

    def feed(self, data: bytes) -> bytes:
        """Decoded bytes; one more than the limit in all at most, after which nothing is decoded."""
        for layer in self._layers:
            data = layer.feed(data, self._left + 1)
        data = data[: self._left + 1]
        self._left -= len(data)
        return data

    @property
    def overflown(self) -> bool:
        return self._left < 0

    def finish(self) -> None:
        """Raises CodingError when the body ended in the middle."""
        if not self.overflown and not all(layer.complete for layer in self._layers):
            raise CodingError("the coded body ends too early")


class _Layer:
    """One coding: several members or frames one after another are one body."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._head = b""  # until there is enough of it to know whether the coding is true
        self._plain = False
        self._started = False
        self._decoder: Any = None

    def feed(self, data: bytes, limit: int) -> bytes:
        if not self._started:
            self._head += data
            magic = _MAGIC.get(self._name, b"x")
            if len(self._head) < len(magic):
                return b""
            data, self._started = self._head, True
            self._plain = self._name in _MAGIC and not data.startswith(magic)
            self._decoder = self._new(data)
        if self._plain or not data:
            return data
        parts: list[bytes] = []
        size = 0
        more = bool(data)
        try:
            while more and size < limit:
                if self._ended():
                    again = _MAGIC.get(self._name)
                    if again is None or not data.startswith(again):
                        break  # padding behind the last member
                    self._decoder = self._new(data)
                part, data, more = self._step(data)
                parts.append(part)
                size += len(part)
        except (zlib.error, brotli.error, zstd.ZstdError) as error:
            raise CodingError(f"damaged {self._name} data") from error
        return b"".join(parts)

    def _new(self, data: bytes) -> Any:
        if self._name == "br":
            return brotli.Decompressor()
        if self._name == "zstd":
            return zstd.ZstdDecompressor(
                options={zstd.DecompressionParameter.window_log_max: MAX_WINDOW}
            )
        if self._name == "deflate" and data[0] & 0x0F != 8:  # without the zlib header, as IIS did
            return zlib.decompressobj(-15)
        return zlib.decompressobj(31 if self._name == "gzip" else 15)

    def _step(self, data: bytes) -> tuple[bytes, bytes, bool]:
        """About _STEP decoded bytes at most, the input that is left, and whether there is more."""
        decoder = self._decoder
        if self._name == "br":  # keeps what it did not get to, and gives it without more input
            part = decoder.process(data, output_buffer_limit=_STEP)
            return part, b"", bool(part) and not decoder.is_finished()
        if self._name == "zstd":  # so does this one
            part = decoder.decompress(data, _STEP)
            left = (decoder.unused_data or b"") if decoder.eof else b""
            return part, left, bool(left) if decoder.eof else not decoder.needs_input
        part = decoder.decompress(data, _STEP)
        rest: bytes = decoder.unused_data if decoder.eof else decoder.unconsumed_tail
        return part, rest, bool(rest)

    def _ended(self) -> bool:
        return bool(self._decoder.is_finished() if self._name == "br" else self._decoder.eof)

    @property
    def complete(self) -> bool:
        if not self._started:
            return not self._head
        return self._plain or self._ended()
