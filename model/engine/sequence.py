"""One answer in the making, and what it reports."""

from dataclasses import dataclass, field
from typing import Literal

import torch

from model.engine.pages import Run
from model.engine.sampling import Adjustment, Sampling
from model.engine.speculation import NgramIndex
from model.engine.text import TextStream

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True)
class TokenLogprob:
    """How likely a token was: `top` are the most likely ones in its place, as (id, logprob).

    Logprobs are the model's own, before temperature, penalties, bias and masks.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Update:
    """News of one sequence: the tokens and text since the last update. The last one, and only that,
    has a `finish_reason`: "stop" (an end token or a stop string), "length", "abort" or "error".
    """

    id: str
    text: str
    tokens: list[int]
    finish_reason: FinishReason | None
    prompt_tokens: int
    completion_tokens: int  # generated so far, the end token included
    cached_tokens: int = 0  # of the prompt, found in the cache
    kept: int = 0  # how many of `tokens` stand in the text: not an end token or a stop string's
    logprobs: list[TokenLogprob] = field(default_factory=list)  # one for each of `tokens`, if asked
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=list)  # in the first update
    embedding: torch.Tensor | None = None  # (C,), the only news of a prompt that was to be embedded
    total_logprob: float = 0.0  # of all tokens so far, where logprobs were asked for
    waited: float = 0.0  # seconds for a place in the batch
    read: float = 0.0  # seconds until the prompt was read, the waiting included
    lasted: float = 0.0  # seconds until the end, in the last update
    problem: str = ""  # of an "error": what the request itself asked for and cannot be had


@dataclass(eq=False)
class Sequence:
    """A prompt and how it goes on. `tokens` are the generated ones, the end token included."""

    id: str
    prompt: list[int]
    sampling: Sampling
    text: TextStream | None  # None: only ids are wanted
    limit: int  # tokens to generate at most, what the context leaves already considered
    streamed: bool = True  # report as it grows, or only the whole
    embed: bool = False  # report the mean hidden state of the prompt, and no token
    tokens: list[int] = field(default_factory=list)
    adjustment: Adjustment | None = None
    added: float = 0.0  # when it began to wait, by the monotonic clock
    waited: float = 0.0  # seconds it did
    read: float = 0.0  # seconds until its prompt was read, since it was added
    lasted: float = 0.0  # and until its end
    # In the cache:
    run: Run | None = None  # None: waiting
    computed: int = 0  # tokens whose keys and values lie in the cache
    cached: int = 0  # of these, found there
    hashes: list[bytes] = field(default_factory=list)  # of the full pages known so far
    filled: int = 0  # pages whose content the page table knows
    guessed: bool = False  # whether its next tokens are guessed
    lookup: NgramIndex | None = None  # where they are looked up; None: by the draft model
    draft: list[int] = field(default_factory=list)  # tokens guessed to come next
    # Not reported yet:
    parts: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=list)
    reported: int = 0  # tokens reported
    kept: int = 0  # tokens that stand in the text
    total_logprob: float = 0.0
    problem: str = ""  # why it broke off, where its own form is the reason
    hidden: torch.Tensor | None = None  # (C,), the sum over the prompt so far

    @property
    def length(self) -> int:
        """Tokens known, prompt and answer."""
        return len(self.prompt) + len(self.tokens)

    @property
    def reading(self) -> bool:
        """Whether part of the prompt is still to be read."""
        return self.computed < len(self.prompt)

    @property
    def needs_whole_prompt(self) -> bool:
        """Whether hidden states of every prompt token are wanted, which no cache holds."""
        return self.embed or self.sampling.prompt_logprobs

    def known(self, start: int, end: int) -> list[int]:
        """Tokens start … end - 1 of prompt and answer."""
        at = len(self.prompt)
        if end <= at:
            return self.prompt[start:end]
        return self.prompt[start:] + self.tokens[max(0, start - at) : end - at]
