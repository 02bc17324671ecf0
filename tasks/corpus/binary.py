"""Whether bytes that are served as text are text, by what they are.

After MIME Sniffing (WHATWG), sections 3, 6 and 7.2: signatures of known formats, and the bytes that
no text has. There one such byte among the first 1,445 is enough. Pages do hold stray ones, which
extraction mends, so here it takes a share of them; in compressed data it is a tenth.
"""

from __future__ import annotations

import re

SAMPLE = 1 << 16  # bytes that are looked at
MOST_CONTROLS = 0.04
STRAY = 8  # so many may stand in a text of any length
_MARKS = (b"\xef\xbb\xbf", b"\xfe\xff", b"\xff\xfe", b"\x00\x00\xfe\xff")
_WIDE = re.compile(r"charset\s*=\s*[\"']?utf-?(?:16|32)", re.IGNORECASE)
# Section 3, "binary data byte", without backspace, which manual pages use for bold type.
_CONTROLS = bytes({*range(0x09), 0x0B, *range(0x0E, 0x1B), *range(0x1C, 0x20)} - {0x08})
_FORMATS = (
    ("PDF", rb"%PDF-\d"),
    ("PNG image", rb"\x89PNG\r\n\x1a\n"),
    ("JPEG image", rb"\xff\xd8\xff"),
    ("GIF image", rb"GIF8[79]a[\s\S]{6}[\x00-\x3f]\x00|GIF8[79]a[\s\S]{0,6}\x00"),
    ("WebP image", rb"RIFF[\s\S]{4}WEBP"),
    ("audio or video", rb"RIFF[\s\S]{4}(?:WAVE|AVI )|OggS\x00|fLaC\x00|ID3[\x02-\x04]"),
    ("audio or video", rb"\x1aE\xdf\xa3|[\s\S]{4}ftyp[\x20-\x7e]{4}\x00"),
    ("zip archive", rb"PK\x03\x04"),
    ("compressed data", rb"\x1f\x8b\x08|\xfd7zXZ\x00|\x28\xb5\x2f\xfd|BZh[1-9]1AY&SY"),
    ("compressed data", rb"7z\xbc\xaf\x27\x1c|Rar!\x1a\x07"),
    ("program", rb"\x7fELF|MZ[\s\S]{1,2}\x00|\x00asm|\xca\xfe\xba\xbe|\xcf\xfa\xed\xfe"),
    ("font", rb"wOF[F2]\x00|OTTO\x00|\x00\x01\x00\x00"),
    ("database", rb"SQLite format 3\x00"),
)
_SIGNATURES = tuple((name, re.compile(pattern)) for name, pattern in _FORMATS)


def binary_kind(body: bytes, content_type: str = "") -> str:
    """What `body` is instead of text (`PNG image`, `zip archive`, `unknown`), or empty."""
    if body.startswith(_MARKS):
        return ""
    for name, signature in _SIGNATURES:
        if signature.match(body):
            return name
    sample = body[:SAMPLE]
    if _WIDE.search(content_type) or _is_wide(sample):
        return ""
    controls = len(sample) - len(sample.translate(None, _CONTROLS))
    return "unknown" if controls > max(STRAY, MOST_CONTROLS * len(sample)) else ""


def _is_wide(sample: bytes) -> bool:
    """UTF-16 without a mark: every other byte of most of its characters is NUL."""
    even, odd = sample[::2], sample[1::2]
    text, zeros = (odd, even) if even.count(0) > odd.count(0) else (even, odd)
    controls = len(text) - len(text.translate(None, _CONTROLS))
    return zeros.count(0) > len(zeros) / 2 and controls <= MOST_CONTROLS * len(text)
