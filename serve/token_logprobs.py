"""Logprobs as OpenAI's two protocols show them."""

from collections.abc import Sequence
from typing import Any

from model.chat import Tokenizer
from model.engine import TokenLogprob

Entries = Sequence[tuple[int, TokenLogprob | None]]
"""Tokens with what the model thought of them; None for a first token, which follows nothing."""


def chat_logprobs(tokenizer: Tokenizer, entries: Entries) -> dict[str, Any]:
    """`choices[].logprobs` of /v1/chat/completions."""
    content = [
        _chat_token(tokenizer, entry.token, entry.logprob)
        | {"top_logprobs": [_chat_token(tokenizer, *pair) for pair in entry.top]}
        for _, entry in entries
        if entry is not None
    ]
    return {"content": content, "refusal": None}


class Offsets:
    """Where in a text its tokens begin: at as many characters as those before them decode to."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._decoder = tokenizer.stream()
        self._characters = 0

    def of(self, token: int) -> int:
        """Where the next token begins."""
        begins = self._characters
        self._characters += len(self._decoder.push(token))
        return begins

    def end_prompt(self) -> None:
        """A character that a prompt leaves unfinished, no answer finishes."""
        self._characters += len(self._decoder.finish())


def text_logprobs(
    tokenizer: Tokenizer, entries: Entries, offsets: list[int], with_top: bool
) -> dict[str, Any]:
    """`choices[].logprobs` of /v1/completions; `offsets`: of each token, see `Offsets`."""
    tokens, values, top = [], [], []
    for token, entry in entries:
        tokens.append(token_text(tokenizer, token))
        values.append(None if entry is None else entry.logprob)
        # Beside the likeliest stands the token itself, as in OpenAI's answers.
        pairs = () if entry is None else (*entry.top, (token, entry.logprob))
        top.append({token_text(tokenizer, id): logprob for id, logprob in pairs} or None)
    return {
        "tokens": tokens,
        "token_logprobs": values,
        "top_logprobs": top if with_top else None,
        "text_offset": offsets,
    }


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """A token as a text: part of a character as OpenAI writes it, a special token by its name."""
    raw = tokenizer.token_bytes[token]
    if not raw:
        return tokenizer.piece(token)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def _chat_token(tokenizer: Tokenizer, token: int, logprob: float) -> dict[str, Any]:
    return {
        "token": token_text(tokenizer, token),
        "logprob": logprob,
        "bytes": list(tokenizer.token_bytes[token]),
    }
