"""A parsed request answered: prompts to the engine, updates to response bodies or stream events."""

import logging
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from model.chat import encode_chat
from model.engine import EngineBusy, EngineClosed, PromptError, Sampling, Update
from serve.errors import ApiError, not_ready, overloaded
from serve.host import ServedModel
from serve.mailbox import Mail, Mailbox
from serve.protocol import MAX_CHOICES, ChatRequest, CompletionRequest
from serve.responses import DONE, Envelope, Usage, event

log = logging.getLogger(__name__)


class Completion:
    """One request and the model that answers it."""

    def __init__(self, request: ChatRequest | CompletionRequest, served: ServedModel) -> None:
        """Raises ApiError 400 for prompts that the model cannot read."""
        self.request = request
        self.served = served
        self.envelope = Envelope.new(
            "chat" if isinstance(request, ChatRequest) else "text",
            served.spec.name,
            served.spec.system_fingerprint,
        )
        self.prompts = self._prompts()
        if len(self.prompts) * request.choices > MAX_CHOICES:
            raise ApiError(
                400,
                f"{len(self.prompts)} prompts with n = {request.choices} make more than "
                f"{MAX_CHOICES} answers; send fewer",
                param="n",
                code="invalid_value",
            )
        self.usage = Usage()

    async def whole(self, mailbox: Mailbox) -> dict[str, Any]:
        """The response body once everything is generated."""
        choices: dict[int, dict[str, Any]] = {}
        with self._open(mailbox, streamed=False) as mail:
            async for index, update in mail.updates():
                self._count(index, update)
                if failure := _failure(update):
                    raise failure
                choices[index] = self.envelope.choice(index, update.text, update.finish_reason)
        return self.envelope.whole([choices[index] for index in sorted(choices)], self.usage)

    async def events(self, mailbox: Mailbox) -> AsyncGenerator[bytes, None]:
        """Server-sent events as tokens come. The first item is made before any token: draw it to
        learn of a refusal (ApiError) while the status can still be chosen."""
        with_usage = self.request.include_usage
        with self._open(mailbox, streamed=True) as mail:
            opening = b""
            if self.envelope.kind == "chat":
                for index in range(len(mail.indices)):
                    chunk = self.envelope.chunk([self.envelope.opening(index)], with_usage)
                    opening += event(chunk)
            yield opening
            async for index, update in mail.updates():
                self._count(index, update)
                if failure := _failure(update):
                    yield event(failure.body())
                    return
                for delta in self.envelope.deltas(index, update.text, update.finish_reason):
                    yield event(self.envelope.chunk([delta], with_usage))
            if with_usage:
                yield event(self.envelope.usage_chunk(self.usage))
            yield DONE

    def _count(self, index: int, update: Update) -> None:
        self.usage.add(index, index // self.request.choices, update)

    @contextmanager
    def _open(self, mailbox: Mailbox, *, streamed: bool) -> Iterator[Mail]:
        base = self.request.sampling(self.request.limit)
        requests: list[tuple[list[int], Sampling]] = [
            (prompt, replace(base, choice=index * self.request.choices + number))
            for index, prompt in enumerate(self.prompts)
            for number in range(self.request.choices)
        ]
        try:
            with mailbox.open(self.served.engine, requests, streamed=streamed) as mail:
                yield mail
        except PromptError as error:
            param = "messages" if self.envelope.kind == "chat" else "prompt"
            code = "context_length_exceeded" if "context length" in str(error) else "invalid_value"
            raise ApiError(400, str(error), param=param, code=code) from error
        except EngineBusy as error:
            raise overloaded(str(error)) from error
        except EngineClosed as error:
            raise not_ready(str(error)) from error

    def _prompts(self) -> list[list[int]]:
        tokenizer = self.served.engine.tokenizer
        if isinstance(self.request, ChatRequest):
            return [encode_chat([m.layout() for m in self.request.messages], tokenizer)]
        return [
            [tokenizer.begin, *tokenizer.encode(prompt)] if isinstance(prompt, str) else prompt
            for prompt in self.request.prompts()
        ]


def _failure(update: Update) -> ApiError | None:
    """The error of a sequence that the engine, not its own end, has ended."""
    if update.finish_reason == "abort":
        return not_ready("the server is shutting down")
    if update.finish_reason == "error":
        return ApiError(500, "the engine failed while generating; the request can be repeated")
    return None
