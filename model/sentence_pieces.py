"""SentencePiece's pieces, BPE or Unigram: no text is lost, and every piece stands for fixed bytes.

Two things SentencePiece leaves open are settled here: the space mark U+2581 occurring in a text
goes by its bytes, and what the vocabulary lacks does, too.
"""

from functools import cached_property
from typing import Literal

import sentencepiece

SPACE_MARK = "\u2581"  # how SentencePiece writes a space
SPACE_MARK_BYTES = SPACE_MARK.encode()


class SentencePieces:
    """A `tokenizer.model`. Raises ValueError, worded to follow the file's name, for what is none.

    Which of its tokens are special is the caller's to know: they are pieces here like others.
    """

    file_name = "tokenizer.model"

    def __init__(self, data: bytes) -> None:
        self._pieces = sentencepiece.SentencePieceProcessor()
        try:
            self._pieces.LoadFromSerializedProto(data)
        except RuntimeError as error:
            raise ValueError(f"is not a SentencePiece model: {error}") from error
        self._space_mark = [self._pieces.PieceToId(f"<0x{b:02X}>") for b in SPACE_MARK_BYTES]

    def __len__(self) -> int:
        return int(self._pieces.GetPieceSize())

    @cached_property
    def kind(self) -> Literal["bpe", "unigram"]:
        """Whether pieces are joined by rank, or the likeliest are chosen."""
        ranked = all(self.score(token).is_integer() for token in range(len(self)))
        return "bpe" if ranked else "unigram"

    def encode(self, text: str) -> list[int]:
        """Ids of a text that UTF-8 can write; never a control symbol."""
        if SPACE_MARK in text:
            first, *rest = text.split(SPACE_MARK)
            ids = list(self._pieces.EncodeAsIds(first))
            for part in rest:
                ids += self._space_mark + self._pieces.EncodeAsIds(part)
            return ids
        return list(self._pieces.EncodeAsIds(text))

    def piece(self, token: int) -> str:
        return str(self._pieces.IdToPiece(token))

    def bytes_of(self, token: int) -> bytes:
        piece = self.piece(token)
        if self._pieces.IsByte(token):
            return bytes([int(piece[3:5], 16)])
        return piece.replace(SPACE_MARK, " ").encode()

    def score(self, token: int) -> float:
        """Of BPE minus the rank of the merge that made this piece, of Unigram its log probability;
        0 for bytes and control symbols."""
        return float(self._pieces.GetScore(token))
