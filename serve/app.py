"""The HTTP surface: OpenAI's endpoints, health, metrics and the chat page."""

import logging
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

from serve import metrics
from serve.cards import card, cards
from serve.checking import decode_json, parse, validate
from serve.completions import Completion
from serve.embeddings import embed
from serve.errors import ApiError, not_ready
from serve.gateway import Gateway, Meter
from serve.host import ModelHost, NotReady, ServedModel, UnknownModel
from serve.keys import KeyRing
from serve.mailbox import Mailbox
from serve.prompts import encode_messages, encode_prompts, require_tools
from serve.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    TokenizeRequest,
)
from serve.responses_api import ResponseRun, ResponsesRequest
from serve.transport import EventStream, read_body, unless_disconnected

Answer = Callable[[Request], Awaitable[Response]]
Asked = TypeVar("Asked", ChatRequest, CompletionRequest, ResponsesRequest)
log = logging.getLogger(__name__)
STATIC = Path(__file__).parent / "static"
# The page loads nothing from elsewhere and talks to nobody else; a frame could trick a person.
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def create_app(host: ModelHost, replica: str = "", keys: KeyRing | None = None) -> Starlette:
    """The application around a model host; `replica` names this copy in `/health`. keys: who may
    ask; None: everybody."""
    mailbox = Mailbox()
    counted = metrics.HttpMetrics()

    async def health(request: Request) -> JSONResponse:
        """Whether this replica works, and which model it serves."""
        return JSONResponse(
            host.state() | {"replica": replica}, status_code=200 if host.healthy else 503
        )

    async def ready(request: Request) -> JSONResponse:
        """200 once a model answers, 503 before."""
        state = host.state()
        return JSONResponse(state, status_code=200 if state["status"] == "ok" else 503)

    async def prometheus(request: Request) -> PlainTextResponse:
        text = metrics.render(host.served, counted, replica)
        return PlainTextResponse(text, media_type=metrics.CONTENT_TYPE)

    async def list_models(request: Request) -> JSONResponse:
        return JSONResponse({"object": "list", "data": cards(host.served)})

    async def get_model(request: Request) -> JSONResponse:
        name = request.path_params["name"]
        return JSONResponse(card(host.first(name), name))

    async def chat_completions(request: Request) -> Any:
        return await complete(request, ChatRequest)

    async def completions(request: Request) -> Any:
        return await complete(request, CompletionRequest)

    async def responses(request: Request) -> Any:
        return await complete(request, ResponsesRequest)

    async def embeddings(request: Request) -> JSONResponse:
        asked = parse(EmbeddingRequest, decode_json(await read_body(request)))
        with leased(asked.model) as served:
            work = embed(asked, served, mailbox, request.state.meter)
            return JSONResponse(await unless_disconnected(request, work))

    async def tokenize(request: Request) -> JSONResponse:
        asked = validate(TokenizeRequest, decode_json(await read_body(request)))
        served = host.first(asked.model)
        engine, tools = served.engine, asked.tools or []
        if asked.messages is not None:
            require_tools(bool(tools), asked.messages, served.calls_tools, served.spec.names[0])
            tokens = await encode_messages(asked.messages, engine, tools=tools)
        else:
            (tokens,) = await encode_prompts([asked.prompt or ""], engine, "prompt")
        return JSONResponse(
            {"count": len(tokens), "max_model_len": engine.context, "tokens": tokens}
        )

    async def detokenize(request: Request) -> JSONResponse:
        asked = validate(DetokenizeRequest, decode_json(await read_body(request)))
        tokenizer = host.first(asked.model).engine.tokenizer
        for number, token in enumerate(asked.tokens):
            if token >= len(tokenizer):
                message = f"tokens[{number}] {token} is outside the vocabulary of {len(tokenizer)}"
                raise ApiError(400, message, param=f"tokens[{number}]", code="invalid_value")
        return JSONResponse({"prompt": tokenizer.decode(asked.tokens)})

    async def complete(request: Request, kind: type[Asked]) -> Any:
        asked = parse(kind, decode_json(await read_body(request)))
        served = host.acquire(asked.model, asked.client)
        done: Callable[[], None] = partial(host.release, served)
        try:
            completion: Completion | ResponseRun
            if isinstance(asked, ResponsesRequest):
                completion = await ResponseRun.begin(asked, served)
            else:
                completion = await Completion.prepare(asked, served)
            headers = {"x-gristmill-version": served.spec.version}
            meter: Meter = request.state.meter

            def over() -> None:
                settle(completion, meter)
                host.release(served)

            done = over
            meter.reserve(*completion.tokens)
            if asked.stream:
                events = completion.events(mailbox)
                first = await anext(events)
                done = _nothing  # but the stream's to do
                return EventStream(first, events, headers, on_close=over)
            done = _nothing
            body = await unless_disconnected(request, completion.whole(mailbox), over)
            return JSONResponse(body, headers=headers)
        finally:
            done()

    @contextmanager
    def leased(name: str) -> Iterator[ServedModel]:
        served = host.acquire(name, by_share=False)
        try:
            yield served
        finally:
            host.release(served)

    async def chat_page(request: Request) -> Response:
        page = (STATIC / "chat.html").read_text()
        return Response(page, media_type="text/html; charset=utf-8", headers=PAGE_HEADERS)

    def get(path: str, answer: Answer) -> Route:
        return Route(path, answer, methods=["GET"])

    def post(path: str, answer: Answer) -> Route:
        return Route(path, answer, methods=["POST"])

    return Starlette(
        routes=[
            post("/v1/chat/completions", chat_completions),
            post("/v1/completions", completions),
            post("/v1/responses", responses),
            post("/v1/embeddings", embeddings),
            post("/tokenize", tokenize),
            post("/detokenize", detokenize),
            get("/v1/models", list_models),
            get("/v1/models/{name:path}", get_model),
            get("/health", health),
            get("/ready", ready),
            get("/metrics", prometheus),
            get("/", chat_page),
            Mount("/static", Assets(directory=STATIC), name="static"),
        ],
        middleware=[Middleware(Gateway, keys=keys, counted=counted)],
        exception_handlers={
            ApiError: _api_error,
            NotReady: _not_ready,
            UnknownModel: _unknown_model,
            HTTPException: _http_error,
            ClientDisconnect: _client_gone,
        },
    )


