"""A parsed request answered: prompts to the engine, updates to response bodies or stream events."""

import json
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

from model.engine import (
    ConstraintFactory,
    EngineBusy,
    EngineClosed,
    PromptError,
    Sampling,
    Update,
)
from serve.errors import ApiError, not_ready, overloaded
from serve.host import ServedModel
from serve.mailbox import Mail, Mailbox
from serve.prompts import encode_messages, encode_prompts, require_tools
from serve.protocol import ChatRequest, CompletionRequest, Request
from serve.responses import DONE, Clock, Envelope, Usage, event
from serve.specification import MAX_CHOICES
from serve.token_logprobs import Entries, Offsets, chat_logprobs, text_logprobs
from serve.tools import AnswerReader, whole_message


class Completion:
    """One request and the model that answers it. Made by `prepare`."""

    def __init__(
        self,
        request: ChatRequest | CompletionRequest,
        served: ServedModel,
        prompts: list[list[int]],
        constraint: ConstraintFactory | None,
    ) -> None:
        self.request = request
        self.served = served
        self.tokenizer = served.engine.tokenizer
        self.envelope = Envelope.new(
            "chat" if isinstance(request, ChatRequest) else "text",
            served.spec.name,
            served.spec.system_fingerprint,
        )
        self.prompts = prompts
        self.echo, self.begun = False, [True]  # whether prompts begin with a token of ours
        if isinstance(request, CompletionRequest):
            self.echo = bool(request.echo)
            self.begun = [isinstance(prompt, str) for prompt in request.prompts()]
        sampling = request.sampling(constraint)
        if request.candidates > request.choices and sampling.logprobs is None:
            sampling = replace(sampling, logprobs=0)  # the best are chosen by them
        if self.echo and request.top_count is not None:
            sampling = replace(sampling, prompt_logprobs=True)
        self.sampling = sampling
        self.form = request.form
        self.choices, self.limit = request.choices, request.limit
        self.usage = Usage()
        self.accepted = False  # by the engine
        self.clock = Clock()
        self._offsets: dict[int, Offsets] = {}  # answer → where its next token begins
        self.may_call = isinstance(request, ChatRequest) and bool(request.offered)
        self.must_call = isinstance(request, ChatRequest) and request.must_call
        self._readers: dict[int, AnswerReader] = {}  # answer → what is text and what a call

    @classmethod
    async def prepare(
        cls, request: ChatRequest | CompletionRequest, served: ServedModel
    ) -> "Completion":
        """Encode the prompts and check the grammar. Raises ApiError 400 for what cannot be
        read.
        """
        count = 1 if isinstance(request, ChatRequest) else len(request.prompts())
        if count * request.candidates > MAX_CHOICES:
            raise ApiError(
                400,
                f"{count} prompts with {request.candidates} answers each make more than "
                f"{MAX_CHOICES} answers; send fewer",
                param="n",
                code="invalid_value",
            )
        if isinstance(request, ChatRequest):
            tools, messages = request.offered, request.messages
            require_tools(bool(tools), messages, served.calls_tools, served.spec.names[0])
            prompts = [await encode_messages(messages, served.engine, request.source, tools)]
        else:
            prompts = await encode_prompts(request.prompts(), served.engine, request.source)
        constraint = None
        if isinstance(request, ChatRequest) and request.offered:
            # By themselves: an answer may come to a call late, and then all others would wait.
            if form := Request.grammar(request):
                await served.grammars.check(*form)
            for number, tool in enumerate(request.offered):
                schema = json.dumps(tool.arguments())
                param = f"tools[{number}].function.parameters"
                await served.grammars.check("json_schema", schema, param)
        if grammar := request.grammar():
            constraint = await served.grammars.check(*grammar)
        return cls(request, served, prompts, constraint)

    async def whole(self, mailbox: Mailbox) -> dict[str, Any]:
        """The response body once everything is generated."""
        answers: dict[int, Update] = {}
        async with self.open(mailbox, streamed=False) as mail:
            async for index, update in mail.updates():
                self.count(index, update)
                if failure := self.failure(update):
                    raise failure
                answers[index] = update
        choices: list[dict[str, Any]] = []
        for prompt in range(len(self.prompts)):
            for number in self._best(prompt, answers):
                update = answers[number]
                text = (self._prompt_text(prompt) if self.echo else "") + update.text
                logprobs = self._logprobs(number, prompt, update)
                reason: str | None = update.finish_reason
                message = None
                if self.may_call:
                    message, reason = whole_message(text, reason, must=self.must_call)
                choices.append(
                    self.envelope.choice(len(choices), text, reason, logprobs, message=message)
                )
        return self.envelope.whole(choices, self.usage)

    async def events(self, mailbox: Mailbox) -> AsyncGenerator[bytes, None]:
        """Server-sent events as tokens come. The first item is made before any token: draw it to
        learn of a refusal (ApiError) while the status can still be chosen."""
        with_usage = self.request.include_usage
        echoed: set[int] = set()
        async with self.open(mailbox, streamed=True) as mail:
            opening = b""
            if self.envelope.kind == "chat":
                for index in range(len(mail.indices)):
                    chunk = self.envelope.chunk([self.envelope.opening(index)], with_usage)
                    opening += event(chunk)
            yield opening
            async for index, update in mail.updates():
                self.count(index, update)
                if failure := self.failure(update):
                    yield event(failure.body())
                    return
                prompt = index // self.request.choices
                text = update.text
                if self.echo and index not in echoed:
                    echoed.add(index)
                    text = self._prompt_text(prompt) + text
                logprobs = self._logprobs(index, prompt, update)
                reason: str | None = update.finish_reason
                parts = None
                if self.may_call:
                    reader = self._readers.setdefault(index, AnswerReader(self.must_call))
                    parts = reader.push(text, last=reason is not None)
                    reason = reader.ended(reason)
                for delta in self.envelope.deltas(index, text, reason, logprobs, parts):
                    yield event(self.envelope.chunk([delta], with_usage))
            if with_usage:
                yield event(self.envelope.usage_chunk(self.usage))
            yield DONE

    def count(self, index: int, update: Update) -> None:
        if self.request.stream and (gap := self.clock.heard(index)) is not None:
            self.served.metrics.between_tokens.observe(gap)
        self.usage.add(index, index // self.request.candidates, update)

    def failure(self, update: Update) -> ApiError | None:
        return failure_of(update, self.form)

    @property
    def tokens(self) -> tuple[int, int]:
        """How many this may come to, prompts and answers: at least, and at most. Both are the same
        where the request says how long an answer may be.
        """
        many, context = self.request.candidates, self.served.engine.context
        read = sum(map(len, self.prompts))
        rooms = [max(0, context - len(prompt)) for prompt in self.prompts]
        if self.limit is None:
            return read + many * len(rooms), read + many * sum(rooms)
        most = read + many * sum(min(self.limit, room) for room in rooms)
        return most, most

    @asynccontextmanager
    async def open(self, mailbox: Mailbox, *, streamed: bool) -> AsyncIterator[Mail]:
        """The engine at work on every answer; number i is answer i % candidates to prompt
        i // candidates. Counts the tokens of those that are unfinished at the end. Raises ApiError
        when it refuses.
        """
        many = self.request.candidates
        # A seed answers a prompt alike wherever it stands; without one, equal prompts must differ.
        apart = many if self.request.seed is None else 0
        requests: list[tuple[list[int], Sampling]] = [
            (prompt, replace(self.sampling, choice=index * apart + number))
            for index, prompt in enumerate(self.prompts)
            for number in range(many)
        ]
        try:
            with mailbox.open(self.served.engine, requests, streamed=streamed) as mail:
                self.accepted = True
                try:
                    yield mail
                finally:
                    for number, update in await mail.end():
                        self.usage.add(number, number // many, update)
        except PromptError as error:
            raise self._refused(error) from error
        except EngineBusy as error:
            raise overloaded(str(error)) from error
        except EngineClosed as error:
            raise not_ready(str(error)) from error

    def _refused(self, error: PromptError) -> ApiError:
        """Which parameter the engine could not read."""
        param = self.request.source
        size = len(self.tokenizer)
        if any(token >= size for token, _ in self.sampling.logit_bias):
            param = "logit_bias"
        elif any(token >= size for token in self.sampling.stop_ids):
            param = "stop_token_ids"
        code = "context_length_exceeded" if "context length" in str(error) else "invalid_value"
        return ApiError(400, str(error), param=param, code=code)

    def _best(self, prompt: int, answers: dict[int, Update]) -> list[int]:
        """The answers to send: those with the highest logprob per token."""
        many = self.request.candidates
        numbers = list(range(prompt * many, (prompt + 1) * many))
        if many == self.request.choices:
            return numbers
        means = {n: answers[n].total_logprob / max(1, len(answers[n].tokens)) for n in numbers}
        return sorted(numbers, key=lambda n: -means[n])[: self.request.choices]

    def _prompt_text(self, prompt: int) -> str:
        return self.tokenizer.decode(self.prompts[prompt])

    def _logprobs(self, index: int, prompt: int, update: Update) -> dict[str, Any] | None:
        """In the shape of the protocol, of the tokens that stand in the text; None unless asked."""
        top = self.request.top_count
        if top is None:
            return None
        kept = update.tokens[: update.kept]
        entries: Entries = list(zip(kept, update.logprobs, strict=False))
        if self.envelope.kind == "chat":
            return chat_logprobs(self.tokenizer, entries) if entries else None
        offsets = self._offsets.setdefault(index, Offsets(self.tokenizer))
        begins: list[int] = []
        if update.prompt_logprobs:
            of_prompt = list(zip(self.prompts[prompt], update.prompt_logprobs, strict=True))
            if self.begun[prompt]:  # by us, not the caller
                of_prompt = of_prompt[1:]
            begins = [offsets.of(token) for token, _ in of_prompt]
            offsets.end_prompt()
            entries = [*of_prompt, *entries]
        begins += [offsets.of(token) for token in kept]
        return text_logprobs(self.tokenizer, entries, begins, top > 0)


def failure_of(update: Update, form: str | None = None) -> ApiError | None:
    """The error of a sequence that the engine, not its own end, has ended; `form` is the parameter
    that says which form it must have.
    """
    if update.finish_reason == "abort":
        return not_ready("the server is shutting down")
    if update.finish_reason == "error" and update.problem:
        return ApiError(400, update.problem, param=form, code="invalid_value")
    if update.finish_reason == "error":
        return ApiError(500, "the engine failed while generating; the request can be repeated")
    return None
