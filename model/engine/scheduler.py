"""Who runs and who waits: the whole policy of continuous batching on one page.

First come, first served. A sequence is admitted when a place in the batch and a run of pages for
all it can ever need are free, so an admitted sequence always finishes and nothing is preempted.
In a step every answer under way gets its token first; what the budget leaves reads prompts, and
only the last of them in part.
"""

from collections import deque
from collections.abc import Iterable

from model.engine.pages import PAGE, Copy, PageTable, Run, next_hash
from model.engine.runner import Span
from model.engine.sequence import Sequence


class Scheduler:
    """The queue, the batch and the pages.

    slots: sequences in a batch at most. budget: tokens of one step, so that a long prompt does not
    stall the answers under way. root: what all hashes of this cache begin with: contents of another
    model are never found. grid: with it, prompts are read in chunks of exactly that many tokens,
    counted from their beginning, and only pages of whole chunks are found again.
    """

    def __init__(
        self,
        pages: PageTable,
        *,
        slots: int,
        budget: int,
        root: bytes = b"",
        reuse: bool = True,
        grid: int | None = None,
    ) -> None:
        self.pages = pages
        self.slots = slots
        self.budget = budget
        self.root = root
        self.reuse = reuse
        self.grid = grid
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.moved: list[tuple[Run, Run]] = []  # by compaction, for the cache to follow, in order
        self.copies: list[Copy] = []

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def admit(self) -> None:
        """Move from waiting to running what fits. Afterwards the cache must carry out `moved`,
        then `copies`.
        """
        self.moved, self.copies = [], []
        while self.waiting and len(self.running) < self.slots:
            sequence = self.waiting[0]
            if not sequence.hashes:
                sequence.hashes = self._hash(sequence, [], len(sequence.prompt))
            hits = self._hits(sequence)
            if self._soon_to_be_had(sequence, len(hits)):
                break
            needed = pages_for(sequence)
            found = self.pages.allocate(needed, hits)
            if found is None:
                if self.pages.free < needed or self.copies:
                    break
                self._compact()
                hits = self._hits(sequence)
                found = self.pages.allocate(needed, hits)
                assert found is not None, "all free pages are neighbours"
            sequence.run, sequence.filled = found.run, found.hits
            sequence.computed = sequence.cached = found.hits * PAGE
            self.copies += found.copies
            self.running.append(self.waiting.popleft())

    def plan(self) -> list[tuple[Sequence, Span]]:
        """What the next step reads of whom."""
        left = self.budget
        plan = []
        for sequence in self.running:
            if not sequence.reading:
                span = self._span(sequence, sequence.length, sequence.draft)
                plan.append((sequence, span))
                left -= len(span.tokens)
        for sequence in self.running:
            if sequence.reading and left > 0:
                end = self._chunk_end(sequence, left)
                left -= end - sequence.computed
                plan.append((sequence, self._span(sequence, end)))
        return plan

    def advance(self, sequence: Sequence, end: int) -> None:
        """Tokens up to `end` lie in the cache now; list the pages that became full."""
        sequence.computed = end
        if not self.reuse:
            return
        certain = end
        if self.grid is not None:
            certain = min(end, len(sequence.prompt)) // self.grid * self.grid
        if certain // PAGE > sequence.filled:
            sequence.hashes = self._hash(sequence, sequence.hashes, certain)
            run = sequence.run
            assert run is not None
            for page in range(sequence.filled, certain // PAGE):
                self.pages.fill(run.first + page, sequence.hashes[page])
            sequence.filled = certain // PAGE

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out, waiting or running."""
        if sequence.run is None:
            self.waiting.remove(sequence)
        else:
            self.pages.release(sequence.run)
            self.running.remove(sequence)
            sequence.run = None

    def find(self, ids: Iterable[str]) -> list[Sequence]:
        """The sequences of these ids, wherever they are; unknown ids have finished already."""
        wanted = set(ids)
        return [s for s in (*self.waiting, *self.running) if s.id in wanted]

    def check(self) -> None:
        """Raise AssertionError when pages and sequences do not match."""
        assert len(self.running) <= self.slots
        assert all(s.run is None for s in self.waiting), "a waiting sequence holds pages"
        self.pages.check([s.run for s in self.running if s.run is not None])
        ids = [s.id for s in (*self.waiting, *self.running)]
        assert len(ids) == len(set(ids)), "a sequence is queued twice"

    def _span(self, sequence: Sequence, end: int, draft: Iterable[int] = ()) -> Span:
        assert sequence.run is not None
        start = sequence.computed
        return Span(sequence.run.first, start, [*sequence.known(start, end), *draft])

    def _chunk_end(self, sequence: Sequence, left: int) -> int:
        whole = len(sequence.prompt)
        if self.grid is not None:
            return min(whole, (sequence.computed // self.grid + 1) * self.grid)
        return min(whole, sequence.computed + left)

    def _hits(self, sequence: Sequence) -> list[int]:
        """Pages to begin with. The last prompt token is always read, for its logits."""
        if not self.reuse or sequence.needs_whole_prompt:
            return []
        most = (len(sequence.prompt) - 1) // PAGE
        hits = self.pages.hits(sequence.hashes[:most])
        if self.grid is not None:
            hits = hits[: len(hits) * PAGE // self.grid * self.grid // PAGE]
        return hits

    def _soon_to_be_had(self, sequence: Sequence, hits: int) -> bool:
        """Whether the next page is being read right now for another sequence of this batch."""
        most = (len(sequence.prompt) - 1) // (self.grid or PAGE) * (self.grid or PAGE) // PAGE
        if not self.reuse or sequence.needs_whole_prompt or hits >= most:
            return False
        wanted = sequence.hashes[hits]
        return any(
            other.reading and hits < len(other.hashes) and other.hashes[hits] == wanted
            for other in self.running
        )

    def _hash(self, sequence: Sequence, hashes: list[bytes], end: int) -> list[bytes]:
        """The chain continued to the full pages of the first `end` tokens."""
        if not self.reuse:
            return hashes
        hashes = list(hashes)
        for page in range(len(hashes), end // PAGE):
            before = hashes[-1] if hashes else self.root
            hashes.append(next_hash(before, sequence.known(page * PAGE, (page + 1) * PAGE)))
        return hashes

    def _compact(self) -> None:
        runs = [s.run for s in self.running if s.run is not None]
        moved = self.pages.compact(runs)
        for sequence, target in zip(self.running, moved, strict=True):
            assert sequence.run is not None
            self.moved.append((sequence.run, target))
            sequence.run = target
        self.moved.sort(key=lambda pair: pair[0].first)


def pages_for(sequence: Sequence) -> int:
    """Pages that hold prompt and answer; the last token of an answer is never read."""
    return -(-(len(sequence.prompt) + max(0, sequence.limit - 1)) // PAGE)
