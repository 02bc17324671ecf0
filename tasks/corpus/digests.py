"""Payload digests of WARC records: two algorithms, two spellings each, one form to compare.

`sha256:` and base32 is what our crawls write, `sha1:` and base32 what Common Crawl and most tools
do (WARC 1.1, section 5.8, leaves both open); others write hexadecimal digits.
"""

from __future__ import annotations

import base64
import re

_DIGEST = re.compile(r"sha-?(1|256):([0-9a-z]+)=*", re.IGNORECASE)
_HEX = {"1": 40, "256": 64}
_BASE32 = {"1": 32, "256": 52}


def canonical_digest(text: str) -> str:
    """`sha1:` or `sha256:` and base32 in capitals without padding; empty where it is neither."""
    match = _DIGEST.fullmatch(text.strip())
    if match is None:
        return ""
    size, value = match.groups()
    if len(value) == _HEX[size] and re.fullmatch("[0-9a-fA-F]+", value):
        value = base64.b32encode(bytes.fromhex(value)).decode().rstrip("=")
    elif len(value) != _BASE32[size] or not re.fullmatch("[A-Za-z2-7]+", value):
        return ""
    return f"sha{size}:{value.upper()}"
