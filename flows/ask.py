"""One question to the served model, its answer as it comes."""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.request
from collections.abc import Iterator
from http.client import HTTPException

from tasks.runtime.errors import UserError
from tasks.runtime.rest import Refused, call
from tasks.runtime.settings import Settings

KEY = "GRISTMILL_API_KEY"  # the environment variable that holds this person's key
_direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def served_models(settings: Settings) -> list[str]:
    """Ids of the models that the endpoint offers. Raises UserError when it offers none."""
    reason: Exception | None = None
    models: list[str] = []
    try:
        listed = call(f"{settings.serve}/v1/models", token=os.environ.get(KEY))
        models = [model["id"] for model in listed["data"]]
    except Refused as error:
        if error.status in (401, 403):
            raise _not_let_in(settings) from error
        reason = error
    except (OSError, HTTPException) as error:
        raise UserError(
            f"no endpoint answers at {settings.serve}; start the stack: gristmill up"
        ) from error
    except (KeyError, TypeError) as error:
        raise UserError(f"{settings.serve}/v1/models is not a model endpoint: {error}") from error
    if not models:
        raise UserError(
            f"no model is served at {settings.serve}; make one with: gristmill run pipeline --watch"
        ) from reason
    return models


def ask(settings: Settings, question: str, model: str | None = None) -> Iterator[str]:
    """Yields the answer piece by piece. Raises UserError when nothing can answer."""
    if not question.strip():
        raise UserError('the question is empty; ask one: gristmill ask "What does json.dumps do?"')
    models = served_models(settings)
    if model is not None and model not in models:
        raise UserError(f"no model {model!r} is served; there is {', '.join(models)}")
    body = {
        "model": model or models[0],
        "messages": [{"role": "user", "content": question}],
        "stream": True,
        "temperature": 0,
    }
    headers = {"Content-Type": "application/json", "Accept": "text/event-stream"}
    if key := os.environ.get(KEY):
        headers["Authorization"] = f"Bearer {key}"
    request = urllib.request.Request(
        f"{settings.serve}/v1/chat/completions", json.dumps(body).encode(), headers
    )
    try:
        with _direct.open(request, timeout=120) as response:
            for line in response:
                text = line.decode("utf-8").strip()
                if not text.startswith("data:") or text == "data: [DONE]":
                    continue
                event = json.loads(text.removeprefix("data:"))
                if "error" in event:
                    raise UserError(f"the model stopped: {event['error'].get('message', event)}")
                for choice in event.get("choices", ()):
                    if piece := choice["delta"].get("content"):
                        yield piece
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            raise _not_let_in(settings) from error
        said = error.read().decode("utf-8", "replace")[:300]
        raise UserError(f"the endpoint refused the question ({error.code}): {said}") from error
    except (OSError, HTTPException) as error:
        raise UserError(f"the endpoint at {settings.serve} broke off: {error}") from error


def _not_let_in(settings: Settings) -> UserError:
    given = "refuses the key in" if os.environ.get(KEY) else "asks for an API key; put yours into"
    return UserError(f"{settings.serve} {given} {KEY} (gristmill keys create NAME makes one)")
