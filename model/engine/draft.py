"""Guessing what comes next with a smaller model of the same vocabulary.

The draft model reads the same text into a cache of its own and says a few tokens, one after the
other; the large model then reads them all at once. It draws them with the noise that the large
model will draw with (`sampling.choose`), so that at any temperature both choose alike as far as
they think alike. What is sent out is the large model's choice alone (see `speculation`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from model.engine.pages import PAGE
from model.engine.runner import Runner, Span
from model.engine.sampling import choose_apart
from model.engine.sequence import Sequence as Answer
from model.engine.weights import Weights
from model.transformer import Transformer


@dataclass
class Place:
    """Where a sequence lies in the draft's cache: the first of a context's pages; tokens read."""

    page: int
    read: int = 0


class Drafter:
    """A draft model with room for one whole context for each slot. Not thread-safe."""

    def __init__(self, model: Transformer, slots: int, weights: Weights = "float32") -> None:
        self.config = model.config
        pages = -(-self.config.context // PAGE)
        self.runner = Runner(model, slots * pages, weights)
        self._free = [slot * pages for slot in range(slots)]
        self._places: dict[Answer, Place] = {}

    def keep(self, running: Sequence[Answer]) -> None:
        """Give the places of all others back."""
        gone = self._places.keys() - set(running)
        self._free += [self._places.pop(sequence).page for sequence in gone]

    def guess(self, wanted: Sequence[tuple[Answer, int]], vocabulary: int) -> None:
        """Fill `draft` of each sequence with up to so many tokens, ids below `vocabulary`."""
        ahead = {sequence: count for sequence, count in wanted if count > 0}
        spans = []
        for sequence in ahead:
            if sequence not in self._places:
                self._places[sequence] = Place(self._free.pop())
            place = self._places[sequence]
            spans.append(Span(place.page, place.read, sequence.known(place.read, sequence.length)))
            place.read = sequence.length
        while ahead:
            hidden = self.runner.forward(spans)
            ends = [sum(len(s.tokens) for s in spans[: i + 1]) - 1 for i in range(len(spans))]
            logits = self.runner.logits(hidden[ends])[:, :vocabulary]
            positions = [sequence.length + len(sequence.draft) for sequence in ahead]
            chosen = choose_apart(logits, [sequence.sampling for sequence in ahead], positions)
            for sequence, token in zip(list(ahead), chosen, strict=True):
                if not isinstance(token, int):  # the large model's own choice will say why
                    del ahead[sequence]
                    continue
                sequence.draft.append(token)
                if len(sequence.draft) >= ahead[sequence]:
                    del ahead[sequence]
            spans = [
                Span(
                    self._places[sequence].page,
                    sequence.length + len(sequence.draft) - 1,
                    sequence.draft[-1:],
                )
                for sequence in ahead
            ]
