"""Small JSON requests to our own servers, without the clients that take seconds to import."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from typing import Any

_direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class Refused(Exception):
    """A server answered with an error: `status` is the HTTP status, the message its body."""

    def __init__(self, status: int, body: str) -> None:
        super().__init__(f"HTTP {status}: {body[:500]}")
        self.status = status


def call(
    url: str,
    body: Any = None,
    *,
    method: str | None = None,
    token: str | None = None,
    timeout: float = 5,
) -> Any:
    """The JSON (or text) a server answers with. A `body` is sent as JSON, by POST.

    Raises Refused for an HTTP error and OSError when nothing answers within `timeout` seconds.
    """
    headers = {"Accept": "application/json"}
    if body is not None:
        headers["Content-Type"] = "application/json"
    if token:
        headers["Authorization"] = f"Bearer {token}"
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, headers, method=method)
    try:
        with _direct.open(request, timeout=timeout) as response:
            text = response.read().decode("utf-8", "replace")
    except urllib.error.HTTPError as error:
        raise Refused(error.code, error.read().decode("utf-8", "replace")) from error
    except ValueError as error:  # a broken answer of a server that is just ending
        raise OSError(str(error)) from error
    try:
        return json.loads(text)
    except ValueError:
        return text
