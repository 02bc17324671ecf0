"""Requests to an endpoint under test, and what must be true of every answer."""

from __future__ import annotations

import json

from tests.serve.conftest import Endpoint

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "def main():"}]}
TEXT = {"model": "tiny", "prompt": "import os"}


def post(endpoint: Endpoint, path: str, body: object) -> dict:
    with endpoint.client() as client:
        response = client.post(path, json=body)
    assert response.status_code == 200, response.text
    return response.json()


def stream(endpoint: Endpoint, path: str, body: dict) -> list[dict]:
    """The chunks of a stream, which must end with [DONE]."""
    with endpoint.client() as client, client.stream("POST", path, json=body) as response:
        assert response.status_code == 200, response.read()
        assert response.headers["content-type"].startswith("text/event-stream")
        events = "".join(response.iter_text()).split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    return [json.loads(event.removeprefix("data: ")) for event in events[:-2]]


def error(endpoint: Endpoint, path: str, **request: object) -> tuple[int, dict]:
    with endpoint.client() as client:
        response = client.post(path, **request)
    body = response.json()["error"]
    assert set(body) == {"message", "type", "param", "code"}
    return response.status_code, body


def bomb(title: str = "") -> str:
    """600 characters that take llguidance a minute and gigabytes, whatever its own limits."""
    patterns = [{"type": "string", "pattern": f".*a[ab]{{{n}}}b.*"} for n in range(3, 20)]
    return json.dumps({"title": title, "allOf": patterns})
