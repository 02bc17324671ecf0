"""Text to tokens and back: the tokenizer with its special tokens, and the layout of a conversation.

A conversation is `<s>`, then for each message `<|role|>` its text `<|end|>`, then `<|assistant|>`
where an answer is wanted. The marks are SentencePiece control symbols: no text a person writes
encodes to them, so a message cannot pretend to be another one.
"""

import codecs
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import sentencepiece

UNKNOWN, BEGIN, END_OF_DOCUMENT, PAD = range(4)  # ids; padding is not the end of anything
UNKNOWN_PIECE, BEGIN_PIECE, END_OF_DOCUMENT_PIECE, PAD_PIECE = "<unk>", "<s>", "</s>", "<pad>"
ROLES = {"system": "<|system|>", "user": "<|user|>", "assistant": "<|assistant|>"}
END_OF_TURN_PIECE = "<|end|>"
MASK_PIECE = "<mask>"
RESERVED = tuple(f"<|reserved_{number}|>" for number in range(7))
# Their order fixes their ids, which follow the four above.
CONTROL_SYMBOLS = (*ROLES.values(), END_OF_TURN_PIECE, MASK_PIECE, *RESERVED)
SPECIAL_TOKENS = 4 + len(CONTROL_SYMBOLS)
BYTE_TOKENS = 256

SPACE_MARK = "\u2581"  # how SentencePiece writes a space
SPACE_MARK_BYTES = SPACE_MARK.encode()

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('role ' ~ message['role'] ~ ' is not system, user or assistant') }}"
    "{% endif %}"
    "{{ '<|' ~ message['role'] ~ '|>' ~ message['content'] ~ '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
"""The same layout in Jinja, for `tokenizer_config.json`. Other programs render it to text first and
then look for special tokens in that text, so there, unlike here, a message can contain a mark."""

Message = Mapping[str, str]  # {"role": "system" | "user" | "assistant", "content": text}


class ChatError(ValueError):
    """A conversation that has no layout. The message names what is wrong with it."""


class TokenizerError(ValueError):
    """A tokenizer file that cannot serve. The message names the file or token and the remedy."""


class Tokenizer:
    """A SentencePiece model whose round trip is the identity: `decode(encode(text)) == text`.

    Every piece stands for fixed bytes, so decoding is their concatenation. Three things
    SentencePiece leaves open are settled here: the space mark U+2581 occurring in a text goes by
    its bytes, a lone surrogate (which is no text in UTF-8) becomes `?`, and special tokens decode
    to nothing.
    """

    def __init__(self, proto: bytes, name: str = "tokenizer.model") -> None:
        self.proto = proto
        self._pieces = sentencepiece.SentencePieceProcessor()
        try:
            self._pieces.LoadFromSerializedProto(proto)
        except RuntimeError as error:
            raise TokenizerError(f"{name} is not a SentencePiece model: {error}") from error
        expected = (UNKNOWN_PIECE, BEGIN_PIECE, END_OF_DOCUMENT_PIECE, PAD_PIECE, *CONTROL_SYMBOLS)
        for token, piece in enumerate(expected):
            if token >= len(self) or self._pieces.IdToPiece(token) != piece:
                raise TokenizerError(
                    f"{name} has no {piece} at id {token}: it was not made by the tokenizer stage"
                )
        self._space_mark = [self._pieces.PieceToId(f"<0x{b:02X}>") for b in SPACE_MARK_BYTES]
        self.unknown, self.begin, self.end_of_document, self.pad = range(4)
        self.roles = {role: self._pieces.PieceToId(piece) for role, piece in ROLES.items()}
        self.end_of_turn: int = self._pieces.PieceToId(END_OF_TURN_PIECE)
        self.mask: int = self._pieces.PieceToId(MASK_PIECE)

    @classmethod
    def load(cls, path: Path) -> "Tokenizer":
        """From a `tokenizer.model` file, or the directory of a model that holds one."""
        path = path / "tokenizer.model" if path.is_dir() else path
        try:
            return cls(path.read_bytes(), str(path))
        except FileNotFoundError:
            raise TokenizerError(f"{path} does not exist; a model directory needs one") from None

    def __len__(self) -> int:
        return int(self._pieces.GetPieceSize())

    def __reduce__(self) -> tuple[Any, ...]:
        return Tokenizer, (self.proto,)

    @property
    def stop_ids(self) -> tuple[int, int]:
        """Ids that end generation, as `generation_config.eos_token_id` lists them."""
        return self.end_of_document, self.end_of_turn

    def encode(self, text: str) -> list[int]:
        """Ids of a text; never a special token."""
        if not text.isascii():
            text = text.encode("utf-8", "replace").decode("utf-8")
            if SPACE_MARK in text:
                first, *rest = text.split(SPACE_MARK)
                ids = list(self._pieces.EncodeAsIds(first))
                for part in rest:
                    ids += self._space_mark + self._pieces.EncodeAsIds(part)
                return ids
        return list(self._pieces.EncodeAsIds(text))

    def encode_document(self, text: str) -> list[int]:
        """A document as the model is trained on it: begin, text, end of document."""
        return [self.begin, *self.encode(text), self.end_of_document]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of some ids; bytes that are not UTF-8 (a cut character) become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        table = self.token_bytes
        return b"".join(table[token] for token in ids)

    @cached_property
    def token_bytes(self) -> list[bytes]:
        """What each id stands for; nothing for special tokens."""
        table = []
        for token in range(len(self)):
            piece = self._pieces.IdToPiece(token)
            if token < SPECIAL_TOKENS:
                table.append(b"")
            elif self._pieces.IsByte(token):
                table.append(bytes([int(piece[3:5], 16)]))
            else:
                table.append(piece.replace(SPACE_MARK, " ").encode())
        return table

    def piece(self, token: int) -> str:
        """The name of an id, for people."""
        return str(self._pieces.IdToPiece(token))

    def score(self, token: int) -> float:
        """Of BPE minus the rank of the merge that made this piece, of Unigram its log probability;
        0 for bytes and special tokens."""
        return float(self._pieces.GetScore(token))

    @cached_property
    def is_bpe(self) -> bool:
        """Whether pieces are joined by rank; else the likeliest are chosen (Unigram)."""
        return all(self.score(token).is_integer() for token in range(len(self)))

    def stream(self) -> "StreamDecoder":
        return StreamDecoder(self)


