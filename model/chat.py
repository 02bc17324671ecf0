"""Text to tokens and back: the tokenizer with its special tokens, and the layout of a conversation.

A conversation is `<s>`, then for each message `<|role|>` its text `<|end|>`, then `<|assistant|>`
where an answer is wanted. The marks are SentencePiece control symbols: no text a person writes
encodes to them, so a message cannot pretend to be another one. How tools stand in it is said in
`model.tool_calls`.
"""

import codecs
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from model import tool_calls
from model.byte_level import ByteLevelPieces
from model.sentence_pieces import SentencePieces
from model.tool_calls import Tool

UNKNOWN, BEGIN, END_OF_DOCUMENT, PAD = range(4)  # ids; padding is not the end of anything
UNKNOWN_PIECE, BEGIN_PIECE, END_OF_DOCUMENT_PIECE, PAD_PIECE = "<unk>", "<s>", "</s>", "<pad>"
ROLES = {"system": "<|system|>", "user": "<|user|>", "assistant": "<|assistant|>"}
END_OF_TURN_PIECE = "<|end|>"
MASK_PIECE = "<mask>"
RESERVED = tuple(f"<|reserved_{number}|>" for number in range(7))
TOOL_PIECE = RESERVED[0]  # begins what a tool gave; it keeps the name that tokenizers know it by
# Their order fixes their ids, which follow the four above.
CONTROL_SYMBOLS = (*ROLES.values(), END_OF_TURN_PIECE, MASK_PIECE, *RESERVED)
SPECIAL_PIECES = (UNKNOWN_PIECE, BEGIN_PIECE, END_OF_DOCUMENT_PIECE, PAD_PIECE, *CONTROL_SYMBOLS)
SPECIAL_TOKENS = len(SPECIAL_PIECES)
BYTE_TOKENS = 256  # their ids follow the special tokens', the learned pieces' follow these

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

TOOL_CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% set system = messages[0]['content'] or '' if messages[0]['role'] == 'system' else '' %}"
    "{% if tools %}"
    "{{ '<|system|>' ~ system ~ ('\\n' if system else '') ~ '<tools>\\n' }}"
    "{% for tool in tools %}{{ (tool | tojson) ~ '\\n' }}{% endfor %}"
    "{{ '</tools><|end|>' }}"
    "{% endif %}"
    "{% for message in messages %}"
    "{% set content = message['content'] or '' %}"
    "{% if message['role'] not in ['system', 'user', 'assistant', 'tool'] %}"
    "{{ raise_exception('role ' ~ message['role'] ~ ' is not system, user, assistant or tool') }}"
    "{% elif message['role'] == 'tool' %}"
    "{{ '<|reserved_0|>' ~ content ~ '<|end|>' }}"
    "{% elif not (tools and loop.first and message['role'] == 'system') %}"
    "{{ '<|' ~ message['role'] ~ '|>' ~ content }}"
    "{% for call in message['tool_calls'] or [] %}"
    "{% set arguments = call['function']['arguments'] %}"
    "{{ '\\n' if content or not loop.first else '' }}"
    "{{ '<tool_call>{\"name\": ' ~ (call['function']['name'] | tojson) ~ ', \"arguments\": ' }}"
    "{{ arguments if arguments is string else arguments | tojson }}"
    "{{ '}</tool_call>' }}"
    "{% endfor %}"
    "{{ '<|end|>' }}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
"""The layout of a model that was trained to call tools."""

Message = Mapping[str, Any]
"""{"role": "system" | "user" | "assistant" | "tool", "content": text}; an assistant's may have
"tool_calls" as OpenAI's have, and then no content, or a "weight" of 0, which keeps it from being
learned; a tool's "tool_call_id" says which call it answers."""


TOKENIZER_FILES = (SentencePieces.file_name, ByteLevelPieces.file_name)


class ChatError(ValueError):
    """A conversation that has no layout. The message names what is wrong with it."""


class TokenizerError(ValueError):
    """A tokenizer file that cannot serve. The message names the file or token and the remedy."""


