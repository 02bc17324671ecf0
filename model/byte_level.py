"""Byte-level BPE, the kind of GPT-2, Llama 3 and Qwen, from a `tokenizer.json`.

A text is cut into words by regular expressions, and each word's bytes are joined by a list of
merges. The file writes a byte as a letter (GPT-2's table), so a piece is a string of such letters.
The encoding is that of Hugging Face's `tokenizers`, which is imported only where there is such a
vocabulary; nothing but words and merges is left to it, so a text loses nothing and spells no
special token.
"""

import json
from collections.abc import Mapping
from typing import Any, Literal

_SHOWN = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
_HIDDEN = tuple(byte for byte in range(256) if byte not in _SHOWN)
LETTERS = tuple(chr(0x100 + _HIDDEN.index(b) if b in _HIDDEN else b) for b in range(256))
"""The letter that stands for each byte: itself if it is to be seen in Latin-1, else one from U+0100
on."""
_BYTES = {letter: byte for byte, letter in enumerate(LETTERS)}

CUTTERS = ("Split", "Digits", "Punctuation", "UnicodeScripts")  # pre-tokenizers that only cut


class ByteLevelPieces:
    """A `tokenizer.json` in which every id is a piece over byte letters, or an added token.

    Raises ValueError, worded to follow the file's name, for one of another kind, one that changes a
    text before it is cut, or one that lacks an id. Which of its tokens are special is the caller's
    to know: all added tokens have no bytes here and are never what a text encodes to.
    """

    file_name = "tokenizer.json"
    kind: Literal["byte-level"] = "byte-level"

    def __init__(self, data: bytes) -> None:
        import tokenizers

        body = read_json(data)
        require_byte_level(body)
        if body.get("normalizer"):
            raise ValueError(f"changes texts before it cuts them ({body['normalizer']['type']})")
        model = body["model"]
        named = model["vocab"] | {t["content"]: t["id"] for t in body.get("added_tokens", ())}
        self._names = {token: name for name, token in named.items()}
        if sorted(self._names) != list(range(len(named))):
            raise ValueError(f"does not have one piece for each id from 0 to {len(named) - 1}")
        added = {token["content"] for token in body.get("added_tokens", ())}
        self._added = {named[name] for name in added}
        pieces = {name: token for name, token in model["vocab"].items() if name not in added}
        words = {
            "version": "1.0",
            "added_tokens": [],
            "pre_tokenizer": body["pre_tokenizer"],
            "model": model | {"vocab": pieces, "dropout": None, "unk_token": None},
        }
        try:
            self._encoder = tokenizers.Tokenizer.from_str(json.dumps(words))
        except Exception as error:  # the library raises nothing narrower
            raise ValueError(f"is not what the library tokenizers reads: {error}") from error

    def __len__(self) -> int:
        return len(self._names)

    def encode(self, text: str) -> list[int]:
        """Ids of a text that UTF-8 can write; never an added token."""
        return list(self._encoder.encode(text, add_special_tokens=False).ids)

    def piece(self, token: int) -> str:
        return self._names[token]

    def bytes_of(self, token: int) -> bytes:
        return b"" if token in self._added else spelt(self._names[token]) or b""


def spelt(piece: str) -> bytes | None:
    """The bytes that a piece's letters stand for; None where one stands for none."""
    try:
        return bytes(_BYTES[letter] for letter in piece)
    except KeyError:
        return None


def read_json(data: bytes) -> dict[str, Any]:
    """A `tokenizer.json`. Raises ValueError, worded to follow its name, for anything else."""
    try:
        body = json.loads(data)
        if isinstance(body["model"]["type"], str):
            return dict(body)
    except (ValueError, KeyError, TypeError):
        pass
    raise ValueError("is no tokenizer.json of the library tokenizers")


def is_byte_level(body: Mapping[str, Any]) -> bool:
    """Whether a `tokenizer.json` joins bytes that are written as letters."""
    steps = _steps(body.get("pre_tokenizer"))
    return body["model"]["type"] == "BPE" and any(step["type"] == "ByteLevel" for step in steps)


def require_byte_level(body: Mapping[str, Any]) -> None:
    """Raises ValueError, worded to follow the file's name, unless it is BPE over bytes, cut without
    loss."""
    model = body["model"]
    if not is_byte_level(body):
        kind = "BPE with byte_fallback" if model.get("byte_fallback") else model["type"]
        raise ValueError(
            f"holds a vocabulary of the kind {kind}, not byte-level BPE; it is read from the "
            f"tokenizer.model beside it"
        )
    *cutters, last = _steps(body["pre_tokenizer"])
    for step in cutters:
        if step["type"] not in CUTTERS or step.get("behavior") == "Removed":
            raise ValueError(f"has a pre-tokenizer {step['type']}, which loses text or adds to it")
    if last["type"] != "ByteLevel" or last.get("add_prefix_space"):
        raise ValueError("has a pre-tokenizer that loses text or adds to it")
    for name in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name):
            raise ValueError(f"has {name} {model[name]!r}, which stands for no bytes")


def _steps(pre_tokenizer: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    if pre_tokenizer is None:
        return []
    if pre_tokenizer["type"] == "Sequence":
        return [step for each in pre_tokenizer["pretokenizers"] for step in _steps(each)]
    return [pre_tokenizer]
