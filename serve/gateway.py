"""What every request passes: an id, the caller's key and limits, one line of the access log.

The log never holds a word of what was asked or answered.
"""

import json
import logging
import re
import time
import uuid
from dataclasses import dataclass
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.errors import ApiError
from serve.keys import SCOPE_OF, Account, KeyRing
from serve.metrics import HttpMetrics

log = logging.getLogger(__name__)
access_log = logging.getLogger("gristmill.access")
REQUEST_ID = "x-request-id"
SAFE_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
# Ray Serve's own, by which a client could change how it is treated.
INTERNAL = (b"x-request-disconnect-disabled", b"x-request-timeout-seconds")
HANDLERS = ("/", "/health", "/ready", "/metrics", "/v1/models", "/tokenize", "/detokenize")
METHODS = ("GET", "HEAD", "OPTIONS", "POST")
QUIET = ("/health", "/ready", "/metrics")


@dataclass
class Meter:
    """What one request came to; `request.state.meter`."""

    id: str
    account: Account | None = None
    model: str | None = None  # the system fingerprint that answered
    prompt_tokens: int = 0
    completion_tokens: int = 0
    charged: int = 0  # tokens of the key's limit

    def reserve(self, least: int, most: int) -> None:
        """See `Account.reserve`."""
        if self.account is not None:
            self.charged = self.account.reserve(least, most)

    def settle(self) -> None:
        """Charge what the request came to instead of what was reserved."""
        came_to = self.prompt_tokens + self.completion_tokens
        if self.account is not None:
            self.account.correct(came_to - self.charged)
            self.charged = came_to


class Gateway:
    """ASGI middleware around the application."""

    def __init__(
        self, app: ASGIApp, keys: KeyRing | None = None, counted: HttpMetrics | None = None
    ) -> None:
        self.app = app
        self.keys = keys
        self.counted = counted or HttpMetrics()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        scope["headers"] = [pair for pair in scope["headers"] if pair[0].lower() not in INTERNAL]
        given = headers.get(REQUEST_ID, "")
        meter = Meter(given if SAFE_ID.fullmatch(given) else uuid.uuid4().hex)
        scope.setdefault("state", {})["meter"] = meter
        started, status = time.monotonic(), 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)[REQUEST_ID] = meter.id
            await send(message)

        try:
            if self.keys is not None:
                path, authorization = scope["path"], headers.get("authorization")
                meter.account = await self.keys.account(path, authorization)
                if meter.account is not None:
                    meter.account.admit(takes_tokens=path in SCOPE_OF)
            await self.app(scope, receive, send_with_id)
        except ApiError as error:
            await error.response()(scope, receive, send_with_id)
        except Exception:
            # Starlette's own handler of what nobody foresaw stands outside of this, where the
            # answer would have no id and the log no status.
            log.exception("request %s failed", meter.id)
            if status == 0:
                failure = ApiError(500, "the server failed; its log says why")
                await failure.response()(scope, receive, send_with_id)
            else:
                raise
        finally:
            method = scope["method"] if scope["method"] in METHODS else "other"
            self.counted.answered[method, handler(scope["path"]), status] += 1
            if scope["path"] not in QUIET:
                access_log.info(line(scope, meter, status, time.monotonic() - started))


def handler(path: str) -> str:
    """The path as a label: of these there are few, whatever clients ask for."""
    if path.startswith("/v1/models/"):
        return "/v1/models/{name}"
    return path if path in SCOPE_OF or path in HANDLERS else "other"


def line(scope: Scope, meter: Meter, status: int, seconds: float) -> str:
    """One request as JSON; status 0: the client was gone before an answer."""
    client = scope.get("client")
    body: dict[str, Any] = {
        "at": round(time.time(), 3),
        "request": meter.id,
        "method": scope["method"],
        "path": scope["path"][:200],
        "status": status,
        "ms": round(seconds * 1000, 1),
        "client": client[0] if client else None,
        "key": meter.account.key.id if meter.account else None,
        "model": meter.model,
        "prompt_tokens": meter.prompt_tokens,
        "completion_tokens": meter.completion_tokens,
    }
    return json.dumps(body)
