"""Bytes of a page to text, whatever its server, its author and its history say about them.

The order departs from the HTML standard in one point: bytes that are valid UTF-8 are UTF-8 even
when a header claims Latin-1, because that lie is common and the coincidence is not.
"""

from __future__ import annotations

import codecs
import contextlib
import re

from charset_normalizer import from_bytes
from resiliparse.parse.encoding import map_encoding_to_html5

_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_HEADER = re.compile(r"charset\s*=\s*[\"']?([\w.:-]+)", re.IGNORECASE)
_META = re.compile(rb"<meta[^>]{0,200}?charset\s*=\s*[\"']?\s*([\w.:-]+)", re.IGNORECASE)
# What the Encoding Standard (WHATWG) reads under a name is often wider than Python's codec of it.
_WIDER = {
    "ascii": "cp1252",
    "iso8859-1": "cp1252",
    "iso8859-9": "cp1254",
    "iso8859-11": "cp874",
    "tis-620": "cp874",
    "gb2312": "gb18030",
    "gbk": "gb18030",
    "big5": "big5hkscs",
    "shift_jis": "cp932",
    "euc_jp": "euc_jis_2004",
    "euc_kr": "cp949",
}
# These have bytes without a character, which the Encoding Standard reads as control characters.
_HOLED = re.compile(r"cp125\d|cp874")
_CYRILLIC = {"x-mac-cyrillic": "mac_cyrillic", "x-mac-ukrainian": "mac_cyrillic"}
_SAMPLE = 5000
_WIDE_SHARE = 0.05
_MIXED = "gristmill-mixed"
_HOLES = "gristmill-holes"
# Well-formed UTF-8 beyond ASCII (RFC 3629), near enough to count it.
_CHARACTER = re.compile(
    rb"[\xc2-\xdf][\x80-\xbf]|[\xe0-\xef][\x80-\xbf]{2}|[\xf0-\xf4][\x80-\xbf]{3}"
)
_HIGH = re.compile(rb"[\x80-\xff]+")


def decode(body: bytes, content_type: str = "") -> tuple[str, tuple[str, ...]]:
    """The text, and what had to be mended: `nul-bytes`, `mixed-charset`, `wrong-charset`,
    `undecodable-bytes`."""
    if (marked := decode_marked(body)) is not None:
        return marked.replace("\x00", ""), ()
    mended: list[str] = []
    if (wide := _declared_wide(body, content_type)) is not None:
        return wide.replace("\x00", ""), ()
    if b"\x00" in body:
        body = body.replace(b"\x00", b"")
        mended.append("nul-bytes")
    if b"\x1b" not in body:  # else it may be an encoding with escapes, which is valid UTF-8, too
        with contextlib.suppress(UnicodeDecodeError):
            return body.decode(), tuple(mended)
    declared = _declared(body, content_type)
    stateful = [name for name in declared if name.startswith(("iso2022", "hz")) and b"\x1b" in body]
    for encoding in (*stateful, "utf-8", *declared):
        try:
            return body.decode(encoding), tuple(mended)
        except (UnicodeError, LookupError):
            continue
    if _is_mostly_utf8(body):
        return body.decode("utf-8", _MIXED), (*mended, "mixed-charset")
    for encoding in filter(_HOLED.fullmatch, declared):
        with contextlib.suppress(UnicodeDecodeError):
            return body.decode(encoding, _HOLES), (*mended, "undecodable-bytes")
    # charset_normalizer reads every byte many times over: the ends of a long page are enough.
    sample = body if len(body) <= 2 * _SAMPLE else body[:_SAMPLE] + body[-_SAMPLE:]
    for match in from_bytes(sample):
        try:
            return body.decode(match.encoding), (*mended, "wrong-charset")
        except (UnicodeError, LookupError):
            continue
    return body.decode("utf-8", "replace"), (*mended, "undecodable-bytes")


def decode_marked(body: bytes) -> str | None:
    """The text of bytes that begin with a byte-order mark; None for all others."""
    for mark, encoding in _MARKS:
        if body.startswith(mark):
            return body.decode(encoding, "replace")
    return None


def known_encoding(label: str) -> str | None:
    """Python's name for what the Encoding Standard calls `label`, else for what Python does; None
    for what is no encoding at all. A codec of another kind (`base64`) fails when it decodes.
    """
    try:
        standard = map_encoding_to_html5(label, fallback_utf8=False)
        name = codecs.lookup(standard or _CYRILLIC.get(label.lower(), label)).name
    except (LookupError, ValueError):
        return None
    return _WIDER.get(name, name)


def _declared_wide(body: bytes, content_type: str) -> str | None:
    """The text of UTF-16 or UTF-32 without a mark, where a header says so and the bytes agree:
    their NULs are those of markup, not a slip in a page of another encoding.
    """
    names = [name for name in _declared(b"", content_type) if name.startswith(("utf-16", "utf-32"))]
    zeros = body.count(0)
    if not names or not zeros:
        return None
    if zeros < _WIDE_SHARE * len(body):
        with contextlib.suppress(UnicodeDecodeError):
            body.replace(b"\x00", b"").decode()
            return None
    # Without a mark and an order the Encoding Standard reads them as little-endian.
    encoding = names[0] if names[0].endswith("e") else f"{names[0]}-le"
    with contextlib.suppress(UnicodeDecodeError):
        return body.decode(encoding)
    return None


def _is_mostly_utf8(body: bytes) -> bool:
    """Whether more characters beyond ASCII are right in UTF-8 than bytes are wrong in it: a page
    put together from pieces of several encodings, rather than one in another.
    """
    right = len(_CHARACTER.findall(body))
    wrong = sum(map(len, _HIGH.findall(_CHARACTER.sub(b"", body))))
    return right > 2 * wrong


def _as_windows(error: UnicodeError) -> tuple[str, int]:
    """The bytes that are no UTF-8 as the encoding most pieces come from."""
    assert isinstance(error, UnicodeDecodeError)
    piece = error.object[error.start : error.end]
    return piece.decode("cp1252", "replace"), error.end


def _as_control(error: UnicodeError) -> tuple[str, int]:
    """The bytes 0x80 to 0x9F that have no character; raises for others."""
    assert isinstance(error, UnicodeDecodeError)
    piece = error.object[error.start : error.end]
    if max(piece) > 0x9F:
        raise error
    return piece.decode("latin-1"), error.end


codecs.register_error(_MIXED, _as_windows)
codecs.register_error(_HOLES, _as_control)


def _declared(body: bytes, content_type: str) -> list[str]:
    labels = [match.group(1) for match in _HEADER.finditer(content_type)]
    labels += [match.group(1).decode("ascii", "replace") for match in _META.finditer(body[:4096])]
    return [name for name in map(known_encoding, labels) if name]