class Tokenizer:
    """A vocabulary whose round trip is the identity: `decode(encode(text)) == text`, and of any
    bytes `decode_bytes(encode_bytes(data)) == data`.

    It is read from SentencePiece's file or, for byte-level BPE, from a `tokenizer.json`; in both,
    ids are the special tokens, the 256 bytes, and the learned pieces. Every id stands for fixed
    bytes, so decoding is their concatenation: none for special tokens. A lone surrogate, which is
    no text in UTF-8, is read as `?`.
    """

    def __init__(self, data: bytes, name: str = "") -> None:
        """data: the file's content; name: what to call it in errors."""
        self.data = data
        begins = data[:64].removeprefix(codecs.BOM_UTF8).lstrip()
        kind = ByteLevelPieces if begins[:1] == b"{" else SentencePieces
        name = name or kind.file_name
        try:
            self._pieces: ByteLevelPieces | SentencePieces = kind(data)
        except ValueError as error:
            raise TokenizerError(f"{name} {error}") from error
        self._require_layout(name)
        self.unknown, self.begin, self.end_of_document, self.pad = range(4)
        self.roles = {role: SPECIAL_PIECES.index(piece) for role, piece in ROLES.items()}
        self.end_of_turn = SPECIAL_PIECES.index(END_OF_TURN_PIECE)
        self.mask = SPECIAL_PIECES.index(MASK_PIECE)
        self.tool_result = SPECIAL_PIECES.index(TOOL_PIECE)

    def _require_layout(self, name: str) -> None:
        for token, piece in enumerate(SPECIAL_PIECES):
            if token >= len(self) or self.piece(token) != piece:
                raise TokenizerError(
                    f"{name} has no {piece} at id {token}: it was not made by the tokenizer stage"
                )
        for byte in range(BYTE_TOKENS):
            token = SPECIAL_TOKENS + byte
            if token >= len(self) or self._pieces.bytes_of(token) != bytes([byte]):
                raise TokenizerError(
                    f"{name} has not the byte {byte} at id {token}: it was not made by the "
                    f"tokenizer stage"
                )

    @classmethod
    def load(cls, path: Path) -> "Tokenizer":
        """From a tokenizer's file, or the directory of a model that holds one. A `tokenizer.json`
        beside SentencePiece's file is for other programs."""
        if path.is_dir():
            names = [name for name in TOKENIZER_FILES if (path / name).is_file()]
            path = path / (names or TOKENIZER_FILES)[0]
        try:
            return cls(path.read_bytes(), str(path))
        except FileNotFoundError:
            raise TokenizerError(
                f"{path} does not exist; a model directory needs {' or '.join(TOKENIZER_FILES)}"
            ) from None

    def __len__(self) -> int:
        return len(self._pieces)

    def __reduce__(self) -> tuple[Any, ...]:
        return Tokenizer, (self.data,)

    @property
    def file_name(self) -> str:
        """What the file is called from which `load` makes this tokenizer."""
        return self._pieces.file_name

    @property
    def kind(self) -> Literal["bpe", "unigram", "byte-level"]:
        """How pieces are found: SentencePiece's BPE or Unigram, or byte-level BPE."""
        return self._pieces.kind

    @property
    def stop_ids(self) -> tuple[int, int]:
        """Ids that end generation, as `generation_config.eos_token_id` lists them."""
        return self.end_of_document, self.end_of_turn

    def encode(self, text: str) -> list[int]:
        """Ids of a text; never a special token."""
        if not text.isascii():
            text = text.encode("utf-8", "replace").decode("utf-8")
        return self._pieces.encode(text)

    def encode_bytes(self, data: bytes) -> list[int]:
        """Ids of any bytes, text or not, which `decode_bytes` gives back; never a special token.
        Those that are UTF-8 are encoded as text, each other byte is a token of its own."""
        ids: list[int] = []
        # Python reads a byte that is not UTF-8 as a lone surrogate, and UTF-8 text holds none.
        for part in re.split(r"([\udc80-\udcff])", data.decode("utf-8", "surrogateescape")):
            if re.fullmatch(r"[\udc80-\udcff]", part):
                ids.append(SPECIAL_TOKENS + ord(part) - 0xDC00)
            else:
                ids += self._pieces.encode(part)
        return ids

    def encode_document(self, text: str) -> list[int]:
        """A document as the model is trained on it: begin, text, end of document."""
        return [self.begin, *self.encode(text), self.end_of_document]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of some ids; bytes that are not UTF-8 (a cut character) become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of some ids; those of `encode_bytes`, and of `encode` in UTF-8."""
        table = self.token_bytes
        return b"".join(table[token] for token in ids)

    @cached_property
    def token_bytes(self) -> list[bytes]:
        """What each id stands for; nothing for special tokens."""
        learned = range(SPECIAL_TOKENS, len(self))
        return [b""] * SPECIAL_TOKENS + [self._pieces.bytes_of(token) for token in learned]

    def piece(self, token: int) -> str:
        """The name of an id, as its file spells it."""
        return self._pieces.piece(token)

    def score(self, token: int) -> float:
        """Of SentencePiece's BPE minus the rank of the merge that made this piece, of Unigram its
        log probability; 0 for bytes and special tokens. Byte-level BPE has merges instead."""
        if isinstance(self._pieces, ByteLevelPieces):
            raise TokenizerError("a byte-level vocabulary has merges, not scores")
        return self._pieces.score(token)

    def stream(self) -> "StreamDecoder":
        return StreamDecoder(self)


class StreamDecoder:
    """Decodes a growing sequence of ids; what it returns never splits a character.

    Bytes that cannot be completed become U+FFFD as `decode` would give them: the pieces returned,
    joined, equal `decode` of all ids.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._bytes = tokenizer.token_bytes
        self._decoder: Any = codecs.getincrementaldecoder("utf-8")("replace")

    @property
    def pending(self) -> int:
        """Bytes of a character that is not whole yet."""
        return len(self._decoder.buffer)

    def push(self, token: int) -> str:
        """The text that became certain with this id; empty inside a character."""
        return self._decoder.decode(self._bytes[token])

    def finish(self) -> str:
        """What was still held back at the end."""
        return self._decoder.decode(b"", True)


