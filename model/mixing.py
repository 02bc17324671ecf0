"""Two sources of sequences in one run: documents replayed in fine-tuning are not forgotten."""

import numpy as np
import torch
from torch import Tensor

from model.loader import Batch, DataError, Ints, Loader


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