def settle(completion: "Completion | ResponseRun", meter: Meter) -> None:
    """Count and charge what a request came to, however it ended; one that the engine refused took
    no time worth knowing.
    """
    usage, served = completion.usage, completion.served
    meter.model = served.spec.system_fingerprint
    meter.prompt_tokens, meter.completion_tokens = usage.prompt_tokens, usage.completion_tokens
    meter.settle()
    if not completion.accepted:
        return
    served.metrics.record(
        seconds=completion.clock.elapsed,
        first=completion.clock.first,
        usage=usage,
        choices=completion.choices,
        limit=completion.limit,
    )


class Assets(StaticFiles):
    """The chat page's style and script, with the page's headers."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        if scope["method"] not in ("GET", "HEAD"):
            raise HTTPException(405, headers={"Allow": "GET, HEAD"})
        return await super().get_response(path, scope)

    def file_response(self, *args: Any, **kwargs: Any) -> Response:
        response = super().file_response(*args, **kwargs)
        response.headers.update(PAGE_HEADERS)
        return response


def _nothing() -> None:
    pass


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


async def _not_ready(request: Request, error: Exception) -> Response:
    return not_ready(str(error)).response()


async def _unknown_model(request: Request, error: Exception) -> Response:
    return ApiError(404, str(error), param="model", code="model_not_found").response()


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}"
    headers = dict(error.headers or {})  # of a wrong method: the right ones
    return ApiError(error.status_code, message, code="invalid_url", headers=headers).response()


async def _client_gone(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it; the access log does
