"""Choosing the next token: greedy, or by a seed whose noise depends on nobody else in the batch."""

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

MAX_LOGPROBS = 20
LEAST_TEMPERATURE = 1e-5  # below it the best token is certain, and a quotient may be infinite
CANDIDATES = 256  # sorted first; the whole vocabulary only where these do not hold the answer
_WORD = 2**64 - 1


def _random_seed() -> int:
    return int.from_bytes(os.urandom(8), "little")


@dataclass(frozen=True)
class Sampling:
    """How one sequence is continued. Raises ValueError, naming the field, for an impossible value.

    A temperature below LEAST_TEMPERATURE is greedy, and then top_k, top_p, min_p and seed have
    nothing to choose. Otherwise the logits are divided by the temperature, the top_k best are kept
    (0: all), of these the fewest whose probability reaches top_p (arXiv:1904.09751), of these the
    ones at least min_p times as likely as the best (arXiv:2407.01082), and one of what is left is
    drawn.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = field(default_factory=_random_seed)
    choice: int = 0  # which of several answers to the same prompt: each has its own noise
    max_tokens: int | None = None  # None: as many as the context holds; 0: only read the prompt
    min_tokens: int = 0  # before that many, no end token is chosen and no stop string looked for
    ignore_eos: bool = False  # end tokens are tokens like others
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()  # end tokens besides the model's
    repetition_penalty: float = 1.0  # arXiv:1909.05858; of tokens in the prompt or the answer
    presence_penalty: float = 0.0  # off the logit of each token that is in the answer
    frequency_penalty: float = 0.0  # the same, times how often it is there
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token, added to its logit)
    logprobs: int | None = None  # report this many of the likeliest tokens beside each chosen one
    prompt_logprobs: bool = False  # and the same of the prompt's tokens
    constraint: "ConstraintFactory | None" = None  # the form the answer must have

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature {self.temperature} must be 0 or more, and finite")
        if self.top_k < 0:
            raise ValueError(f"top_k {self.top_k} must be 0 (all tokens) or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p {self.top_p} must be above 0 and at most 1")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p {self.min_p} must be between 0 and 1")
        if self.max_tokens is not None and self.max_tokens < 0:
            raise ValueError(f"max_tokens {self.max_tokens} must be 0 or more")
        if self.min_tokens < 0 or (
            self.max_tokens is not None and self.min_tokens > self.max_tokens
        ):
            raise ValueError(
                f"min_tokens {self.min_tokens} must be 0 or more, and at most max_tokens"
            )
        if "" in self.stop:
            raise ValueError("stop holds an empty text; leave it out")
        if not 0 < self.repetition_penalty < float("inf"):
            raise ValueError(f"repetition_penalty {self.repetition_penalty} must be above 0")
        for name in ("presence_penalty", "frequency_penalty"):
            if not -float("inf") < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} {getattr(self, name)} must be finite")
        if any(not -1e4 <= bias <= 1e4 for _, bias in self.logit_bias):
            raise ValueError("logit_bias must be between -10000 and 10000")
        if self.logprobs is not None and not 0 <= self.logprobs <= MAX_LOGPROBS:
            raise ValueError(f"logprobs {self.logprobs} must be between 0 and {MAX_LOGPROBS}")
        if self.prompt_logprobs and self.logprobs is None:
            raise ValueError("prompt_logprobs needs logprobs")


def uniforms(seeds: list[int], choices: list[int], positions: list[int]) -> Tensor:
    """One number in [0, 1) for each (seed, choice, position), the same whenever it is asked for.

    The mixing function is SplitMix64's (Steele, Lea, Flood 2014), chained over the three words.
    """
    state = np.zeros(len(seeds), dtype=np.uint64)
    for words in (seeds, choices, positions):
        state = state ^ np.array([word & _WORD for word in words], dtype=np.uint64)
        state = state + np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state = state ^ (state >> np.uint64(31))
    return torch.from_numpy((state >> np.uint64(11)).astype(np.float64) * 2.0**-53)


class Constraint(Protocol):
    """A form that an answer must have, followed token by token."""

    def allowed(self) -> Tensor:
        """bool (V,): the tokens that may come next; at least one is True."""
        ...

    def push(self, token: int) -> None:
        """The token was chosen."""
        ...


class ConstraintError(ValueError):
    """A form that cannot be followed further, raised by `allowed` or `push`; the message says which
    and why, in words for who asked for it.
    """


ConstraintFactory = Callable[[], Constraint]
"""Makes the constraint of one answer, at its beginning."""


class Adjustment:
    """What one answer's parameters do to its logits before a token is chosen."""

    def __init__(
        self, sampling: Sampling, prompt: Sequence[int], ends: Iterable[int], vocabulary: int
    ) -> None:
        self.sampling = sampling
        self.ends = torch.tensor(sorted(ends), dtype=torch.long)
        self.constraint = sampling.constraint() if sampling.constraint else None
        self._bias: tuple[Tensor, Tensor] | None = None
        if sampling.logit_bias:
            tokens, values = zip(*sampling.logit_bias, strict=True)
            self._bias = torch.tensor(tokens), torch.tensor(values, dtype=torch.float32)
        self._counts = self._seen = None
        if sampling.presence_penalty or sampling.frequency_penalty:
            self._counts = torch.zeros(vocabulary)
        if sampling.repetition_penalty != 1:
            self._seen = torch.zeros(vocabulary, dtype=torch.bool)
            self._seen[torch.tensor(prompt)] = True

    @classmethod
    def of(
        cls, sampling: Sampling, prompt: Sequence[int], ends: Iterable[int], vocabulary: int
    ) -> "Adjustment | None":
        """None when there is nothing to adjust, which is the rule."""
        s = sampling
        needed = (
            s.constraint is not None
            or s.min_tokens > 0
            or bool(s.logit_bias)
            or (s.repetition_penalty, s.presence_penalty, s.frequency_penalty) != (1, 0, 0)
        )
        return cls(sampling, prompt, ends, vocabulary) if needed else None

    def apply(self, logits: Tensor, generated: int) -> Tensor:
        """logits (V,) of the token that comes after `generated` ones; a new tensor."""
        s = self.sampling
        logits = logits.cpu().clone()
        if self._seen is not None:
            scaled = torch.where(
                logits > 0, logits / s.repetition_penalty, logits * s.repetition_penalty
            )
            logits = torch.where(self._seen, scaled, logits)
        if self._counts is not None:
            logits -= s.frequency_penalty * self._counts
            logits -= s.presence_penalty * (self._counts > 0)
        if self._bias is not None:
            logits.index_add_(0, *self._bias)
        if self.constraint is not None:
            logits.masked_fill_(~self.constraint.allowed(), float("-inf"))
        if generated < s.min_tokens:
            without = logits.index_fill(0, self.ends, float("-inf"))
            # A constraint may leave nothing but the end.
            logits = without if bool((without > float("-inf")).any()) else logits
        return logits

    def push(self, token: int) -> None:
        """A token was chosen."""
        if self._counts is not None:
            self._counts[token] += 1
        if self._seen is not None:
            self._seen[token] = True
        if self.constraint is not None:
            self.constraint.push(token)


