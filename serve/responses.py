"""OpenAI's response bodies and stream chunks."""

import json
import time
import uuid
from dataclasses import dataclass, field
from typing import Any, Literal

from model.engine import Update

DONE = b"data: [DONE]\n\n"
Kind = Literal["chat", "text"]


def event(body: dict[str, Any]) -> bytes:
    """One server-sent event."""
    text = json.dumps(body, ensure_ascii=False, separators=(",", ":"))
    return f"data: {text}\n\n".encode()


@dataclass
class Usage:
    """Tokens of one request: each prompt counted once, the tokens of all choices together."""

    prompts: dict[int, int] = field(default_factory=dict)
    cached: dict[int, int] = field(default_factory=dict)  # of the prompts, found in the cache
    completions: dict[int, int] = field(default_factory=dict)
    reasons: dict[int, str] = field(default_factory=dict)  # why each answer ended
    waited: float = 0.0  # seconds for a place in the batch, of the answer that waited longest
    read: float = 0.0  # seconds until the prompts were read, the waiting included
    lasted: float = 0.0  # seconds until the engine had ended the last answer

    def add(self, choice: int, prompt: int, update: Update) -> None:
        if update.prompt_tokens:  # none: it ends before it began, or with its engine
            self.prompts[prompt] = update.prompt_tokens
            # Choices after the first find what the first has read; that is no news of the prompt.
            self.cached[prompt] = min(
                self.cached.get(prompt, update.cached_tokens), update.cached_tokens
            )
            self.completions[choice] = update.completion_tokens
        self.waited = max(self.waited, update.waited)
        if update.finish_reason not in (None, "abort"):  # an answer broken off says nothing of time
            self.reasons[choice] = update.finish_reason
            self.read, self.lasted = max(self.read, update.read), max(self.lasted, update.lasted)

    @property
    def prompt_tokens(self) -> int:
        return sum(self.prompts.values())

    @property
    def completion_tokens(self) -> int:
        return sum(self.completions.values())

    def body(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(self.cached.values())},
        }


class Clock:
    """How long a request takes, in seconds. `first`: until its first token, where that is seen."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._heard: dict[int, float] = {}  # answer → when its last news came
        self.first: float | None = None

    def heard(self, answer: int) -> float | None:
        """Seconds between this news of an answer and the last; None where it is the first."""
        now = time.monotonic()
        if self.first is None:
            self.first = now - self._started
        last = self._heard.get(answer)
        self._heard[answer] = now
        return None if last is None else now - last

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self._started


@dataclass(frozen=True)
class Envelope:
    """What every body of one response has in common."""

    kind: Kind
    model: str
    system_fingerprint: str
    id: str
    created: int

    @classmethod
    def new(cls, kind: Kind, model: str, system_fingerprint: str) -> "Envelope":
        prefix = "chatcmpl" if kind == "chat" else "cmpl"
        return cls(
            kind, model, system_fingerprint, f"{prefix}-{uuid.uuid4().hex}", int(time.time())
        )

    def whole(self, choices: list[dict[str, Any]], usage: Usage) -> dict[str, Any]:
        name = "chat.completion" if self.kind == "chat" else "text_completion"
        return self._body(name, choices) | {"usage": usage.body()}

    def chunk(self, choices: list[dict[str, Any]], with_usage: bool) -> dict[str, Any]:
        """with_usage: the client asked for a usage chunk, so the others say `"usage": null`."""
        name = "chat.completion.chunk" if self.kind == "chat" else "text_completion"
        return self._body(name, choices) | ({"usage": None} if with_usage else {})

    def usage_chunk(self, usage: Usage) -> dict[str, Any]:
        return self.chunk([], True) | {"usage": usage.body()}

    def _body(self, name: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": name,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.system_fingerprint,
            "choices": choices,
        }

    def choice(
        self,
        index: int,
        text: str,
        finish_reason: str | None,
        logprobs: Any = None,
        message: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """One finished answer. message: what it says instead of `text`, its calls of tools too."""
        common = {"index": index, "logprobs": logprobs, "finish_reason": finish_reason}
        if self.kind == "text":
            return {"text": text} | common
        said = message or {"content": text}
        return {"message": {"role": "assistant", "refusal": None} | said} | common

    def opening(self, index: int) -> dict[str, Any]:
        """The first delta of a chat choice, which says who speaks."""
        delta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def deltas(
        self,
        index: int,
        text: str,
        finish_reason: str | None,
        logprobs: Any = None,
        said: list[dict[str, Any]] | None = None,
    ) -> list[dict[str, Any]]:
        """What to send for an update: the new text, or what is `said` instead of it, then, in a
        chat, an empty delta at the end."""
        if self.kind == "text":
            if not text and finish_reason is None:
                return []
            choice = {"index": index, "logprobs": logprobs, "text": text}
            return [choice | {"finish_reason": finish_reason}]
        if said is None:
            said = [{"content": text}] if text else []
        if logprobs and not said:
            said = [{"content": ""}]
        parts: list[dict[str, Any]] = []
        for delta in said:
            part = {"index": index, "logprobs": logprobs, "delta": delta}
            parts.append(part | {"finish_reason": None})
            logprobs = None  # they come once
        if finish_reason is not None:
            last: dict[str, Any] = {"index": index, "logprobs": None, "delta": {}}
            parts.append(last | {"finish_reason": finish_reason})
        return parts
