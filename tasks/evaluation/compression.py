"""What general compressors need for a text once they have read another: the bar for a model.

A compressor is conditioned on the training text by compressing both: bits of a held-out text are
8 · (compressed(training + held-out) - compressed(training)). PPMd (Shkarin 2002; variant H)
predicts each byte from the 5 or 8 before it, as a byte-level n-gram model does; xz finds repeats,
its window made as large as both texts.
"""

from __future__ import annotations

import lzma
from typing import Literal

import pyppmd

Method = Literal["ppmd5", "ppmd8", "xz"]
METHODS: tuple[Method, ...] = ("ppmd5", "ppmd8", "xz")
LABELS = {"ppmd5": "PPMd, order 5", "ppmd8": "PPMd, order 8", "xz": "xz -9"}

# PPMd forgets everything when its memory is full. Order 8 took 14 bytes for each byte of
# documentation; memory that is not used is never touched.
MEMORY_PER_BYTE = 64
LARGEST_MEMORY = 0xFFFFFFFF - 12 * 3
LARGEST_WINDOW = 1536 << 20  # of xz


def compressed_size(method: Method, data: bytes) -> int:
    """Bytes that `method` makes of `data`."""
    if method == "xz":
        window = min(max(len(data), 1 << 16), LARGEST_WINDOW)
        filters = [{"id": lzma.FILTER_LZMA2, "preset": 9, "dict_size": window}]
        return len(lzma.compress(data, lzma.FORMAT_RAW, filters=filters))
    memory = min(max(MEMORY_PER_BYTE * len(data), 1 << 22), LARGEST_MEMORY)
    encoder = pyppmd.Ppmd7Encoder(int(method.removeprefix("ppmd")), memory)
    return len(encoder.encode(data)) + len(encoder.flush())


def conditional_bits_per_byte(size: int, training_size: int, heldout_bytes: int) -> float:
    """Bits per held-out byte from the compressed sizes of both texts together and of the first."""
    return 8 * (size - training_size) / heldout_bytes