@torch.inference_mode()
def choose(logits: Tensor, samplings: list[Sampling], positions: list[int]) -> list[int]:
    """The next token of each row of `logits` (n, V); positions: index of that token in its
    sequence.
    """
    best = logits.argmax(-1).tolist()
    drawn = [
        row for row, sampling in enumerate(samplings) if sampling.temperature >= LEAST_TEMPERATURE
    ]
    if not drawn:
        return best
    truncated: list[int] = []
    plain: list[int] = []
    for row in drawn:
        s = samplings[row]
        (truncated if s.top_k or s.top_p < 1 or s.min_p > 0 else plain).append(row)
    for rows, draw in ((plain, _draw), (truncated, _draw_truncated)):
        if rows:
            chosen = [samplings[row] for row in rows]
            noise = uniforms(
                [s.seed for s in chosen],
                [s.choice for s in chosen],
                [positions[row] for row in rows],
            )
            temperature = torch.tensor([s.temperature for s in chosen], dtype=torch.float64)
            scaled = logits[rows].cpu().double() / temperature[:, None]
            tokens = draw(scaled, noise, chosen)
            for row, token in zip(rows, tokens.tolist(), strict=True):
                best[row] = token
    return best


def choose_apart(
    logits: Tensor, samplings: list[Sampling], positions: list[int]
) -> list[int | Exception]:
    """As `choose`, but what fails for one row is that row's result and disturbs no other."""
    try:
        return list(choose(logits, samplings, positions))
    except Exception as error:
        if len(samplings) == 1:
            return [error]
    return [
        choose_apart(logits[row : row + 1], [sampling], [position])[0]
        for row, (sampling, position) in enumerate(zip(samplings, positions, strict=True))
    ]


def _draw(logits: Tensor, noise: Tensor, samplings: list[Sampling]) -> Tensor:
    """One token for each row of logits (R, V), from the whole vocabulary."""
    return _invert(logits.softmax(-1), noise)


def _draw_truncated(logits: Tensor, noise: Tensor, samplings: list[Sampling]) -> Tensor:
    """As `_draw`, after top_k, top_p and min_p."""
    vocabulary = logits.shape[1]
    most = [min(s.top_k or vocabulary, vocabulary) for s in samplings]
    top_k = torch.tensor(most)[:, None]
    top_p = torch.tensor([s.top_p for s in samplings], dtype=logits.dtype)[:, None]
    min_p = torch.tensor([s.min_p for s in samplings], dtype=logits.dtype)[:, None]
    total = logits.logsumexp(-1, keepdim=True)
    # The best top_k must all be among the candidates, or their sum would be wrong.
    limited = [k for k in most if k < vocabulary]
    count = min(max(CANDIDATES, *limited, 0), vocabulary)
    while True:
        values, tokens = logits.topk(count, dim=-1)
        ranked = torch.arange(count) < top_k
        masked = values.masked_fill(~ranked, float("-inf"))
        norm = torch.where(top_k < vocabulary, masked.logsumexp(-1, keepdim=True), total)
        probabilities = (masked - norm).exp()
        before = probabilities.cumsum(-1) - probabilities
        keep = ranked & (before < top_p) & (probabilities >= min_p * probabilities[:, :1])
        if count == vocabulary or not bool(keep[:, -1].any()):
            break
        count = vocabulary
    keep[:, 0] = True
    index = _invert(probabilities * keep, noise)
    return tokens.gather(1, index[:, None])[:, 0]


def _invert(weights: Tensor, noise: Tensor) -> Tensor:
    """Where `noise` (R,) in [0, 1) falls in the running sums of `weights` (R, K); never on a 0."""
    sums = weights.cumsum(-1)
    target = noise[:, None] * sums[:, -1:]
    index = (sums <= target).sum(-1)
    last = weights.shape[1] - 1 - (weights > 0).flip(-1).to(torch.uint8).argmax(-1)
    return torch.minimum(index, last)