class StreamDecoder:
    """Decodes a growing sequence of ids; what it returns never splits a character.

    Bytes that cannot be completed become U+FFFD as `decode` would give them: the pieces returned,
    joined, equal `decode` of all ids.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._bytes = tokenizer.token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """The text that became certain with this id; empty inside a character."""
        return self._decoder.decode(self._bytes[token])

    def finish(self) -> str:
        """What was still held back at the end."""
        return self._decoder.decode(b"", True)


def encode_chat(
    messages: Sequence[Message], tokenizer: Tokenizer, add_generation_prompt: bool = True
) -> list[int]:
    """Ids of a conversation, ending where the assistant's answer begins.

    Raises ChatError for no messages, an unknown role or a missing content.
    """
    ids, _ = _layout(messages, tokenizer)
    return [*ids, tokenizer.roles["assistant"]] if add_generation_prompt else ids


def encode_example(
    messages: Sequence[Message], tokenizer: Tokenizer
) -> tuple[list[int], list[bool]]:
    """A conversation to learn from: its ids, and which of them the assistant says.

    Learned are the answers and the end mark of each; the mark that opens an answer is given.
    Raises ChatError as `encode_chat` does, and when there is no answer to learn.
    """
    ids, learned = _layout(messages, tokenizer)
    if not any(learned):
        raise ChatError("the conversation has no assistant message to learn from")
    return ids, learned


def _layout(messages: Sequence[Message], tokenizer: Tokenizer) -> tuple[list[int], list[bool]]:
    if not messages:
        raise ChatError("messages is empty; give at least one message")
    ids, learned = [tokenizer.begin], [False]
    for number, message in enumerate(messages):
        role, content = message.get("role"), message.get("content")
        if role not in tokenizer.roles:
            raise ChatError(f"messages[{number}].role {role!r} is not {', '.join(ROLES)}")
        if not isinstance(content, str):
            raise ChatError(f"messages[{number}].content is not a text")
        text = tokenizer.encode(content)
        ids += [tokenizer.roles[role], *text, tokenizer.end_of_turn]
        learned += [False] + [role == "assistant"] * (len(text) + 1)
    return ids, learned
