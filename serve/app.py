"""The HTTP surface: OpenAI's endpoints, health, metrics and the chat page."""

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.staticfiles import StaticFiles

from model.chat import encode_chat
from serve import metrics
from serve.completions import Completion
from serve.errors import ApiError, not_ready
from serve.host import ModelHost, NotReady, ServedModel
from serve.mailbox import Mailbox
from serve.protocol import (
    ChatRequest,
    CompletionRequest,
    TokenizeRequest,
    decode_json,
    parse,
    validate,
)
from serve.transport import EventStream, read_body, unless_disconnected

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


def create_app(host: ModelHost, replica: str = "") -> FastAPI:
    """The application around a model host; `replica` names this copy in `/health`."""
    app = FastAPI(title="Gristmill", docs_url=None, redoc_url=None, openapi_url=None)
    mailbox = Mailbox()
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(NotReady, _not_ready)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(ClientDisconnect, _client_gone)
    app.add_exception_handler(Exception, _server_error)

    @app.get("/health")
    async def health() -> JSONResponse:
        """Whether this replica works, and which model it serves."""
        return JSONResponse(
            host.state() | {"replica": replica}, status_code=200 if host.healthy else 503
        )

    @app.get("/ready")
    async def ready() -> JSONResponse:
        """200 once a model answers, 503 before."""
        state = host.state()
        return JSONResponse(state, status_code=200 if state["status"] == "ok" else 503)

    @app.get("/metrics")
    async def prometheus() -> PlainTextResponse:
        return PlainTextResponse(metrics.render(host.current), media_type=metrics.CONTENT_TYPE)

    @app.get("/v1/models")
    async def list_models() -> JSONResponse:
        served = host.current
        return JSONResponse({"object": "list", "data": [_card(served)] if served else []})

    @app.get("/v1/models/{name:path}")
    async def get_model(name: str) -> JSONResponse:
        served = host.current
        if served is None:
            raise not_ready(host.why_not_ready())
        _require(name, served)
        return JSONResponse(_card(served))

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Any:
        return await complete(request, ChatRequest)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Any:
        return await complete(request, CompletionRequest)

    @app.post("/tokenize")
    async def tokenize(request: Request) -> JSONResponse:
        asked = validate(TokenizeRequest, decode_json(await read_body(request)))
        served = host.current
        if served is None:
            raise not_ready(host.why_not_ready())
        if asked.model is not None:
            _require(asked.model, served)
        tokenizer, context = served.engine.tokenizer, served.engine.context
        if asked.messages is not None:
            tokens = encode_chat([m.layout() for m in asked.messages], tokenizer)
        else:
            tokens = [tokenizer.begin, *tokenizer.encode(asked.prompt or "")]
        return JSONResponse({"count": len(tokens), "max_model_len": context, "tokens": tokens})

    async def complete(request: Request, kind: type[ChatRequest] | type[CompletionRequest]) -> Any:
        asked = parse(kind, decode_json(await read_body(request)))
        served = host.acquire()
        release: Callable[[], None] = partial(host.release, served)
        try:
            _require(asked.model, served)
            completion = Completion(asked, served)
            headers = {"x-gristmill-version": served.spec.version}
            if asked.stream:
                events = completion.events(mailbox)
                first = await anext(events)
                stream = EventStream(first, events, headers, on_close=release)
                release = _nothing
                return stream
            body = await unless_disconnected(request, completion.whole(mailbox))
            return JSONResponse(body, headers=headers)
        finally:
            release()

    @app.get("/")
    async def chat_page() -> Response:
        page = (STATIC / "chat.html").read_text()
        return Response(page, media_type="text/html; charset=utf-8", headers=PAGE_HEADERS)

    app.mount("/static", Assets(directory=STATIC), name="static")
    return app


class Assets(StaticFiles):
    """The chat page's style and script, with the page's headers."""

    def file_response(self, *args: Any, **kwargs: Any) -> Response:
        response = super().file_response(*args, **kwargs)
        response.headers.update(PAGE_HEADERS)
        return response


def _card(served: ServedModel) -> dict[str, Any]:
    """A model as `/v1/models` shows it: OpenAI's fields, then ours."""
    spec = served.spec
    return {
        "id": spec.name,
        "object": "model",
        "created": int(served.since),
        "owned_by": "gristmill",
        "max_model_len": served.engine.context,
        "version": spec.version,
        "system_fingerprint": spec.system_fingerprint,
        "artifact": spec.artifact,
        "parameters": served.parameters,
        "title": spec.title,
        "corpus": spec.corpus,
        "examples": spec.examples,
        "lineage": spec.lineage,
        "scores": spec.scores,
    }


def _require(name: str, served: ServedModel) -> None:
    """Raise ApiError 404 unless `name` is the served model's."""
    if name != served.spec.name:
        raise ApiError(
            404,
            f"The model {name!r} does not exist; this endpoint serves {served.spec.name!r}",
            param="model",
            code="model_not_found",
        )


def _nothing() -> None:
    pass


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


async def _not_ready(request: Request, error: Exception) -> Response:
    return not_ready(str(error)).response()


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}"
    return ApiError(error.status_code, message, code="invalid_url").response()


async def _client_gone(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it; the access log does


async def _server_error(request: Request, error: Exception) -> Response:
    return ApiError(500, "the server failed; its log says why").response()