def encode_chat(
    messages: Sequence[Message],
    tokenizer: Tokenizer,
    add_generation_prompt: bool = True,
    tools: Sequence[Tool] = (),
) -> list[int]:
    """Ids of a conversation, ending where the assistant's answer begins; `tools` are offered in its
    system message.

    Raises ChatError for no messages, an unknown role or a missing content.
    """
    ids, _ = _layout(messages, tokenizer, tools)
    return [*ids, tokenizer.roles["assistant"]] if add_generation_prompt else ids


def encode_example(
    messages: Sequence[Message], tokenizer: Tokenizer, tools: Sequence[Tool] = ()
) -> tuple[list[int], list[bool]]:
    """A conversation to learn from: its ids, and which of them the assistant says.

    Learned are the answers and the end mark of each; the mark that opens an answer is given, and
    so is an answer of weight 0.
    Raises ChatError as `encode_chat` does, and when there is no answer to learn.
    """
    ids, learned = _layout(messages, tokenizer, tools)
    if not any(learned):
        raise ChatError("the conversation has no assistant message to learn from")
    return ids, learned


def _layout(
    messages: Sequence[Message], tokenizer: Tokenizer, tools: Sequence[Tool]
) -> tuple[list[int], list[bool]]:
    if not messages:
        raise ChatError("messages is empty; give at least one message")
    marks = {**tokenizer.roles, "tool": tokenizer.tool_result}
    ids, learned = [tokenizer.begin], [False]

    def say(role: str, content: str, says: bool) -> None:
        text = tokenizer.encode(content)
        ids.extend([marks[role], *text, tokenizer.end_of_turn])
        learned.extend([False] + [says] * (len(text) + 1))

    try:
        ordered = tool_calls.in_order(messages)
    except ValueError as error:
        raise ChatError(str(error)) from error
    if tools and messages[0].get("role") != "system":
        say("system", tool_calls.offer("", tools), False)
    for number, message in enumerate(ordered):
        role, content = message.get("role"), message.get("content")
        if role not in marks:
            raise ChatError(f"messages[{number}].role {role!r} is not {', '.join(marks)}")
        calls = message.get("tool_calls") or () if role == "assistant" else ()
        if calls and content is None:
            content = ""
        if not isinstance(content, str):
            raise ChatError(f"messages[{number}].content is not a text")
        if calls:
            content = tool_calls.said(content, calls)
        elif tools and number == 0 and role == "system":
            content = tool_calls.offer(content, tools)
        says = role == "assistant" and message.get("weight", 1) != 0
        say(role, content, says)
    return ids, learned
