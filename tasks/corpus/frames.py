"""The packed records of a WARC file: gzip members and zstd frames, unpacked piece by piece.

Zstandard Compression for WARC Files 1.0 (IIPC): a file begins with a frame, or with a skippable
frame that holds the dictionary of all others, packed itself or not; further skippable frames are
for extensions.
"""

from __future__ import annotations

import mmap
import struct
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO

from backports import zstd

from tasks.corpus.content_coding import MAX_WINDOW, CodingError, Decoder

GZIP_MEMBER = b"\x1f\x8b\x08"
ZSTD_FRAME = b"\x28\xb5\x2f\xfd"
_DICTIONARY_FRAME = b"\x5d\x2a\x4d\x18"
_SKIPPABLE = b"\x2a\x4d\x18"  # behind a first byte of 50 to 5f
MAX_DICTIONARY = 1 << 24  # bytes
READ = 1 << 15  # compressed bytes at a time: at most 33 MB come out of gzip
STEP = 1 << 20  # bytes that zstd, which packs far denser, may give at once


class DamagedFrame(Exception):
    """What is packed cannot be unpacked to its end."""


class Unpacked:
    """Iterates over the content of the member or frame at `offset`.

    Behind the last piece, `whole` says whether the frame has its end in `data`, and `end` where.
    Raises DamagedFrame; `end` then is how far was read.
    """

    def __init__(
        self, data: mmap.mmap | bytes, offset: int, dictionary: zstd.ZstdDict | None
    ) -> None:
        self._data, self._dictionary = data, dictionary
        self._zstd = data[offset : offset + 4] == ZSTD_FRAME
        self.end, self.whole = offset, False

    def __iter__(self) -> Iterator[bytes]:
        decoder = self._decoder()
        try:
            while not decoder.eof and self.end < len(self._data):
                piece = self._data[self.end : self.end + READ]
                self.end += len(piece)
                if not self._zstd:
                    yield decoder.decompress(piece)
                    continue
                yield decoder.decompress(piece, STEP)
                while not decoder.eof and not decoder.needs_input:
                    yield decoder.decompress(b"", STEP)
        except (zlib.error, zstd.ZstdError) as error:
            raise DamagedFrame(str(error)) from error
        self.whole = decoder.eof
        if self.whole:
            self.end -= len(decoder.unused_data or b"")

    def _decoder(self) -> Any:
        if not self._zstd:
            return zlib.decompressobj(31)
        options = {int(zstd.DecompressionParameter.window_log_max): MAX_WINDOW}
        return zstd.ZstdDecompressor(zstd_dict=self._dictionary, options=options)


def is_packed(data: mmap.mmap | bytes, offset: int = 0) -> bool:
    return data[offset : offset + 3] == GZIP_MEMBER or data[offset : offset + 4] == ZSTD_FRAME


def behind_skippable(data: mmap.mmap | bytes, offset: int) -> int | None:
    """Where the skippable frame at `offset` ends; None where there is none."""
    head = data[offset : offset + 8]
    if len(head) < 8 or head[0] >> 4 != 5 or head[1:4] != _SKIPPABLE:
        return None
    return offset + 8 + int(struct.unpack("<I", head[4:])[0])


def read_dictionary(file: BinaryIO) -> zstd.ZstdDict | None:
    """The same of an open file, of which no more is read than that."""
    head = file.read(8)
    end = behind_skippable(head, 0)
    return None if end is None else dictionary_of(head + file.read(min(end, MAX_DICTIONARY)))


def dictionary_of(data: mmap.mmap | bytes) -> zstd.ZstdDict | None:
    """The dictionary a file begins with, if it does; without it no record can be read."""
    end = behind_skippable(data, 0)
    if end is None or data[:4] != _DICTIONARY_FRAME or end > MAX_DICTIONARY:
        return None
    content = data[8:end]
    try:
        if content.startswith(ZSTD_FRAME):
            content = Decoder("zstd", MAX_DICTIONARY).feed(content)
        dictionary = zstd.ZstdDict(content)
        zstd.ZstdDecompressor(zstd_dict=dictionary)  # which looks at more of it
        return dictionary
    except (CodingError, ValueError, zstd.ZstdError):
        return None
