"""The engine without its thread: sequences in, one step at a time, updates out."""

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Literal

import torch

from model.chat import Tokenizer
from model.engine.runner import Runner
from model.engine.sampling import Sampling, choose
from model.engine.scheduler import Scheduler, Sequence
from model.engine.text import TextStream
from model.transformer import Transformer

GREEDY = Sampling(temperature=0.0, seed=0)
FinishReason = Literal["stop", "length", "abort", "error"]


class PromptError(ValueError):
    """A prompt the model cannot read. The message says why and what would do."""


@dataclass(frozen=True)
class Update:
    """News of one sequence: the tokens and text since the last update. The last one, and only that,
    has a `finish_reason`: "stop" (an end token or a stop string), "length", "abort" or "error"."""

    id: str
    text: str
    tokens: list[int]
    finish_reason: FinishReason | None
    prompt_tokens: int
    completion_tokens: int  # generated so far, the end token included


@dataclass(frozen=True)
class Generation:
    """A finished answer: `tokens` with the end token, `text` without it or a stop string."""

    text: str
    tokens: list[int]
    finish_reason: FinishReason
    prompt_tokens: int


@dataclass
class Counters:
    """Totals since the engine started, and what it holds now."""

    requests: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    aborted: int = 0
    steps: int = 0
    running: int = field(default=0)
    waiting: int = field(default=0)


