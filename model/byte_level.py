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
        listed = {token["content"]: token["id"] for token in body.get("added_tokens") or ()}
        named = model["vocab"] | listed
        self._names = {token: name for name, token in named.items()}
        if sorted(self._names) != list(range(len(named))):
            raise ValueError(f"does not have one piece for each id from 0 to {len(named) - 1}")
        self._added = set(listed.values())
        pieces = {name: token for name, token in model["vocab"].items() if name not in listed}
        # The library does not refuse it: it panics.
        if not all(
            {left, right, left + right} <= pieces.keys() for left, right in merges_of(model)
        ):
            raise ValueError("has merges of pieces that it lacks")
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
    """A `tokenizer.json`, everything of it that is used here of the form that the library
    `tokenizers` writes. Raises ValueError, worded to follow its name, for anything else.
    """
    try:
        body = json.loads(data)
    except ValueError:  # of JSON and of UTF-8
        body = None
    match body:
        case {"model": {"type": str(kind)} as model}:
            problem = _problem(body, kind, model)
        case _:
            problem = "has no model"
    if problem:
        raise ValueError(f"is no tokenizer.json of the library tokenizers: it {problem}")
    return dict(body)


def _problem(body: Mapping[str, Any], kind: str, model: Mapping[str, Any]) -> str | None:
    """What is not of its form."""
    vocab, unknown = model.get("vocab"), model.get("unk_id")
    if kind == "Unigram":
        if not (isinstance(vocab, list) and all(map(_is_scored, vocab))):
            return "has no vocab of pieces with scores"
        if unknown is not None and not (isinstance(unknown, int) and 0 <= unknown < len(vocab)):
            return f"has unk_id {unknown!r}, which is no piece"
    elif not (isinstance(vocab, dict) and all(isinstance(each, int) for each in vocab.values())):
        return "has no vocab of pieces with ids"
    merges = model.get("merges")
    if kind == "BPE" and not (isinstance(merges, list) and all(map(_is_pair, merges_of(model)))):
        return "has no merges of two pieces each"
    if not isinstance(model.get("unk_token"), str | None):
        return "has an unk_token that is no piece"
    added = body.get("added_tokens") or []
    if not (isinstance(added, list) and all(map(_is_added, added))):
        return "has added_tokens without content or id"
    for name, inner in (("normalizer", "normalizers"), ("pre_tokenizer", "pretokenizers")):
        if body.get(name) is not None and not _is_step(body[name], inner):
            return f"has a {name} without a type"
    return None


def _is_scored(row: Any) -> bool:
    match row:
        case [str(), int() | float()]:
            return True
    return False


def _is_pair(merge: Any) -> bool:
    match merge:
        case [str(), str()]:
            return True
    return False


def _is_added(token: Any) -> bool:
    match token:
        case {"content": str(), "id": int()}:
            return True
    return False


def _is_step(step: Any, inner: str) -> bool:
    match step:
        case {"type": "Sequence"}:
            steps = step.get(inner)
            return isinstance(steps, list) and all(_is_step(each, inner) for each in steps)
        case {"type": str()}:
            return True
    return False


def merges_of(model: Mapping[str, Any]) -> list[list[str]]:
    """The pairs that a BPE model joins; older files write each as one string."""
    return [each.split(" ") if isinstance(each, str) else each for each in model["merges"]]


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
