"""Several sources of sequences in one run.

`MixedLoader`: documents replayed in fine-tuning, lest they be forgotten. `WeightedLoader`: any
number of corpora by weight.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from model.loader import Batch, DataError, Ints, Loader, Place


class MixedLoader:
    """Blocks of `block` sequences, a fixed `share` of them from `replay`, the others from `main`.

    Block number b is one of replay's exactly when ⌊(b+1)·share⌋ exceeds ⌊b·share⌋: evenly spread.
    Each source goes on in its own order, so the mixture resumes exactly where both do. With the
    batch as block every step is of one kind, and the many targets of documents do not outweigh the
    few of answers. An id is the source's own, doubled, plus one for replay.
    """

    def __init__(self, main: Loader, replay: Loader, share: float, block: int) -> None:
        if not 0 <= share < 1:
            raise DataError(f"replay share {share} must be at least 0 and below 1")
        if main.sequence != replay.sequence:
            raise DataError(f"sequences of {main.sequence} and {replay.sequence} tokens do not mix")
        self.sequence = main.sequence
        self.main, self.replay, self.share, self.block = main, replay, share, block

    def order(self, first: int, count: int) -> Ints:
        blocks, within = np.divmod(np.arange(first, first + count), self.block)
        before = np.floor(blocks * self.share).astype(np.int64)  # replayed blocks until this one
        replayed = np.floor((blocks + 1) * self.share) > before
        ids = np.empty(count, dtype=np.int64)
        for source, loader in enumerate((self.main, self.replay)):
            here = replayed == source
            if here.any():
                earlier = before if source else blocks - before
                begin = int((earlier * self.block + within)[here][0])
                ids[here] = loader.order(begin, int(here.sum())) * 2 + source
        return ids

    def read(self, ids: Ints) -> Batch:
        parts = [
            _complete(loader.read(ids[ids % 2 == source] // 2))
            for source, loader in enumerate((self.main, self.replay))
            if (ids % 2 == source).any()
        ]
        back = torch.from_numpy(np.argsort(np.argsort(ids % 2, kind="stable"), kind="stable"))
        columns = zip(*parts, strict=True)
        return Batch(*(torch.cat(column).index_select(0, back) for column in columns))

    def targets(self, ids: Ints) -> int:
        main, replay = ids[ids % 2 == 0] // 2, ids[ids % 2 == 1] // 2
        return self.main.targets(main) + self.replay.targets(replay)

    def places(self, number: int) -> list[Place]:
        return (self.replay if number % 2 else self.main).places(number // 2)


class WeightedLoader:
    """Sequences of named sources, each with its share of every stretch of the run.

    Sequence number i of the run comes from the source whose count lags most behind its share: the
    n-th of a source (n = 0, 1, …) stands where (n + ½) / weight comes in the order of all sources'
    such numbers. So any stretch holds each share to within one sequence or so, each source goes on
    in its own order, and both are functions of i alone: resumption is exact, whatever the workers.
    An id is the source's own times the number of sources, plus the source's place. A source of
    weight 0 takes no part.
    """

    def __init__(self, sources: Mapping[str, Loader], weights: Mapping[str, float]) -> None:
        if not sources or set(sources) != set(weights):
            raise DataError(
                f"weights are for {', '.join(sorted(weights))}, sources are "
                f"{', '.join(sorted(sources)) or 'none'}; give every source one weight, 0 to leave "
                f"it out"
            )
        for name, weight in weights.items():
            if not weight >= 0:
                raise DataError(f"weight {weight} of source {name} is below 0; 0 leaves it out")
        sources = {name: loader for name, loader in sources.items() if weights[name]}
        if not sources:
            raise DataError("every source has weight 0; give one of them a weight above 0")
        lengths = {loader.sequence for loader in sources.values()}
        if len(lengths) > 1:
            raise DataError(f"sequences of {sorted(lengths)} tokens do not mix; use one length")
        self.sequence = lengths.pop()
        self.names = list(sources)
        self.sources = [sources[name] for name in self.names]
        total = sum(weights[name] for name in self.names)
        self.shares = np.array([weights[name] / total for name in self.names])

    def order(self, first: int, count: int) -> Ints:
        taken = self._taken(first)
        # Each source offers more than it can get; of all offers the first `count` in time are it.
        room = [int(share * count) + 2 * len(self.shares) + 2 for share in self.shares]
        source = np.repeat(np.arange(len(room)), room)
        number = np.concatenate([np.arange(size) + taken[s] for s, size in enumerate(room)])
        chosen = np.lexsort((source, (number + 0.5) / self.shares[source]))[:count]
        ids = np.empty(count, dtype=np.int64)
        for place, loader in enumerate(self.sources):
            here = source[chosen] == place
            if here.any():
                own = loader.order(int(number[chosen][here][0]), int(here.sum()))
                ids[here] = own * len(self.sources) + place
        return ids

    def _taken(self, first: int) -> list[int]:
        """How many of the first `first` sequences each source gave."""
        low = [max(int(share * first) - len(self.shares) - 1, 0) for share in self.shares]
        missing = first - sum(low)
        room = missing + 1
        source = np.repeat(np.arange(len(low)), room)
        number = np.concatenate([np.arange(room) + start for start in low])
        order = np.lexsort((source, (number + 0.5) / self.shares[source]))[:missing]
        return [start + int((source[order] == s).sum()) for s, start in enumerate(low)]

    def read(self, ids: Ints) -> Batch:
        count = len(self.sources)
        parts = [
            _complete(loader.read(ids[ids % count == place] // count))
            for place, loader in enumerate(self.sources)
            if (ids % count == place).any()
        ]
        back = np.argsort(np.argsort(ids % count, kind="stable"), kind="stable")
        columns = zip(*parts, strict=True)
        return Batch(*(torch.cat(c).index_select(0, torch.from_numpy(back)) for c in columns))

    def targets(self, ids: Ints) -> int:
        count = len(self.sources)
        owned = (ids[ids % count == place] // count for place in range(count))
        return sum(s.targets(own) for s, own in zip(self.sources, owned, strict=True))

    def places(self, number: int) -> list[Place]:
        own, source = divmod(number, len(self.sources))
        return self.sources[source].places(own)


def _complete(batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """A batch's tensors with those it leaves out written down, so that it can be stacked."""
    tokens = batch.tokens
    everything = torch.ones_like(tokens, dtype=torch.bool)
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    return (
        tokens,
        batch.targets,
        everything if batch.mask is None else batch.mask,
        positions if batch.positions is None else batch.positions,
        torch.zeros_like(tokens) if batch.segments is None else batch.segments,
    )
