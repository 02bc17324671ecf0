"""A vocabulary made elsewhere: SentencePiece's, or a Hugging Face `tokenizer.json`.

One that has our special tokens at our ids is taken as it is: it was exported from here. Of any
other the learned pieces are taken, in their order and with their scores or merges, behind our
special tokens and bytes, and nothing is normalised or put before a text, so that the round trip
stays lossless. (Llama 2 and Mistral put a space before every text: their first word has a space
mark, ours has one where the text has a space.) Ids are then ours; a model that was trained with
theirs gets its rows moved when a training goes on from it (`model.foreign_vocabulary`).
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from model import chat
from model.byte_level import merges_of, read_json
from model.chat import CONTROL_SYMBOLS, Tokenizer, TokenizerError
from tasks.corpus.source_config import allowed
from tasks.runtime.errors import UserError
from tasks.runtime.settings import Settings
from tasks.tokenizer.imported_byte_level import byte_level_in_our_layout

NAMES = ("tokenizer.model", "tokenizer.json")
# SentencePiece's types of pieces.
NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6
BPE, UNIGRAM = 2, 1
LEARNED = (NORMAL, 4)  # 4: pieces that a user defined


def imported_file(path: str) -> Path:
    """The tokenizer file that `path` names, itself or in that directory.

    Raises UserError when it is not there, or not below a source root.
    """
    found = allowed(Path(path), Settings.load(), "tokenizer.import_from")
    for candidate in (found, *(found / name for name in NAMES)):
        if candidate.is_file():
            return candidate
    raise UserError(
        f"tokenizer.import_from {path!r} is no file, and no directory with {' or '.join(NAMES)}"
    )


def digest_of(path: str) -> str:
    return hashlib.sha256(imported_file(path).read_bytes()).hexdigest()


def import_tokenizer(path: Path) -> bytes:
    """The tokenizer's file in our layout. Raises UserError for a kind that has no such form."""
    data = path.read_bytes()
    try:
        return Tokenizer(data, path.name).data
    except TokenizerError as error:
        if path.suffix == ".json":
            return _of_hugging_face(path.name, data)
        if "is not a SentencePiece model" in str(error):
            raise UserError(f"tokenizer.import_from: {error}") from error
    return _in_our_layout(*_of_sentencepiece(data))


def sentencepiece_format() -> Any:
    """SentencePiece's file format, as protobuf's classes; they are made when it is imported."""
    return importlib.import_module("sentencepiece.sentencepiece_model_pb2")


def _of_sentencepiece(data: bytes) -> tuple[list[tuple[str, float]], int]:
    """(learned pieces with scores, the kind of model)."""
    theirs = sentencepiece_format().ModelProto.FromString(data)
    kind = int(theirs.trainer_spec.model_type)
    if kind not in (BPE, UNIGRAM):
        raise UserError(
            "tokenizer.import_from: only SentencePiece models of the kinds BPE and Unigram can be "
            "imported, not words or characters"
        )
    return [(p.piece, p.score) for p in theirs.pieces if int(p.type) in LEARNED], kind


def _of_hugging_face(name: str, data: bytes) -> bytes:
    try:
        body = read_json(data)
    except ValueError as error:
        raise UserError(f"tokenizer.import_from: {name} {error}") from error
    over_bytes = byte_level_in_our_layout(body, name)
    if over_bytes is not None:
        return over_bytes
    model = body["model"]
    special = {token["content"] for token in body.get("added_tokens") or ()}
    if model["type"] == "Unigram":
        rows = [(piece, float(score)) for piece, score in model["vocab"]]
        kept = [(p, s) for p, s in rows if p not in special and not _is_byte(p)]
        return _in_our_layout(kept, UNIGRAM)
    if model["type"] != "BPE" or not model.get("byte_fallback"):
        raise UserError(
            f"tokenizer.import_from: {name} is a {model['type']} that neither joins bytes nor "
            f"falls back to them, so some texts have no pieces; import one that does, or train one"
        )
    return _in_our_layout(_ranked(model, special), BPE)


def _ranked(model: dict[str, Any], special: set[str]) -> list[tuple[str, float]]:
    """The pieces of a list of merges, each scored by the first merge that makes it, then letters.

    SentencePiece joins the pair that makes the best piece, `tokenizers` the first pair in its list:
    the same wherever the list was made from pieces, as ours, Llama's and Gemma's are.
    """
    ranks: dict[str, int] = {}
    for left, right in merges_of(model):
        ranks.setdefault(left + right, len(ranks))
    known = model["vocab"]
    made = sorted((p for p in ranks if p in known and p not in special), key=ranks.__getitem__)
    letters = [
        piece
        for piece, _ in sorted(known.items(), key=lambda entry: entry[1])
        if piece not in ranks and piece not in special and not _is_byte(piece)
    ]
    return [(piece, -float(rank)) for rank, piece in enumerate((*made, *letters))]


def _is_byte(piece: str) -> bool:
    return len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">")


def _in_our_layout(pieces: Iterable[tuple[str, float]], kind: int) -> bytes:
    """Our special tokens, bytes, then these pieces."""
    proto = sentencepiece_format().ModelProto()
    first = (chat.UNKNOWN_PIECE, chat.BEGIN_PIECE, chat.END_OF_DOCUMENT_PIECE, chat.PAD_PIECE)
    rows = [(name, 0.0, CONTROL) for name in (*first, *CONTROL_SYMBOLS)]
    rows[chat.UNKNOWN] = (chat.UNKNOWN_PIECE, 0.0, UNKNOWN)
    rows += [(f"<0x{byte:02X}>", 0.0, BYTE) for byte in range(chat.BYTE_TOKENS)]
    taken = {name for name, _, _ in rows}
    for piece, score in pieces:
        if piece and piece not in taken:
            taken.add(piece)
            rows.append((piece, score, NORMAL))
    for name, score, of in rows:
        proto.pieces.add(piece=name, score=score, type=of)
    spec = proto.trainer_spec
    spec.model_type, spec.vocab_size, spec.byte_fallback = kind, len(rows), True
    spec.unk_id, spec.bos_id = chat.UNKNOWN, chat.BEGIN
    spec.eos_id, spec.pad_id = chat.END_OF_DOCUMENT, chat.PAD
    spec.unk_piece, spec.bos_piece = chat.UNKNOWN_PIECE, chat.BEGIN_PIECE
    spec.eos_piece, spec.pad_piece = chat.END_OF_DOCUMENT_PIECE, chat.PAD_PIECE
    spec.control_symbols.extend(CONTROL_SYMBOLS)
    proto.normalizer_spec.name = "identity"
    proto.normalizer_spec.add_dummy_prefix = False
    proto.normalizer_spec.remove_extra_whitespaces = False
    proto.normalizer_spec.escape_whitespaces = True
    return bytes(proto.SerializeToString(deterministic=True))
