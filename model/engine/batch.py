"""Many prompts answered at once, without a server: evaluation and rollouts."""

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from model.chat import Tokenizer
from model.engine.core import Core
from model.engine.sampling import Sampling
from model.engine.sequence import FinishReason, TokenLogprob
from model.transformer import Transformer

GREEDY = Sampling(temperature=0.0, seed=0)


@dataclass(frozen=True)
class Generation:
    """A finished answer: `tokens` with the end token, `text` without it or a stop string."""

    text: str
    tokens: list[int]
    finish_reason: FinishReason
    prompt_tokens: int
    logprobs: list[TokenLogprob] = field(default_factory=list)  # one a token, where asked for
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=list)


def generate_batch(
    model: Transformer,
    tokenizer: Tokenizer | None,
    prompts: Iterable[list[int]],
    sampling: Sampling | Iterable[Sampling] = GREEDY,
    *,
    slots: int = 128,
    on_progress: Callable[[int], None] | None = None,
    **options: Any,
) -> list[Generation]:
    """Answer many prompts as fast as one thread can; answers come in the order of the prompts.

    prompts: token ids (`model.chat.encode_chat` makes them). sampling: one for all, or one each; a
    prompt's index becomes its `choice` when they share one, so that equal prompts differ.
    on_progress is called with the number of answers finished so far. options: those of `Core`.
    Raises PromptError for a prompt that does not fit the model's context.
    """
    prompts = list(prompts)
    if isinstance(sampling, Sampling):
        samplings = [replace(sampling, choice=index) for index in range(len(prompts))]
    else:
        samplings = list(sampling)
    core = Core(
        model,
        tokenizer,
        slots=max(1, min(slots, len(prompts))),
        **{"prefill_tokens": 4096} | options,
    )
    pairs = zip(itertools.count(), prompts, samplings, strict=False)
    sequences = [core.sequence(str(i), p, s, streamed=False) for i, p, s in pairs]
    # The longest first, so that the batch does not end with one of them alone.
    for sequence in sorted(sequences, key=lambda s: -len(s.prompt)):
        core.add(sequence)
    done: dict[str, Generation] = {}
    while core.has_work:
        for update in core.step():
            assert update.finish_reason is not None
            done[update.id] = Generation(
                update.text,
                update.tokens,
                update.finish_reason,
                update.prompt_tokens,
                update.logprobs,
                update.prompt_logprobs,
            )
            if on_progress:
                on_progress(len(done))
    return [done[sequence.id] for sequence in sequences]
