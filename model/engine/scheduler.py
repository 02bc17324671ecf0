"""Who runs and who waits: the whole policy of continuous batching on one page.

First come, first served. A sequence is admitted when a slot is free, and a slot holds a full
context, so an admitted sequence always finishes. Sequence i of `running` has slot i: when one
finishes, the last one takes its place.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from model.engine.sampling import Sampling
from model.engine.text import TextStream


@dataclass(eq=False)
class Sequence:
    """One answer in the making. `tokens` are the generated ones, the end token included."""

    id: str
    prompt: list[int]
    sampling: Sampling
    text: TextStream | None  # None: only ids are wanted
    limit: int  # tokens to generate at most, what the context leaves already considered
    streamed: bool = True  # report every token, or only the whole
    tokens: list[int] = field(default_factory=list)
    parts: list[str] = field(default_factory=list)  # text not reported yet
    reported: int = 0  # tokens reported
    slot: int | None = None

    @property
    def length(self) -> int:
        """Tokens whose keys and values lie in the cache once the next step has run."""
        return len(self.prompt) + len(self.tokens)


class Scheduler:
    """The queue and the slots. `prefill_tokens` bounds how many prompt tokens (padding included)
    are read between two decode steps, so that a burst of prompts does not stall the answers under
    way.
    """

    def __init__(self, slots: int, prefill_tokens: int) -> None:
        self.slots = slots
        self.prefill_tokens = prefill_tokens
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def admit(self) -> list[Sequence]:
        """Move from waiting to running what this step can read; at least one if a slot is free."""
        admitted: list[Sequence] = []
        longest = 0
        while self.waiting and len(self.running) < self.slots:
            longest = max(longest, len(self.waiting[0].prompt))
            if admitted and longest * (len(admitted) + 1) > self.prefill_tokens:
                break
            sequence = self.waiting.popleft()
            sequence.slot = len(self.running)
            self.running.append(sequence)
            admitted.append(sequence)
        return admitted

    def release(self, sequence: Sequence) -> tuple[int, int, int] | None:
        """Free the slot of a running sequence. Returns (source slot, target slot, tokens) to be
        moved in the cache, or None.
        """
        hole = sequence.slot
        assert hole is not None
        sequence.slot = None
        last = self.running.pop()
        if last is sequence:
            return None
        source, last.slot = last.slot, hole
        self.running[hole] = last
        assert source is not None
        return source, hole, last.length

    def find(self, ids: Iterable[str]) -> list[Sequence]:
        """The sequences of these ids, wherever they are; unknown ids have finished already."""
        wanted = set(ids)
        return [s for s in (*self.waiting, *self.running) if s.id in wanted]

    def check(self) -> None:
        """Raise AssertionError when slots and sequences do not match one to one."""
        assert len(self.running) <= self.slots
        for slot, sequence in enumerate(self.running):
            assert sequence.slot == slot, f"{sequence.id} says slot {sequence.slot}, lies in {slot}"
        assert all(s.slot is None for s in self.waiting), "a waiting sequence holds a slot"
        ids = [s.id for s in (*self.waiting, *self.running)]
        assert len(ids) == len(set(ids)), "a sequence is queued twice"
