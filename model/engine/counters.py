"""What an engine counts: what it has done, and what it holds."""

from bisect import bisect_left
from dataclasses import dataclass, field

STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)  # vLLM's bounds


@dataclass
class Counters:
    """Totals since the engine started, and what it holds now."""

    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0  # of the prompts, found in the cache
    generation_tokens: int = 0
    aborted: int = 0
    ended: int = 0  # for whatever reason
    steps: int = 0
    drafts: int = 0  # guesses of one or more tokens
    drafted_tokens: int = 0  # proposed by speculation
    accepted_tokens: int = 0  # of these, those that were right
    running: int = 0
    waiting: int = 0
    pages: int = 0
    pages_used: int = 0
    step_tokens: int = 0  # read by all steps, of prompts and answers
    steps_of: list[int] = field(default_factory=lambda: [0] * (len(STEP_TOKENS) + 1))
    """How many steps read how many tokens: up to each bound of STEP_TOKENS, then more."""

    def count_step(self, tokens: int) -> None:
        """A step that read so many."""
        self.steps += 1
        self.step_tokens += tokens
        self.steps_of[bisect_left(STEP_TOKENS, tokens)] += 1
