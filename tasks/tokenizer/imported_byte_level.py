"""Byte-level BPE made elsewhere (GPT-2's, Llama 3's, Qwen's), in our layout.

Its words and merges stay as they are, so a text gets the same pieces, under our ids: special
tokens, the 256 bytes, then the learned pieces in their order. What goes: its added tokens, which a
text could spell (ours are never what a text encodes to), a space invented at the beginning, and
Unicode normalisation, which would change the text. Where a text is in that form already, as almost
all is, pieces are the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from model.byte_level import LETTERS, is_byte_level, merges_of, require_byte_level, spelt
from model.chat import SPECIAL_PIECES
from model.tokenizer_files import to_json, tokenizer_body
from tasks.runtime.errors import UserError

NORMAL_FORMS = ("NFC", "NFD", "NFKC", "NFKD")


def byte_level_in_our_layout(body: Mapping[str, Any], name: str) -> bytes | None:
    """The tokenizer.json in our layout; None when `body` is of another kind.

    Raises UserError when its words cannot be kept without losing text.
    """
    if not is_byte_level(body):
        return None
    words = _without_prefix(body["pre_tokenizer"])
    try:
        require_byte_level({**body, "pre_tokenizer": words})
    except ValueError as error:
        raise UserError(f"tokenizer.import_from: {name} {error}; train one here") from error
    _require_plain(body.get("normalizer"), name)
    theirs = body["model"]
    pieces = _learned(body)
    named = {piece: token for token, piece in enumerate((*SPECIAL_PIECES, *LETTERS, *pieces))}
    known = named.keys() - set(SPECIAL_PIECES)
    usable = [[a, b] for a, b in merges_of(theirs) if {a, b, a + b} <= known]
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": bool(theirs.get("ignore_merges")),
        "vocab": named,
        "merges": usable,
    }
    decoder = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    return to_json(
        tokenizer_body(
            normalizer=None,
            pre_tokenizer=words,
            decoder=decoder | {"use_regex": True},
            model=model,
        )
    )


def _learned(body: Mapping[str, Any]) -> list[str]:
    """Their pieces of several bytes, in the order of their ids."""
    gone = {token["content"] for token in body.get("added_tokens") or ()} | set(SPECIAL_PIECES)
    ordered = sorted(body["model"]["vocab"].items(), key=lambda entry: entry[1])
    return [piece for piece, _ in ordered if piece not in gone and len(piece) > 1 and spelt(piece)]


def _without_prefix(pre_tokenizer: Mapping[str, Any]) -> dict[str, Any]:
    """The same words, without a space that is not in the text."""
    if pre_tokenizer["type"] == "Sequence":
        steps = [_without_prefix(step) for step in pre_tokenizer["pretokenizers"]]
        return {**pre_tokenizer, "pretokenizers": steps}
    prefixed = "add_prefix_space" in pre_tokenizer
    return {**pre_tokenizer, **({"add_prefix_space": False} if prefixed else {})}


def _require_plain(normalizer: Mapping[str, Any] | None, name: str) -> None:
    if normalizer is None or normalizer["type"] in NORMAL_FORMS:
        return
    if normalizer["type"] != "Sequence":
        raise UserError(
            f"tokenizer.import_from: {name} changes texts before it cuts them "
            f"({normalizer['type']}), so its pieces are not those of the text; train one here"
        )
    for step in normalizer["normalizers"]:
        _require_plain(step, name)
