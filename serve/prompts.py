"""Prompts to token ids, with the endless ones refused before they cost anything."""

import asyncio
import json
from collections.abc import Callable, Sequence
from typing import ParamSpec

from model.chat import ChatError, Tokenizer, encode_chat
from serve.engine_process import EngineProcess
from serve.errors import ApiError
from serve.tools import Tool
from serve.turns import Message

P = ParamSpec("P")
LONG = 20_000  # characters from which on encoding is worth another thread


async def encode_messages(
    messages: Sequence[Message],
    engine: EngineProcess,
    param: str = "messages",
    tools: Sequence[Tool] = (),
) -> list[int]:
    """A conversation laid out for an answer. Raises ApiError 400 for one beyond the context."""
    laid_out = [message.layout() for message in messages]
    offered = [tool.offered() for tool in tools]
    calls = (call["function"] for said in laid_out for call in said.get("tool_calls", ()))
    size = sum(len(said["content"]) for said in laid_out)
    size += sum(len(call["name"]) + len(call["arguments"]) for call in calls)
    size += len(json.dumps(offered, ensure_ascii=False)) if offered else 0
    _refuse_endless(size, engine, param)
    try:
        return await _encode(size, encode_chat, laid_out, engine.tokenizer, tools=offered)
    except ChatError as error:
        raise ApiError(400, str(error), param=param, code="invalid_value") from error


def require_tools(offered: bool, messages: Sequence[Message], trained: bool, model: str) -> None:
    """Raises ApiError 400 for tools that are offered, or messages of theirs, where the model was
    not trained for them."""
    if trained:
        return
    found = next((n for n, message in enumerate(messages) if message.has_tools), None)
    if offered or found is not None:
        raise ApiError(
            400,
            f"{model} was not trained to call tools; leave them out, or fine-tune it on "
            "conversations that call some",
            param="tools" if offered else f"messages[{found}]",
            code="unsupported_parameter",
        )


async def encode_prompts(
    prompts: Sequence[str | list[int]], engine: EngineProcess, param: str
) -> list[list[int]]:
    """Texts after the token that begins them; ids as they are."""
    tokenizer = engine.tokenizer
    encoded = []
    for prompt in prompts:
        if isinstance(prompt, str):
            _refuse_endless(len(prompt), engine, param)
            ids = await _encode(len(prompt), tokenizer.encode, prompt)
            encoded.append([tokenizer.begin, *ids])
        else:
            encoded.append(prompt)
    return encoded


def longest_token(tokenizer: Tokenizer) -> int:
    """Bytes of the longest token."""
    return max(map(len, tokenizer.token_bytes))


def _refuse_endless(characters: int, engine: EngineProcess, param: str) -> None:
    """A text that cannot fit, however well it is compressed, is not even encoded."""
    least = characters // engine.longest_token
    if least > engine.context:
        raise ApiError(
            400,
            f"the prompt has {characters} characters, at least {least} tokens; this model's "
            f"maximum context length is {engine.context} tokens, the answer included; shorten it",
            param=param,
            code="context_length_exceeded",
        )


async def _encode(
    size: int, function: Callable[P, list[int]], *arguments: P.args, **named: P.kwargs
) -> list[int]:
    """In another thread where it would hold up the others."""
    if size < LONG:
        return function(*arguments, **named)
    return await asyncio.to_thread(function, *arguments, **named)