class Core:
    """Scheduler, network and sampling put together. Not thread-safe: one thread owns it.

    slots: sequences in a batch at most. tokenizer: None when only token ids are wanted.
    stop_ids: tokens that end an answer; None: the tokenizer's.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer | None,
        *,
        slots: int = 32,
        prefill_tokens: int = 1024,
        dtype: torch.dtype = torch.float32,
        stop_ids: Iterable[int] | None = None,
    ) -> None:
        self.config = model.config
        self.tokenizer = tokenizer
        if stop_ids is None:
            stop_ids = tokenizer.stop_ids if tokenizer else ()
        self.stop_ids = frozenset(stop_ids)
        self.scheduler = Scheduler(slots, prefill_tokens)
        self.runner = Runner(model, slots, dtype)
        self.counters = Counters()

    def sequence(
        self, id: str, prompt: list[int], sampling: Sampling, *, streamed: bool = True
    ) -> Sequence:
        """Check a prompt and make the sequence that `add` takes; may be called from any thread.

        Raises PromptError for an empty prompt, ids outside the vocabulary, or no room for an
        answer.
        """
        context = self.config.context
        if not prompt:
            raise PromptError("the prompt is empty; give at least one token")
        if len(prompt) >= context:
            raise PromptError(
                f"the prompt has {len(prompt)} tokens, this model's maximum context length is "
                f"{context} tokens, the answer included; shorten the prompt"
            )
        if min(prompt) < 0 or max(prompt) >= self.config.vocab_size:
            raise PromptError(
                f"the prompt holds a token id outside the vocabulary of {self.config.vocab_size}"
            )
        if sampling.stop and self.tokenizer is None:
            raise PromptError("stop strings need a tokenizer; this engine was made without one")
        text = TextStream(self.tokenizer, sampling.stop) if self.tokenizer else None
        limit = min(sampling.max_tokens or context, context - len(prompt))
        return Sequence(id, prompt, sampling, text, limit, streamed)

    def add(self, sequence: Sequence) -> None:
        self.scheduler.add(sequence)
        self.counters.requests += 1
        self.counters.prompt_tokens += len(sequence.prompt)

    @property
    def has_work(self) -> bool:
        return bool(self.scheduler.running or self.scheduler.waiting)

    def step(self) -> list[Update]:
        """Read the prompts that fit, then one token for every running sequence."""
        updates: list[Update] = []
        if admitted := self.scheduler.admit():
            first = admitted[0].slot
            assert first is not None
            logits = self.runner.prefill([s.prompt for s in admitted], first)
            self._advance(admitted, logits, updates)
        if running := list(self.scheduler.running):
            logits = self.runner.decode(
                [s.tokens[-1] for s in running], [s.length - 1 for s in running]
            )
            self._advance(running, logits, updates)
        self.counters.steps += 1
        self._count()
        return updates

    def abort(self, ids: Iterable[str], reason: FinishReason = "abort") -> list[Update]:
        """Take sequences out, whether waiting or running; ids that have finished are no error."""
        updates = []
        for sequence in self.scheduler.find(ids):
            if sequence.slot is None:
                self.scheduler.waiting.remove(sequence)
            updates.append(self._finish(sequence, reason))
            self.counters.aborted += 1
        self._count()
        return updates

    def check(self) -> None:
        """Raise AssertionError when the slots do not match the sequences."""
        self.scheduler.check()

    def _count(self) -> None:
        self.counters.running = len(self.scheduler.running)
        self.counters.waiting = len(self.scheduler.waiting)

    def _advance(
        self, sequences: list[Sequence], logits: torch.Tensor, updates: list[Update]
    ) -> None:
        """Choose and append the next token of each sequence, and finish those that end with it."""
        chosen = choose(logits, [s.sampling for s in sequences], [s.length for s in sequences])
        self.counters.generation_tokens += len(sequences)
        for sequence, token in zip(sequences, chosen, strict=True):
            sequence.tokens.append(token)
            if sequence.text is not None and (part := sequence.text.push(token)):
                sequence.parts.append(part)
            if token in self.stop_ids or (sequence.text is not None and sequence.text.stopped):
                updates.append(self._finish(sequence, "stop"))
            elif len(sequence.tokens) >= sequence.limit:
                updates.append(self._finish(sequence, "length"))
            elif sequence.streamed:
                updates.append(self._report(sequence, None))

    def _finish(self, sequence: Sequence, reason: FinishReason) -> Update:
        if sequence.slot is not None and (move := self.scheduler.release(sequence)):
            source, target, length = move
            self.runner.cache.move(source, target, length)
        if sequence.text is not None:
            was_stopped = sequence.text.stopped
            sequence.parts.append(sequence.text.finish())
            if sequence.text.stopped and not was_stopped:
                reason = "stop"
        return self._report(sequence, reason)

    def _report(self, sequence: Sequence, reason: FinishReason | None) -> Update:
        text, tokens = "".join(sequence.parts), sequence.tokens[sequence.reported :]
        sequence.parts.clear()
        sequence.reported = len(sequence.tokens)
        return Update(sequence.id, text, tokens, reason, len(sequence.prompt), len(sequence.tokens))


def generate_batch(
    model: Transformer,
    tokenizer: Tokenizer | None,
    prompts: Iterable[list[int]],
    sampling: Sampling | Iterable[Sampling] = GREEDY,
    *,
    slots: int = 128,
    stop_ids: Iterable[int] | None = None,
    dtype: torch.dtype = torch.float32,
    on_progress: Callable[[int], None] | None = None,
) -> list[Generation]:
    """Answer many prompts as fast as one thread can; answers come in the order of the prompts.

    prompts: token ids (`model.chat.encode_chat` makes them). sampling: one for all, or one each; a
    prompt's index becomes its `choice` when they share one, so that equal prompts differ.
    on_progress is called with the number of answers finished so far.
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
        prefill_tokens=4096,
        dtype=dtype,
        stop_ids=stop_ids,
    )
    pairs = zip(itertools.count(), prompts, samplings, strict=False)
    sequences = [core.sequence(str(i), p, s, streamed=False) for i, p, s in pairs]
    # Prompts of a like length are read together with little padding.
    for sequence in sorted(sequences, key=lambda s: -len(s.prompt)):
        core.add(sequence)
    done: dict[str, Generation] = {}
    while core.has_work:
        for update in core.step():
            assert update.finish_reason is not None
            done[update.id] = Generation(
                update.text, update.tokens, update.finish_reason, update.prompt_tokens
            )
            if on_progress:
                on_progress(len(done))
    return [done[sequence.id] for sequence in sequences]
